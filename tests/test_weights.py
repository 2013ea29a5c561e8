"""Transformers from files as they lie on the Hub: every layout gives the same model, and a wrong file its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import weights
from engine.messages import StudioError

FIXTURE = Path(__file__).parent / "fixtures" / "phantom.safetensors"


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """Wan's original layout, as Phantom's code made it."""
    torch.set_num_threads(1)
    held = load_file(FIXTURE)
    return {key.removeprefix("model."): t for key, t in held.items() if key.startswith("model.")}


def load(source: Path) -> torch.nn.Module:
    return weights.transformer(source, torch.float32, head_dim=24).eval()


def asked(model: torch.nn.Module) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 4, 3, 4, 6), torch.tensor([500]), torch.randn(1, 12, 16), return_dict=False)[0]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(t, other.state_dict()[key]) for key, t in one.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_a_single_file_in_wans_layout_is_the_model_whatever_its_prefix(
    original: dict[str, Tensor], tmp_path: Path, prefix: str
) -> None:
    save_file({f"{prefix}{key}": t for key, t in original.items()}, tmp_path / "phantom.safetensors")
    made = load(tmp_path / "phantom.safetensors")
    assert isinstance(made, WanTransformer3DModel) and made.config.num_layers == 2 and made.config.ffn_dim == 64
    theirs = WanTransformer3DModel(**{k: v for k, v in made.config.items() if not k.startswith("_")})
    theirs.load_state_dict(convert_wan_transformer_to_diffusers({k: t.float() for k, t in original.items()}))
    assert torch.equal(asked(made), asked(theirs.eval()))
    assert not any(t.is_meta for t in (*made.parameters(), *made.buffers()))


def test_diffusers_layout_and_shards_give_the_same_model(original: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(original, tmp_path / "one.safetensors")
    whole = load(tmp_path / "one.safetensors")
    whole.save_pretrained(tmp_path / "folder", max_shard_size="50KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 2
    assert same(load(tmp_path / "folder"), whole)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, part in enumerate((list(original)[::2], list(original)[1::2])):
        save_file({key: original[key] for key in part}, shards / f"wan-{number}.safetensors")
    assert same(load(shards), whole)


def test_a_side_branch_is_recognised_and_its_layers_counted(tmp_path: Path) -> None:
    made = WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=4, vace_layers=[0, 2], vace_in_channels=24, rope_max_seq_len=64,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "vace")
    again = load(tmp_path / "vace")
    assert isinstance(again, WanVACETransformer3DModel)
    assert again.config.vace_layers == [0, 2] and again.config.vace_in_channels == 24
    for key, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_weights_arrive_in_the_precision_that_was_asked_for(original: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(original, tmp_path / "one.safetensors")
    made = weights.transformer(tmp_path / "one.safetensors", torch.bfloat16, head_dim=24)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


def _without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without("blocks.1.ffn.0.weight"), "1 of its weights are missing"),
        (_without("patch_embedding.weight"), "patch_embedding.weight is missing"),
        (lambda t: {**t, "blocks.0.extra.weight": torch.ones(2)}, "does not have"),
        (lambda t: {**t, "blocks.1.ffn.0.bias": torch.ones(5)}, "has the shape"),
        (lambda t: {f"{key}.lora_A": v for key, v in t.items()}, "a LoRA"),
        (lambda t: {"unet.weight": torch.ones(2)}, "no Wan model"),
    ],
)
def test_a_wrong_or_half_file_is_refused_by_name(
    original: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    reason: str,
) -> None:
    save_file(change(original), tmp_path / "half.safetensors")
    with pytest.raises(StudioError, match=reason) as refusal:
        load(tmp_path / "half.safetensors")
    assert "half.safetensors" in refusal.value.what


def test_a_file_that_is_cut_short_lies_or_is_a_pickle_is_refused(original: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(original, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(StudioError, match="damaged or cut short"):
        load(path)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    key = next(key for key in header if key != "__metadata__")
    header[key]["data_offsets"] = [0, 10**12]  # a lying header
    lying = json.dumps(header).encode()
    path.write_bytes(len(lying).to_bytes(8, "little") + lying + content[-1000:])
    with pytest.raises(StudioError, match="damaged or cut short"):
        load(path)
    pickled = tmp_path / "model.pth"
    torch.save(original, pickled)
    with pytest.raises(StudioError, match="not a safetensors file"):
        load(pickled)


def test_a_shard_that_the_index_names_and_nobody_brought_is_missed(original: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(original, tmp_path / "one.safetensors")
    load(tmp_path / "one.safetensors").save_pretrained(tmp_path / "folder", max_shard_size="50KB")
    sorted((tmp_path / "folder").glob("*.safetensors"))[0].unlink()
    with pytest.raises(StudioError, match="weights of its index"):
        load(tmp_path / "folder")
