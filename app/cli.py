"""The command line: python launch.py [studio | generate | plan | models | doctor | bench | evaluate | test] ...

In:  arguments, IDCRAFTER_AUTH, and for `generate` a job document or a clip that carries one.
Out: an exit code: 0 done, 1 refused or failed with one line on stderr, 2 not understood, 130 cancelled.
     `generate` writes the clip's path to stdout and everything else to stderr.
Knows nothing of torch until `generate` or `bench` runs; asking for help needs the standard library alone.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from engine.paths import ROOT, models_dir
from engine.threads import limit_spinning

if TYPE_CHECKING:
    from app.settings import Settings
    from engine.hardware.options import MachineOptions

PROFILES = ("auto", "6", "8", "12", "16", "24", "all")
ABOUT = "Put several people and things into one video and keep each of them recognisable."
VERBS = """\
verbs:
  (none)      open the studio in the browser
  generate    make one clip here and now
  plan        say what a clip needs here, or on a card of another size
  models      list, plan, pull, verify, remove, adopt, add: the models and their files
  doctor      look at this machine and say what is missing
  bench       measure what docs/measurements.md claims
  evaluate    make held-out jobs and say how well everyone is recognised
  test        run the tests (what follows goes to pytest)
  check, lock for developers: style and types; the pinned libraries

`python launch.py VERB --help` tells more about each.
"""


def main(arguments: list[str]) -> int:
    """Run one verb; see the header for what comes back."""
    keep_private()
    limit_spinning(os.environ)
    verb, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in RUN else ("studio", arguments)
    try:
        if rest and verb == "studio" and not rest[0].startswith("-"):
            raise Usage(unknown_verb(rest[0]))
        return RUN[verb](rest)
    except Usage as error:
        return complain(str(error), code=2)
    except KeyboardInterrupt:
        return complain("Cancelled.", code=130)
    except Exception as error:
        return complain(as_sentence(error))


def keep_private() -> None:
    """Nobody is told what is made here: every library's telemetry is off before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"


# --- errors ----------------------------------------------------------------------------------------------------------


class Usage(Exception):
    """The command line was not understood."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line with the way out."""

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message[:1].upper()}{message[1:].rstrip('.')}. Type `{self.prog} --help` to see what fits.")


def complain(sentence: str, *, code: int = 1) -> int:
    """One line on stderr; gives the exit code back."""
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    return code


def unknown_verb(word: str) -> str:
    """The sentence for a first word that is no verb, with the one that may have been meant."""
    close = get_close_matches(word, RUN, n=1)
    if Path(word).suffix.lower() in (".mp4", ".json"):
        advice = f"Type `python launch.py generate {word}` to make that clip."
    elif close:
        advice = f"Did you mean `python launch.py {close[0]}`?"
    else:
        advice = "Type `python launch.py --help` to see what fits."
    return f"There is no verb {word!r}. A verb is one of {', '.join(RUN)}. {advice}"


def as_sentence(error: Exception) -> str:
    """What a person reads about an error; the traceback of an unforeseen one goes to a file that is named."""
    from engine.messages import StudioError

    if isinstance(error, StudioError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OUTSIDE:
        return f"{error.filename or 'A file'} could not be used. {os.strerror(error.errno)}. {OUTSIDE[error.errno]}"
    return f"The studio stopped on a fault of its own ({type(error).__name__}: {str(error)[:200]}). {keep_traceback()}"


OUTSIDE = {
    errno.ENOSPC: "Free some disk space and try again.",
    errno.EROFS: "Choose a folder you may write to.",
    errno.EACCES: "Choose a folder you may write to.",
    errno.EPERM: "Choose a folder you may write to.",
}
"""What the machine, not the studio, got wrong, and the cure."""


def keep_traceback() -> str:
    """Write the traceback being handled to a file; the sentence that says where."""
    import tempfile
    import time
    import traceback

    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    for folder in (ROOT / "outputs" / ".studio" / "logs", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            continue  # read-only or full: the next folder
        return f"What happened is written in {folder / name}; please add that file to a report."
    return "It could not be written to a file either: the disk is full or read-only."


# --- the studio ------------------------------------------------------------------------------------------------------


def studio(arguments: list[str]) -> int:
    """Open the page and serve it until Ctrl+C."""
    settings = studio_settings(arguments, os.environ)
    # For this process and for the workers it starts.
    os.environ.update({"IDCRAFTER_MODELS": str(settings.models_dir), **settings.machine})
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from app.page import server as page

    page.serve(settings)
    return 0


def studio_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python launch.py",
        description=ABOUT,
        epilog=VERBS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--listen", action="store_true", help="let other machines open the page (asks for a password)")
    add("--port", type=int, default=7860, help="port of the page (7860)")
    add("--share", action="store_true", help="a public address through Gradio's relay (asks for a password)")
    add("--auth", metavar="USER:PASS", help="password; better in IDCRAFTER_AUTH, since arguments show in process lists")
    add("--inbrowser", action=argparse.BooleanOptionalAction, help="open a browser (where there is a screen)")
    add("--theme", choices=("dark", "light", "system"), default="dark", help="colours of the page")
    add("--outputs", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="where clips go (outputs)")
    add("--models-dir", type=Path, metavar="FOLDER", help="where your models lie (models)")
    add("--devices", default="", metavar="LIST", help="a worker on each of these, such as cuda:0,cuda:1 (the fastest)")
    add_machine(parser)
    add("--offline", action="store_true", help="ask nothing of the network")
    return parser


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that runs models."""
    add = parser.add_argument
    add(
        "--attention",
        metavar="KERNELS",
        help="auto, native, flash, flash3, sage, xformers or cudnn; what does not run here is left out with a line",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks at the first clip; slower start, faster steps",
    )
    add("--profile", choices=PROFILES, help="GB of the graphics card that clips may use (auto: what is free)")


def machine_of(given: argparse.Namespace, environment: Mapping[str, str]) -> MachineOptions:
    """What these options, and this environment where they say nothing, ask of the machine.

    Raises:
        StudioError: a word that names nothing.
    """
    from engine.hardware.options import machine_options

    said = dict(environment)
    if given.attention is not None:
        said["IDCRAFTER_ATTENTION"] = given.attention
    if given.compile is not None:
        said["IDCRAFTER_COMPILE"] = "1" if given.compile else ""
    if given.profile is not None:
        said["IDCRAFTER_PROFILE"] = given.profile
    return machine_options(said)


def studio_settings(arguments: list[str], environment: Mapping[str, str]) -> Settings:
    """The settings that these arguments and this environment ask for, checked before anything heavy is imported.

    Raises:
        Usage: not understood.
        StudioError: open to others without a password, or the port is taken.
    """
    given = studio_parser().parse_args(arguments)
    from app import settings

    auth = settings.read_auth(environment.get("IDCRAFTER_AUTH", "") if given.auth is None else given.auth)
    settings.check_password(auth, listen=given.listen, share=given.share)
    host = "0.0.0.0" if given.listen else "127.0.0.1"
    machine, devices = machine_of(given, environment).variables(), settings.read_devices(given.devices)
    settings.check_port(host, given.port)
    outputs = given.outputs.expanduser().resolve()
    return settings.Settings(
        host=host,
        port=given.port,
        share=given.share,
        auth=auth,
        inbrowser=settings.has_screen(environment, sys.platform) if given.inbrowser is None else given.inbrowser,
        theme=given.theme,
        outputs=outputs,
        models_dir=(given.models_dir or models_dir()).expanduser().resolve(),
        data=outputs / ".studio",
        devices=devices,
        machine=machine,
        offline=given.offline,
    )


# --- the other verbs -------------------------------------------------------------------------------------------------


def generate(arguments: list[str]) -> int:
    """Make one clip in this process; its path goes to stdout."""
    given = generate_parser().parse_args(arguments)
    os.environ.update(machine_of(given, os.environ).variables())
    if given.models_dir:
        os.environ["IDCRAFTER_MODELS"] = str(given.models_dir.expanduser().resolve())
    from app.verbs import generate as one_clip

    return one_clip.main(given)


def generate_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python launch.py generate",
        description="Make one clip here and now. A document or a clip made here sets everything; options win.",
        epilog='example: python launch.py generate --subject fox=fox.png --prompt "@fox runs" --seed 7 --out fox.mp4',
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = "a job document (.json), a clip (.mp4) to remake, or what Wan2GP made (.mp4, .mkv, .png, .jpg)"
    add("document", nargs="?", type=Path, metavar="DOCUMENT", help=what)
    add("--preset", help="which model (toybox)")
    add(
        "--subject",
        action="append",
        default=[],
        metavar="NAME=PICTURE[,PICTURE]",
        help="someone or something to keep recognisable, one to three pictures; once for each subject",
    )
    add("--prompt", help="what happens, mentioning every subject as @name")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="a LoRA, by its file or its name in the models folder's loras; once for each",
    )
    add("--seed", type=int, help="starting noise; the same job gives the same frames")
    add("--frames", type=int, help="length, 4k + 1 frames")
    add("--size", metavar="WxH", help="width and height in pixels")
    add("--steps", type=int, help="denoising steps")
    add(
        "--cache", metavar="WORD", help="leave out forwards that hardly matter: off, careful or fast (the preset's own)"
    )
    add("--precision", metavar="WORD", help="of the large weights: fp32, bf16, fp8, int8 or nf4 (what fits)")
    add("--out", type=Path, metavar="FILE.mp4", help="where the clip goes (a dated name in the outputs folder)")
    add("--outputs", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="the outputs folder")
    add("--models-dir", type=Path, metavar="FOLDER", help="where your models lie (models)")
    add_machine(parser)
    return parser


def plan(arguments: list[str]) -> int:
    """What a clip would need; 1 when it does not fit."""
    parser = Parser(
        prog="python launch.py plan",
        description="Say what a clip needs before it is begun: memory part by part, time, disk, and what binds.",
        epilog="example: python launch.py plan --preset phantom-14b --vram 12",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", default="toybox", help="which model (toybox)")
    add("--subjects", type=int, help="how many, one picture each (2)")
    add("--frames", type=int, help="length, 4k + 1 frames")
    add("--size", metavar="WxH", help="width and height in pixels")
    add("--steps", type=int, help="denoising steps")
    add("--precision", choices=("fp32", "bf16", "fp8", "int8", "nf4"), help="of the transformer (what fits)")
    add("--vram", type=more_than_nothing, metavar="GB", help="as if there were a card with so much memory")
    add("--ram", type=more_than_nothing, metavar="GB", help="as if the machine had so much memory")
    add("--tflops", type=more_than_nothing, help="what the card reaches in bf16")
    add("--profile", choices=PROFILES, default="auto", help="GB of the card that may be used (what is free)")
    add("--models-dir", type=Path, metavar="FOLDER", help="where your models lie (models)")
    given = parser.parse_args(arguments)
    if given.size and not re.fullmatch(r"\d{2,4}x\d{2,4}", given.size):
        raise Usage(f"The size {given.size!r} is no WxH. Write it as 832x480.")
    if given.models_dir:
        os.environ["IDCRAFTER_MODELS"] = str(given.models_dir.expanduser().resolve())
    from app.verbs import plan as planner

    return planner.main(given)


def more_than_nothing(text: str) -> float:
    """A number above zero, as argparse reads it."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not more than nothing")
    return number


more_than_nothing.__name__ = "number"  # what argparse calls it where it is none


def models(arguments: list[str]) -> int:
    """The models: what they need, what is here, and bringing the rest."""
    from app.verbs import models as verb

    return verb.main(verb.parser(Parser).parse_args(arguments))


def doctor(arguments: list[str]) -> int:
    """Look at this machine; 1 when something stands in the way."""
    parser = Parser(prog="python launch.py doctor", description="Look at this machine and say what is missing.")
    parser.add_argument("--port", type=int, default=7860, help="the port the page would use (7860)")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", metavar="FOLDER", help="the outputs folder")
    parser.add_argument("--models-dir", type=Path, metavar="FOLDER", help="where your models lie (models)")
    given = parser.parse_args(arguments)
    if given.models_dir:
        os.environ["IDCRAFTER_MODELS"] = str(given.models_dir.expanduser().resolve())
    from app.verbs import doctor as checks

    return checks.main(outputs=given.outputs.expanduser().resolve(), port=given.port)


def bench(arguments: list[str]) -> int:
    """Measure what docs/measurements.md claims."""
    from app.bench import runner as measurements

    return measurements.main(arguments)


def evaluate(arguments: list[str]) -> int:
    """The toybox benchmark, in a process of its own."""
    return subprocess.call([sys.executable, "-X", "utf8", "-m", "train.toybox.benchmark", *arguments], cwd=ROOT)


def test(arguments: list[str]) -> int:
    """Run pytest in a process of its own; its closing line is the last thing said."""
    # One thread: two busy OpenMP pools fight over the cores (a tiny pipeline took 8 s instead of .2 s).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.call([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment)


def check(arguments: list[str]) -> int:
    """For developers: formatting, lint and types as a commit needs them; `check types` runs one of them alone."""
    tools = {
        "format": ["ruff", "format", "--check"],
        "lint": ["ruff", "check"],
        "types": ["pyright", "--pythonpath", sys.executable],
    }
    unknown = [name for name in arguments if name not in tools]
    if unknown:
        raise Usage(f"There is no check {unknown[0]!r}. Checks are {', '.join(tools)}. Name some of them, or none.")
    codes = [subprocess.call([sys.executable, "-m", *tools[name]], cwd=ROOT) for name in arguments or tools]
    return max(codes)


def lock(arguments: list[str]) -> int:
    """For developers: make requirements.txt from requirements.in and what is installed."""
    from app.verbs import lock as maker

    return maker.main(arguments)


RUN: dict[str, Callable[[list[str]], int]] = {
    "studio": studio,
    "generate": generate,
    "plan": plan,
    "models": models,
    "doctor": doctor,
    "bench": bench,
    "evaluate": evaluate,
    "test": test,
    "check": check,
    "lock": lock,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
