"""Pulling from a Hub on loopback that drops lines, answers 500 and sends wrong bytes: whole, or a sentence."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from engine.hub import cache as hub_module
from engine.hub import download
from engine.hub.cache import FileRequest, Hub
from engine.messages import StudioError
from engine.paths import ROOT
from tests.support.hub_server import COMMIT, Fault, HubServer

LARGE = np.random.default_rng(0).bytes(3_000_000)
OTHER = np.random.default_rng(1).bytes(200_000)
REPOS = {
    "own/model": {"model.safetensors": LARGE, "config.json": b'{"a": 1}', "sub/other.safetensors": OTHER},
    "own/copy": {"same.safetensors": LARGE},
    "own/secret": {"model.safetensors": OTHER},
}
MODEL = [FileRequest("own/model", name) for name in REPOS["own/model"]]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "SPARE", 0)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(dict(REPOS), private=frozenset({"own/secret"}), token="hf_thetoken") as running:
        yield running


def hub_at(server: HubServer, folder: Path, **more: object) -> Hub:
    return Hub(folder, pause=lambda failures: 0.0, endpoint=server.endpoint, **more)  # type: ignore[arg-type]


def quiet(here: int, total: int, name: str) -> None:
    pass


def whole(hub: Hub, wanted: list[FileRequest] = MODEL) -> bool:
    found = [hub.find_local(each) for each in wanted]
    return all(p is not None and p.read_bytes() == REPOS[w.repo][w.path] for p, w in zip(found, wanted, strict=True))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".part", ".etag", ".new", ".copy")]


def test_a_plan_says_what_is_missing_before_anything_is_fetched(server: HubServer, tmp_path: Path) -> None:
    hub = hub_at(server, tmp_path)
    plan = hub.plan(MODEL)
    assert plan.bytes_to_fetch == sum(map(len, REPOS["own/model"].values())) and plan.fits
    assert server.bytes_sent == 0 and not whole(hub)
    hub.pull(MODEL, quiet)
    assert whole(hub) and hub.plan(MODEL).bytes_to_fetch == 0 and not leftovers(tmp_path)


def test_every_library_finds_what_was_pulled(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    hub_at(server, tmp_path).pull(MODEL, quiet)
    sent = server.bytes_sent
    path = hf_hub_download("own/model", "model.safetensors", cache_dir=tmp_path, endpoint=server.endpoint)
    assert Path(path).read_bytes() == LARGE and server.bytes_sent == sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hf_hub_download("own/model", "sub/other.safetensors", cache_dir=tmp_path)
    assert whole(Hub(tmp_path))  # asking what is here asks nobody


def test_a_line_that_drops_at_twenty_places_brings_every_byte_once(server: HubServer, tmp_path: Path) -> None:
    places = np.random.default_rng(2).integers(1000, 140_000, 20)
    server.faults += [Fault(drop_after=int(place)) for place in places]
    hub = hub_at(server, tmp_path)
    seen: list[int] = []
    hub.pull([MODEL[0]], lambda here, total, name: seen.append(here))
    assert whole(hub, [MODEL[0]]) and not server.faults
    assert server.bytes_sent <= 1.05 * len(LARGE)
    assert seen == sorted(seen) and seen[-1] == len(LARGE)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(server: HubServer, tmp_path: Path, status: int) -> None:
    server.faults += [Fault(status=status)] * 3
    hub = hub_at(server, tmp_path)
    hub.pull(MODEL, quiet)
    assert whole(hub)


def test_a_server_that_never_answers_well_is_given_up_with_a_sentence_and_the_next_pull_goes_on(
    server: HubServer, tmp_path: Path
) -> None:
    hub = hub_at(server, tmp_path)
    server.faults += [Fault(drop_after=1_000_000)] + [Fault(status=500)] * download.TRIES
    with pytest.raises(StudioError, match="goes on where it stopped"):
        hub.pull([MODEL[0]], quiet)
    assert hub.find_local(MODEL[0]) is None
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]]) and server.bytes_sent <= 1.05 * len(LARGE)


def test_a_wrong_byte_is_fetched_again_once_and_then_refused_with_nothing_kept(
    server: HubServer, tmp_path: Path
) -> None:
    server.faults.append(Fault(flip=True))
    hub = hub_at(server, tmp_path / "once")
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]])
    server.faults += [Fault(flip=True)] * 2
    hub = hub_at(server, tmp_path / "twice")
    with pytest.raises(StudioError, match="damaged, twice"):
        hub.pull([MODEL[0]], quiet)
    assert hub.find_local(MODEL[0]) is None and not leftovers(tmp_path)


def test_a_server_that_cannot_go_on_from_the_middle_starts_again(server: HubServer, tmp_path: Path) -> None:
    server.faults += [Fault(drop_after=500_000), Fault(no_range=True)]
    hub = hub_at(server, tmp_path)
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]])


def test_a_part_of_another_version_is_not_gone_on_from(server: HubServer, tmp_path: Path) -> None:
    """If-Range names the version; a server that has another one sends all of it."""
    server.faults += [Fault(drop_after=500_000)] + [Fault(status=500)] * download.TRIES
    hub = hub_at(server, tmp_path)
    with pytest.raises(StudioError):
        hub.pull([MODEL[0]], quiet)
    part = next(tmp_path.rglob("*.part"))
    part.write_bytes(b"x" * 500_000)
    part.with_suffix(".etag").write_text('"another"', encoding="utf-8")
    before = server.bytes_sent
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]]) and server.bytes_sent - before == len(LARGE)


def test_what_a_pull_was_stopped_by_stops_it_and_nothing_is_lost(server: HubServer, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stopping(here: int, total: int, name: str) -> None:
        if here > 1_500_000:
            raise Stop

    hub = hub_at(server, tmp_path)
    with pytest.raises(Stop):
        hub.pull([MODEL[0]], stopping)
    kept = next(tmp_path.rglob("*.part")).stat().st_size
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]]) and kept > 1_500_000
    assert server.requests[-1][2]["Range"] == f"bytes={kept}-"


def test_a_disk_that_is_too_small_is_found_out_before(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**9, 0, 1_000_000))
    with pytest.raises(StudioError, match="Free some disk space"):
        hub_at(server, tmp_path).pull(MODEL, quiet)
    assert server.bytes_sent == 0


def test_a_disk_that_fills_up_on_the_way_is_said_and_the_part_stays(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, real = hub_at(server, tmp_path), download._copy

    def full(answer, file, have, say):
        file.write(answer.read(1_000_000))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(StudioError, match="No space left"):
        hub.pull([MODEL[0]], quiet)
    assert len(server.faults) == 0 and next(tmp_path.rglob("*.part")).stat().st_size == 1_000_000
    monkeypatch.setattr(download, "_copy", real)
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]])


def test_one_blob_serves_two_files_of_a_repository_and_a_damaged_one_is_found(
    server: HubServer, tmp_path: Path
) -> None:
    server.repos["own/model"] = {**REPOS["own/model"], "again.safetensors": LARGE}
    wanted = [MODEL[0], FileRequest("own/model", "again.safetensors")]
    hub = hub_at(server, tmp_path)
    hub.pull(wanted, quiet)
    assert server.bytes_sent == len(LARGE)
    assert hub.verify(wanted, quiet) == []
    path = hub.find_local(MODEL[0])
    assert path is not None
    blob = path.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert hub.verify([MODEL[0]], quiet) == [MODEL[0]] and hub.find_local(MODEL[0]) is None


def test_two_repositories_that_hold_one_file_fetch_it_once(server: HubServer, tmp_path: Path) -> None:
    copy = FileRequest("own/copy", "same.safetensors")
    hub = hub_at(server, tmp_path)
    hub.pull([MODEL[0], copy], quiet)
    assert whole(hub, [MODEL[0], copy]) and server.bytes_sent == len(LARGE)
    later = hub_at(server, tmp_path / "later")
    later.pull([MODEL[0]], quiet)
    assert later.plan([copy]).bytes_to_fetch == 0
    later.pull([copy], quiet)
    assert whole(later, [MODEL[0], copy]) and server.bytes_sent == 2 * len(LARGE)
    later.remove([MODEL[0]], keep=[copy])
    assert whole(later, [copy]) and later.find_local(MODEL[0]) is None


def test_an_empty_file_is_a_file(server: HubServer, tmp_path: Path) -> None:
    server.repos["own/empty"] = {"__init__.py": b""}
    empty = [FileRequest("own/empty", "__init__.py")]
    paths = hub_at(server, tmp_path).pull(empty, quiet)
    assert [path.read_bytes() for path in paths] == [b""] and not leftovers(tmp_path)


def test_answers_without_a_byte_are_not_waited_for_forever(server: HubServer, tmp_path: Path) -> None:
    server.faults += [Fault(drop_after=0)] * download.TRIES
    with pytest.raises(StudioError, match="could not be fetched whole"):
        hub_at(server, tmp_path).pull([MODEL[0]], quiet)


@pytest.mark.parametrize("place", ["../../outside", "a/../../b", "/absolute", "a\\b", "c:/x", ""])
def test_a_file_or_revision_that_leads_elsewhere_is_refused(place: str) -> None:
    for names in ({"path": place}, {"path": "x", "revision": place}):
        with pytest.raises(StudioError, match="no file or revision"):
            FileRequest("own/model", **names)


def test_a_server_whose_hash_is_a_path_is_refused(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "hash_of", lambda content: "../../../outside")
    with pytest.raises(StudioError, match="not to be had"):
        hub_at(server, tmp_path).plan([MODEL[0]])


def test_files_of_another_program_are_adopted_by_their_hash_not_by_their_name(
    server: HubServer, tmp_path: Path
) -> None:
    models = tmp_path / "ComfyUI" / "models"
    models.mkdir(parents=True)
    (models / "renamed.safetensors").write_bytes(LARGE)
    (models / "other.safetensors").write_bytes(OTHER[:-1] + b"!")  # the right name and size, other bytes
    server.repos["own/model"] = {**REPOS["own/model"], "twin.safetensors": LARGE[::-1]}  # as large, other bytes
    (models / "twin.safetensors").write_bytes(LARGE[::-1])
    hub = hub_at(server, tmp_path / "cache")
    wanted = [*MODEL, FileRequest("own/model", "twin.safetensors")]
    adopted = hub.adopt(wanted, [models, tmp_path / "none"], quiet)
    assert [path.name for path in adopted] == ["renamed.safetensors", "twin.safetensors"]
    assert hub.plan(MODEL).bytes_to_fetch == len(OTHER) + len(REPOS["own/model"]["config.json"])
    assert whole(hub, [MODEL[0]]) and server.bytes_sent == 0


@pytest.mark.parametrize("links", ["of both kinds", "hard ones", "none"])
def test_removing_frees_what_it_says_and_keeps_what_another_preset_needs(
    server: HubServer, tmp_path: Path, links: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("a privilege that is not held")

    if links != "of both kinds":  # Windows, as most people have it
        monkeypatch.setattr(Path, "symlink_to", refused)
    if links == "none":  # exFAT
        monkeypatch.setattr(os, "link", refused)
    hub = hub_at(server, tmp_path)
    hub.pull(MODEL, quiet)
    assert hub.remove(MODEL, keep=[MODEL[0]]) == len(OTHER) + len(REPOS["own/model"]["config.json"])
    assert whole(hub, [MODEL[0]]) and hub.find_local(MODEL[2]) is None
    sizes = [path.stat().st_size for path in tmp_path.rglob("blobs/*") if path.suffix != ".lock"]
    assert sizes == [len(LARGE)]


def test_a_token_goes_to_the_hub_alone(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = [FileRequest("own/secret", "model.safetensors")]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(StudioError, match="private and no token"):
        hub_at(server, tmp_path).pull(secret, quiet)
    hub_at(server, tmp_path, token="hf_thetoken").pull(secret, quiet)
    for method, path, headers in server.requests:
        if path.startswith("/bytes/"):
            assert "Authorization" not in headers, method
    held = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert held and not any(b"hf_thetoken" in path.read_bytes() for path in held)


@pytest.mark.parametrize("repo", ["../outside", "own/../x", "own", "own/model/more", "own/..", "/etc/passwd", "a\\b/c"])
def test_an_id_that_is_a_path_is_refused(tmp_path: Path, repo: str) -> None:
    with pytest.raises(StudioError, match="no repository of the Hub"):
        Hub(tmp_path).plan([FileRequest(repo, "x")])


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (FileRequest("own/nothing", "x"), "no such repository"),
        (FileRequest("own/model", "nothing"), "no such file"),
        (FileRequest("own/model", "config.json", "v9"), "no revision v9"),
    ],
)
def test_what_is_not_there_is_said(server: HubServer, tmp_path: Path, wanted: FileRequest, reason: str) -> None:
    with pytest.raises(StudioError, match=reason):
        hub_at(server, tmp_path).plan([wanted])


def test_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StudioError, match="--offline"):
        hub_at(server, tmp_path).plan(MODEL)


PULL = """
import sys
from pathlib import Path
from engine.hub.cache import Hub, FileRequest
hub = Hub(Path(sys.argv[1]), pause=lambda failures: 0.1)
hub.pull([FileRequest("own/model", "model.safetensors")], lambda here, total, name: None)
"""


def pulling(server: HubServer, cache: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.Popen([sys.executable, "-c", PULL, str(cache)], cwd=ROOT, env=environment)


def test_a_pull_that_was_killed_goes_on_where_it_stopped(server: HubServer, tmp_path: Path) -> None:
    gate = threading.Event()
    server.faults.append(Fault(stall=gate))
    first = pulling(server, tmp_path)
    deadline = time.monotonic() + 60
    while server.bytes_sent < len(LARGE) // 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    while not any(p.stat().st_size > len(LARGE) // 4 for p in tmp_path.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    assert first.wait(30) in (-signal.SIGTERM, -getattr(signal, "SIGKILL", 9), 1)
    gate.set()
    hub = hub_at(server, tmp_path)
    assert hub.find_local(MODEL[0]) is None
    kept = next(tmp_path.rglob("*.part")).stat().st_size
    hub.pull([MODEL[0]], quiet)
    assert whole(hub, [MODEL[0]]) and kept > len(LARGE) // 4
    assert server.requests[-1][2]["Range"] == f"bytes={kept}-"


def test_two_processes_that_pull_the_same_file_fetch_it_once(server: HubServer, tmp_path: Path) -> None:
    gate = threading.Event()
    server.faults.append(Fault(stall=gate))
    both = [pulling(server, tmp_path) for _ in range(2)]
    deadline = time.monotonic() + 60
    while sum(method == "HEAD" for method, _, _ in server.requests) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)  # the second one would begin by now
    gate.set()
    assert [process.wait(60) for process in both] == [0, 0]
    hub = hub_at(server, tmp_path)
    assert whole(hub, [MODEL[0]]) and server.bytes_sent == len(LARGE)
    path = hub.find_local(MODEL[0])
    assert path is not None and hashlib.sha256(path.read_bytes()).hexdigest() == server.hash_of(LARGE)
    assert COMMIT in str(path)
