"""A preset that names a `.pth`: pulled like any file, made into safetensors once, and never opened again."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from app.library import models
from app.library.downloads import Pulls
from app.page.tabs import models as models_tab
from engine import presets, run, tiny
from engine.hub import cache as hub_module
from engine.hub.cache import Hub
from engine.job import make_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import StudioError
from engine.presets import HubFiles, Preset
from tests.engine.hub.test_pickle_worker import Trap
from tests.light.app import test_downloads, test_models
from tests.light.app.test_downloads import ended, until
from tests.light.app.test_models import Home
from tests.light.engine.test_download import leftovers, quiet
from tests.support.hub_server import Fault
from tests.support.wan_files import in_wans_names, plain

home, pulls = test_models.home, test_downloads.pulls  # fixtures, by the names they have there
WAN = {
    "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": tiny.LATENT_CHANNELS,
    "out_channels": tiny.LATENT_CHANNELS, "text_dim": tiny.TEXT_DIM, "freq_dim": 32, "ffn_dim": 96,
}  # fmt: skip


def saved(held: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


def named(home: Home, content: bytes, name: str = "wan.pth") -> HubFiles:
    """A repository with that pickle."""
    home.server.repos["own/pickled"] = {name: content}
    return HubFiles(repo="own/pickled", path=name, num_bytes=len(content), licence="MIT")


@pytest.fixture
def small(home: Home) -> Preset:
    """Around a pickle of 2 MB."""
    return home.write("small", named(home, saved({"a": torch.randn(500_000)})))


@pytest.fixture
def large(home: Home) -> Preset:
    """Around a pickle that takes a moment to write."""
    return home.write("large", named(home, saved({f"{n}": torch.full((5_000_000,), n * 1.0) for n in range(10)})))


def blobs(home: Home) -> list[str]:
    """What lies of the pickle, by the ends of names."""
    found = (home.cache / "models--own--pickled" / "blobs").glob("*")
    return sorted(path.name.partition(".")[2].rpartition(".")[2] for path in found if path.suffix != ".lock")


def converting(home: Home) -> Path | None:
    return next(iter((home.cache / "models--own--pickled" / "blobs").glob("*.converting.new")), None)


def soon(what: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.002)
    raise AssertionError("it did not come")


# --- from the command line -------------------------------------------------------------------------------------------


def test_a_preset_whose_transformer_is_a_pth_ends_with_a_clip_made(home: Home, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder, wan = tiny.write_tiny(tmp_path / "tiny"), plain(**WAN)
    wan.save_pretrained(folder / "plain")
    pth = named(home, saved(in_wans_names(wan)))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    home.server.repos["own/tiny"] = files
    parts = {part: HubFiles(repo="own/tiny", path=part, num_bytes=9, licence="MIT")
             for part in ("vae", "text_encoder", "tokenizer")}  # fmt: skip
    toybox = presets.load("toybox").model_dump(mode="json")
    toybox |= {"name": "pth", "conditioning": "none", "max_subjects": 0, "shared_noise": 0.0, "shape": None}

    def preset(transformer: HubFiles | str) -> Preset:
        components = {"transformer": transformer, **parts}
        return Preset.model_validate({**toybox, "components": components})

    path = home.folder / "models" / "presets" / "pth.json"
    path.parent.mkdir(parents=True)
    path.write_text(preset(pth).model_dump_json(), encoding="utf-8")

    code, out, said = home.run("plan", "pth")
    assert code == 0 and "own/pickled/wan.pth (a pickle: turned into safetensors once, never loaded)" in out, said
    assert "to make safetensors of it" in out
    code, out, said = home.run("pull", "pth", "--yes")
    assert code == 0 and "pth is here" in out, said
    assert blobs(home) == ["safetensors"] and not leftovers(home.cache)
    assert home.say("verify", "pth")[1].startswith("Every file of ") and "here" in home.say("list")[1]

    def frames(made: Preset) -> np.ndarray:
        path.write_text(made.model_dump_json(), encoding="utf-8")
        job = make_job(preset="pth", prompt="rain", num_frames=5, width=32, height=32, sampling={
            "num_inference_steps": 2, "guidance_scale": 2.0})  # fmt: skip
        done = run.run(job, lambda message: None, outputs=tmp_path / "clips", pool=ModelPool(torch.device("cpu")))
        return np.stack(list(video.read_frames(done.clip)))

    assert np.array_equal(frames(preset(pth)), frames(preset(str(folder / "plain"))))


def test_it_is_fetched_and_converted_once_found_damaged_and_taken_away(home: Home, small: Preset) -> None:
    models.pull(small, home.hub, quiet, judges=False)
    made, sent = small.place("transformer").resolve(), home.server.bytes_sent
    before = made.stat().st_mtime_ns
    assert home.say("pull", "small", "--yes")[0] == 0 and "everything is here" in home.say("plan", "small")[1]
    assert home.server.bytes_sent == sent and made.stat().st_mtime_ns == before
    made.write_bytes(made.read_bytes()[:-1] + b"!")
    code, out, _ = home.say("verify", "small")
    assert code == 1 and "own/pickled/wan.pth" in out and not models.state(small, home.hub).here
    assert blobs(home) == []
    models.pull(small, home.hub, quiet, judges=False)
    assert models.state(small, home.hub).here
    assert models.removal(small, home.hub).num_bytes > 2_000_000
    assert home.say("remove", "small", "--yes")[0] == 0
    assert blobs(home) == [] and not home.hub.list_local("own/pickled", "wan.pth")


def test_code_inside_stops_with_one_sentence_and_nothing_is_left(home: Home, tmp_path: Path) -> None:
    trap = saved({"a": torch.ones(2000), "b": Trap(tmp_path / "made")})
    preset = home.write("trap", named(home, trap))
    code, out, said = home.run("pull", "trap", "--yes")
    assert code == 1 and out == "" and "Traceback" not in said
    assert "wan.pth cannot be turned into safetensors. It holds code or objects" in said.splitlines()[-1]
    assert blobs(home) == [] and not (tmp_path / "made").exists() and not models.state(preset, home.hub).here
    assert models.state(preset, home.hub).arrived == 0 and not leftovers(home.cache)


@pytest.mark.skipif(sys.platform == "win32", reason="no process can be stopped there")
@pytest.mark.parametrize("both", [True, False])
def test_what_is_killed_in_mid_conversion_leaves_nothing_half(home: Home, large: Preset, both: bool) -> None:
    pull = home.start("pull", "large", "--yes")
    half = soon(lambda: converting(home))
    [child] = psutil.Process(pull.pid).children()
    child.suspend()
    soon(lambda: child.status() == psutil.STATUS_STOPPED)  # it takes a moment where it waits for the disk
    assert half.is_file()
    os.kill(pull.pid, signal.SIGKILL)
    pull.communicate()
    assert not models.state(large, home.hub).here and models.state(large, home.hub).arrived > 0
    if both:
        child.kill()
    else:  # whoever waited for it is gone, so it ends and takes away what it wrote
        child.resume()
    soon(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert blobs(home) == (["new", "pickle"] if both else ["pickle"])
    assert not models.state(large, home.hub).here
    models.pull(large, home.hub, quiet, judges=False)
    assert models.state(large, home.hub).here and blobs(home) == ["safetensors"] and not leftovers(home.cache)
    assert home.server.bytes_sent <= 1.05 * sum(files.num_bytes for files in models.named_files(large, judges=False))


def test_two_processes_fetch_and_convert_it_once(home: Home, small: Preset) -> None:
    home.server.faults.append(Fault(bytes_per_s=500_000))  # long enough for both to have seen that it is missing
    both = [home.start("pull", "small", "--yes") for _ in range(2)]
    said = [child.communicate(timeout=120)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert blobs(home) == ["safetensors"] and not leftovers(home.cache) and models.state(small, home.hub).here
    assert home.server.bytes_sent <= 1.05 * sum(files.num_bytes for files in models.named_files(small, judges=False))


# --- from the page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_the_conversion_and_may_pause_or_give_it_up(home: Home, large: Preset, pulls: Pulls) -> None:
    for last in (False, True):
        pulls.fetch("large")
        until(pulls, "large", lambda pull: pull.file == "wan.pth, into safetensors" and converting(home) is not None)
        if last:
            pulls.give_up("large")
            soon(lambda: pulls.of("large") is None)
        else:
            pulls.pause("large")
            assert until(pulls, "large", ended).stage == "paused"
            assert blobs(home) == ["pickle"] and not converting(home)
            assert models.state(large, home.hub).arrived > 200_000_000
    assert blobs(home) == [] and not leftovers(home.cache) and models.state(large, home.hub).arrived == 0
    pulls.fetch("large")
    assert until(pulls, "large", ended).said == "6 files are here, each one checked."
    assert models.state(large, home.hub).here


def test_the_disk_has_to_hold_both_and_that_is_said_beforehand(
    home: Home, small: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, plan = models.state(small, home.hub), models.plan(small, home.hub, judges=False)
    [pth] = plan.to_convert
    assert plan.bytes_to_convert == pth.size == found.bytes_to_convert
    assert not dataclasses.replace(plan, bytes_free=plan.bytes_to_fetch + pth.size - 1).fits
    assert dataclasses.replace(plan, bytes_free=plan.bytes_to_fetch + pth.size).fits
    free = plan.bytes_to_fetch + pth.size // 2
    shown = models_tab._sizes(found, free, busy=False)
    assert "2.0 MB to make safetensors of it" in shown and 'class="disk low"' in shown
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))
    with pytest.raises(StudioError, match=r"need .* GB, and .* GB are free"):
        home.hub.pull(models.wanted(small, home.hub, judges=False), quiet)
    assert home.server.bytes_sent == 0


# --- what other programs have ----------------------------------------------------------------------------------------


def test_one_that_another_program_has_is_adopted_and_theirs_stays(home: Home, small: Preset) -> None:
    content = home.server.repos["own/pickled"]["wan.pth"]
    theirs = home.folder / "theirs"
    theirs.mkdir()
    (theirs / "renamed.pth").write_bytes(content)
    adopted, _ = models.adopt([theirs], home.hub, quiet)
    assert [path.name for path in adopted] == ["renamed.pth"] and home.server.bytes_sent == 0
    assert small.has("transformer") and blobs(home) == ["safetensors"]
    assert (theirs / "renamed.pth").read_bytes() == content


def test_one_that_lies_in_the_cache_already_is_converted_and_stays(home: Home, small: Preset) -> None:
    from huggingface_hub import hf_hub_download

    own = hf_hub_download("own/pickled", "wan.pth", cache_dir=home.cache, endpoint=home.server.endpoint)
    assert not small.has("transformer")  # a pickle is not a part
    sent = home.server.bytes_sent
    home.hub.pull([hub_module.FileRequest("own/pickled", "wan.pth")], quiet)
    assert home.server.bytes_sent == sent and small.has("transformer") and Path(own).is_file()
    models.remove(small, home.hub)
    assert not small.has("transformer") and Path(own).is_file()


def test_a_pickle_that_two_repositories_hold_is_fetched_and_converted_once(home: Home, small: Preset) -> None:
    home.server.repos["own/copy"] = {"same.pth": home.server.repos["own/pickled"]["wan.pth"]}
    wanted = [hub_module.FileRequest("own/pickled", "wan.pth"), hub_module.FileRequest("own/copy", "same.pth")]
    paths = Hub(home.cache, endpoint=home.server.endpoint).pull(wanted, quiet)
    assert len({path.read_bytes() for path in paths}) == 1 and all(home.hub.find_local(each) for each in wanted)
    assert home.server.bytes_sent == len(home.server.repos["own/copy"]["same.pth"])
