"""The verb `models`: list, plan, pull, verify, remove, adopt, add.

In:  arguments; HF_TOKEN for private repositories, which is read nowhere else.
Out: what was asked for on stdout, how far a pull is on stderr; 0 done, 1 refused or failed, 130 paused.
Knows nothing of the page or of torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from app.wording import files, size
from engine.messages import StudioError, duration
from engine.paths import models_dir

if TYPE_CHECKING:  # for real only once HF_HUB_OFFLINE is set, which the library reads when it is imported
    from app.library.models import Speed
    from engine.hub.cache import FetchPlan, Hub
    from engine.presets import Preset

EVERY_S = 0.5  # between two states of the line that says how far a pull is
PLAIN_EVERY_S = 10.0  # the same where the line cannot be written over
OFFLINE = "Offline: list and remove work, and so does every preset that is here; nothing is asked or fetched."


def parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The arguments; `kind` is the command line's own parser, whose complaints are one line."""
    found = kind(
        prog="python launch.py models",
        description="The models of this studio: what they need, what is here, and bringing the rest.",
        epilog="A token for private or gated repositories is read from HF_TOKEN alone. A pull that was stopped, by "
        "Ctrl-C or by anything else, goes on where it stopped.",
        allow_abbrev=False,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--models-dir", type=Path, metavar="FOLDER", help="where your models lie (models)")
    shared.add_argument("--offline", action="store_true", help="ask nothing of the network")
    verbs = found.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=kind)

    def verb(name: str, words: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=words, description=words, parents=[shared], allow_abbrev=False)

    verb("list", "Every preset: here or missing, what is left to fetch, its licence and its page.")
    for name, words in (
        ("plan", "Every file of a preset with its size, what of it is here, and whether the disk holds the rest."),
        ("pull", "Fetch what is missing of a preset; each byte once, each file checked."),
    ):
        one = verb(name, words)
        one.add_argument("name", metavar="NAME", help="the preset")
        one.add_argument("--judges", action="store_true", help="also the networks that judge how alike everyone is")
        if name == "pull":
            one.add_argument("--yes", action="store_true", help="do not ask first")
            one.add_argument("--accept-no-licence", action="store_true", help="fetch what nobody has licensed, too")
    one = verb("verify", "Hash a preset's files again and take damaged ones away.")
    one.add_argument("name", metavar="NAME", help="the preset")
    one = verb("remove", "Take a preset's files away, except those that another preset needs.")
    one.add_argument("name", metavar="NAME", help="the preset")
    one.add_argument("--yes", action="store_true", help="do not ask first")
    verb("adopt", "Take over what ComfyUI, Wan2GP or another cache has fetched, by hash.").add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="such as ComfyUI/models or Wan2GP/ckpts"
    )
    one = verb("add", "Make a preset of a repository of your own: diffusers layout, safetensors only.")
    one.add_argument("repo", metavar="OWNER/NAME", help="its id on the Hub")
    one.add_argument("--like", default="", metavar="PRESET", help="whose defaults it takes")
    one.add_argument("--accept-no-licence", action="store_true", help="although it names no licence")
    return found


def main(given: argparse.Namespace) -> int:
    """Run one of the verbs.

    Raises:
        StudioError: refused, or it failed; nothing damaged is left.
    """
    if given.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if given.models_dir:
        os.environ["IDCRAFTER_MODELS"] = str(given.models_dir.expanduser().resolve())
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # why the Hub does not answer is said once, at the end
    from engine.hub.cache import Hub

    if constants.HF_HUB_OFFLINE:
        _tell(OFFLINE)
    hub = Hub(token=os.environ.get("HF_TOKEN") or None)
    return VERBS[given.verb](given, hub)


# --- the verbs -------------------------------------------------------------------------------------------------------


def list_presets(given: argparse.Namespace, hub: Hub) -> int:
    """A table; asks nobody."""
    from app.library import models
    from engine import presets

    rows = [("preset", "state", "to fetch", "licence", "page")]
    for preset in presets.list_readable():
        found = models.state(preset, hub)
        left = size(found.bytes_to_fetch) if found.to_fetch else "-"
        rows.append((preset.name, found.word, left, preset.licence, models.link(preset)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name in set(presets.names()) - {preset.name for preset in presets.list_readable()}:
        try:
            presets.load(name)
        except StudioError as error:
            _tell(str(error))
    return 0


def plan(given: argparse.Namespace, hub: Hub) -> int:
    """Every file, then the sum and the disk."""
    from app.library import models

    preset = _preset(given.name)
    asked = models.plan(preset, hub, judges=given.judges)
    missing = {found.hash for found in asked.missing}
    for found in asked.files:
        how = " (by the library: kept in the Xet store alone)" if found.xet else ""
        how += " (a pickle: turned into safetensors once, never loaded)" if found in asked.to_convert else ""
        word = "missing" if found.hash in missing else "here"
        print(f"{size(found.size):>8}  {word:7}  {found.wanted.repo}/{found.wanted.path}{how}")
    print(f"{preset.title}: {_sum(asked)}, into {hub.cache}.")
    if not asked.fits:
        print("The disk does not hold it. Free some space, or set HF_HUB_CACHE to a folder on a larger disk.")
    _say_what_is_yours(preset, hub)
    return 0


def pull(given: argparse.Namespace, hub: Hub) -> int:
    """Say what it costs, ask, fetch."""
    from app.library import models

    preset = _preset(given.name)
    if not given.accept_no_licence:
        models.check_licences(preset, hub, judges=given.judges)
    asked = models.plan(preset, hub, judges=given.judges)
    _tell(f"{preset.title}: {_sum(asked)}, into {hub.cache}.")
    _tell("Licences: " + "; ".join(_licences(preset, judges=given.judges)) + ".")
    alone = [found.wanted.path for found in asked.missing if found.xet]
    if alone:
        _tell(f"{', '.join(alone)}: kept in the Hub's Xet store alone, so the library fetches it; a pause begins anew.")
    if (asked.missing or asked.to_convert) and not given.yes and not _agreed("Fetch it?"):
        return 1
    line = Line(models.Speed())
    try:
        count = models.pull(preset, hub, line.say, judges=given.judges, accept_no_licence=True)
    except KeyboardInterrupt:
        line.end()
        _tell("Paused. The same command goes on where it stopped.")
        return 130
    except StudioError:
        line.end()
        raise
    line.end()
    print(f"{preset.name} is here: {files(count)}, each one checked.")
    _say_what_is_yours(preset, hub)
    return 0


def verify(given: argparse.Namespace, hub: Hub) -> int:
    """Hash what is here."""
    from app.library import models

    preset, line = _preset(given.name), Line(None)
    broken = models.verify(preset, hub, line.say)
    line.end()
    for each in broken:
        print(f"damaged, taken away: {each.repo}/{each.path}")
    if broken:
        print(f"Fetch it again with `python launch.py models pull {preset.name}`.")
        return 1
    if not models.state(preset, hub).fetched:
        print(f"What is here of {preset.title} is whole; some of it is not here.")
    else:
        print(f"Every file of {preset.title} is whole.")
    return 0


def remove(given: argparse.Namespace, hub: Hub) -> int:
    """Say what goes and what stays, ask, take away."""
    from app.library import models

    preset = _preset(given.name)
    found = models.removal(preset, hub)
    if not found.files:
        print(f"Nothing of {preset.title} can be taken away: nothing of it alone is here.{found.kept}")
        return 0
    _tell(f"{files(len(found.files))} of {preset.title}, {size(found.num_bytes)}, in {hub.cache}.{found.kept}")
    _tell("Other programs that use this cache would have to fetch them again.")
    if not given.yes and not _agreed("Remove them?"):
        return 1
    models.remove(preset, hub)
    print(f"{size(found.num_bytes)} are free again.")
    return 0


def adopt(given: argparse.Namespace, hub: Hub) -> int:
    """Look through folders of other programs."""
    from app.library import models

    folders = [folder.expanduser().resolve() for folder in given.folders]
    line = Line(None)
    adopted, unknown = models.adopt(folders, hub, line.count)
    line.end()
    for path in adopted:
        print(f"adopted: {path}")
    for error in unknown:
        _tell(str(error))
    print(f"Adopted: {len(adopted)}." if adopted else "No file there is one that a preset needs.")
    return 0


def add(given: argparse.Namespace, hub: Hub) -> int:
    """A repository of one's own becomes a preset."""
    from app.library import add_model, models

    if given.like:
        _preset(given.like)
    preset = add_model.add(given.repo, hub, like=given.like, accept_no_licence=given.accept_no_licence)
    left = models.state(preset, hub)
    print(f"{preset.name} is added ({preset.conditioning}); {size(left.bytes_to_fetch)} to fetch.")
    print(f"Fetch it with `python launch.py models pull {preset.name}`.")
    return 0


VERBS: dict[str, Callable[[argparse.Namespace, Hub], int]] = {
    "list": list_presets,
    "plan": plan,
    "pull": pull,
    "verify": verify,
    "remove": remove,
    "adopt": adopt,
    "add": add,
}


# --- what it says ----------------------------------------------------------------------------------------------------


class Line:
    """One line on stderr that is written over; where that is not a terminal, a line now and then."""

    def __init__(self, speed: Speed | None) -> None:
        self._speed = speed
        self._terminal = sys.stderr.isatty()
        self._said = 0.0
        self._open = False

    def say(self, here: int, total: int, name: str) -> None:
        """Bytes of bytes, and which file."""
        words = f"{size(here)} of {size(total)}"
        if self._speed is not None:
            self._speed.see(here)
            left = self._speed.seconds_left(total)
            if left is not None and here < total:
                words += f", {size(self._speed.bytes_per_s)}/s, {duration(left)} left"
        self._write(f"{100 * here // max(1, total):3d} %  {words}  {name}", last=here >= total)

    def count(self, number: int, total: int, name: str) -> None:
        """Files of files."""
        self._write(f"file {number} of {total}  {name}", last=number >= total)

    def end(self) -> None:
        """The next thing said begins a line of its own."""
        if self._open:
            sys.stderr.write("\n")
            sys.stderr.flush()
        self._open = False

    def _write(self, words: str, *, last: bool) -> None:
        now = time.monotonic()
        if not last and now - self._said < (EVERY_S if self._terminal else PLAIN_EVERY_S):
            return
        self._said = now
        sys.stderr.write(f"\r{words[:110]:110}" if self._terminal else f"{words}\n")
        sys.stderr.flush()
        self._open = self._terminal


def _preset(name: str) -> Preset:
    from engine import presets

    return presets.load(name)


def _sum(asked: FetchPlan) -> str:
    if not asked.missing and not asked.to_convert:
        return "everything is here"
    more = f" and {size(asked.bytes_to_convert)} to make safetensors of it" if asked.to_convert else ""
    return f"{size(asked.bytes_to_fetch)} to fetch{more}, {size(asked.bytes_free)} free"


def _licences(preset: Preset, *, judges: bool) -> list[str]:
    from app.library import models

    named = models.named_files(preset, judges=judges)
    return list(dict.fromkeys(f"{files.repo} {files.licence or models.NO_LICENCE}" for files in named))


def _say_what_is_yours(preset: Preset, hub: Hub) -> None:
    from app.library import models

    for part in models.state(preset, hub).own:
        place = models_dir() / str(getattr(preset.components, part))
        _tell(f"Its {part} is a checkpoint of yours: put it into {place}.")


def _agreed(question: str) -> bool:
    """Ask; only a yes is one. Where nobody can answer, that is said."""
    if not sys.stdin.isatty():
        raise StudioError("Nobody can be asked here.", "This is not a terminal.", "Add --yes to go on without asking.")
    _tell(f"{question} [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _tell(words: str, *, end: str = "\n") -> None:
    print(words, end=end, file=sys.stderr, flush=True)
