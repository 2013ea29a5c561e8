"""A .pth becomes safetensors once, in a process of its own; what holds code is not opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import convert, weights
from engine.messages import StudioError
from tests.wan_files import HEAD, in_wans_names, plain


def test_a_pth_gives_the_same_model_and_is_never_opened_again(tmp_path: Path) -> None:
    made = plain()
    torch.save(in_wans_names(made), tmp_path / "wan.pth")
    target = convert.convert_pth(tmp_path / "wan.pth", tmp_path / "new" / "wan.safetensors")
    again = weights.transformer(target, torch.float32, head_dim=HEAD)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in made.state_dict().items())
    (tmp_path / "wan.pth").unlink()
    assert convert.convert_pth(tmp_path / "wan.pth", target) == target
    assert [path.name for path in target.parent.iterdir()] == ["wan.safetensors"]


def test_weights_in_a_training_runs_nest_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    torch.save({"step": 7, "state_dict": {"a": table, "b": table, "c": table[:, 1:].t()}}, tmp_path / "run.pth")
    held = load_file(convert.convert_pth(tmp_path / "run.pth", tmp_path / "run.safetensors"))
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
        convert.convert_pth(path, target)
    assert refusal.value.what == "bad.pth cannot be turned into safetensors."
    assert [p.name for p in tmp_path.iterdir() if p.name != "bad.pth"] == []
