"""LoRA files of every dialect on a tiny transformer: one small change, written in each spelling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from engine import tiny
from engine.job import Lora
from engine.loading import lora
from engine.messages import StudioError
from engine.models.identity_wan import IdentityWanTransformer3DModel
from engine.models.subject_tower import References

RANK, ALPHA = 3, 6.0
PLAIN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 16, "out_channels": 16, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 3, "rope_max_seq_len": 128,
}  # fmt: skip
Changes = dict[str, tuple[Tensor, Tensor]]  # module in diffusers' spelling -> A, B


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def plain() -> WanTransformer3DModel:
    torch.manual_seed(1)
    return WanTransformer3DModel(**PLAIN).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def changes(plain: WanTransformer3DModel) -> Changes:
    """A change of every layer in every block."""
    torch.manual_seed(2)
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    blocks = {name: layer for name, layer in layers.items() if name.startswith("blocks.")}
    return {
        name: (torch.randn(RANK, layer.in_features) * 0.1, torch.randn(layer.out_features, RANK) * 0.1)
        for name, layer in blocks.items()
    }


# --- the dialects ----------------------------------------------------------------------------------------------------


def diffusers(changes: Changes) -> dict[str, Tensor]:
    """As diffusers' and finetrainers' pipelines save them; alpha is in the weights."""
    return products(changes, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", folded=True)


def peft(changes: Changes) -> dict[str, Tensor]:
    """As PEFT saves a model; alpha is in adapter_config.json."""
    return products(changes, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")


def wan(changes: Changes) -> dict[str, Tensor]:
    """Wan's own names, with alpha, as ComfyUI's extraction writes them."""
    return own(changes, "diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", alpha=True)


def ai_toolkit(changes: Changes) -> dict[str, Tensor]:
    """Wan's own names, PEFT's halves, no alpha."""
    return own(changes, "diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight")


def diffsynth(changes: Changes) -> dict[str, Tensor]:
    return own(changes, "pipe.dit.{}.lora_A.default.weight", "pipe.dit.{}.lora_B.default.weight")


def musubi(changes: Changes) -> dict[str, Tensor]:
    return own(changes, "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", alpha=True, flat=True)


def fun(changes: Changes) -> dict[str, Tensor]:
    return own(changes, "lora_unet__{}.lora_down.weight", "lora_unet__{}.lora_up.weight", alpha=True, flat=True)


def lycoris(changes: Changes) -> dict[str, Tensor]:
    flat = {name.replace(".", "_"): change for name, change in changes.items()}
    return products(flat, "lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", folded=True)


def differences(changes: Changes) -> dict[str, Tensor]:
    """Kijai's full differences: the product itself."""
    return {f"diffusion_model.{lora.to_wan_name(n)}.diff": b @ a * (ALPHA / RANK) for n, (a, b) in changes.items()}


def own(changes: Changes, down: str, up: str, *, alpha: bool = False, flat: bool = False) -> dict[str, Tensor]:
    spelled = {lora.to_wan_name(name): change for name, change in changes.items()}
    if flat:
        spelled = {name.replace(".", "_"): change for name, change in spelled.items()}
    written = products(spelled, down, up, folded=not alpha)
    if alpha:
        written |= {down.format(name).replace(".lora_down.weight", ".alpha"): torch.tensor(ALPHA) for name in spelled}
    return written


def products(changes: Changes, down: str, up: str, *, folded: bool = False) -> dict[str, Tensor]:
    scale = ALPHA / RANK if folded else 1.0
    halves = {down.format(name): a for name, (a, _) in changes.items()}
    return halves | {up.format(name): b * scale for name, (_, b) in changes.items()}


DIALECTS = [diffusers, peft, wan, ai_toolkit, diffsynth, musubi, fun, lycoris, differences]


def write(path: Path, tensors: dict[str, Tensor]) -> Lora:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return Lora(path=str(path))


def write_dialect(folder: Path, dialect: Callable[[Changes], dict[str, Tensor]], changes: Changes) -> Lora:
    name = "adapter_model" if dialect is peft else dialect.__name__
    if dialect is peft:
        (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}), encoding="utf-8")
    return write(folder / f"{name}.safetensors", dialect(changes))


def prediction(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = torch.randn(1, 8, 32, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def summed(plain: WanTransformer3DModel, changes: Changes, weight: float = 1.0) -> WanTransformer3DModel:
    """The same model with W + weight * (alpha / rank) * B A in place of W."""
    model = WanTransformer3DModel(**PLAIN).eval()
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for name, (a, b) in changes.items():
        state[f"{name}.weight"] += weight * (ALPHA / RANK) * (b @ a)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.__name__)
def test_every_dialect_predicts_what_the_summed_weights_predict(plain, changes, tmp_path, dialect):
    file = write_dialect(tmp_path, dialect, changes)
    with lora.use_loras(plain, [file]) as (matched,):
        assert matched.left == () and matched.total == len(dialect(changes))
        assert matched.sentence == f"{matched.total} of {matched.total} weights of {Path(file.path).name}."
        seen = prediction(plain)
    assert (seen - prediction(summed(plain, changes))).abs().max() < 1e-6
    assert (seen - prediction(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.__name__)
def test_merging_gives_the_same_prediction(plain, changes, tmp_path, dialect):
    model = summed(plain, {})
    lora.apply(model, [write_dialect(tmp_path, dialect, changes).model_copy(update={"weight": 0.7})], merge=True)
    assert (prediction(model) - prediction(summed(plain, changes, 0.7))).abs().max() < 1e-6
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dialect", [ai_toolkit, wan, musubi], ids=lambda dialect: dialect.__name__)
def test_where_the_librarys_converter_reads_a_file_peft_predicts_the_same(plain, changes, tmp_path, dialect):
    convert = (
        _convert_musubi_wan_lora_to_diffusers if dialect is musubi else _convert_non_diffusers_wan_lora_to_diffusers
    )
    model = summed(plain, {})
    copied = {key: tensor.clone() for key, tensor in dialect(changes).items()}  # the converter scales in place
    model.load_lora_adapter(convert(copied), prefix="transformer")
    theirs = prediction(model)
    with lora.use_loras(plain, [write_dialect(tmp_path, dialect, changes)]):
        assert (prediction(plain) - theirs).abs().max() < 1e-6


def test_our_spelling_of_wans_own_names_is_the_inverse_of_the_librarys():
    picture = {**PLAIN, "image_dim": 40, "added_kv_proj_dim": 48}
    side = {**PLAIN, "vace_layers": [0, 2], "vace_in_channels": 96}
    for model in (WanTransformer3DModel(**picture), WanVACETransformer3DModel(**side)):
        names = list(model.state_dict())
        theirs = convert_wan_transformer_to_diffusers({lora.to_wan_name(name): name for name in names})
        assert {new: name for new, name in theirs.items() if new != name} == {}
        assert len({lora.to_wan_name(name) for name in names}) == len(names)


def test_a_file_that_trains_a_part_of_some_blocks_is_read_where_the_librarys_converter_stops(plain, changes, tmp_path):
    some = {
        name: change for name, change in changes.items() if "attn1.to_q" in name and not name.startswith("blocks.1")
    }
    with pytest.raises(KeyError):
        _convert_musubi_wan_lora_to_diffusers(musubi(some))
    with lora.use_loras(plain, [write_dialect(tmp_path, musubi, some)]) as (matched,):
        assert (matched.total, matched.left) == (3 * len(some), ())
        assert (prediction(plain) - prediction(summed(plain, some))).abs().max() < 1e-6


# --- full differences ------------------------------------------------------------------------------------------------


DISTILLED = (
    "blocks.1.norm2.weight",
    "blocks.0.attn1.norm_q.weight",
    "blocks.2.ffn.net.2.bias",
    "proj_out.weight",
    "proj_out.bias",
    "blocks.0.scale_shift_table",
    "scale_shift_table",
    "patch_embedding.weight",
)


def test_differences_of_norms_biases_tables_and_the_patch_embedding_are_added(plain, tmp_path):
    """Everything a distilled LoRA may hold beside products; the same sums in another model predict the same."""
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name in DISTILLED:
        change = torch.randn_like(state[name]) * 0.1
        state[name] += 0.5 * change
        stem, _, leaf = lora.to_wan_name(name).rpartition(".")
        tensors[
            "diffusion_model." + {"weight": f"{stem}.diff", "bias": f"{stem}.diff_b"}.get(leaf, f"{stem}.diff_m")
        ] = change
    a, b = torch.randn(2, 16, 1, 2, 2) * 0.1, torch.randn(48, 2, 1, 1, 1) * 0.1
    state["patch_embedding.weight"] += 0.5 * (b.flatten(1) @ a.flatten(1)).view(48, 16, 1, 2, 2)
    tensors |= {"diffusion_model.patch_embedding.lora_A.weight": a, "diffusion_model.patch_embedding.lora_B.weight": b}
    model = WanTransformer3DModel(**PLAIN).eval()
    model.load_state_dict(state)
    file = write(tmp_path / "distilled.safetensors", tensors).model_copy(update={"weight": 0.5})
    before = {name: (parameter, parameter.clone()) for name, parameter in plain.named_parameters()}
    with lora.use_loras(plain, [file]) as (matched,):
        assert matched.left == ()
        assert (prediction(plain) - prediction(model)).abs().max() < 1e-6
    for name, parameter in plain.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


# --- off again -------------------------------------------------------------------------------------------------------


def test_weight_nought_equals_no_lora_bit_for_bit_and_opens_no_file(plain, changes, tmp_path):
    before = prediction(plain)
    nowhere = Lora(path=str(tmp_path / "nowhere.safetensors"), weight=0)
    with lora.use_loras(
        plain, [nowhere, write_dialect(tmp_path, wan, changes).model_copy(update={"weight": 0})]
    ) as found:
        assert found == () and torch.equal(prediction(plain), before)


def test_taken_away_even_by_an_error_nothing_is_left_bit_for_bit(plain, changes, tmp_path):
    before, state = prediction(plain), {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(RuntimeError, match="stopped"), lora.use_loras(plain, [write_dialect(tmp_path, wan, changes)]):
        assert not torch.equal(prediction(plain), before)
        raise RuntimeError("stopped")
    assert torch.equal(prediction(plain), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())


def test_several_add_up_with_their_weights_and_the_next_ones_take_their_place(plain, changes, tmp_path):
    half = {name: change for name, change in changes.items() if "attn1" in name}
    first = write(tmp_path / "a.safetensors", wan(changes)).model_copy(update={"weight": 0.5})
    second = write(tmp_path / "b.safetensors", musubi(half)).model_copy(update={"weight": -0.25})
    wanted = summed(summed(plain, changes, 0.5), half, -0.25)
    lora.apply(plain, [first, second])
    assert (prediction(plain) - prediction(wanted)).abs().max() < 1e-6
    lora.apply(plain, [second])
    assert (prediction(plain) - prediction(summed(plain, half, -0.25))).abs().max() < 1e-6
    lora.remove(plain)


@pytest.mark.slow
def test_compiled_blocks_hear_of_a_lora_that_comes_and_goes(plain, changes, tmp_path):
    model = summed(plain, {})
    model.blocks[1].compile(backend="eager")
    before = prediction(model)
    with lora.use_loras(model, [write_dialect(tmp_path, wan, changes)]):
        assert (prediction(model) - prediction(summed(plain, changes))).abs().max() < 1e-5
    assert torch.equal(prediction(model), before)


# --- quantized -------------------------------------------------------------------------------------------------------


def test_beside_quantized_weights_a_lora_adds_what_it_adds_to_full_ones(plain, changes, tmp_path):
    from optimum.quanto import freeze, qint8, quantize

    model = summed(plain, {})
    quantize(model, weights=qint8)
    freeze(model)
    assert not any(type(layer.weight) is nn.Parameter for layer in model.modules() if isinstance(layer, nn.Linear))
    file = write_dialect(tmp_path, wan, changes)
    layer = model.blocks[0].attn1.to_q
    x, (a, b) = torch.randn(5, 48), changes["blocks.0.attn1.to_q"]
    alone = layer(x)
    with lora.use_loras(model, [file]) as (matched,):
        assert matched.left == ()
        assert (layer(x) - alone - x @ (b @ a).T * (ALPHA / RANK)).abs().max() < 1e-5
    assert torch.equal(layer(x), alone)
    with pytest.raises(ValueError, match="quantized"):
        lora.apply(model, [file], merge=True)


def test_beside_four_bit_weights_too(tmp_path):
    from bitsandbytes.nn import Linear4bit

    model = WanTransformer3DModel(**{**PLAIN, "attention_head_dim": 32}).eval().requires_grad_(False)
    full = model.blocks[0].attn1.to_q
    small = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    small.load_state_dict(full.state_dict())
    model.blocks[0].attn1.to_q = small.to("cpu").requires_grad_(False)  # the move is what quantizes
    change = {"blocks.0.attn1.to_q": (torch.randn(RANK, 64), torch.randn(64, RANK))}
    x, (a, b) = torch.randn(5, 64), change["blocks.0.attn1.to_q"]
    alone = small(x)
    assert small.weight.dtype == torch.uint8 and not torch.equal(alone, full(x))
    with lora.use_loras(model, [write_dialect(tmp_path, wan, change)]):
        assert (small(x) - alone - x @ (b @ a).T * (ALPHA / RANK)).abs().max() < 1e-4
    assert torch.equal(small(x), alone)


def test_a_model_that_is_filled_tensor_by_tensor_takes_the_same_sums(plain, changes, tmp_path):
    with torch.device("meta"):
        empty = WanTransformer3DModel(**PLAIN)
    norms = {"diffusion_model.blocks.1.norm3.diff_b": torch.ones(48), "diffusion_model.modulation.diff": torch.ones(3)}
    norms |= {"diffusion_model.head.modulation.diff": torch.ones(1, 2, 48)}
    file = write(tmp_path / "few.safetensors", wan(changes) | norms).model_copy(update={"weight": 0.5})
    add, (matched,) = lora.prepare_merge(empty, [file])
    assert matched.left == ("diffusion_model.modulation.diff",)
    model = summed(plain, {})
    lora.apply(model, [file], merge=True)
    state = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(add(name, state[name]), tensor)
    assert add("patch_embedding.weight", state["patch_embedding.weight"]) is state["patch_embedding.weight"]


# --- our own model ---------------------------------------------------------------------------------------------------


def test_a_lora_of_the_identity_blocks_changes_what_they_read_of_the_subjects(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny.stir(tiny.transformer()).requires_grad_(False)
    references = References(latents=torch.randn(1, 2, 1, 16, 4, 4))
    before = model.encode_identity(references)
    trained = get_peft_model(tiny.transformer(), LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"]))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path)
    with lora.use_loras(model, [Lora(path=str(tmp_path / "adapter_model.safetensors"))]) as (matched,):
        assert matched.left == () and any("subject_blocks" in key for key in keys_of(tmp_path))
        inside = model.encode_identity(references)
        merged = IdentityWanTransformer3DModel(
            **{k: v for k, v in model.config.items() if not k.startswith("_")}
        ).eval()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, module in trained.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                state[f"{name}.weight"] += module.get_delta_weight("default")
        merged.load_state_dict(state)
        wanted = merged.encode_identity(references)
    assert before and inside and wanted
    for layer, other, old in zip(inside.layers, wanted.layers, before.layers, strict=True):
        assert (layer.key - other.key).abs().max() < 1e-4
        assert not torch.equal(layer.key, old.key)


def keys_of(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
        return list(opened.keys())


# --- refused ---------------------------------------------------------------------------------------------------------


def refusal(plain: nn.Module, file: Lora) -> StudioError:
    before = prediction(plain)
    with pytest.raises(StudioError) as refused:
        lora.apply(plain, [file])
    assert refused.value.field == "loras"
    assert torch.equal(prediction(plain), before)
    return refused.value


def test_a_lora_of_another_width_is_refused_with_both_widths(plain, tmp_path):
    wide = {"blocks.0.attn1.to_q": (torch.zeros(2, 5120), torch.zeros(5120, 2))}
    tensors = wan(wide) | {"diffusion_model.head.head.diff_b": torch.zeros(64)}  # this one would fit
    said = refusal(plain, write(tmp_path / "large.safetensors", tensors))
    assert said.why == "It was made for a model 5120 wide, this one is 48 wide."


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "Stable Diffusion"),
        ("transformer_blocks.0.attn1.to_q", "LTX"),
        ("something.else", "something.else.lora_down.weight"),
    ],
)
def test_a_lora_of_another_family_is_refused_by_name(plain, tmp_path, key, family):
    halves = {f"{key}.lora_down.weight": torch.zeros(2, 48), f"{key}.lora_up.weight": torch.zeros(48, 2)}
    said = refusal(plain, write(tmp_path / "other.safetensors", halves))
    assert said.what.startswith("None of the 2 weights of other.safetensors") and family in said.why


def test_what_finds_no_place_is_counted_and_named_and_the_rest_is_used(plain, changes, tmp_path):
    strangers = {
        "diffusion_model.img_emb.proj.1.lora_down.weight": torch.zeros(2, 48),  # pictures: this model reads none
        "diffusion_model.blocks.0.self_attn.q.something": torch.zeros(1),
        "lora_te_text.lora_down.weight": torch.zeros(2, 48),
        "diffusion_model.patch_embedding.diff": torch.zeros(48, 36, 1, 2, 2),  # of a model with more channels
    }
    with lora.use_loras(plain, [write(tmp_path / "part.safetensors", wan(changes) | strangers)]) as (matched,):
        assert set(matched.left) == set(strangers)
        assert matched.sentence.startswith(f"{matched.total - 4} of {matched.total} weights of part.safetensors; ")
        assert "and 3 more" in matched.sentence
        assert (prediction(plain) - prediction(summed(plain, changes))).abs().max() < 1e-6


@pytest.mark.parametrize(("suffix", "method"), [("lokr_w1", "LoKr"), ("hada_w1_a", "LoHa"), ("dora_scale", "DoRA")])
def test_other_methods_are_refused_instead_of_half_applied(plain, changes, tmp_path, suffix, method):
    tensors = wan(changes) | {f"diffusion_model.blocks.0.self_attn.q.{suffix}": torch.zeros(2, 2)}
    assert f"is a {method}, not a LoRA" in refusal(plain, write(tmp_path / "x.safetensors", tensors)).what


def test_a_damaged_a_lying_and_a_foreign_file_are_refused_and_not_a_number_too(plain, changes, tmp_path):
    good = Path(write_dialect(tmp_path, wan, changes).path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    lying = tmp_path / "lying.safetensors"
    lying.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    for path in (cut, lying):
        assert "cannot be read" in refusal(plain, Lora(path=str(path))).what
    pickled = tmp_path / "style.pt"
    pickled.write_bytes(b"\x80\x04.")
    assert "not opened" in refusal(plain, Lora(path=str(pickled))).what
    broken = wan(changes)
    next(iter(broken.values())).view(-1)[0] = float("nan")
    assert "no numbers" in refusal(plain, write(tmp_path / "nan.safetensors", broken)).why
    assert "not here" in refusal(plain, Lora(path=str(tmp_path / "gone.safetensors"), sha256="ab" * 32)).what
    one = write(
        tmp_path / "one.safetensors", {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 48)}
    )
    assert "None of the 1 weights" in refusal(plain, one).what
