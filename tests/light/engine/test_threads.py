"""How threads wait: a short spin for every process that imports torch, unless somebody has decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.paths import ROOT
from engine.threads import BLOCK_TIME_MS, SPIN_COUNT, WAITING, limit_spinning


@pytest.mark.parametrize(
    ("system", "name", "value"),
    [
        ("linux", "GOMP_SPINCOUNT", SPIN_COUNT),
        ("win32", "KMP_BLOCKTIME", BLOCK_TIME_MS),
        ("darwin", "KMP_BLOCKTIME", BLOCK_TIME_MS),
    ],
)
def test_each_systems_openmp_gets_its_own_word(system: str, name: str, value: str) -> None:
    environment: dict[str, str] = {}
    limit_spinning(environment, system)
    assert environment == {name: value}


@pytest.mark.parametrize("name", WAITING)
def test_what_somebody_has_set_stays(name: str) -> None:
    environment = {name: "7"}
    limit_spinning(environment)
    assert environment == {name: "7"}


@pytest.mark.parametrize("module", ["app.cli", "app.worker", "train.sft", "train.toybox"])
def test_every_program_sets_it_before_it_imports_torch(module: str, tmp_path: Path) -> None:
    """The program is run to the point where torch would come; there its environment is read."""
    arguments = {
        "app.cli": ["generate", "--prompt", "a beach"],
        "app.worker": ["--queue", str(tmp_path / "queue.sqlite"), "--outputs", str(tmp_path)],
    }
    code = f"""
import os, runpy, sys

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("spin is limited" if set({WAITING!r}) & set(os.environ) else "spin is not limited", flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
sys.argv[1:] = {arguments.get(module, [])!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert ran.stdout.strip() == "spin is limited", ran.stderr
