"""What a name on the Hub stands for, under which licence, and what only the library can bring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from engine.hub import cache as hub_module
from engine.hub.cache import FileRequest, Hub, HubUnreachable, is_file
from engine.messages import StudioError
from tests.light.engine.test_download import leftovers, quiet
from tests.support.hub_server import COMMIT, Fault, HubServer

WEIGHTS = np.random.default_rng(7).bytes(50_000)
FOLDERS = {
    "config.json": b"{}",
    "README.md": b"words",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"x" * 2000,
    "run.py": b"print()",
    "tokenizer.model": b"t" * 1500,
    "encoder/config.json": b'{"a": 2}',
    "encoder/model-00001-of-00002.safetensors": b"1" * 3000,
    "encoder/model-00002-of-00002.safetensors": b"2" * 3000,
    "encoder/model.safetensors": b"3" * 6000,
    "encoder/model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "encoder/model.fp16-00001-of-00001.safetensors": b"4" * 3000,
    "encoder/model.fp16.safetensors": b"5" * 3000,
    "half/model.fp16.safetensors": b"6" * 3000,
    "faces/one_2023.onnx": b"7" * 2000,
    "faces/one_2026.onnx": b"8" * 2000,
    "pickles/model.pth": b"9" * 2000,
    "v1.1/model.safetensors": b"a" * 2000,
}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "SPARE", 0)


@pytest.fixture
def server() -> Iterator[HubServer]:
    repos = {"own/model": dict(FOLDERS), "own/bare": {"model.safetensors": WEIGHTS}}
    with HubServer(repos, cards={"own/bare": {}}) as running:
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Hub:
    return Hub(tmp_path, pause=lambda failures: 0.0, endpoint=server.endpoint)


def paths(wanted: tuple[FileRequest, ...]) -> list[str]:
    return [each.path for each in wanted]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (
            "encoder",
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        ("half", ["model.fp16.safetensors"]),
        ("faces", ["one_2023.onnx", "one_2026.onnx"]),
        ("v1.1", ["model.safetensors"]),
    ],
)
def test_a_folder_stands_for_its_configs_and_one_set_of_weights(hub: Hub, folder: str, expected: list[str]) -> None:
    assert paths(hub.expand("own/model", folder)) == [f"{folder}/{name}" for name in expected]


def test_a_repository_stands_for_nothing_that_could_run_code(hub: Hub) -> None:
    found = paths(hub.expand("own/model"))
    assert {"config.json", "model.safetensors", "tokenizer.model", "encoder/config.json"} <= set(found)
    assert not [name for name in found if name.endswith((".bin", ".pth", ".py", ".onnx", ".md"))]


def test_a_file_that_is_named_is_taken_as_it_is_named_and_nobody_is_asked(hub: Hub, server: HubServer) -> None:
    assert paths(hub.expand("own/model", "pickles/model.pth")) == ["pickles/model.pth"]
    assert server.requests == []
    assert is_file("a/b.safetensors") and not is_file("a/v1.1") and not is_file("text_encoder") and not is_file("")


def test_a_folder_of_pickles_is_refused(hub: Hub) -> None:
    with pytest.raises(StudioError, match="carry code"):
        hub.expand("own/model", "pickles")


@pytest.mark.parametrize(("repo", "folder"), [("own/model", "nothing"), ("own/nothing", "")])
def test_a_folder_that_is_not_there_is_said(hub: Hub, repo: str, folder: str) -> None:
    with pytest.raises(StudioError, match="not to be had"):
        hub.expand(repo, folder)


@pytest.mark.parametrize("folder", ["../..", "a/../../b", "/etc"])
def test_a_folder_that_leads_elsewhere_is_refused(hub: Hub, folder: str) -> None:
    with pytest.raises(StudioError, match="no file or revision"):
        hub.expand("own/model", folder)


def test_offline_a_folder_stands_for_what_the_cache_holds(
    hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hub.expand("own/model", "encoder")
    hub.pull(wanted, quiet)
    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.expand("own/model", "encoder") == wanted and len(server.requests) == asked
    with pytest.raises(StudioError, match=r"half of own/model .* --offline"):
        hub.expand("own/model", "half")


def test_where_nobody_answers_a_folder_is_asked_for_once_since_the_library_asks_again_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    with pytest.raises(HubUnreachable, match="does not answer"):
        Hub(tmp_path, pause=lambda _: 0.0, endpoint="http://127.0.0.1:9").expand("own/model", "encoder")
    assert sum(waits) < 30


def test_the_licence_and_the_commit_are_read_off_the_card(hub: Hub) -> None:
    assert hub.licence("own/model") == ("apache-2.0", COMMIT)
    assert hub.licence("own/bare") == ("", COMMIT)


def test_a_gated_repository_says_what_to_do(hub: Hub, server: HubServer) -> None:
    server.gated = frozenset({"own/model"})
    for question in (lambda: hub.plan([FileRequest("own/model", "config.json")]), lambda: hub.expand("own/model")):
        with pytest.raises(StudioError, match=r"accept terms .* token"):
            question()


def test_a_part_that_is_given_up_is_taken_away(hub: Hub, server: HubServer, tmp_path: Path) -> None:
    wanted = [FileRequest("own/model", "model.safetensors")]
    server.faults += [Fault(drop_after=20_000)] + [Fault(status=500)] * 6
    with pytest.raises(StudioError):
        hub.pull(wanted, quiet)
    plan = hub.plan(wanted)
    assert plan.bytes_to_fetch == len(WEIGHTS) - 20_000
    assert hub.discard(plan) == 20_000 and not leftovers(tmp_path)
    assert hub.plan(wanted).bytes_to_fetch == len(WEIGHTS)


# --- Xet -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A file without a place of its own. The library is told to take it by plain HTTP: no Xet store stands here."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server.xet = frozenset({"own/model/model.safetensors"})
    return server


def test_what_is_in_the_xet_store_alone_is_known_from_the_answer_and_fetched_by_the_library(
    alone: HubServer, hub: Hub, tmp_path: Path
) -> None:
    wanted = [FileRequest("own/model", "model.safetensors"), FileRequest("own/model", "config.json")]
    plan = hub.plan(wanted)
    assert [found.xet for found in plan.files] == [True, False]
    seen: list[int] = []
    [path, _] = hub.pull(wanted, lambda here, total, name: seen.append(here))
    assert path.read_bytes() == WEIGHTS and seen[-1] == len(WEIGHTS) + 2 and not leftovers(tmp_path)
    [agent] = {h["user-agent"] for m, p, h in alone.requests if m == "GET" and p.endswith("model.safetensors")}
    assert "hf_hub" in agent  # the library's, not ours
    assert not [p for p in path.resolve().parent.iterdir() if p.suffix == ".library"]


def test_a_preset_may_say_so_beforehand(server: HubServer, hub: Hub) -> None:
    [wanted] = hub.expand("own/model", "model.safetensors", xet=True)
    assert hub.plan([wanted]).files[0].xet


def test_a_wrong_byte_from_the_library_is_found_out(alone: HubServer, hub: Hub, tmp_path: Path) -> None:
    alone.faults += [Fault(flip=True)] * 2
    with pytest.raises(StudioError, match="damaged, twice"):
        hub.pull([FileRequest("own/model", "model.safetensors")], quiet)
    assert not leftovers(tmp_path) and hub.find_local(FileRequest("own/model", "model.safetensors")) is None


def test_a_pause_ends_the_library_too(alone: HubServer, hub: Hub, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stopping(here: int, total: int, name: str) -> None:
        raise Stop

    alone.faults.append(Fault(bytes_per_s=10_000))
    with pytest.raises(Stop):
        hub.pull([FileRequest("own/model", "model.safetensors")], stopping)
    assert not list(tmp_path.rglob("*.library"))
    hub.pull([FileRequest("own/model", "model.safetensors")], quiet)
