"""Pulls beside the page: they go on through reloads, pause, are given up, fail in words, and wait their turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.library import models
from app.library.downloads import ADD, ADOPT, Pull, Pulls
from engine.hub.cache import Hub
from engine.hub.download import TRIES
from engine.presets import Preset
from tests.light.app import test_models
from tests.light.app.test_models import REPOS, TRANSFORMER, Home
from tests.light.engine.test_download import leftovers, quiet
from tests.support.hub_server import Fault

home, one, two = test_models.home, test_models.one, test_models.two  # fixtures, by the names they have there


@pytest.fixture
def pulls(home: Home) -> Pulls:
    return Pulls(lambda token: Hub(home.cache, token, lambda failures: 0.0, home.server.endpoint))


def until(pulls: Pulls, name: str, what: Callable[[Pull], bool]) -> Pull:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (pull := pulls.of(name)) is not None and what(pull):
            return pull
        time.sleep(0.02)
    raise AssertionError(f"{name} stands at {pulls.of(name)}")


def ended(pull: Pull) -> bool:
    return not pull.busy


def test_a_pull_says_how_far_it_is_pauses_and_goes_on_where_it_stopped(home: Home, one: Preset, pulls: Pulls) -> None:
    home.server.faults.append(Fault(bytes_per_s=400_000))
    before = pulls.changes()
    pulls.fetch("one")
    seen = until(pulls, "one", lambda pull: pull.here > 300_000 and pull.seconds_left is not None)
    assert (
        seen.stage == "fetching"
        and seen.bytes_per_s > 0
        and seen.total == pytest.approx(test_models.total(one, home), rel=0.01)
    )
    assert pulls.changes() > before
    pulls.fetch("one")  # pressed twice is pulled once
    pulls.pause("one")
    assert until(pulls, "one", ended).stage == "paused" and not models.state(one, home.hub).here
    pulls.fetch("one")
    assert until(pulls, "one", ended).said == "6 files are here, each one checked."
    assert home.whole(one) and home.server.bytes_sent <= 1.05 * test_models.total(one, home)
    pulls.verify("one")
    assert "whole" in until(pulls, "one", ended).said


def test_what_is_given_up_is_taken_away_on_its_way_or_paused(home: Home, one: Preset, pulls: Pulls) -> None:
    for pause_first in (False, True):
        home.server.faults.append(Fault(bytes_per_s=400_000))
        pulls.fetch("one")
        until(pulls, "one", lambda pull: pull.here > 200_000)
        if pause_first:
            pulls.pause("one")
            until(pulls, "one", ended)
        pulls.give_up("one")
        end = time.monotonic() + 60
        while pulls.of("one") is not None and time.monotonic() < end:
            time.sleep(0.02)
        assert pulls.of("one") is None and not leftovers(home.cache) and models.state(one, home.hub).arrived == 0


def test_one_pull_waits_for_the_other_and_may_be_stopped_while_it_waits(
    home: Home, one: Preset, two: Preset, pulls: Pulls
) -> None:
    home.server.faults.append(Fault(bytes_per_s=700_000))
    pulls.fetch("one")
    until(pulls, "one", lambda pull: pull.here > 100_000)
    pulls.fetch("two")
    assert until(pulls, "two", lambda pull: True).stage == "waiting"
    pulls.pause("two")
    assert until(pulls, "two", ended).stage == "paused" and until(pulls, "one", lambda pull: True).busy
    pulls.fetch("two")
    assert until(pulls, "two", ended).stage == "done" and until(pulls, "one", ended).stage == "done"


def test_a_pull_that_fails_says_why_and_the_next_one_goes_on(home: Home, one: Preset, pulls: Pulls) -> None:
    home.server.faults += [Fault(status=500)] * TRIES
    pulls.fetch("one")
    failed = until(pulls, "one", ended)
    assert failed.stage == "failed" and failed.error is not None and "goes on" in failed.error.next_step
    pulls.fetch("one")
    assert until(pulls, "one", ended).stage == "done"
    place = one.place("transformer").resolve()
    place.write_bytes(place.read_bytes()[:-1] + b"!")
    pulls.verify("one")
    failed = until(pulls, "one", ended)
    assert failed.error is not None and "one.safetensors" in failed.error.what
    pulls.clear("one")
    assert pulls.of("one") is None


def test_a_fault_of_our_own_does_not_leave_a_bar_standing_for_ever(
    home: Home, one: Preset, pulls: Pulls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a wire came loose")

    monkeypatch.setattr(models, "plan", broken)
    pulls.fetch("one")
    failed = until(pulls, "one", ended)
    assert failed.error is not None and "a wire came loose" in failed.error.what


def test_adopting_and_adding_go_the_same_way(home: Home, one: Preset, pulls: Pulls, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x.safetensors").write_bytes(TRANSFORMER)
    pulls.adopt(tmp_path / "theirs")
    assert until(pulls, ADOPT, ended).said.startswith("Adopted: 1 (x.safetensors).")
    pulls.adopt(tmp_path / "nowhere")
    assert (failed := until(pulls, ADOPT, ended)).error is not None and "no folder" in failed.error.what
    pulls.add(" me/trained ")
    assert until(pulls, ADD, ended).said == "me-trained is added."


def test_a_token_is_held_in_memory_and_lets_private_files_in(home: Home, one: Preset, pulls: Pulls) -> None:
    home.server.private, home.server.token = frozenset({"own/one"}), "hf_asecret"
    pulls.fetch("one")
    assert until(pulls, "one", ended).stage == "failed" and not pulls.has_token
    pulls.hold_token(" hf_asecret ")
    pulls.fetch("one")
    assert until(pulls, "one", ended).stage == "done" and pulls.has_token
    assert "hf_asecret" not in f"{pulls.of('one')}"
    pulls.hold_token("")
    assert not pulls.has_token


def test_files_that_are_whole_are_not_touched_by_giving_up(home: Home, one: Preset, two: Preset, pulls: Pulls) -> None:
    models.pull(two, home.hub, quiet, judges=False)
    pulls.give_up("one")
    assert home.whole(two) and REPOS
