"""The verb `models` as a person types it, against a Hub on loopback; and what it stands on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from app import cli
from app.library import add_model, models
from engine import presets
from engine.hub import cache as hub_module
from engine.hub.cache import Hub
from engine.messages import StudioError
from engine.paths import ROOT
from engine.presets import HubFiles, Preset
from tests.light.engine.test_download import leftovers, quiet
from tests.support.hub_server import COMMIT, Fault, HubServer

RNG = np.random.default_rng(11)
TRANSFORMER, ENCODER = RNG.bytes(2_000_000), RNG.bytes(400_000)
CONFIG = json.loads((ROOT / "assets" / "toybox" / "transformer" / "config.json").read_text(encoding="utf-8"))
PLAIN = {**CONFIG, "_class_name": "WanTransformer3DModel", "identity_layers": 0}
REPOS = {
    "own/wan": {
        "vae/config.json": b"{}",
        "vae/model.safetensors": RNG.bytes(20_000),
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors": ENCODER,
        "tokenizer/tokenizer.json": b'{"t": 1}',
    },
    "own/one": {"one.safetensors": TRANSFORMER},
    "own/half": {"half.safetensors": RNG.bytes(200_000), "other.safetensors": RNG.bytes(210_000)},
    "own/two": {"two.safetensors": RNG.bytes(30_000)},
    "own/yunet": {"face_detection_yunet_2026.onnx": RNG.bytes(3_000)},
    "own/sface": {"face_recognition_sface_2021.onnx": RNG.bytes(4_000)},
    "me/trained": {
        "transformer/config.json": json.dumps(CONFIG).encode(),
        "transformer/diffusion_pytorch_model.safetensors": RNG.bytes(5_000),
        "transformer/optimizer.pt": b"x" * 2_000,
    },
    "me/pickled": {"transformer/config.json": json.dumps(PLAIN).encode(), "transformer/model.bin": b"x" * 2_000},
    "me/other": {"transformer/config.json": b'{"_class_name": "UNet"}', "transformer/a.safetensors": b"x" * 2_000},
    "me/flat": {"model.safetensors": b"x" * 2_000, "config.json": b"{}"},
}


# A check that is started in the background hands on that Ctrl-C is to be ignored; a terminal does not.
AS_IN_A_TERMINAL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from app import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@dataclass
class Home:
    """A cache, a folder of models with presets of its own, and a Hub to fetch from."""

    folder: Path
    server: HubServer
    heard: pytest.CaptureFixture[str]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def hub(self) -> Hub:
        return Hub(self.cache, pause=lambda failures: 0.0, endpoint=self.server.endpoint)

    def write(
        self, name: str, transformer: HubFiles | str, *, text_encoder: HubFiles | None = None, **more: object
    ) -> Preset:
        """A preset of that name around the shared encoder, or around one of its own."""

        def files(path: str, repo: str = "own/wan") -> dict[str, object]:
            size = sum(len(c) for n, c in REPOS[repo].items() if n.startswith(path))
            return {"repo": repo, "path": path, "num_bytes": size, "licence": "Apache-2.0"}

        made = presets.load("toybox").model_dump(mode="json")
        parts = {part: files(part) for part in ("vae", "text_encoder", "tokenizer")}
        parts |= {"text_encoder": text_encoder.model_dump()} if text_encoder else {}
        named = transformer if isinstance(transformer, str) else transformer.model_dump()
        faces = [files("", "own/yunet"), files("", "own/sface")]
        made |= {"name": name, "title": name.title(), "components": {"transformer": named, **parts, "faces": faces}}
        path = self.folder / "models" / "presets" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**made, **more}), encoding="utf-8")
        return presets.load(name)

    def say(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr of the verb in this process."""
        code = cli.main(["models", *words])
        return code, *self.heard.readouterr()

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        given = {
            **os.environ, "HF_ENDPOINT": self.server.endpoint, "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "0",
            "IDCRAFTER_MODELS": str(self.folder / "models"), "PYTHONUTF8": "1", **environment,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", AS_IN_A_TERMINAL, "models", *words], cwd=ROOT, env=given, encoding="utf-8",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        child = self.start(*words, **environment)
        out, said = child.communicate(timeout=120)
        return child.returncode, out, said

    def whole(self, preset: Preset, *, judges: bool = False) -> bool:
        hub = self.hub
        wanted = models.wanted(preset, hub, judges=judges)
        found = {each: hub.find_local(each) for each in wanted}
        return all(path is not None and path.read_bytes() == REPOS[w.repo][w.path] for w, path in found.items())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Home]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_module, "SPARE", 0)
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer({name: dict(files) for name, files in REPOS.items()}, cards={"me/flat": {}}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield Home(tmp_path, server, capsys)


@pytest.fixture
def one(home: Home) -> Preset:
    return home.write("one", HubFiles(repo="own/one", path="one.safetensors", num_bytes=2_000_000, licence="MIT"))


@pytest.fixture
def two(home: Home, one: Preset) -> Preset:
    return home.write("two", HubFiles(repo="own/two", path="two.safetensors", num_bytes=30_000, licence="MIT"))


def total(preset: Preset, home: Home, *, judges: bool = False) -> int:
    return sum(len(REPOS[w.repo][w.path]) for w in models.wanted(preset, home.hub, judges=judges))


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_shape_that_toybox_names_is_its_configs() -> None:
    vae = json.loads((ROOT / "assets" / "toybox" / "vae" / "config.json").read_text(encoding="utf-8"))
    shape = presets.load("toybox").shape
    assert shape == add_model._shape(CONFIG, "toybox", shape)
    assert shape is not None and (shape.vae_spatial, shape.z_dim) == (vae["scale_factor_spatial"], vae["z_dim"])


@pytest.mark.parametrize("name", [name for name in presets.names() if name != "toybox"])
def test_an_open_checkpoint_names_its_files_licences_shape_and_every_default(name: str) -> None:
    preset = presets.load(name)
    assert preset.shape is not None and preset.shape.dim == 128 * preset.shape.num_heads
    own = preset.sampling.model_dump(exclude={"final_sigma"})  # left out: the steps lead down to no noise
    assert all(value is not None for value in own.values())
    assert all(files.licence and files.num_bytes for own in preset.downloads().values() for files in own)
    text = preset.downloads()["text_encoder"][0]
    assert text == presets.load("wan-1.3b").downloads()["text_encoder"][0]  # fetched once for all of them
    assert text.num_bytes < 12e9 and all(each.licence and each.num_bytes for each in text.alternatives)
    assert preset.mention == {"identity": "slot", "sources": "image"}.get(preset.conditioning, "noun")
    assert all(size.width % preset.size_multiple == 0 == size.height % preset.size_multiple for size in preset.sizes)
    assert preset.size_multiple == preset.shape.vae_spatial * preset.shape.patch[1]


# --- pulling ---------------------------------------------------------------------------------------------------------


def test_a_plan_names_every_file_and_fetches_nothing(home: Home, one: Preset) -> None:
    code, out, _ = home.say("plan", "one")
    assert code == 0 and home.server.bytes_sent == 0
    assert "own/one/one.safetensors" in out and "own/wan/text_encoder/model.safetensors" in out
    assert "missing" in out and "to fetch" in out and "free" in out and "own/yunet" not in out


def test_a_pull_survives_twenty_cuts_busy_servers_and_a_wrong_byte(home: Home, one: Preset) -> None:
    places = np.random.default_rng(3).integers(1_000, 90_000, 20)
    kinds = [Fault(drop_after=int(place)) for place in places]
    home.server.faults += [
        *kinds[:7],
        Fault(status=500),
        *kinds[7:13],
        Fault(status=429),
        Fault(status=503),
        *kinds[13:],
    ]
    code, out, said = home.run("pull", "one", "--yes")
    assert (code, home.server.faults) == (0, []), said
    assert "checked" in out and home.whole(one) and not leftovers(home.cache)
    assert home.server.bytes_sent <= 1.05 * total(one, home)
    home.server.faults.append(Fault(flip=True))
    other = home.write("two", HubFiles(repo="own/two", path="two.safetensors", num_bytes=30_000, licence="MIT"))
    assert home.run("pull", "two", "--yes")[0] == 0 and home.whole(other)


def test_a_server_that_lies_twice_or_stays_dead_is_one_sentence_and_nothing_corrupt_is_left(
    home: Home, one: Preset
) -> None:
    home.server.faults += [Fault(flip=True)] * 2
    code, out, said = home.say("pull", "one", "--yes")
    assert code == 1 and "damaged, twice" in said.splitlines()[-1] and out == ""
    assert not models.state(one, home.hub).here and not leftovers(home.cache)
    with pytest.raises(StudioError):
        presets.check_files(one)


def test_a_pull_that_is_killed_goes_on_where_it_stopped(home: Home, one: Preset) -> None:
    home.server.faults.append(Fault(bytes_per_s=400_000))
    first = home.start("pull", "one", "--yes")
    end = time.monotonic() + 90
    while home.server.bytes_sent < 600_000 and time.monotonic() < end:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    left = models.state(one, home.hub)
    assert left.arrived > 0 and not left.here
    code, _, said = home.run("pull", "one", "--yes")
    assert code == 0 and home.whole(one) and not leftovers(home.cache), said
    assert home.server.bytes_sent <= 1.05 * total(one, home)


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C cannot be sent to one process there")
def test_ctrl_c_pauses_and_says_so(home: Home, one: Preset) -> None:
    home.server.faults.append(Fault(bytes_per_s=300_000))
    child = home.start("pull", "one", "--yes")
    end = time.monotonic() + 90
    while home.server.bytes_sent < 300_000 and time.monotonic() < end:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "Paused. The same command goes on where it stopped." in said
    assert "Traceback" not in said


def test_two_processes_that_pull_one_preset_fetch_each_byte_once(home: Home, one: Preset) -> None:
    home.server.faults.append(Fault(bytes_per_s=1_000_000))
    both = [home.start("pull", "one", "--yes") for _ in range(2)]
    said = [child.communicate(timeout=120)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert home.whole(one) and not leftovers(home.cache)
    assert home.server.bytes_sent <= 1.05 * total(one, home)


FULL = """
import resource, sys
from app import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(cli.main(["models", "pull", "one", "--yes"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_stops_a_pull_with_one_sentence_and_room_lets_it_go_on(home: Home, one: Preset) -> None:
    home.server.faults.append(Fault(bytes_per_s=300_000))  # or the socket would hold what no disk has seen
    child = subprocess.run(
        [sys.executable, "-c", FULL], cwd=ROOT, encoding="utf-8", capture_output=True, check=False, timeout=120,
        env={**os.environ, "HF_ENDPOINT": home.server.endpoint, "HF_HUB_CACHE": str(home.cache),
             "HF_HUB_OFFLINE": "0", "IDCRAFTER_MODELS": str(home.folder / "models")},
    )  # fmt: skip
    assert child.returncode == 1 and "could not be fetched whole" in child.stderr.splitlines()[-1], child.stderr
    assert "Traceback" not in child.stderr and not models.state(one, home.hub).here
    assert home.run("pull", "one", "--yes")[0] == 0 and home.whole(one)
    assert home.server.bytes_sent <= 1.05 * total(one, home)


def test_a_pull_without_a_terminal_wants_a_yes_and_fetches_nothing(home: Home, one: Preset) -> None:
    code, out, said = home.say("pull", "one")
    assert code == 1 and "--yes" in said and home.server.bytes_sent == 0 and out == ""


def test_the_networks_that_judge_are_fetched_when_asked_for_and_gathered_in_one_folder(home: Home, one: Preset) -> None:
    assert models.pull(one, home.hub, quiet, judges=False) == 6
    assert not one.has("faces")
    models.pull(one, home.hub, quiet, judges=True)
    names = sorted(path.name for path in one.place("faces").iterdir())
    assert names == ["face_detection_yunet_2026.onnx", "face_recognition_sface_2021.onnx"]
    assert one.has("faces") and models.state(one, home.hub).judges


# --- what serves as well ---------------------------------------------------------------------------------------------


HALF, OTHER = (
    HubFiles(repo="own/half", path=f"{name}.safetensors", num_bytes=size, licence="MIT")
    for name, size in (("half", 200_000), ("other", 210_000))
)
WHOLE = HubFiles(repo="own/wan", path="text_encoder", num_bytes=400_002, licence="MIT")


@pytest.fixture
def three(home: Home) -> Preset:
    """With a text encoder of half the size; the whole one and another half one serve as well."""
    half = HALF.model_copy(update={"alternatives": (WHOLE, OTHER)})
    named = HubFiles(repo="own/two", path="two.safetensors", num_bytes=30_000, licence="MIT")
    return home.write("three", named, text_encoder=half)


def test_where_nothing_is_here_the_first_of_what_serves_is_fetched(home: Home, three: Preset) -> None:
    code, _, said = home.say("pull", "three", "--yes")
    assert code == 0 and home.whole(three) and "own/half" in said
    assert [each.name for each in home.cache.glob("models--*") if "half" in each.name] == ["models--own--half"]
    assert three.place("text_encoder").name == "half.safetensors"
    assert not home.hub.list_local("own/wan", "text_encoder") and not home.hub.list_local(
        "own/half", "other.safetensors"
    )


def test_what_serves_as_well_and_is_here_is_used_and_nothing_is_fetched_for_it(
    home: Home, one: Preset, three: Preset
) -> None:
    assert "text_encoder" in str(models.state(three, home.hub).to_fetch)
    models.pull(one, home.hub, quiet, judges=False)
    assert models.state(three, home.hub).bytes_to_fetch == 30_000
    assert three.place("text_encoder") == one.place("text_encoder") and three.place("text_encoder").is_dir()
    sent = home.server.bytes_sent
    code, out, _ = home.say("plan", "three")
    assert code == 0 and "own/half" not in out and "own/wan/text_encoder/model.safetensors" in out
    models.pull(three, home.hub, quiet, judges=False)
    assert home.server.bytes_sent - sent == 30_000 and home.whole(three)
    assert home.say("verify", "three")[0] == 0
    assert models.removal(three, home.hub).kept_for == ("One",)
    models.remove(one, home.hub)  # what Three needs of it stays
    assert home.whole(three) and models.state(three, home.hub).here


def test_half_of_what_serves_as_well_is_not_it(home: Home, one: Preset, three: Preset) -> None:
    models.pull(one, home.hub, quiet, judges=False)
    (one.place("text_encoder") / "model.safetensors").unlink()
    assert three.place("text_encoder").name == "half.safetensors" and not three.has("text_encoder")


def test_the_first_wins_where_both_are_here_and_removing_takes_both(home: Home, one: Preset, three: Preset) -> None:
    home.hub.pull([hub_module.FileRequest(HALF.repo, HALF.path)], quiet)
    models.pull(one, home.hub, quiet, judges=False)
    models.pull(three, home.hub, quiet, judges=False)
    assert three.place("text_encoder").name == "half.safetensors"
    (home.folder / "models" / "presets" / "one.json").unlink()
    models.remove(three, home.hub)
    assert not home.hub.list_local(WHOLE.repo, WHOLE.path) and not home.hub.list_local(HALF.repo, HALF.path)


@pytest.mark.parametrize("best", ["half.safetensors", "text_encoder", "other.safetensors"])
def test_of_what_serves_as_well_the_first_that_another_program_has_is_adopted(
    home: Home, three: Preset, best: str
) -> None:
    theirs = home.folder / "theirs"
    theirs.mkdir()
    (theirs / "3.bin").write_bytes(REPOS["own/half"]["other.safetensors"])
    if best != "other.safetensors":
        (theirs / "2.bin").write_bytes(ENCODER)
        (theirs / "2.json").write_bytes(b"{}")
    if best == "half.safetensors":
        (theirs / "1.bin").write_bytes(REPOS["own/half"]["half.safetensors"])
    adopted, _ = models.adopt([theirs], home.hub, quiet)
    kept = {"half.safetensors": "1.bin", "text_encoder": "2.bin", "other.safetensors": "3.bin"}[best]
    assert [path.name for path in adopted if path.suffix == ".bin"] == [kept]
    assert three.has("text_encoder") and three.place("text_encoder").name == best


# --- licences, tokens, offline ---------------------------------------------------------------------------------------


def test_files_under_no_licence_are_refused_until_a_person_goes_on_without(home: Home) -> None:
    home.server.cards["own/two"] = {}
    bare = home.write("bare", HubFiles(repo="own/two", path="two.safetensors", num_bytes=30_000))
    code, _, said = home.say("pull", "bare", "--yes")
    assert code == 1 and "own/two names no licence." in said and home.server.bytes_sent == 0
    assert home.say("pull", "bare", "--yes", "--accept-no-licence")[0] == 0 and home.whole(bare)


def test_a_token_comes_from_the_environment_and_goes_nowhere(
    home: Home, one: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.server.private, home.server.token = frozenset({"own/one"}), "hf_asecret"
    code, out, said = home.say("pull", "one", "--yes")
    assert code == 1 and "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_asecret")
    code, out, said = home.say("pull", "one", "--yes")
    assert code == 0 and "hf_asecret" not in out + said
    held = [path for path in home.folder.rglob("*") if path.is_file()]
    assert not [path for path in held if b"hf_asecret" in path.read_bytes()]


def test_offline_lists_and_removes_and_says_why_it_does_not_fetch(
    home: Home, one: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.pull(one, home.hub, quiet, judges=False)
    asked = len(home.server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as --offline does for a process that has just begun
    code, out, said = home.say("list", "--offline")
    row = next(line for line in out.splitlines() if line.startswith("one "))
    assert code == 0 and re.search(r"one\s+here\s+-\s", row) and "list and remove work" in said
    code, _, said = home.say("pull", "one", "--yes", "--offline")
    assert code == 1 and "--offline" in said and len(home.server.requests) == asked
    assert home.say("remove", "one", "--yes", "--offline")[0] == 0 and not models.state(one, home.hub).here


# --- verify, remove, adopt -------------------------------------------------------------------------------------------


def test_a_damaged_file_is_found_taken_away_and_fetched_again(home: Home, one: Preset) -> None:
    models.pull(one, home.hub, quiet, judges=False)
    assert home.say("verify", "one")[:2] == (0, "Every file of One is whole.\n")
    place = one.place("transformer").resolve()
    place.write_bytes(place.read_bytes()[:-1] + b"!")
    code, out, _ = home.say("verify", "one")
    assert code == 1 and "own/one/one.safetensors" in out and not models.state(one, home.hub).here
    assert home.say("pull", "one", "--yes")[0] == 0 and home.whole(one)


def test_removing_keeps_what_another_preset_here_needs_and_says_so(home: Home, one: Preset, two: Preset) -> None:
    for preset in (one, two):
        models.pull(preset, home.hub, quiet, judges=True)
    found = models.removal(one, home.hub)
    assert found.num_bytes == len(TRANSFORMER) and found.kept_for == ("Two",)
    code, _, said = home.say("remove", "one", "--yes")
    assert code == 0 and "What Two needs too stays." in said
    assert home.whole(two, judges=True) and two.has("faces") and not models.state(one, home.hub).here
    models.remove(two, home.hub)
    assert not models.state(two, home.hub).here and not two.has("faces")
    assert not [path for path in home.cache.glob("*/blobs/*") if path.suffix != ".lock"]


def test_shared_files_are_fetched_once(home: Home, one: Preset, two: Preset) -> None:
    models.pull(one, home.hub, quiet, judges=False)
    sent = home.server.bytes_sent
    assert models.state(two, home.hub).bytes_to_fetch == 30_000
    models.pull(two, home.hub, quiet, judges=False)
    assert home.server.bytes_sent - sent == 30_000


def test_what_other_programs_fetched_is_adopted(home: Home, one: Preset) -> None:
    comfy = home.folder / "ComfyUI" / "models" / "diffusion_models"
    comfy.mkdir(parents=True)
    (comfy / "renamed.safetensors").write_bytes(TRANSFORMER)
    cache = home.folder / "elsewhere"
    models.pull(one, Hub(cache, endpoint=home.server.endpoint), quiet, judges=False)
    (cache / "models--own--one").rename(cache / "models--gone")
    sent = home.server.bytes_sent
    code, out, said = home.say("adopt", str(comfy.parent), str(cache))
    assert code == 0 and "renamed.safetensors" in out, said
    assert home.server.bytes_sent - sent == 0 and home.whole(one) and models.state(one, home.hub).here
    assert home.say("adopt", str(home.folder / "nowhere"))[0] == 1


def test_adopting_ends_with_the_first_question_that_nobody_answers(
    home: Home, one: Preset, two: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def silent(_: Hub, repo: str, *__: object, **___: object) -> None:
        asked.append(repo)
        raise hub_module.HubUnreachable("It is not to be had.", "The Hub does not answer.", "Try again.")

    monkeypatch.setattr(Hub, "expand", silent)
    code, _, said = home.say("adopt", str(home.folder))
    assert code == 1 and "does not answer" in said and len(asked) == 1


def test_two_that_need_the_rest_are_told_apart_although_titles_have_commas() -> None:
    assert models.Removal((), 0, ()).kept == ""
    kept = models.Removal((), 0, ("VACE, 1.3B", "Wan, 14B", "Toybox")).kept
    assert kept == " What VACE, 1.3B; Wan, 14B and Toybox need too stays."


def test_a_page_that_a_sentence_names_ends_before_the_comma_after_it(home: Home, one: Preset) -> None:
    own = home.write("own", "nowhere", source="https://example.org/model; its encoder another's")
    assert models.link(own) == "https://example.org/model"


# --- adding ----------------------------------------------------------------------------------------------------------


def test_a_repository_that_this_studio_trained_becomes_a_preset(home: Home) -> None:
    code, out, said = home.say("add", "me/trained")
    assert code == 0 and "me-trained is added (identity)" in out, said
    preset = presets.load("me-trained")
    [files] = preset.downloads()["transformer"]
    assert (files.revision, files.path) == (COMMIT, "transformer") and preset.shape == presets.load("toybox").shape
    assert preset.components.vae == presets.load("toybox").components.vae  # what it does not bring
    assert not models.state(preset, home.hub).here
    assert home.say("pull", "me-trained", "--yes")[0] == 0 and models.state(preset, home.hub).here
    assert "optimizer.pt" not in str(list(home.cache.rglob("*.pt")))
    assert home.say("add", "me/trained")[0] == 0  # once more is no fault
    models.forget(preset)
    assert "me-trained" not in presets.names()


@pytest.mark.parametrize(
    ("repo", "reason"),
    [
        ("me/pickled", "safetensors"),
        ("me/other", "UNet"),
        ("me/flat", "no licence"),
        ("me/nobody", "^me/nobody is not to be had.*no such repository"),
        ("../outside", "no repository of the Hub"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_sentence_and_leaves_no_preset(
    home: Home, repo: str, reason: str
) -> None:
    with pytest.raises(StudioError, match=reason):
        add_model.add(repo, home.hub)
    assert not list((home.folder / "models").rglob("*.json"))


def test_a_preset_that_came_along_cannot_be_forgotten_or_shadowed(home: Home, one: Preset) -> None:
    with pytest.raises(StudioError, match="came with the studio"):
        models.forget(presets.load("toybox"))
    home.write("toybox", "nowhere")
    assert presets.load("toybox").components.transformer == "assets/toybox/transformer"
    (home.folder / "models" / "presets" / "broken.json").write_text("{", encoding="utf-8")
    assert [preset.name for preset in presets.list_readable()][-1] == "one"
    with pytest.raises(StudioError, match="cannot be read"):
        presets.load("broken")
    code, out, said = home.say("list")
    assert code == 0 and "broken" in said and "one" in out


def test_a_speed_is_that_of_the_last_seconds() -> None:
    now = [0.0]
    speed = models.Speed(lambda: now[0])
    assert speed.seconds_left(100) is None
    for second in range(31):
        now[0] = float(second)
        speed.see(second * 10 if second < 15 else 150 + (second - 15) * 100)
    assert speed.bytes_per_s == pytest.approx(100)
    assert speed.seconds_left(1650 + 500) == pytest.approx(5)
