"""Models: what each preset needs from the Hub, what of it is here, and how it is brought, checked and taken away.

In:  presets, and a `Hub` that asks and fetches.
Out: states that ask nobody, plans, and deeds that say how far they are.
Knows nothing of Gradio, of the command line, of threads, or of torch.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from engine import presets
from engine.hub.cache import FetchPlan, FileRequest, Hub, HubUnreachable, Say
from engine.hub.download import file_size, link_or_copy
from engine.hub.pickles import is_pickle
from engine.messages import StudioError
from engine.presets import OPTIONAL, Components, HubFiles, Preset

WINDOW_S = 12.0  # a speed is that of the last seconds, not of an hour ago
NO_LICENCE = "none named"  # written down where a person went on without one


# --- what is here ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How a preset stands on this machine."""

    preset: Preset
    to_fetch: tuple[HubFiles, ...]  # of parts that are not here
    own: tuple[str, ...]  # parts that nobody can fetch: a checkpoint of the creator's own
    judges: bool  # whether those who judge its clips are here, too
    arrived: int  # bytes of files that are on their way

    @property
    def fetched(self) -> bool:
        """Nothing is left to fetch."""
        return not self.to_fetch

    @property
    def here(self) -> bool:
        """It can make clips."""
        return self.fetched and not self.own

    @property
    def bytes_to_fetch(self) -> int:
        """As the preset says; a plan asks the Hub."""
        return sum(files.num_bytes for files in self.to_fetch)

    @property
    def bytes_to_convert(self) -> int:
        """What safetensors will take that are made of pickles, as large as these."""
        return sum(files.num_bytes for files in self.to_fetch if is_pickle(files.path))

    @property
    def word(self) -> str:
        """One or two words for a table."""
        if self.here:
            return "here"
        return "missing" if self.to_fetch else "needs your checkpoint"


def state(preset: Preset, hub: Hub) -> State:
    """How a preset stands. Asks nobody and opens no weights."""
    needed = preset.downloads(optional=False)
    missing = [own for part, own in needed.items() if not preset.has(part)]
    to_fetch = _distinct(chain.from_iterable(missing))
    own = tuple(
        part
        for part in Components.model_fields
        if part not in OPTIONAL and isinstance(named := getattr(preset.components, part), str) and named
        if not preset.has(part)
    )
    judges = all(preset.has(part) for part in preset.downloads() if part in OPTIONAL)
    repos = {files.repo for files in to_fetch}
    arrived = sum(hub.count_arrived_bytes(repo) for repo in repos)
    return State(preset, to_fetch, own, judges, arrived)


def named_files(preset: Preset, *, judges: bool) -> tuple[HubFiles, ...]:
    """What the preset names on the Hub, each once; with `judges` also the networks that judge a clip."""
    return _distinct(chain.from_iterable(preset.downloads(optional=judges).values()))


def wanted(preset: Preset, hub: Hub, *, judges: bool) -> tuple[FileRequest, ...]:
    """Every single file of it.

    Raises:
        StudioError: a repository or folder is not to be had.
    """
    found = []
    for files in named_files(preset, judges=judges):
        found += hub.expand(files.repo, files.path, files.revision, xet=files.xet)
    return tuple(dict.fromkeys(found))


def link(preset: Preset) -> str:
    """Where a person reads about the model: its transformer's page, or the first that its source names, or ""."""
    files = preset.downloads(optional=False).get("transformer")
    named = re.search(r"https://[^\s,;]+", preset.source)
    return files[0].link if files else named[0] if named else ""


def _distinct(files: Iterable[HubFiles]) -> tuple[HubFiles, ...]:
    return tuple(dict.fromkeys(files))


# --- bringing it here ------------------------------------------------------------------------------------------------


def check_licences(preset: Preset, hub: Hub, *, judges: bool) -> None:
    """Refuse files under no licence, unless a person has already gone on without one.

    Raises:
        StudioError: neither the preset nor the repository's own card names a licence.
    """
    for files in named_files(preset, judges=judges):
        if not files.licence and not hub.licence(files.repo, files.revision)[0]:
            raise no_licence(files.repo)


def no_licence(repo: str) -> StudioError:
    """The refusal of a repository that names no licence."""
    return StudioError(
        f"{repo} names no licence.",
        "Without one its owner has allowed nobody to use it.",
        "Ask its owner; or go on at your own risk, with --accept-no-licence or its box under Models.",
        field="repository",
    )


def plan(preset: Preset, hub: Hub, *, judges: bool) -> FetchPlan:
    """What fetching it would do, as the Hub says."""
    return hub.plan(wanted(preset, hub, judges=judges))


def pull(preset: Preset, hub: Hub, say: Say, *, judges: bool, accept_no_licence: bool = False) -> int:
    """Fetch what is missing of a preset; gives the number of its files.

    Raises:
        StudioError: no licence, no room, no such file, a dead line, or damage; what has arrived stays.
    """
    if not accept_no_licence:
        check_licences(preset, hub, judges=judges)
    paths = hub.pull(wanted(preset, hub, judges=judges), say)
    gather(preset, hub, judges=judges)
    return len(paths)


def gather(preset: Preset, hub: Hub, *, judges: bool) -> None:
    """One folder for each part whose files lie in several repositories; linked, so that nothing lies here twice."""
    for part, files in preset.downloads(optional=judges).items():
        if not isinstance(getattr(preset.components, part), tuple):
            continue
        folder = preset.place(part)
        folder.mkdir(parents=True, exist_ok=True)
        for each in _local_files(files, hub):
            source, target = hub.find_local(each), folder / Path(each.path).name
            if source is not None and file_size(target) != file_size(source):
                target.unlink(missing_ok=True)
                link_or_copy(source, target)


def verify(preset: Preset, hub: Hub, say: Say) -> list[FileRequest]:
    """Hash every file that is here again; gives the damaged ones, which are then taken away."""
    here = set(_here(preset, hub))
    return hub.verify([each for each in wanted(preset, hub, judges=True) if replace(each, xet=False) in here], say)


def adopt(folders: Sequence[Path], hub: Hub, say: Say) -> tuple[list[Path], list[StudioError]]:
    """Take over what ComfyUI, Wan2GP or another cache has already fetched for any preset, by hash, not by name.

    Returns:
        The files that were taken over, and what could not be asked about.

    Raises:
        StudioError: one of the folders is not there, or the Hub does not answer.
    """
    for folder in folders:
        if not folder.is_dir():
            raise StudioError(
                f"There is no folder {folder}.",
                "Files are adopted from a ComfyUI `models`, a Wan2GP `ckpts`, or another Hugging Face cache.",
                "Give the path of such a folder.",
                field="folder",
            )
    adopted, unknown = [], []
    known = presets.list_readable()
    asked: set[HubFiles] = set()
    first = chain.from_iterable(named_files(preset, judges=True) for preset in known)
    instead = chain.from_iterable(_instead(preset) for preset in known)
    for files in chain(first, instead):
        if files in asked:
            continue
        asked.add(files)
        try:
            adopted += hub.adopt(hub.expand(files.repo, files.path, files.revision, xet=files.xet), folders, say)
        except HubUnreachable:
            raise
        except StudioError as error:
            unknown.append(error)
    for preset in known:
        gather(preset, hub, judges=True)
    return adopted, unknown


def _instead(preset: Preset) -> Iterator[HubFiles]:
    """What would serve as well as the parts that are not here; it ends, part by part, with the first that has come."""
    for part, own in preset.downloads().items():
        for files in own:
            for each in files.alternatives:
                if not preset.has(part):
                    yield each


# --- taking it away --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """What taking a preset away would do."""

    files: tuple[FileRequest, ...]
    num_bytes: int
    kept_for: tuple[str, ...]  # other presets here that need some of its files

    @property
    def kept(self) -> str:
        """A sentence on what stays, after a space; "" where nothing does."""
        *others, last = [""] if not self.kept_for else self.kept_for
        named = "; ".join(others) + " and " * bool(others) + last  # titles have commas of their own
        return f" What {named} {'need' if others else 'needs'} too stays." if last else ""


def removal(preset: Preset, hub: Hub) -> Removal:
    """Which files would go, and who else needs the rest. Asks nobody."""
    own = set(_here(preset, hub))
    others = {other.title: own & set(_here(other, hub)) for other in _others_here(preset, hub)}
    kept = set().union(*others.values())
    files = tuple(sorted(own - kept, key=lambda each: (each.repo, each.path)))
    blobs = {path.resolve() for each in files if (path := hub.find_local(each)) is not None}
    return Removal(files, sum(map(file_size, blobs)), tuple(title for title, shared in others.items() if shared))


def remove(preset: Preset, hub: Hub) -> Removal:
    """Take its files away, except those that another preset here needs."""
    found = removal(preset, hub)
    others = _others_here(preset, hub)
    keep = list(chain.from_iterable(_here(other, hub) for other in others))
    gathered = {part for part in preset.downloads() if isinstance(getattr(preset.components, part), tuple)}
    for other in others:
        gathered -= set(other.downloads())
    hub.remove(found.files, keep)
    for part in gathered:
        for path in preset.place(part).glob("*"):
            path.unlink()
    return found


def forget(preset: Preset) -> None:
    """Take a preset away that its creator has added; its files are another matter.

    Raises:
        StudioError: it came with the studio.
    """
    path = presets.own_presets_dir() / f"{preset.name}.json"
    if not path.is_file():
        raise StudioError(f"{preset.title} came with the studio.", "Only presets that you added can be forgotten.", "")
    path.unlink()


def _here(preset: Preset, hub: Hub) -> list[FileRequest]:
    files = _distinct(chain.from_iterable(preset.downloads(every=True).values()))
    return _local_files(files, hub)


def _local_files(files: Iterable[HubFiles], hub: Hub) -> list[FileRequest]:
    """What of these lies in the cache."""
    here: list[FileRequest] = []
    for named in files:
        here += hub.list_local(named.repo, named.path, named.revision)
    return here


def _others_here(preset: Preset, hub: Hub) -> list[Preset]:
    return [other for other in presets.list_readable() if other.name != preset.name and state(other, hub).here]


# --- how fast --------------------------------------------------------------------------------------------------------


class Speed:
    """Bytes a second over the last seconds, and the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, here: int) -> None:
        """So many bytes are here now."""
        now = self._clock()
        if len(self._seen) > 1 and now - self._seen[-2][0] < WINDOW_S / 100:
            self._seen.pop()  # a fast line says more than anybody can read
        self._seen.append((now, here))
        while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()

    @property
    def bytes_per_s(self) -> float:
        """0 while nothing is known, as in the first second."""
        if not self._seen:
            return 0.0
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return max(0, after - before) / (last - first) if last - first >= 1 else 0.0

    def seconds_left(self, total: int) -> float | None:
        """None while nothing is known."""
        rate = self.bytes_per_s
        return (total - self._seen[-1][1]) / rate if rate else None
