"""Transformers from files as people have them: every format gives the same model, and a wrong file its reason."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from engine import tiny
from engine.loading import build, parts, quantize
from engine.loading.tensor_files import open_tensors
from engine.messages import StudioError
from engine.models.identity_wan import IdentityWanTransformer3DModel, is_identity_key
from engine.models.subject_tower import References
from tests.support.wan_files import FIXTURE, HEAD, in_wans_names, plain, scaled_fp8, side, unscaled, write_gguf

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """Wan's original layout, as Phantom's code made it."""
    torch.set_num_threads(1)
    held = load_file(FIXTURE)
    return {key.removeprefix("model."): t for key, t in held.items() if key.startswith("model.")}


def load(source: Path) -> torch.nn.Module:
    return build.build_transformer(source, torch.float32, head_dim=24).eval()


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


def test_a_side_branch_in_wans_own_names_is_the_same(tmp_path: Path) -> None:
    made = side()
    save_file(in_wans_names(made), tmp_path / "vace.safetensors")
    again = build.build_transformer(tmp_path / "vace.safetensors", torch.float32, head_dim=HEAD)
    assert isinstance(again, WanVACETransformer3DModel) and same(again, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_diffusers_gives_what_diffusers_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    for name, made in (("plain", plain()), ("side", side()), ("subjects", tiny.stir(tiny.transformer()))):
        made.save_pretrained(tmp_path / name)
        ours = build.build_transformer(tmp_path / name, dtype)
        theirs = type(made).from_pretrained(tmp_path / name, torch_dtype=dtype)
        assert type(ours) is type(theirs)
        assert {**theirs.config, **ours.config} == dict(theirs.config)
        for key, tensor in theirs.state_dict().items():
            assert ours.state_dict()[key].dtype == tensor.dtype and torch.equal(ours.state_dict()[key], tensor)
        for key, table in theirs.named_buffers():
            assert torch.equal(ours.get_buffer(key), table)


def test_what_a_derived_model_adds_to_its_config_is_no_hindrance(tmp_path: Path) -> None:
    made = plain()
    made.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "use_src_id_rotary": True}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert same(load(tmp_path), made)


def test_what_is_loaded_no_longer_hangs_on_the_file(original: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({key: tensor.float() for key, tensor in original.items()}, path)
    made = load(path)
    before = asked(made)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(asked(made), before)


@pytest.mark.parametrize("new", [False, True])
def test_scaled_fp8_is_its_weights_times_their_scales(tmp_path: Path, new: bool) -> None:
    packed = scaled_fp8(in_wans_names(plain()), new=new)
    save_file({f"model.diffusion_model.{key}": t for key, t in packed.items()}, tmp_path / "fp8.safetensors")
    made = build.build_transformer(tmp_path / "fp8.safetensors", torch.float32, head_dim=HEAD)
    theirs = convert_wan_transformer_to_diffusers(unscaled(packed))
    assert set(theirs) == set(made.state_dict())
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in theirs.items())


def test_plain_fp8_is_read_as_it_stands(tmp_path: Path) -> None:
    told = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in in_wans_names(plain()).items()}
    save_file(told, tmp_path / "fp8.safetensors")
    made = build.build_transformer(tmp_path / "fp8.safetensors", torch.float32, head_dim=HEAD)
    theirs = convert_wan_transformer_to_diffusers({key: tensor.float() for key, tensor in told.items()})
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_gguf_is_what_its_own_library_reads(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.loading import tensor_files

    monkeypatch.setattr(tensor_files, "UNPACKED_AT_ONCE", 10 * 256)  # several pieces, the last one shorter
    theirs = write_gguf(tmp_path / "wan.gguf", in_wans_names(plain()), kind)
    made = build.build_transformer(tmp_path / "wan.gguf", torch.float32, head_dim=HEAD)
    for key, tensor in convert_wan_transformer_to_diffusers(theirs).items():
        assert torch.equal(made.state_dict()[key], tensor)
    (tmp_path / "wan.gguf").rename(tmp_path / "wan.safetensors")  # what it is, its bytes tell
    assert same(build.build_transformer(tmp_path / "wan.safetensors", torch.float32, head_dim=HEAD), made)


def test_plain_wan_goes_into_identity_blocks_that_add_nothing_yet(tmp_path: Path) -> None:
    wan = plain()
    save_file(in_wans_names(wan), tmp_path / "wan.safetensors")
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(1, 12, 256)
    told = {"identity_layers": 2, "vlm_dim": 48, "slot_keys": True}
    for precision in (None, "int8"):
        made = build.build_transformer(
            tmp_path / "wan.safetensors", torch.float32, precision=precision, head_dim=HEAD, identity=told
        )
        beside = build.build_transformer(
            tmp_path / "wan.safetensors", torch.float32, precision=precision, head_dim=HEAD
        )
        assert isinstance(made, IdentityWanTransformer3DModel)
        assert not any(t.is_meta for t in (*made.parameters(), *made.buffers()))
        references = tiny_references()
        with torch.no_grad():
            cache = made.encode_identity(references)
            assert torch.equal(made(*inputs, identity=cache).sample, beside(*inputs).sample)
        started = IdentityWanTransformer3DModel.from_plain_wan(wan, **told).state_dict()
        for key, tensor in made.named_parameters():
            if is_identity_key(key):  # drawn anew, in the same size
                held = tensor.dequantize() if hasattr(tensor, "dequantize") and precision else tensor
                assert float(held.detach().norm()) == pytest.approx(float(started[key].norm()), rel=0.1, abs=1e-6)


def test_a_size_that_was_not_expected_is_refused(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "small")
    assert build.build_transformer(tmp_path / "small", torch.float32, expect={"dim": 256, "layers": 2})
    with pytest.raises(StudioError, match=r"small cannot be loaded\. .* dim 256, not 5,120 and layers 2, not 40"):
        build.build_transformer(tmp_path / "small", torch.float32, expect={"dim": 5120, "layers": 40})


@pytest.mark.parametrize("precision", [None, "int8", "nf4"])
def test_the_model_and_one_tensor_are_all_that_is_in_memory(
    tmp_path: Path, precision: quantize.Precision | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = plain()
    wan.save_pretrained(tmp_path / "wan", max_shard_size="2MB")
    largest = max(tensor.numel() for tensor in wan.parameters()) * 4
    size = quantize.num_bytes(build.build_transformer(tmp_path / "wan", torch.float32, precision=precision))
    del wan
    alive: list[int] = []
    put = quantize.put

    def watched(model: Any, key: str, tensor: Tensor, *given: Any) -> None:
        put(model, key, tensor, *given)
        if tensor.numel() >= 2**17:
            alive.append(tensor_bytes() - before)

    monkeypatch.setattr(quantize, "put", watched)
    gc.collect()
    before = tensor_bytes()
    made = build.build_transformer(tmp_path / "wan", torch.float32, precision=precision)
    assert tensor_bytes() - before == pytest.approx(quantize.num_bytes(made), rel=0.02)
    assert len(alive) == 5 and max(alive) <= size + largest + 4096


def tensor_bytes() -> int:
    """All tensors that are alive, a file's pages included."""
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not hasattr(t, "__tensor_flatten__")]
    found = [t for t in found if not isinstance(t, FakeTensor)]  # compiling, in another test, may have left some
    held = {t.data_ptr(): t.numel() * t.element_size() for t in found if not t.is_meta}
    return sum(held.values())


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
        (lambda t: {**t, "img_emb.proj.0.weight": torch.ones(2)}, "an image-to-video model"),
        (lambda t: {**t, "patch_embedding.weight": torch.ones(48, 9, 1, 2, 2)}, "reads 9 channels to write 4"),
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
    with pytest.raises(StudioError, match=r"model\.pth cannot be loaded\. It is a pickle"):
        load(pickled)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"once upon a time there was a fox", "neither like a safetensors nor like a GGUF"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"", "neither like a safetensors nor like a GGUF"),
        ((2**60).to_bytes(8, "little") + b"{}", "damaged or cut short"),
        (b"GGUF\x03\x00\x00\x00", "damaged or cut short"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "GGUF of version 1"),
        (b"GGUF\x03\x00\x00\x00" + (2**60).to_bytes(8, "little") * 2, "damaged or cut short"),
        # one list of 2^60 numbers
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\1" + bytes(7) + b"k\x09\0\0\0\0\0\0\0"
         + (2**60).to_bytes(8, "little"), "damaged or cut short"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_refused_whatever_its_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "wan.safetensors"
    path.write_bytes(content)
    with pytest.raises(StudioError, match=reason) as refusal:
        load(path)
    assert refusal.value.what == "wan.safetensors cannot be loaded."


@pytest.mark.parametrize("length", [640, 15_392], ids=["as a pickle begins", "as a page begins"])
def test_a_safetensors_file_is_one_whatever_its_length_looks_like(tmp_path: Path, length: int) -> None:
    path, tensor = tmp_path / "wan.safetensors", torch.arange(6, dtype=torch.float32).view(2, 3)
    told = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    path.write_bytes(length.to_bytes(8, "little") + told.ljust(length) + tensor.numpy().tobytes())
    with open_tensors(path) as held:
        assert torch.equal(held.read("w"), tensor)


def test_a_gguf_that_is_cut_short_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wan.gguf"
    write_gguf(path, in_wans_names(plain()), "Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[:-4000])
    with pytest.raises(StudioError, match="does not end inside the file"):
        load(path)
    head = 8 + 8 + 8
    at = content.index((8).to_bytes(4, "little"), content.index(b"blocks.0.self_attn.q.weight") + head)
    path.write_bytes(content[:at] + (16).to_bytes(4, "little") + content[at + 4 :])  # IQ2_XXS
    with pytest.raises(StudioError, match="is stored as IQ2_XXS, which nothing here unpacks"):
        load(path)


def test_other_ways_of_packing_are_named(tmp_path: Path) -> None:
    packed = scaled_fp8(in_wans_names(plain()), new=True)
    packed["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file(packed, tmp_path / "four.safetensors")
    with pytest.raises(StudioError, match="stored as nvfp4"):
        load(tmp_path / "four.safetensors")
    save_file({**packed, "blocks.0.ffn.0.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "i.safetensors")
    del packed["blocks.0.ffn.0.comfy_quant"]
    save_file({**packed, "blocks.0.ffn.0.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "i.safetensors")
    with pytest.raises(StudioError, match="stored as I8"):
        load(tmp_path / "i.safetensors")


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "wan", max_shard_size="2MB")
    index = next((tmp_path / "wan").glob("*.index.json"))
    told = json.loads(index.read_text(encoding="utf-8"))
    told["weight_map"]["patch_embedding.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(StudioError, match="is no index of shards"):
        build.build_transformer(tmp_path / "wan", torch.float32)


def test_a_variant_beside_the_weights_is_left_alone_and_a_second_copy_refused(tmp_path: Path) -> None:
    made = plain()
    made.save_pretrained(tmp_path / "wan")
    made.to(torch.float16).save_pretrained(tmp_path / "wan", variant="fp16")
    assert same(build.build_transformer(tmp_path / "wan", torch.float32), plain())
    (tmp_path / "wan" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "wan" / "other.safetensors")
    with pytest.raises(StudioError, match="in another file beside it"):
        build.build_transformer(tmp_path / "wan", torch.float32)


def test_a_part_may_be_a_single_file_or_a_folder_and_tells_how_far_it_is(tmp_path: Path) -> None:
    made = plain(num_attention_heads=2, attention_head_dim=128)  # as every published Wan
    save_file(in_wans_names(made), tmp_path / "wan.safetensors")
    assert same(parts.load_part("transformer", tmp_path / "wan.safetensors", CPU), made)
    made.save_pretrained(tmp_path / "wan")
    shares: list[float] = []
    assert same(parts.load_part("transformer", tmp_path / "wan", CPU, tell=shares.append), made)
    assert shares == sorted(set(shares)) and len(shares) == len(made.state_dict()) and shares[-1] == 1


def tiny_references() -> References:
    return References(torch.randn(1, 2, 1, 4, 8, 8), vlm_states=torch.randn(1, 5, 48))


def test_a_shard_that_the_index_names_and_nobody_brought_is_missed(original: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(original, tmp_path / "one.safetensors")
    load(tmp_path / "one.safetensors").save_pretrained(tmp_path / "folder", max_shard_size="50KB")
    sorted((tmp_path / "folder").glob("*.safetensors"))[0].unlink()
    with pytest.raises(StudioError, match="weights of its index"):
        load(tmp_path / "folder")
