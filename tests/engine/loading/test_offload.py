"""Blocks that wait outside the device: the same result, bit for bit, whatever they are made of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from optimum.quanto import QLinear, qint8
from peft import LoraConfig
from torch import Tensor, nn

from engine import tiny
from engine.loading import offload
from engine.loading.offload import PLACES, move_into_file, offload_blocks, weights_of
from engine.models.subject_tower import References

CPU = torch.device("cpu")


def predict(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, tiny.LATENT_CHANNELS, 2, 8, 8, generator=generator)
    text = torch.randn(1, 8, tiny.TEXT_DIM, generator=generator)
    pictures = torch.randn(1, 2, 1, tiny.LATENT_CHANNELS, 8, 8, generator=generator)
    with torch.no_grad():
        identity = model.encode_identity(References(pictures))
        return model(latents, torch.tensor([500.0]), text, identity=identity, return_dict=False)[0]


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """Every projection of the blocks' feed-forward as the libraries quantize it."""
    for block in model.blocks:
        for owner, name in ((block.ffn.net[0], "proj"), (block.ffn.net, "2")):
            plain = owner._modules[name]
            if kind == "int8":
                layer = QLinear.from_module(plain, weights=qint8)
                layer.freeze()
            else:
                import bitsandbytes as bnb

                layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, compute_dtype=torch.float32)
                layer.load_state_dict(plain.state_dict())
                layer = layer.to(CPU)
            owner._modules[name] = layer
    return model


@pytest.mark.parametrize("kind", ["full", "int8", "nf4"])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_model_whose_blocks_wait_outside_predicts_the_same_bit_for_bit(
    kind: str, in_a_file: bool, tmp_path: Path
) -> None:
    model = tiny.transformer()
    if kind != "full":
        quantized(model, kind)
    expected = predict(model)
    for block in (*model.blocks, *model.subject_blocks) if in_a_file else ():
        move_into_file(block, tmp_path)
    for _ in range(2):
        with offload_blocks(model, ["blocks"], CPU, once=["subject_blocks"]):
            assert torch.equal(predict(model), expected)
            assert torch.equal(predict(model), expected), "the second step"
    assert torch.equal(predict(model), expected), "afterwards, without visits"
    assert any(tmp_path.iterdir()) == in_a_file


def test_what_a_lora_adds_by_hooks_is_another_in_every_block() -> None:
    model = tiny.transformer()
    for number, block in enumerate(model.blocks):
        block.attn1.to_q.register_forward_hook(lambda _, __, out, number=number: out + number)
    expected = predict(model)
    with offload_blocks(model, ["blocks"], CPU):
        assert torch.equal(predict(model), expected)


def test_what_was_added_to_the_layers_before_visits_the_device_with_them() -> None:
    model = tiny.transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    expected = predict(model)
    with offload_blocks(model, ["blocks"], CPU, once=["subject_blocks"]):
        assert torch.equal(predict(model), expected)


def test_only_two_blocks_are_on_the_device_at_once_and_none_of_those_that_run_once() -> None:
    model = tiny.transformer()
    before = {id(m) for m in model.modules()}
    with offload_blocks(model, ["blocks"], CPU, once=["subject_blocks"]):
        predict(model)
        lines = [model.blocks[0].forward.func.__self__, model.subject_blocks[0].forward.func.__self__]
        assert all(len(places) <= PLACES for places in lines[0]._places.values())
        assert not lines[1]._places
        assert {id(m) for m in model.modules()} == before
    assert not lines[0]._places


def test_every_weight_of_a_quantized_block_is_among_those_that_travel() -> None:
    model = quantized(tiny.transformer(), "int8")
    other = quantized(tiny.transformer(), "int8")
    for owner, name in weights_of(other):
        getattr(owner, name).zero_()
    for (mine, name), (theirs, same) in zip(weights_of(model), weights_of(other), strict=True):
        getattr(theirs, same).copy_(getattr(mine, name))
    assert torch.equal(predict(other), predict(model))


def test_what_a_block_raises_comes_through_and_the_next_clip_is_whole() -> None:
    model = tiny.transformer()
    expected = predict(model)
    with pytest.raises(TypeError), offload_blocks(model, ["blocks"], CPU, once=["subject_blocks"]):
        model.blocks[1]()
    with offload_blocks(model, ["blocks"], CPU):
        assert torch.equal(predict(model), expected)


def test_a_forward_that_was_wrapped_before_is_there_again_afterwards() -> None:
    """diffusers' hooks, which split a clip over several cards, live in a block's own `forward`."""
    model = tiny.transformer()
    plain = model.blocks[0].forward
    model.blocks[0].forward = lambda *given, **more: 1.5 * plain(*given, **more)
    expected = predict(model)
    with offload_blocks(model, ["blocks"], CPU):
        pass
    assert torch.equal(predict(model), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on a file's size stands in for a full disk")
def test_a_disk_that_is_full_is_an_error_and_the_model_stays_whole(tmp_path: Path) -> None:
    import resource

    model = tiny.transformer()
    expected = predict(model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"large"):
            move_into_file(model.blocks[0], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("kind", ["full", "int8", "nf4"])
def test_a_copy_of_a_block_in_a_file_holds_its_weights_and_not_the_file_for_each_of_them(
    kind: str, tmp_path: Path
) -> None:
    model = tiny.transformer()
    block = (model if kind == "full" else quantized(model, kind)).blocks[0]
    move_into_file(block, tmp_path)
    copied = offload._copied(block, CPU)
    tensors = [getattr(*spot) for spot in weights_of(copied)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    assert sum(storages.values()) == sum(each.numel() * each.element_size() for each in tensors)
    assert all(torch.equal(a, getattr(*b)) for a, b in zip(tensors, weights_of(block), strict=True))


def test_one_block_of_each_kind_is_copied_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made, copied = [], offload._copied
    monkeypatch.setattr(offload, "_copied", lambda *given: made.append(1) or copied(*given))
    with offload_blocks(tiny.transformer(num_layers=6), ["blocks"], CPU):
        assert len(made) == 2, "with identity blocks and without"


def test_a_list_that_the_model_lacks_is_passed_over() -> None:
    model = tiny.transformer()
    expected = predict(model)
    with offload_blocks(model, ["vace_blocks", "subject.blocks"], CPU):
        assert torch.equal(predict(model), expected)
