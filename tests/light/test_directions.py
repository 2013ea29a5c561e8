"""Imports only point downhill: launch -> app -> train -> engine, and the light ring never meets torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"engine": ("engine",), "train": ("engine", "train"), "app": ("engine", "train", "app")}
HEAVY_IN_APP = {
    "app.worker",
    "app.bench.runner",
    "app.bench.cards",
    "app.bench.full_clips",
    "app.bench.weights",
    "app.bench.random_files",
    "app.verbs.generate",
    "app.verbs.torch_probe",
}  # these run the engine; the rest of app is light
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "optimum", "torchvision", "gguf"}


def modules(room: str) -> list[str]:
    paths = sorted((ROOT / room).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@cache
def imports(module: str) -> frozenset[str]:
    """Every module named by an import statement, wherever it stands; type-checking blocks included."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reaches(module: str, libraries: set[str]) -> bool:
    """Whether it, or anything of ours that it imports, names one of these libraries."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in ALL:
            continue
        seen.add(name)
        wanted = imports(name)
        if {each.split(".")[0] for each in wanted} & libraries:
            return True
        waiting += wanted
    return False


ALL = [module for room in ROOMS for module in modules(room)]
LIGHT = [m for m in ALL if m not in HEAVY_IN_APP and (m.startswith("app") or not reaches(m, HEAVY))]
PAGE = [module for module in LIGHT if reaches(module, {"gradio"})]  # 4 s an import, so they share one process


@pytest.mark.parametrize("module", ALL)
def test_imports_only_point_downhill(module: str):
    uphill = {name for name in imports(module) if name.split(".")[0] in {*ROOMS, "launch", "tests"}}
    assert {name for name in uphill if name.split(".")[0] not in ROOMS[module.split(".")[0]]} == set()


@pytest.mark.parametrize("module", [m for m in ALL if m.startswith("app") and m not in HEAVY_IN_APP])
def test_only_the_worker_and_its_kin_reach_for_the_engine(module: str):
    """Not even inside a function: whoever needs torch does so in a process or a verb of its own."""
    assert {name for name in imports(module) if not name.startswith("app") and reaches(name, HEAVY)} == set()


def test_the_rooms_hold_what_the_page_needs_in_the_light_ring():
    needed = {"engine.job", "engine.messages", "engine.presets", "engine.media.pictures", "engine.media.video"}
    assert needed & set(ALL) <= set(LIGHT)


@pytest.mark.parametrize("module", sorted({*LIGHT} - {*PAGE}))
def test_a_light_module_imports_without_torch(module: str):
    assert_no_torch_after(module)


def test_the_page_imports_without_torch():
    assert_no_torch_after(*PAGE)


def assert_no_torch_after(*names: str) -> None:
    code = f"import sys, {', '.join(names)}; sys.exit(', '.join({HEAVY} & set(sys.modules)) or 0)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
