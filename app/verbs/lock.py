"""Make the locks: requirements.in and the packages installed here -> requirements.txt for every system and Python, and
the same for what only developers need.

In:  requirements.in and requirements-test.in, the environment this runs in, and pip (which is asked about packages only
     other systems need).
Out: requirements.txt and requirements-test.txt, one pin a line, marked where only some systems or Pythons need it.
Knows nothing of the studio. For developers: `python launch.py lock`.

torch and what it brings for CUDA stay out: launch.py picks torch's build for the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from engine.paths import ROOT

SOURCE, LOCK = ROOT / "requirements.in", ROOT / "requirements.txt"
TEST_SOURCE, TEST_LOCK = ROOT / "requirements-test.in", ROOT / "requirements-test.txt"
PYTHONS = ("3.11", "3.12", "3.13")
# pip expands a tag for macOS to the older ones, for Linux it does not: every glibc up to 2.28, by new and old names.
LINUX_TAGS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)]
LINUX_TAGS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
SYSTEMS = {
    "linux": ("Linux", "posix", "x86_64", LINUX_TAGS),
    "win32": ("Windows", "nt", "AMD64", ["win_amd64"]),
    "darwin": ("Darwin", "posix", "arm64", ["macosx_14_0_arm64"]),
}
PER_MACHINE = ("nvidia-", "cuda-", "triton")  # come with torch's own build, never through the lock

Target = tuple[str, str]  # sys.platform, Python's version


@dataclass(frozen=True)
class Package:
    """One pinned package and what it asks for."""

    version: str
    requires: tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Write the locks, then ask the index whether every pin has a wheel for every target."""
    packages: dict[str, Package] = {}
    needed = _needed_where(_requirement_lines(SOURCE), packages)
    everything = _needed_where(_requirement_lines(SOURCE) + _requirement_lines(TEST_SOURCE), packages)
    tools = {}
    for name, targets in everything.items():
        if name not in needed:
            tools[name] = targets
    _write(LOCK, HEADER, packages, needed)
    _write(TEST_LOCK, TEST_HEADER, packages, tools)
    missing: list[str] = []
    if "--unchecked" not in arguments:
        missing = _without_wheel(packages, everything)
    for line in missing:
        _report(line)
    return int(bool(missing))


def _needed_where(lines: list[str], packages: dict[str, Package]) -> dict[str, set[Target]]:
    """Every package that these requirements bring, with the targets that need it; torch has a place of its own."""
    direct = [Requirement(line) for line in lines]
    needed: dict[str, set[Target]] = {}
    for target in product(SYSTEMS, PYTHONS):
        for name in _walk(direct, target, packages):
            needed.setdefault(name, set()).add(target)
    needed.pop("torch")
    return needed


def _write(path: Path, header: str, packages: dict[str, Package], needed: dict[str, set[Target]]) -> None:
    lines = [f"{name}=={packages[name].version}{_marker(needed[name])}" for name in sorted(needed)]
    path.write_text("\n".join([header, *lines, ""]), encoding="utf-8")
    _report(f"{path.name}: {len(lines)} packages")


HEADER = """\
# Every package of the studio, pinned. Made by `python launch.py lock` from requirements.in; do not edit by hand.
# torch is not here: launch.py installs its build for the machine first. Install with --no-deps."""
TEST_HEADER = """\
# What only `python launch.py test` and `check` need besides requirements.txt. Made by `python launch.py lock` from
# requirements-test.in; do not edit by hand. Install with --no-deps."""


def _requirement_lines(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _walk(direct: list[Requirement], target: Target, packages: dict[str, Package]) -> set[str]:
    """Names of everything the direct requirements need on one target."""
    environment = _environment(target)
    found: set[str] = set()
    asked: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in direct for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in asked:
            continue
        asked.add((name, extra))
        found.add(name)
        if name not in packages:
            packages[name] = _look_up(requirement, target)
        for text in packages[name].requires:
            wanted = Requirement(text)
            if wanted.name.startswith(PER_MACHINE):
                continue
            if wanted.marker is None or wanted.marker.evaluate({**environment, "extra": extra}):
                waiting += [(wanted, more) for more in ("", *wanted.extras)]
    return found


def _environment(target: Target) -> dict[str, str]:
    """The marker values of a target; the rest is as on this machine."""
    system, python = target
    name, os_name, machine, _ = SYSTEMS[system]
    return {
        "sys_platform": system,
        "platform_system": name,
        "os_name": os_name,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def _look_up(requirement: Requirement, target: Target) -> Package:
    """The version installed here; of a package that only others need, the newest that fits."""
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        plain = f"{requirement.name}{requirement.specifier}"
        [item] = _ask_pip([plain], target)["install"]
        return Package(item["metadata"]["version"], tuple(item["metadata"].get("requires_dist", ())))
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        raise SystemExit(f"{requirement} is wanted, {distribution.version} is installed. Install it, then try again.")
    return Package(distribution.version, tuple(distribution.requires or ()))


def _ask_pip(requirements: list[str], target: Target) -> dict:
    """pip's own report on installing these for a target, without installing anything."""
    system, python = target
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        listed = Path(folder) / "wanted.txt"
        listed.write_text("\n".join(requirements), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        # pip holds requires-python against the Python it runs in, not the target's; we look ourselves, below.
        command += ["--ignore-requires-python", "--target", folder, "--only-binary", ":all:"]
        command += ["--python-version", python, "--report", str(report)]
        for tag in SYSTEMS[system][3]:
            command += ["--platform", tag]
        answer = subprocess.run([*command, "-r", str(listed)], capture_output=True, encoding="utf-8", check=False)
        if answer.returncode:
            raise SystemExit(f"{system}, Python {python}: {answer.stderr.strip()[-500:]}")
        found = json.loads(report.read_text(encoding="utf-8"))
    for item in found["install"]:
        about = item["metadata"]
        if f"{python}.1" not in SpecifierSet(about.get("requires_python", "")):
            raise SystemExit(f"{system}, Python {python}: {about['name']} wants Python {about['requires_python']}")
    return found


def _without_wheel(packages: dict[str, Package], needed: dict[str, set[Target]]) -> list[str]:
    """Complaints of pip, one a target; empty when every pin has a wheel everywhere it is needed."""
    complaints = []
    for target in product(SYSTEMS, PYTHONS):
        pins = [f"{name}=={packages[name].version}" for name, targets in needed.items() if target in targets]
        try:
            _ask_pip(pins, target)
        except SystemExit as refused:
            complaints.append(str(refused))
    return complaints


def _marker(targets: set[Target]) -> str:
    """The environment marker that holds on exactly these targets; nothing when it is all of them."""
    systems = [system for system in SYSTEMS if any(system == where for where, _ in targets)]
    pythons = [python for python in PYTHONS if any(python == which for _, which in targets)]
    if targets != set(product(systems, pythons)):
        each = [f"(sys_platform == '{s}' and python_version == '{p}')" for s, p in sorted(targets)]
        return f" ; {Marker(' or '.join(each))}"
    parts = []
    if len(systems) < len(SYSTEMS):
        parts.append(" or ".join(f"sys_platform == '{system}'" for system in systems))
    if len(pythons) < len(PYTHONS):
        parts.append(" or ".join(f"python_version == '{python}'" for python in pythons))
    return f" ; {Marker(' and '.join(f'({part})' for part in parts))}" if parts else ""


def _report(text: str) -> None:
    sys.stdout.write(text + "\n")
