"""launch.py: which build of torch, when to install, what it says when it cannot. No network, no torch."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest

import launch

ROOT = Path(launch.__file__).parent
NEW_CARD, OLD_CARD = (581, 8.6), (566, 6.1)


def plans(system: str, nvidia: tuple[int, float] | None = None, index_url: str = "") -> list[str]:
    return [" ".join(plan) for plan in launch.torch_plans(system, nvidia, index_url, "LOCK")]


def test_linux_without_a_card_never_asks_for_the_plain_build_that_brings_cuda():
    configured, pytorch = plans("Linux")
    assert configured == "--no-deps torch==2.13.0+cpu"
    assert pytorch == "--no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0"


def test_linux_with_a_card_takes_torch_as_published_and_pins_its_companions_by_the_lock():
    assert plans("Linux", NEW_CARD) == ["--constraint LOCK torch==2.13.0"]


@pytest.mark.parametrize("nvidia", [OLD_CARD, (550, 8.9)])
def test_linux_with_an_older_card_or_driver_asks_for_the_build_that_it_can_run(nvidia: tuple[int, float]):
    """torch as it is published computes with CUDA 13, which neither a driver before 580 nor Pascal runs."""
    older, published = plans("Linux", nvidia)
    assert older == ("--constraint LOCK --extra-index-url https://download.pytorch.org/whl/cu126 torch==2.13.0+cu126")
    assert published == "--constraint LOCK torch==2.13.0"


def test_macos_takes_torch_as_published():
    assert plans("Darwin")[0] == "--no-deps torch==2.13.0"


def test_windows_takes_cuda_from_pytorch_only_with_a_card():
    assert plans("Windows")[0] == "--no-deps torch==2.13.0"
    assert plans("Windows", NEW_CARD) == ["--no-deps --index-url https://download.pytorch.org/whl/cu130 torch==2.13.0"]
    assert plans("Windows", OLD_CARD) == ["--no-deps --index-url https://download.pytorch.org/whl/cu126 torch==2.13.0"]


@pytest.mark.parametrize(("system", "nvidia"), list(product(("Linux", "Windows", "Darwin"), (None, NEW_CARD))))
def test_torch_index_url_overrides_every_choice(system: str, nvidia: tuple[int, float] | None):
    [only] = plans(system, nvidia, "https://mirror.example/whl")
    assert "--index-url https://mirror.example/whl torch==2.13.0" in only


@pytest.mark.parametrize(
    ("system", "nvidia"), list(product(("Linux", "Windows", "Darwin"), (None, NEW_CARD, OLD_CARD)))
)
def test_every_plan_names_exactly_this_torch(system: str, nvidia: tuple[int, float] | None):
    assert all(f"torch=={launch.TORCH}" in plan for plan in plans(system, nvidia))


def test_the_weakest_of_several_cards_decides():
    assert launch.read_nvidia("581.29, 8.6\n581.29, 6.1\n") == (581, 6.1)
    assert launch.read_nvidia("") is None


def test_requirements_name_the_torch_that_launch_installs():
    assert f"torch=={launch.TORCH} " in (ROOT / "requirements.in").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", [(3, 8), (3, 10), (3, 14)])
def test_a_python_that_does_not_fit_is_refused_in_three_sentences(python: tuple[int, int]):
    sorry = launch.find_obstacle(python, "Linux", "x86_64")
    assert sorry is not None
    assert f"Python {python[0]}.{python[1]}" in str(sorry)
    assert "3.11, 3.12 and 3.13" in str(sorry)


def test_the_pythons_and_machines_that_fit_are_not_refused():
    machines = (("Linux", "x86_64"), ("Linux", "aarch64"), ("Windows", "AMD64"), ("Darwin", "arm64"))
    for python, (system, machine) in product(((3, 11), (3, 12), (3, 13)), machines):
        assert launch.find_obstacle(python, system, machine) is None


def test_an_old_python_can_read_launch_py_far_enough_to_say_so():
    ast.parse((ROOT / "launch.py").read_text(encoding="utf-8"), feature_version=(3, 8))


def test_launch_py_needs_nothing_but_the_standard_library():
    tree = ast.parse((ROOT / "launch.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("output", "cure"),
    [
        ("OSError: [Errno 28] No space left on device", "Free about"),
        ("Temporary failure in name resolution", "Check the connection"),
        ("ERROR: No matching distribution found for torch==2.13.0", "TORCH_INDEX_URL"),
        ("OSError: [WinError 126] The specified module could not be found", "Visual C++"),
        ("Error: something never seen before", "Try the command again"),
    ],
)
def test_a_failed_installation_says_what_helps(output: str, cure: str):
    assert cure in launch.diagnose(output)[1]


# --- the real launcher, on a lock of two packages that lie on disk ----------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, code: str) -> None:
    """A wheel of one module, by hand: what pip needs and nothing more."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def tiny_studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """launch.py beside a command line that prints its arguments, and an index that is a folder."""
    home = tmp_path_factory.mktemp("downloads") / "a studio"  # with a blank in its name, as on many a Windows machine
    wheels = home / "wheels"
    wheels.mkdir(parents=True)
    write_wheel(wheels, "torch", "2.13.0+cpu", "__version__ = '2.13.0+cpu'\n")
    write_wheel(wheels, "toy", "1.0", "SAYS = 'toy 1.0'\n")
    write_wheel(wheels, "toy", "2.0", "SAYS = 'toy 2.0'\n")
    (home / "app").mkdir()
    (home / "app" / "__init__.py").touch()
    (home / "app" / "cli.py").write_text(
        "import sys, toy, torch\nprint(toy.SAYS, sys.argv[1:])\nsys.exit(7)\n", encoding="utf-8"
    )
    elsewhere = home.parent / "app"  # a folder of the person's own, where they stand
    elsewhere.mkdir()
    (elsewhere / "__init__.py").write_text("raise SystemExit('not the studio')", encoding="utf-8")
    (home / "launch.py").write_bytes((ROOT / "launch.py").read_bytes())
    (home / "requirements.txt").write_text("# a lock\ntoy==1.0\n", encoding="utf-8")
    write_wheel(wheels, "checker", "1.0", "")
    (home / "requirements-test.txt").write_text("checker==1.0\n", encoding="utf-8")
    return home


def start(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher as a person would, from another folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "TORCH"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (home / "wheels").as_uri()}
    environment["TORCH_INDEX_URL"] = (home / "wheels").as_uri()  # whatever card this machine has
    command = [sys.executable, str(home / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=home.parent, check=False)


def test_the_launcher_installs_once_and_again_only_when_the_lock_changed(tiny_studio: Path):
    first = start(tiny_studio, "generate", "a b")
    assert (first.returncode, first.stdout) == (7, "toy 1.0 ['generate', 'a b']\n"), first.stderr
    steps = re.findall(r"\[(\d)/4\].*done", first.stderr)
    assert steps == ["1", "2", "3", "4"]

    log = tiny_studio / ".venv" / "install.log"
    before = log.stat().st_mtime_ns
    second = start(tiny_studio)
    assert (second.returncode, second.stdout, second.stderr) == (7, "toy 1.0 []\n", "")
    assert log.stat().st_mtime_ns == before

    (tiny_studio / "requirements.txt").write_text("# a lock\ntoy==2.0\n", encoding="utf-8")
    assert start(tiny_studio).stdout == "toy 2.0 []\n"

    (tiny_studio / "requirements.txt").write_text("# a lock\ntoy==3.0\n", encoding="utf-8")
    failed = start(tiny_studio)
    assert failed.returncode == 1
    assert "No matching distribution found for toy==3.0" in failed.stderr
    assert str(log) in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr

    (tiny_studio / "requirements.txt").write_text("# a lock\ntoy==2.0\n", encoding="utf-8")
    assert "[3/4]" in start(tiny_studio).stderr  # the failed one left no stamp, so this one is looked at again

    site = next((tiny_studio / ".venv").rglob("site-packages"))
    shutil.rmtree(site / "pip")  # as if the very first start had been cut off
    (tiny_studio / ".venv" / "installed.txt").unlink()
    assert start(tiny_studio).stdout == "toy 2.0 []\n"


def test_tools_of_developers_come_with_the_first_test_and_not_before(tiny_studio: Path):
    assert start(tiny_studio, "doctor").returncode == 7
    site = next((tiny_studio / ".venv").rglob("site-packages"))
    assert not (site / "checker.py").exists()
    first = start(tiny_studio, "test", "-x")
    assert first.stdout.endswith("['test', '-x']\n") and "[1/1]" in first.stderr
    assert (site / "checker.py").exists()
    assert start(tiny_studio, "test").stderr == ""
    (tiny_studio / "requirements-test.txt").write_text("checker==9.0\n", encoding="utf-8")
    assert start(tiny_studio, "doctor").returncode == 7, "a creator does not meet what is wrong with the tools"
    failed = start(tiny_studio, "check")
    assert failed.returncode == 1 and "checker==9.0" in failed.stderr


def test_the_stamp_covers_the_lock_and_the_version_of_torch():
    lock = (ROOT / "requirements.txt").read_bytes()
    assert launch.fingerprint() == hashlib.sha256(lock + launch.TORCH.encode()).hexdigest()


def test_help_is_shown_before_anything_is_installed(tmp_path: Path):
    (tmp_path / "launch.py").write_bytes((ROOT / "launch.py").read_bytes())
    for package in ("app", "engine"):
        shutil.copytree(ROOT / package, tmp_path / package)
    for arguments in (["--help"], ["generate", "--help"], ["doctor", "-h"]):
        command = [sys.executable, "-I", "-S", str(tmp_path / "launch.py"), *arguments]
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        assert (answer.returncode, answer.stdout[:6]) == (0, "usage:"), answer.stderr
    assert not (tmp_path / ".venv").exists()
