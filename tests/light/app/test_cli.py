"""The command line: what it refuses and how it says so. The real program in real processes; nothing needs torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from app import cli, settings
from engine.messages import StudioError
from engine.paths import ROOT


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a picture, documents good and bad, and files that are not what they are called."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "fox.png")
    document = {"version": 2, "prompt": "a beach", "seed": 3}
    (tmp_path / "good.json").write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "newer.json").write_text(json.dumps({**document, "version": 99}), encoding="utf-8")
    (tmp_path / "unknown.json").write_text(json.dumps({**document, "colour": "red"}), encoding="utf-8")
    (tmp_path / "huge.json").write_text(json.dumps({**document, "num_frames": 10**30}), encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.mp4").write_text("not a clip", encoding="utf-8")
    (tmp_path / "a folder").mkdir()
    return tmp_path


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a person would see."""
    clean = {key: value for key, value in os.environ.items() if key != "IDCRAFTER_AUTH"}
    clean |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment}
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, env=clean, check=False, timeout=60)


REFUSED = {
    "nothing to make": ("generate", "There is nothing to make."),
    "an empty prompt": ("generate --prompt=", "The prompt is empty."),
    "an unknown option": ("generate --foo", "--foo"),
    "a seed that is no number": ("generate --prompt x --seed seven", "--seed"),
    "80 frames": ("generate --prompt x --frames 80", "Use 77 or 81."),
    "too many frames": ("generate --prompt x --frames 1021", "1021 frames are too many"),
    "a size that does not fit": ("generate --prompt x --size 500x64", "500"),
    "a size in words": ("generate --prompt x --size large", "--size 64x64"),
    "no steps": ("generate --prompt x --steps 0", "at least 1"),
    "an unknown word for what is left out": ("generate --prompt x --cache sometimes", "'careful'"),
    "unknown attention kernels": ("generate --prompt x --attention magic", "There is no attention called 'magic'."),
    "a device that is none": ("--devices cuda:0,gpu1", "There is no device 'gpu1'."),
    "an unknown preset": ("generate --prompt x --preset sora", "There is no preset called 'sora'."),
    "a subject that is never mentioned": ("generate --prompt x --subject fox=fox.png", "never mentions @fox"),
    "a mention without a subject": ("generate --prompt @fox", "no such subject"),
    "a subject without a picture": ("generate --prompt @fox --subject fox", "fox=fox.png"),
    "a picture that is not there": ("generate --prompt @fox --subject fox=nothing.png", "There is no picture"),
    "a text called png": ("generate --prompt @fox --subject fox=text.png", "text.png"),
    "an empty picture": ("generate --prompt @fox --subject fox=empty.png", "empty.png is empty."),
    "four pictures of one subject": ("generate --prompt @fox --subject fox=" + ",".join(["fox.png"] * 4), "At most 3"),
    "nine subjects": (
        "generate --prompt "
        + "".join(f"@s{i}" for i in range(9))
        + "".join(f" --subject s{i}=fox.png" for i in range(9)),
        "At most 8",
    ),
    "a document that is not there": ("generate nothing.json", "There is no file"),
    "a document that is not JSON": ("generate broken.json", "not valid JSON"),
    "a document of a newer studio": ("generate newer.json", "version 99"),
    "a document with an unknown key": ("generate unknown.json", "'colour'"),
    "a document with a huge number": ("generate huge.json", "The number of frames is"),
    "a text called mp4": ("generate text.mp4", "text.mp4"),
    "a folder as a document": ("generate .", "There is no file"),
    "an out that is no mp4": ("generate good.json --out clip.avi", "--out clip.mp4"),
    "an out in no folder": ("generate good.json --out nowhere/clip.mp4", "There is no folder"),
    "--listen without a password": ("--listen", "--listen needs a password."),
    "--share without a password": ("--share", "--share needs a password."),
    "half a password": ("--listen --auth me", "USER:PASS"),
    "a port that does not exist": ("--port 99999", "65535"),
    "a port that is no number": ("--port seven", "--port"),
    "a misspelt verb": ("generat", "python launch.py generate"),
    "a clip where a verb belongs": ("clip.mp4", "python launch.py generate clip.mp4"),
}


@pytest.fixture
def standing_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(here)
    monkeypatch.delenv("IDCRAFTER_AUTH", raising=False)
    return here


@pytest.mark.parametrize(("line", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_gets_one_line_and_no_traceback(
    line: str, part: str, standing_here: Path, capfd: pytest.CaptureFixture[str]
):
    before = sorted(standing_here.iterdir())
    assert cli.main(line.split()) in (1, 2)
    said = capfd.readouterr()
    assert said.out == ""
    [sentence] = said.err.splitlines()
    assert part in sentence
    assert sentence.endswith((".", "?")) and sentence.count(". ") >= 1  # it says more than what is wrong
    assert sorted(standing_here.iterdir()) == before


@pytest.mark.parametrize("line", ["generate newer.json", "generat", "--share"])
def test_the_same_holds_of_the_process_itself(line: str, here: Path):
    answer = run(*line.split(), cwd=here)
    assert answer.returncode in (1, 2)
    assert (answer.stdout, len(answer.stderr.splitlines())) == ("", 1)


def test_a_taken_port_is_refused_with_the_next_free_one(tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        answer = run("--port", str(port), cwd=tmp_path)
    assert answer.returncode == 1
    [sentence] = answer.stderr.splitlines()
    assert f"Port {port} cannot be used." in sentence
    offered = int(sentence.rsplit("--port ", 1)[1].rstrip("."))
    assert offered > port and settings.is_free("127.0.0.1", offered)


def test_the_password_comes_from_the_environment_or_an_option_and_may_hold_colons():
    environment = {"IDCRAFTER_AUTH": "me:a:b"}
    assert cli.studio_settings(["--listen", "--port", "7899"], environment).auth == ("me", "a:b")
    assert cli.studio_settings(["--listen", "--port", "7899", "--auth", "you:c"], environment).auth == ("you", "c")


def test_the_studio_listens_to_this_machine_alone_unless_told():
    assert cli.studio_settings(["--port", "7899"], {}).host == "127.0.0.1"
    assert cli.studio_settings(["--port", "7899", "--listen", "--auth", "a:b"], {}).host == "0.0.0.0"


def test_the_password_is_not_printed_with_the_settings():
    assert "secret" not in repr(settings.Settings(auth=("me", "secret")))


def test_a_browser_opens_only_where_there_is_a_screen():
    assert settings.has_screen({}, "win32") and settings.has_screen({"DISPLAY": ":0"}, "linux")
    assert not settings.has_screen({}, "linux")
    assert not settings.has_screen({"SSH_CONNECTION": "x", "DISPLAY": ":0"}, "linux")


def test_options_override_the_document(here: Path, monkeypatch: pytest.MonkeyPatch):
    from app.verbs import generate

    line = [
        "good.json",
        "--seed",
        "9",
        "--frames",
        "9",
        "--size",
        "32x48",
        "--steps",
        "4",
        "--prompt",
        "@fox",
        "--subject",
    ]
    monkeypatch.chdir(here)
    job = generate.read_given(cli.generate_parser().parse_args([*line, "fox=fox.png"]))
    assert (job.seed, job.num_frames, job.width, job.height) == (9, 9, 32, 48)
    assert (job.sampling.num_inference_steps, job.prompt, job.preset) == (4, "@fox", "toybox")
    [picture] = job.subjects[0].pictures
    assert Path(picture.path) == (here / "fox.png").resolve()


def test_a_picture_may_have_a_comma_in_its_name(here: Path):
    from app.verbs import generate

    both = here / "red,blue.png"
    Image.new("RGB", (8, 8)).save(both)
    assert generate.read_subject(f"@Fox={both}") == ("fox", [{"path": str(both.resolve())}])
    assert len(generate.read_subject(f"fox={here / 'fox.png'},{here / 'fox.png'}")[1]) == 2


def test_a_fault_of_ours_is_one_line_and_its_traceback_is_kept(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("a wire came loose")

    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setitem(cli.RUN, "bench", broken)
    assert cli.main(["bench"]) == 1
    [sentence] = capsys.readouterr().err.splitlines()
    [kept] = (tmp_path / "outputs" / ".studio" / "logs").iterdir()
    assert "RuntimeError: a wire came loose" in sentence and str(kept) in sentence
    assert "Traceback" in kept.read_text(encoding="utf-8")


def test_a_full_disk_is_the_machines_fault_not_ours():
    assert "Free some disk space" in cli.as_sentence(OSError(28, "No space left on device", "clip.mp4"))
    assert cli.as_sentence(StudioError("A.", "B.", "C.")) == "A. B. C."


@pytest.mark.parametrize("verb", ["", "generate", "doctor"])
def test_help_is_friendly(verb: str, tmp_path: Path):
    answer = run(*verb.split(), "--help", cwd=tmp_path)
    assert answer.returncode == 0
    assert answer.stdout.startswith(f"usage: python launch.py {verb}".strip())


def test_no_library_may_call_home(monkeypatch: pytest.MonkeyPatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name)
    cli.keep_private()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "1"
