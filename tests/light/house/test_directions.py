"""Imports only point downhill: launch -> app -> train -> engine, and the light ring never meets torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache

import pytest

from engine.paths import ROOT

ROOMS = {"engine": ("engine",), "train": ("engine", "train"), "app": ("engine", "train", "app")}
# From the top down: a room imports itself and rooms on lower lines, never one beside it or above it.
LAYERS = {
    "engine": (
        ("run", "tiny"),
        ("pipelines",),
        ("loading", "diffusion", "identity"),
        ("hardware", "wan2gp"),
        ("models",),
        ("media",),
        ("lora_files", "resolve"),
        ("presets",),
        ("job", "hub"),
        ("document", "paths", "platform_calls", "threads"),
        ("messages",),
    ),
    "train": (
        ("toybox",),
        ("sft", "evaluation"),
        ("data", "runs", "distributed", "cpu_attention"),
    ),
    "app": (
        ("cli",),
        ("bench", "page"),
        ("verbs", "keeper"),
        ("worker", "estimate", "library"),
        ("queue", "settings"),
        ("wording",),
    ),
}
HEAVY_IN_APP = {"app.worker", "app.verbs.generate", "app.verbs.torch_probe"}  # these run the engine, as app.bench does
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
RUNNING = [m for m in ALL if m in HEAVY_IN_APP or m.startswith("app.bench.")]
LIGHT = [m for m in ALL if m not in RUNNING and (m.startswith("app") or not reaches(m, HEAVY))]
PAGE = [module for module in LIGHT if reaches(module, {"gradio"})]  # 4 s an import, so they share one process


@pytest.mark.parametrize("module", ALL)
def test_imports_only_point_downhill(module: str):
    uphill = {name for name in imports(module) if name.split(".")[0] in {*ROOMS, "launch", "tests"}}
    assert {name for name in uphill if name.split(".")[0] not in ROOMS[module.split(".")[0]]} == set()


def layer(module: str) -> int | None:
    """How far from the top its room stands; None for the package itself."""
    package, _, rest = module.partition(".")
    room = rest.split(".")[0]
    return next((number for number, rooms in enumerate(LAYERS[package]) if room in rooms), None)


def ours(module: str) -> set[str]:
    """The modules of the house that it imports; `from package import name` may name a module or something in one."""
    found = set()
    for name in imports(module):
        if name in ALL and name != module:
            found.add(name)
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


@pytest.mark.parametrize("module", [m for m in ALL if "." in m])
def test_a_room_imports_only_rooms_below_it(module: str):
    package, room = module.split(".")[:2]
    here = layer(module)
    assert here is not None, f"{package}/{room} is not on any line of LAYERS"
    for name in ours(module):
        if name.split(".")[0] != package or name.split(".")[:2] == [package, room]:
            continue
        there = layer(name)
        assert there is not None and there > here, f"{module} imports {name}, which stands beside it or above it"


def test_no_modules_import_each_other_in_a_circle():
    waiting = {module: set(ours(module)) for module in ALL}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert waiting == {}


def test_only_the_page_knows_gradio():
    assert [m for m in ALL if not m.startswith("app.page") and "gradio" in {n.split(".")[0] for n in imports(m)}] == []


def test_nothing_generic_in_train_knows_the_toybox():
    generic = [m for m in ALL if m.startswith("train.") and not m.startswith("train.toybox")]
    assert [m for m in generic if any(name.startswith("train.toybox") for name in ours(m))] == []


def test_loading_knows_no_evaluator_and_files_know_no_planner():
    for module in ALL:
        if module.startswith("engine.loading"):
            assert not {name for name in ours(module) if name.startswith("engine.identity")}, module
        if module in ("engine.loading.tensor_files", "engine.loading.build", "engine.loading.lora"):
            assert "engine.hardware.plan" not in ours(module), module


@pytest.mark.parametrize("module", [m for m in ALL if m.startswith("app") and m not in RUNNING])
def test_only_the_worker_and_its_kin_reach_for_the_engine(module: str):
    """Not even inside a function: whoever needs torch does so in a process or a verb of its own."""
    assert {name for name in imports(module) if not name.startswith("app") and reaches(name, HEAVY)} == set()


def test_the_rooms_hold_what_the_page_needs_in_the_light_ring():
    needed = {"engine.job", "engine.messages", "engine.presets", "engine.media.pictures", "engine.media.video"}
    needed |= {
        "engine.hardware.plan",
        "engine.hub.cache",
        "engine.identity.report",
        "engine.lora_files",
        "train.sft.config",
    }
    assert needed <= set(LIGHT)


@pytest.mark.parametrize("module", sorted({*LIGHT} - {*PAGE}))
def test_a_light_module_imports_without_torch(module: str):
    assert_no_torch_after(module)


def test_the_page_imports_without_torch():
    assert_no_torch_after(*PAGE)


def assert_no_torch_after(*names: str) -> None:
    code = f"import sys, {', '.join(names)}; sys.exit(', '.join({HEAVY} & set(sys.modules)) or 0)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
