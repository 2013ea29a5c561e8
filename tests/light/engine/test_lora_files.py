"""LoRA files by name, by hash and across machines, without opening one."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import lora_files
from engine.job import GenerateJob, make_job
from engine.messages import StudioError


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of LoRAs with three files, one of them in a subfolder."""
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "models"))
    folder = tmp_path / "models" / "loras"
    for name in ("style.safetensors", "wan/Motion.safetensors", ".hidden.safetensors", "readme.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def job(*loras: dict) -> GenerateJob:
    return make_job(prompt="a beach", loras=loras)


def refused(made: GenerateJob) -> StudioError:
    with pytest.raises(StudioError) as error:
        lora_files.locate(made.loras)
    assert error.value.field == "loras"
    return error.value


def test_the_folder_is_listed_with_its_subfolders_and_nothing_else(shelf: Path) -> None:
    assert lora_files.names() == ["style.safetensors", "wan/Motion.safetensors"]


def test_a_folder_that_is_not_there_is_an_empty_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDCRAFTER_MODELS", str(tmp_path / "nowhere"))
    assert lora_files.names() == []


def test_a_name_its_path_and_the_bare_name_of_a_file_in_a_subfolder_mean_the_same_file(shelf: Path) -> None:
    paths = ("wan/Motion.safetensors", str(shelf / "wan" / "Motion.safetensors"), "Motion.safetensors")
    hashes = {lora.sha256 for path in paths for lora in lora_files.locate(job({"path": path}).loras)}
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_a_hash_is_filled_in_and_a_changed_file_is_refused_with_name_and_both_beginnings(shelf: Path) -> None:
    [found] = lora_files.locate(job({"path": "style.safetensors"}).loras)
    made = job(found.model_dump())
    assert found.path == str(shelf / "style.safetensors") and lora_files.locate(made.loras) == made.loras
    assert lora_files.shorten_paths(made).loras[0].path == "style.safetensors"
    (shelf / "style.safetensors").write_bytes(b"another one")
    error = refused(made)
    assert "style.safetensors" in error.what and made.loras[0].sha256[:12] in error.why
    assert lora_files.locate(job({"path": "style.safetensors"}).loras)[0].sha256[:12] in error.why


def test_a_missing_file_is_refused_with_name_and_hash(shelf: Path) -> None:
    error = refused(job({"path": "gone.safetensors", "sha256": "ab" * 32}))
    assert "gone.safetensors" in error.what and "abababababab" in error.what
    assert "gone.safetensors" in refused(job({"path": str(shelf / "gone.safetensors")})).what


def test_weight_nought_asks_for_no_file(shelf: Path) -> None:
    made = job({"path": "gone.safetensors", "weight": 0})
    assert lora_files.locate(made.loras) == made.loras
    lora_files.check(made)


@pytest.mark.parametrize("path", ["style.pt", "style.ckpt", "readme.txt", "style"])
def test_what_could_carry_a_program_is_not_opened(shelf: Path, path: str) -> None:
    (shelf / path).write_bytes(b"")
    assert "not opened" in refused(job({"path": path})).what


@pytest.mark.parametrize(
    "path",
    [
        "../secret.safetensors",
        "wan/../../secret.safetensors",
        "/etc/secret.safetensors",
        "C:\\Users\\me\\secret.safetensors",
        "\\\\server\\share\\secret.safetensors",
        "c:secret.safetensors",
    ],
)
def test_a_strangers_path_leaves_only_a_name_to_look_for_in_the_folder(shelf: Path, path: str) -> None:
    (shelf.parent / "secret.safetensors").write_bytes(b"")
    left = lora_files.drop_foreign_paths(job({"path": path, "weight": 0.5, "sha256": "cd" * 32}))
    assert left.loras[0].path in ("secret.safetensors", "c:secret.safetensors")
    assert (left.loras[0].weight, left.loras[0].sha256) == (0.5, "cd" * 32)
    assert "is not here" in refused(left).what


def test_what_travels_names_no_folder_of_this_machine(shelf: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    made = job(
        {"path": str(shelf / "wan" / "Motion.safetensors")}, {"path": str(elsewhere)}, {"path": "style.safetensors"}
    )
    left = lora_files.shorten_paths(made)
    assert [lora.path for lora in left.loras] == [
        "wan/Motion.safetensors",
        "elsewhere.safetensors",
        "style.safetensors",
    ]
