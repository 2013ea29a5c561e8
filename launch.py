"""Set the studio up on the first run, then hand over: python launch.py [verb] ...

In:  the lock file beside it, the machine it runs on, pip's own configuration, and TORCH_INDEX_URL if it is set.
Out: .venv beside it holding what the lock names, and the command line of the studio running inside it.
Knows nothing of the studio. Standard library only; it parses on Python 3.8 too, so that it can say what is wrong there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "requirements.txt"
TOOLS_LOCK = ROOT / "requirements-test.txt"  # what only these verbs need:
TOOL_VERBS = ("test", "check")
VENV = ROOT / ".venv"
STAMP = VENV / "installed.txt"  # written last: what is half installed is installed again
TOOLS_STAMP = VENV / "tools.txt"
LOG = VENV / "install.log"
TORCH = "2.13.0"
OLDEST, NEWEST = (3, 11), (3, 13)
PYTORCH_INDEX = "https://download.pytorch.org/whl"
STEPS = 4


class Sorry(Exception):
    """An error for a person: what happened, why, what to do next."""

    def __init__(self, what: str, why: str, next_step: str) -> None:
        super().__init__(" ".join((what, why, next_step)))


def main(arguments: list[str]) -> int:
    """Refuse, install or start. Returns the exit code of the studio; 1 with a sentence when it cannot start."""
    try:
        sorry = find_obstacle(sys.version_info[:2], platform.system(), platform.machine())
        if sorry:
            raise sorry
        if asks_for_help(arguments):
            return hand_over(Path(sys.executable), arguments)  # the help needs nothing installed
        if not is_installed():
            install()
        if arguments and arguments[0] in TOOL_VERBS and not has_tools():
            install_tools()
        return hand_over(venv_python(), arguments)
    except Sorry as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Stopped. The same command goes on where this one ended.")
        return 130


# --- may this machine run it? ----------------------------------------------------------------------------------------


def find_obstacle(python: tuple[int, ...], system: str, machine: str) -> Sorry | None:
    """The sentence for a machine that cannot run the studio, or None for one that can."""
    version = ".".join(map(str, python))
    if not OLDEST <= tuple(python) <= NEWEST:
        return Sorry(
            f"This is Python {version}.",
            "The studio runs on Python 3.11, 3.12 and 3.13: its libraries are built for those.",
            better_python(),
        )
    if sys.maxsize < 2**32:
        return Sorry(
            "This Python is a 32-bit build.", "PyTorch exists for 64 bits only.", "Install a 64-bit Python 3.12."
        )
    if system == "Darwin" and machine == "x86_64":
        return Sorry(
            "This is a Mac with an Intel processor, or a Python built for one.",
            f"PyTorch {TORCH} is published for Apple silicon only.",
            "On Apple silicon install the arm64 Python 3.12; on an Intel Mac use another computer.",
        )
    return None


def better_python() -> str:
    """What to type instead, when a Python that fits is already here."""
    for name in ("python3.12", "python3.13", "python3.11"):
        if works(name):
            return f"Type: {name} launch.py"
    return "Install Python 3.12 from python.org and start launch.py with it."


def works(python: str) -> bool:
    """Whether this name starts a Python; a version manager may answer to names of Pythons it does not have."""
    program = shutil.which(python)
    if program is None:
        return False
    return subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0


def asks_for_help(arguments: list[str]) -> bool:
    """`--help` alone or after a verb; everything after `test` belongs to pytest."""
    return bool(arguments) and arguments[0] != "test" and arguments[-1] in ("-h", "--help")


# --- what to install -------------------------------------------------------------------------------------------------


def torch_plans(
    system: str, nvidia: tuple[int, float] | None, index_url: str, lock: str
) -> tuple[tuple[str, ...], ...]:
    """pip's arguments for torch, in the order to try.

    Args:
        system: "Linux", "Windows" or "Darwin".
        nvidia: driver's major version and compute capability of the weakest card, or None without an NVIDIA card.
        index_url: TORCH_INDEX_URL; when it is not empty, only this index is asked.
        lock: path of the lock, which pins what a CUDA build needs besides its own libraries.

    Only Linux builds for CUDA have dependencies outside the lock, so only they are resolved; the others go in alone.
    """
    pin = f"torch=={TORCH}"
    if index_url:
        # A mirror holds its own choice of versions; the lock, which follows, puts its pins back.
        from_mirror = ("--index-url", index_url, pin)
        if system == "Linux":
            return (from_mirror,)
        return (("--no-deps", *from_mirror),)
    if system == "Linux" and nvidia:
        published = ("--constraint", lock, pin)  # for CUDA 13
        name = cuda_build(*nvidia)
        if name == "cu130":
            return (published,)
        older = ("--constraint", lock, "--extra-index-url", f"{PYTORCH_INDEX}/{name}", f"{pin}+{name}")
        return (older, published)
    if system == "Linux":
        # The plain name would bring gigabytes of CUDA; only the CPU build carries the mark +cpu.
        return (("--no-deps", f"{pin}+cpu"), ("--no-deps", "--index-url", f"{PYTORCH_INDEX}/cpu", pin))
    if system == "Windows" and nvidia:
        return (("--no-deps", "--index-url", f"{PYTORCH_INDEX}/{cuda_build(*nvidia)}", pin),)
    return (("--no-deps", pin), ("--no-deps", "--index-url", f"{PYTORCH_INDEX}/cpu", pin))


def cuda_build(driver: int, compute: float) -> str:
    """PyTorch's build for a card: CUDA 13 wants driver 580 and Turing (7.5), CUDA 12.6 serves the rest."""
    if driver >= 580 and compute >= 7.5:
        return "cu130"
    return "cu126"


def find_nvidia() -> tuple[int, float] | None:
    """Driver and compute capability as nvidia-smi tells them; None when there is no such card or no driver."""
    program = shutil.which("nvidia-smi")
    if not program:
        beside_windows = Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvidia-smi.exe"
        if not beside_windows.is_file():
            return None
        program = str(beside_windows)
    query = [program, "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        return None
    return read_nvidia(answer.stdout)


def read_nvidia(answer: str) -> tuple[int, float] | None:
    """The weakest card among lines such as `581.29, 8.6`; a number that is missing counts as a recent one."""
    cards = [line.split(",") for line in answer.splitlines() if line.strip()]
    if not cards:
        return None
    drivers, computes = [], []
    for card in cards:
        driver = re.match(r"\d+", card[0].strip())
        if driver:
            drivers.append(int(driver.group()))
        compute = re.match(r"[\d.]+", card[-1].strip())
        if compute:
            computes.append(float(compute.group()))
    return min(drivers, default=999), min(computes, default=99.0)


def fingerprint() -> str:
    """What the stamp holds: a hash of the lock and of torch's version."""
    return hashlib.sha256(LOCK.read_bytes() + TORCH.encode()).hexdigest()


def is_installed() -> bool:
    """Whether .venv holds what this lock names."""
    if not venv_python().exists() or not STAMP.is_file():
        return False
    return STAMP.read_text(encoding="utf-8").strip() == fingerprint()


def tools_fingerprint() -> str:
    """What the tools' stamp holds: a hash of their lock."""
    return hashlib.sha256(TOOLS_LOCK.read_bytes()).hexdigest()


def has_tools() -> bool:
    """Whether .venv also holds what tests and checks need."""
    return TOOLS_STAMP.is_file() and TOOLS_STAMP.read_text(encoding="utf-8").strip() == tools_fingerprint()


def venv_python() -> Path:
    """The Python inside .venv."""
    if os.name == "nt":
        return VENV / "Scripts" / "python.exe"
    return VENV / "bin" / "python"


def has_pip() -> bool:
    """Whether .venv is complete: without pip its creation was interrupted; without its base Python it does not run."""
    if not venv_python().exists():
        return False
    question = [str(venv_python()), "-m", "pip", "--version"]
    return subprocess.run(question, capture_output=True, check=False).returncode == 0


# --- installing ------------------------------------------------------------------------------------------------------


def install() -> None:
    """Make .venv, put torch and then the lock into it, check that torch loads, and write the stamp.

    Raises:
        Sorry: a step failed; the text names the log.
    """
    began = time.monotonic()
    say(f"Setting up the studio in {VENV} (once; later starts skip this). Details: {LOG}")
    prepare_folder()
    nvidia = find_nvidia()
    plans = torch_plans(platform.system(), nvidia, os.environ.get("TORCH_INDEX_URL", ""), str(LOCK))
    torch_title = f"PyTorch {TORCH} (the largest part)"
    if nvidia:
        torch_title = f"PyTorch {TORCH}, for NVIDIA (the largest part)"
    if not venv_python().exists():
        with Step(1, "a Python environment of its own") as step:
            step.run([sys.executable, "-m", "venv", str(VENV)])
    with Step(2, torch_title) as step:
        step.pip_first_of(plans)
    with Step(3, "the other libraries", total=count_packages(LOCK)) as step:
        step.pip_first_of((("--no-deps", "--requirement", str(LOCK)),))
    with Step(4, "does PyTorch load?") as step:
        step.run([str(venv_python()), "-c", "import torch; print(torch.__version__)"])
    STAMP.write_text(fingerprint() + "\n", encoding="utf-8")
    say(f"Ready after {clock(time.monotonic() - began)}.")


def install_tools() -> None:
    """Put what tests and checks need into a .venv that holds the studio already.

    Raises:
        Sorry: it failed; the text names the log.
    """
    with Step(1, "tools of developers (once)", total=count_packages(TOOLS_LOCK), steps=1) as step:
        step.pip_first_of((("--no-deps", "--requirement", str(TOOLS_LOCK)),))
    TOOLS_STAMP.write_text(tools_fingerprint() + "\n", encoding="utf-8")


def prepare_folder() -> None:
    """An empty or complete .venv without a stamp, and a new log in it.

    Raises:
        Sorry: the folder cannot be written.
    """
    try:
        if VENV.exists() and not has_pip():
            shutil.rmtree(VENV)
        VENV.mkdir(exist_ok=True)
        STAMP.unlink(missing_ok=True)
        TOOLS_STAMP.unlink(missing_ok=True)
        LOG.write_text(f"{time.ctime()} Python {sys.version}\n", encoding="utf-8")
    except OSError as error:
        raise Sorry(
            f"{VENV} cannot be written.", f"{error.strerror}.", "Put the studio's folder where you may write."
        ) from None


def count_packages(lock: Path) -> int:
    """Pinned lines of the lock, those for other systems included."""
    return sum(bool(re.match(r"[A-Za-z0-9]", line)) for line in lock.read_text(encoding="utf-8").splitlines())


class Step:
    """One step of the installation: runs programs, writes their output to the log, and shows the progress.

    On a terminal the line is repainted twice a second; elsewhere a new line comes every ten seconds.
    """

    def __init__(self, number: int, title: str, *, total: int = 0, steps: int = STEPS) -> None:
        self.number = number
        self.steps = steps
        self.title = title
        self.total = total
        self.done = 0
        self.note = ""
        self.began = time.monotonic()
        self.over = threading.Event()
        self.terminal = sys.stderr.isatty()
        self.painter = threading.Thread(target=self._paint, daemon=True)

    def __enter__(self) -> Step:
        self.painter.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.over.set()
        self.painter.join()
        ending = "failed"
        if error is None:
            ending = "done"
        elapsed = clock(time.monotonic() - self.began)
        self._show(f"[{self.number}/{self.steps}] {self.title}: {ending} after {elapsed}", "\n")

    def pip_first_of(self, plans: tuple[tuple[str, ...], ...]) -> None:
        """Install by the first of these argument lists that pip can satisfy.

        Raises:
            Sorry: none of them.
        """
        pip = [str(venv_python()), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        # Wheels only: nothing is compiled, and no package runs code of its own while it is being installed.
        pip += ["--progress-bar", "off", "--only-binary", ":all:"]
        for plan in plans[:-1]:
            if self._execute([*pip, *plan]) == 0:
                return
        self.run([*pip, *plans[-1]])

    def run(self, command: list[str]) -> None:
        """Run a program to its end.

        Raises:
            Sorry: it failed; why is read from its output.
        """
        start = LOG.stat().st_size
        if self._execute(command):
            with LOG.open("rb") as log:
                log.seek(start)
                why, next_step = diagnose(log.read().decode("utf-8", "replace"))
            raise Sorry(f"The set-up stopped at step {self.number}, {self.title}.", why, f"{next_step} Details: {LOG}")

    def _execute(self, command: list[str]) -> int:
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            with subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"},
            ) as child:
                try:
                    for line in child.stdout or ():
                        log.write(line)
                        self._notice(line)
                except KeyboardInterrupt:
                    child.terminate()
                    raise
        return child.returncode

    def _notice(self, line: str) -> None:
        """Pick the package and its size out of pip's lines."""
        collecting = re.match(r"\s*(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line)
        size = re.match(r"\s*Downloading .*\((.+)\)", line)
        if collecting:
            self.done += 1
            self.note = collecting.group(1)
        elif size:
            self.note = f"{self.note.split(' (')[0]} ({size.group(1)})"
        elif line.startswith("Installing collected packages"):
            self.note = "unpacking"

    def _paint(self) -> None:
        period, ending = 10.0, "\n"
        if self.terminal:
            period, ending = 0.5, "\r"
        while not self.over.wait(period):
            self._show(self._describe_progress(time.monotonic() - self.began), ending)

    def _describe_progress(self, elapsed: float) -> str:
        parts = [f"[{self.number}/{self.steps}] {self.title}"]
        fetching = self.total and self.done and self.note != "unpacking"
        if fetching:
            parts.append(f"{min(self.done, self.total)} of {self.total}")
        if self.note:
            parts.append(self.note)
        parts.append(clock(elapsed))
        if fetching and self.done > 4:
            remaining = max(0, self.total - self.done)
            parts.append(f"about {clock(elapsed / self.done * remaining)} left")
        return ", ".join(parts)

    def _show(self, text: str, end: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            text = text[:width].ljust(width)
        sys.stderr.write(text + end)
        sys.stderr.flush()


def diagnose(output: str) -> tuple[str, str]:
    """Why a program failed and what helps, read from what it printed."""
    lowered = output.lower()
    for sign, why, next_step in CURES:
        if re.search(sign, lowered):
            return why, next_step
    complaints = [line.strip() for line in output.splitlines() if re.match(r"\s*(ERROR|\w*Error)\b", line)]
    why = "It gave no reason."
    if complaints:
        why = complaints[-1][:300].rstrip(".") + "."
    return why, "Try the command again."


CURES = (
    (r"no space left|errno 28\b|not enough space", "The disk is full.", "Free about 4 GB and try again."),
    (
        r"name resolution|getaddrinfo failed|max retries|connection (?:refused|broken|reset)|connectionerror|timed out",
        "A package index could not be reached.",
        "Check the connection (or the proxy in HTTPS_PROXY) and try again; what is already there is kept.",
    ),
    (
        r"ensurepip is not available|no module named '?(?:ensurepip|venv)",
        "This Python came without its venv module.",
        "On Debian or Ubuntu: sudo apt install python3-venv; elsewhere take Python from python.org.",
    ),
    (
        r"winerror 126|winerror 1114",
        "Windows could not load PyTorch's libraries.",
        "Install Microsoft's Visual C++ Redistributable (x64) and try again.",
    ),
    (
        r"permission denied|access is denied|winerror (?:5|32)\b",
        "A file in .venv could not be replaced.",
        "Close every running studio and try again.",
    ),
    (
        r"no matching distribution found for torch",
        f"No index offers PyTorch {TORCH} for this Python and this system.",
        "Set TORCH_INDEX_URL to an index that does, or use Python 3.12.",
    ),
)


# --- handing over ----------------------------------------------------------------------------------------------------


def hand_over(python: Path, arguments: list[str]) -> int:
    """Become `python -m app.cli`, in the folder the person is in; on Windows wait for it and pass its exit code on."""
    # The studio is found wherever the person stands; -P: no folder of theirs called "app" is taken for ours.
    command = [str(python), "-P", "-m", "app.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)
    child = subprocess.Popen(command, env=environment)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the studio got the same Ctrl+C and ends by itself


def say(text: str) -> None:
    """One line on stderr; stdout belongs to the studio."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Minutes and seconds, as 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
