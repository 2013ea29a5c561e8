"""A .pth becomes safetensors once, in a process of its own; what holds code is not opened."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from engine.hub import pickles
from engine.loading import build
from engine.messages import StudioError
from tests.support.wan_files import HEAD, in_wans_names, plain


def test_a_pth_gives_the_same_model_and_the_hash_of_what_was_written(tmp_path: Path) -> None:
    made, target = plain(), tmp_path / "new" / "wan.safetensors"
    torch.save(in_wans_names(made), tmp_path / "wan.pth")
    digest = pickles.convert_pth(tmp_path / "wan.pth", target)
    again = build.build_transformer(target, torch.float32, head_dim=HEAD)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in made.state_dict().items())
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert [path.name for path in target.parent.iterdir()] == ["wan.safetensors"]


def test_every_kind_of_number_is_written_as_the_library_reads_it(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
             torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    held = {str(kind): torch.arange(15).view(3, 5).to(kind) for kind in kinds}
    held |= {"one": torch.tensor(3.0), "none": torch.empty(0, 4), "word": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    torch.save(held, tmp_path / "all.pth")
    pickles.convert_pth(tmp_path / "all.pth", tmp_path / "all.safetensors")
    with safe_open(tmp_path / "all.safetensors", "pt") as read:
        assert {*read.keys()} == {*held}
        for key, tensor in held.items():
            found = read.get_tensor(key)
            assert found.dtype == tensor.dtype and torch.equal(found.double(), tensor.double()), key
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "other.pth")
    with pytest.raises(pickles.NotWeights, match=r"numbers of the kind torch\.complex64"):
        pickles.convert_pth(tmp_path / "other.pth", tmp_path / "other.safetensors")


def test_weights_in_a_training_runs_nest_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    torch.save({"step": 7, "state_dict": {"a": table, "b": table, "c": table[:, 1:].t()}}, tmp_path / "run.pth")
    pickles.convert_pth(tmp_path / "run.pth", tmp_path / "run.safetensors")
    held = load_file(tmp_path / "run.safetensors")
    assert held.keys() == {"a", "b", "c"}
    assert torch.equal(held["b"], table) and torch.equal(held["c"], table[:, 1:].t())


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("code", "holds code or objects, not only weights"),
        ("module", "holds code or objects, not only weights"),
        ("text", "damaged, or no file of weights"),
        ("cut", "damaged, or no file of weights"),
        ("number", "no table of names and tensors"),
        ("missing", "The system says: No such file or directory"),
    ],
)
def test_code_damage_and_other_things_are_refused_in_one_sentence(tmp_path: Path, kind: str, reason: str) -> None:
    path, target = tmp_path / "bad.pth", tmp_path / "bad.safetensors"
    if kind == "code":
        torch.save({"a": torch.ones(2), "b": Trap(tmp_path / "made")}, path)
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "text":
        path.write_text("once upon a time", encoding="utf-8")
    elif kind == "cut":
        torch.save({"a": torch.ones(4000)}, path)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "number":
        torch.save({"a": 3}, path)
    with pytest.raises(StudioError, match=reason) as refusal:
        pickles.convert_pth(path, target)
    assert refusal.value.what == "bad.pth cannot be turned into safetensors."
    assert isinstance(refusal.value, pickles.NotWeights) == (kind != "missing")  # what another try might mend
    assert [p.name for p in tmp_path.iterdir() if p.name != "bad.pth"] == []
