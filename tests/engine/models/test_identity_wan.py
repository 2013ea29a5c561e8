"""The identity blocks: what they leave alone, what they change, and what they cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine import tiny
from engine.models.identity_wan import SLOT_KEY, IdentityWanTransformer3DModel, is_identity_key, parameter_counts
from engine.models.subject_tower import References

WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
BASE_TFLOP = 283.0  # Wan 1.3B at 480x832x81
GRID = (6, 10)  # latent pixels, 3 x 5 tokens: odd both ways


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def plain() -> WanTransformer3DModel:
    config = {key: value for key, value in tiny.transformer().config.items() if key in _wan_arguments()}
    return WanTransformer3DModel(**config).eval()


@pytest.fixture
def model(plain) -> IdentityWanTransformer3DModel:
    """Untrained."""
    return _with_identity(plain)


@pytest.fixture
def trained(plain) -> IdentityWanTransformer3DModel:
    """As after training: the output projections of stage 3 have left zero."""
    return tiny.stir(_with_identity(plain), 1.0)


def _wan_arguments() -> set[str]:
    return set(WanTransformer3DModel(num_attention_heads=1, num_layers=1, ffn_dim=8, text_dim=8).config)


def _with_identity(plain: WanTransformer3DModel, **changes) -> IdentityWanTransformer3DModel:
    config = {"identity_layers": 2, "max_subjects": 4, "vlm_dim": tiny.VLM_DIM, **changes}
    return IdentityWanTransformer3DModel.from_plain_wan(plain, **config).eval()


def _inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    noisy = torch.randn(batch, tiny.LATENT_CHANNELS, 3, *GRID)
    return noisy, torch.tensor([700.0, 20.0, 999.0])[:batch], torch.randn(batch, 7, tiny.TEXT_DIM)


def _subjects(count: int, batch: int = 1, views: int = 1, vlm_tokens: int = 5) -> References:
    return References(
        latents=torch.randn(batch, count, views, tiny.LATENT_CHANNELS, 4, 6),
        vlm_states=torch.randn(batch, vlm_tokens, tiny.VLM_DIM),
    )


def _some(references: References, *subjects: int) -> References:
    """Only these subjects, each with the slot it had."""
    assert references.latents is not None
    return dataclasses.replace(
        references, latents=references.latents[:, list(subjects)], slots=torch.tensor([list(subjects)])
    )


@torch.no_grad()
def _run(model, inputs, **subjects) -> Tensor:
    return model(*inputs, return_dict=False, **subjects)[0]


def _differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3


# --- what is left alone ---


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_untrained_model_is_wan_bit_for_bit(plain, model, count, batch):
    inputs = _inputs(batch)
    wanted = _run(plain, inputs)
    references = dataclasses.replace(
        _subjects(count, batch, views=2), mask=torch.rand(batch, count, 2) > 0.3, weights=torch.rand(batch, count) * 2
    )
    assert torch.equal(_run(model, inputs), wanted)
    assert torch.equal(_run(model, inputs, references=references), wanted)
    assert torch.equal(_run(model, inputs, identity=model.encode_identity(references)), wanted)


def test_a_time_per_token_gives_what_wan_gives(plain, model):
    noisy, _, text = _inputs()
    times = torch.linspace(0, 999, 45).view(1, 45)
    wanted = plain(noisy, times, text).sample
    assert torch.equal(model(noisy, times, text, references=_subjects(2)).sample, wanted)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_cache_changes_nothing_bit_for_bit(trained, count):
    inputs, references = _inputs(), _subjects(count, views=2)
    mask = torch.ones(1, count, 2, dtype=torch.bool)
    mask[0, 0, 1] = False
    for case in (references, dataclasses.replace(references, mask=mask)):
        cache = trained.encode_identity(case)
        assert torch.equal(_run(trained, inputs, identity=cache), _run(trained, inputs, references=case))


def test_without_identity_a_trained_model_is_still_wan(plain, trained):
    inputs = _inputs()
    assert torch.equal(_run(trained, inputs), _run(plain, inputs))
    assert trained.encode_identity(References()) is None


# --- what subjects change ---


def test_every_subject_changes_the_clip(trained):
    inputs, references = _inputs(), _subjects(3)
    everyone = _run(trained, inputs, references=references)
    for others in ([1, 2], [0, 2], [0, 1]):
        assert _differ(everyone, _run(trained, inputs, references=_some(references, *others)))


def test_a_weight_of_zero_is_leaving_the_subject_out(trained):
    inputs, references = _inputs(), _subjects(3)
    ignored = dataclasses.replace(references, weights=torch.tensor([[1.0, 0.0, 1.0]]))
    left_out = _run(trained, inputs, references=_some(references, 0, 2))
    torch.testing.assert_close(_run(trained, inputs, references=ignored), left_out, rtol=0, atol=1e-5)


def test_a_weight_of_one_is_no_weight_and_a_larger_one_pulls_harder(trained):
    inputs, references = _inputs(), _subjects(1, vlm_tokens=0)
    plain = _run(trained, inputs)

    def pull(weight: float) -> Tensor:
        weighted = dataclasses.replace(references, weights=torch.tensor([[weight]]))
        return _run(trained, inputs, references=weighted) - plain

    assert torch.equal(pull(1.0), _run(trained, inputs, references=references) - plain)
    assert pull(0.5).norm() < pull(1.0).norm() < pull(2.0).norm()


def test_moving_subjects_with_their_slots_changes_nothing(trained):
    inputs, references = _inputs(), _subjects(4)
    shuffled = _some(references, 2, 0, 3, 1)
    plain = _run(trained, inputs, references=references)
    torch.testing.assert_close(_run(trained, inputs, references=shuffled), plain, rtol=0, atol=1e-5)


def test_the_slot_tells_two_equal_subjects_apart(trained):
    inputs, references = _inputs(), _subjects(1)
    elsewhere = dataclasses.replace(references, slots=torch.tensor([[2]]))
    assert _differ(_run(trained, inputs, references=references), _run(trained, inputs, references=elsewhere))


def test_two_pictures_of_one_subject_are_one_subject(trained):
    """They share a slot and look at each other in stage 1, and stage 2, which needs somebody else, is not used."""
    inputs, references = _inputs(), _subjects(1, views=2)
    with torch.no_grad():
        before = _run(trained, inputs, references=references)
        for block in trained.subject_blocks:
            block.attn2.to_out[0].weight.normal_()
    assert torch.equal(_run(trained, inputs, references=references), before)
    assert references.latents is not None
    swapped = dataclasses.replace(references, latents=references.latents.flip(2))
    assert _differ(_run(trained, inputs, references=swapped), before)  # the first picture is the first one


def test_a_picture_that_is_not_there_is_not_seen(trained):
    inputs, references = _inputs(), _subjects(2, views=2)
    assert references.latents is not None
    mask = torch.tensor([[[True, True], [True, False]]])
    scribbled = references.latents.clone()
    scribbled[0, 1, 1] = 50.0
    outputs = [
        _run(trained, inputs, references=dataclasses.replace(references, latents=latents, mask=mask))
        for latents in (references.latents, scribbled)
    ]
    assert torch.equal(*outputs)


def test_clips_with_different_casts_share_a_batch(trained):
    """Training mixes them: one subject, three subjects, nobody, nobody and no VLM."""
    inputs = tuple(t.repeat(4, *[1] * (t.ndim - 1)) for t in _inputs())
    full = _subjects(3, batch=4)
    assert full.latents is not None and full.vlm_states is not None
    there = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]]).bool()
    heard = torch.tensor([True, True, True, False])
    together = _run(
        trained,
        inputs,
        references=dataclasses.replace(full, mask=there.unsqueeze(-1), vlm_mask=heard[:, None].expand(4, 5)),
    )
    for clip, cast in enumerate(([0], [0, 1, 2], [], [])):
        states = full.vlm_states[clip : clip + 1] if heard[clip] else None
        latents = full.latents[clip : clip + 1, cast] if cast else None
        alone = _run(trained, tuple(t[:1] for t in inputs), references=References(latents, vlm_states=states))
        torch.testing.assert_close(together[clip : clip + 1], alone, rtol=0, atol=2e-5)


def test_a_branch_without_the_vlm_is_a_view_of_the_cache(trained):
    inputs, references = _inputs(), _subjects(2)
    cache = trained.encode_identity(references)
    alone = trained.encode_identity(dataclasses.replace(references, vlm_states=None))
    assert cache is not None and alone is not None
    view = cache.without_vlm()
    assert view is not None and view.layers[0].key.data_ptr() == cache.layers[0].key.data_ptr()
    torch.testing.assert_close(
        _run(trained, inputs, identity=view), _run(trained, inputs, identity=alone), rtol=0, atol=1e-5
    )
    assert trained.encode_identity(References(vlm_states=references.vlm_states)).without_vlm() is None


def test_the_view_without_the_vlm_also_fits_a_mixed_batch(trained):
    """One clip with both subjects, one with the second, one with nobody but the VLM, one with nothing at all."""
    inputs = tuple(t.repeat(4, *[1] * (t.ndim - 1)) for t in _inputs())
    there = torch.tensor([[1, 1], [0, 1], [0, 0], [0, 0]]).bool().unsqueeze(-1)
    heard = torch.tensor([True, False, True, False])[:, None].expand(4, 5)
    full = dataclasses.replace(_subjects(2, batch=4), mask=there, vlm_mask=heard)
    view = trained.encode_identity(full).without_vlm()
    alone = dataclasses.replace(full, vlm_states=None, vlm_mask=None)
    seen, wanted = (_run(trained, inputs, **case) for case in ({"identity": view}, {"references": alone}))
    torch.testing.assert_close(seen, wanted, rtol=0, atol=2e-5)
    assert torch.equal(seen[2:], _run(trained, inputs)[2:])


def test_the_cache_knows_its_size(trained):
    cache = trained.encode_identity(_subjects(3))
    keys = 3 * 2 * 3 + 5
    assert cache.num_bytes() == 2 * 2 * keys * 48 * 4  # layers, key and value, tokens, width, fp32


def test_too_many_subjects_are_refused_with_the_number_of_slots(model):
    with pytest.raises(ValueError, match="5 subjects, but the model has 4 slots"):
        model.encode_identity(_subjects(5))


# --- ablations ---


@pytest.mark.parametrize(
    ("switch", "gone"),
    [
        ({"identity_intra": False}, ("norm1", "attn1")),
        ({"identity_inter": False}, ("norm2", "attn2", "gate")),
        ({"identity_cross": False}, ("norm3", "to_k", "to_v", "norm_k", "identity")),
        ({"vlm_dim": 0}, ("vlm_projector",)),
    ],
)
def test_a_switch_removes_exactly_its_stage(plain, switch, gone):
    everything = dict(_with_identity(plain).named_parameters())
    left = dict(_with_identity(plain, **switch).named_parameters())

    def belongs(name: str) -> bool:
        return is_identity_key(name) and any(part in gone for part in name.split(".")[0:3])

    assert set(everything) - set(left) == {name for name in everything if belongs(name)}
    assert not set(left) - set(everything)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(("intra", "inter"), [(True, False), (False, True), (False, False)])
def test_every_ablation_still_shows_its_subjects(plain, intra, inter, cross):
    switches = {"identity_intra": intra, "identity_inter": inter, "identity_cross": cross}
    model = tiny.stir(_with_identity(plain, **switches), 1.0)
    inputs, references = _inputs(2), _subjects(2, batch=2)
    mask = torch.tensor([[[True], [True]], [[True], [False]]])
    both, masked = (
        _run(model, inputs, references=case) for case in (references, dataclasses.replace(references, mask=mask))
    )
    assert _differ(both[1], masked[1])
    torch.testing.assert_close(both[0], masked[0], rtol=0, atol=1e-5)
    assert torch.equal(_run(model, inputs), _run(plain, inputs))


def test_without_a_vlm_its_states_are_not_read(plain):
    model = tiny.stir(_with_identity(plain, vlm_dim=0))
    inputs, references = _inputs(), _subjects(1)
    silent = dataclasses.replace(references, vlm_states=None)
    assert torch.equal(_run(model, inputs, references=references), _run(model, inputs, references=silent))


# --- weights in, weights out, training ---


def test_plain_wan_goes_in_and_nothing_is_left_on_the_meta_device(plain):
    model = _with_identity(plain)
    assert not [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert torch.equal(model.subject_patch_embedding.weight, plain.patch_embedding.weight)
    mine, theirs = model.state_dict(), plain.state_dict()
    assert {key for key in mine if not is_identity_key(key)} == set(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_weights_that_do_not_fit_are_named(plain):
    del plain.proj_out
    with pytest.raises(ValueError, match="proj_out"):
        _with_identity(plain)


def test_saving_and_loading_gives_the_same_clip(trained, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    again, info = IdentityWanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert dict(again.config).items() >= {"identity_layers": 2, "num_layers": 3, "vlm_dim": tiny.VLM_DIM}.items()
    inputs, references = _inputs(), _subjects(2)
    assert torch.equal(_run(again.eval(), inputs, references=references), _run(trained, inputs, references=references))


def test_a_lora_attaches_to_wan_and_to_the_identity_blocks(trained):
    inputs, references = _inputs(), _subjects(2)
    before = _run(trained, inputs, references=references)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "gate"]))
    grafted = [name for name, _ in trained.named_parameters() if "lora_A" in name]
    assert any(name.startswith("subject_blocks.") for name in grafted)
    assert any(".identity." in name for name in grafted) and any(".attn1." in name for name in grafted)
    assert torch.equal(_run(trained, inputs, references=references), before)  # B starts at zero


def test_every_stage_learns_once_the_output_has_left_zero(trained):
    trained.enable_gradient_checkpointing()
    checkpointed = _gradients(trained)
    trained.disable_gradient_checkpointing()
    plainly = _gradients(trained)
    assert not [name for name, g in plainly.items() if is_identity_key(name) and not g.abs().max() > 0]
    for name, gradient in plainly.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def _gradients(model) -> dict[str, Tensor]:
    model.train().zero_grad()
    torch.manual_seed(1)
    references = dataclasses.replace(_subjects(4, views=2), slots=torch.tensor([[3, 1, 0, 2]]))
    model(*_inputs(), references=references).sample.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_an_untrained_model_starts_learning_at_stage_3(model):
    model.train()
    model(*_inputs(), references=_subjects(2)).sample.square().mean().backward()
    moving = {
        name for name, p in model.named_parameters() if is_identity_key(name) and p.grad is not None and p.grad.any()
    }
    assert moving == {f"blocks.{i}.identity.to_out.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}


def test_a_step_cache_takes_these_blocks(trained):
    inputs, references = _inputs(), _subjects(2)
    cache = trained.encode_identity(references)
    wanted = _run(trained, inputs, identity=cache)
    trained.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with trained.cache_context("full"):
        first, second = (_run(trained, inputs, identity=cache) for _ in range(2))
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(second, wanted)


def test_blocks_can_wait_on_another_device(trained):
    inputs, references = _inputs(), _subjects(2)
    wanted = _run(trained, inputs, references=references)
    trained.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    assert torch.equal(_run(trained, inputs, references=references), wanted)


# --- sizes and costs, counted on the meta device ---


@pytest.mark.parametrize(
    ("config", "base"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)], ids=["1.3B", "14B"]
)
def test_the_full_sizes_have_the_parameters_that_were_computed(config, base):
    with torch.device("meta"):
        counts = parameter_counts(IdentityWanTransformer3DModel(**config))
    width = config["num_attention_heads"] * 128
    assert counts["base"] == base
    assert counts["attention"] == 20 * 13 * (width**2 + width)
    assert counts["norms"] == 20 * 14 * width  # four layer norms with bias, six norms of queries and keys
    assert counts["patches"] == 16 * 4 * width + width and counts["slots"] == 4 * width
    assert counts["vlm"] == 2 * 3584 + 3584 * width + width + width**2 + width


@pytest.fixture(scope="module")
def full_size() -> IdentityWanTransformer3DModel:
    with torch.device("meta"):
        return IdentityWanTransformer3DModel(**WAN_1_3B).eval()


def tflop(model: IdentityWanTransformer3DModel, *, subjects: int, cached: bool, extra_frames: int = 0) -> float:
    """One forward at 480x832x81 with 256 VLM tokens."""
    with torch.device("meta"):
        inputs = torch.empty(1, 16, 21 + extra_frames, 60, 104), torch.empty(1), torch.empty(1, 512, 4096)
        references = References(torch.empty(1, subjects, 1, 16, 60, 104), vlm_states=torch.empty(1, 256, 3584))
        given = {"references": references} if subjects else {}
        with torch.no_grad():
            if cached and subjects:
                given = {"identity": model.encode_identity(references)}
            with FlopCounterMode(display=False) as counter:
                model(*inputs, **given)
    return counter.get_total_flops() / 1e12


def test_wan_costs_what_was_computed(full_size):
    assert tflop(full_size, subjects=0, cached=False) == pytest.approx(BASE_TFLOP, abs=0.05)


@pytest.mark.parametrize(
    ("subjects", "cached", "percent"), [(1, True, 4.8), (4, True, 11.4), (1, False, 5.2), (4, False, 15.4)]
)
def test_subjects_cost_what_was_computed(full_size, subjects, cached, percent):
    added = 100 * (tflop(full_size, subjects=subjects, cached=cached) / BASE_TFLOP - 1)
    assert added == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize(("subjects", "percent"), [(1, 8.2), (4, 34.9)])
def test_concatenating_subjects_in_time_costs_more(full_size, subjects, percent):
    """Phantom's way: each subject is one more latent frame in every step."""
    added = 100 * (tflop(full_size, subjects=0, cached=False, extra_frames=subjects) / BASE_TFLOP - 1)
    assert added == pytest.approx(percent, abs=0.2)


@torch.no_grad()
def test_an_untrained_stage_3_already_looks_at_the_picture_that_the_video_shows(model) -> None:
    subjects = dataclasses.replace(_subjects(3), vlm_states=None)
    block = model.blocks[0].identity
    tokens = model._tower(subjects).tokens[:, 1]  # the second one, as a video
    query = block.norm_q(block.to_q(block.norm(tokens))).unflatten(-1, (block.heads, -1))

    def share_of_the_second() -> Tensor:
        key = model.encode_identity(subjects).layers[0].key.unflatten(-1, (block.heads, -1))
        scores = torch.einsum("bqhd,bshd->bhqs", query, key) * query.shape[-1] ** -0.5
        return scores.softmax(-1).unflatten(-1, (3, -1)).sum(-1).mean((0, 1, 2))[1]

    assert share_of_the_second() > 0.7
    model.subject_blocks[0].to_k.reset_parameters()  # a projection of its own
    assert share_of_the_second() < 0.6


@torch.no_grad()
def test_positions_tell_two_places_of_an_even_picture_apart_and_leave_the_start_plain(plain) -> None:
    without, told = _with_identity(plain), _with_identity(plain, subject_positions=True)
    even = References(latents=torch.ones(1, 1, 2, tiny.LATENT_CHANNELS, 4, 6))
    assert told._tower(even).tokens.shape == without._tower(even).tokens.shape
    alike = without._tower(even).tokens[0, 0]
    assert torch.equal(alike, alike[:1].expand_as(alike))
    first, second = told._tower(even).tokens[0, 0].unflatten(0, (2, -1))
    assert torch.equal(first, second)  # two pictures have the same places
    assert torch.cdist(first, first).add(torch.eye(len(first)) * 9).min() > 0.1
    inputs = _inputs()
    assert torch.equal(told(*inputs, references=even).sample, plain(*inputs).sample)
    assert parameter_counts(told) == parameter_counts(without)


@torch.no_grad()
def test_in_an_even_clip_only_positions_tell_its_moments_apart_and_they_start_at_nothing(plain) -> None:
    even, time, text = torch.full((1, tiny.LATENT_CHANNELS, 5, 8, 8), 0.3), torch.tensor([900.0]), _inputs()[2][:1]
    without, told = _with_identity(plain), _with_identity(plain, video_positions=True)

    def moments(model) -> Tensor:
        with torch.no_grad():
            return model(even, time, text).sample.mean((1, 3, 4))[0]

    assert torch.equal(moments(told), moments(without))
    assert float(moments(without).std()) < 1e-5  # RoPE is relative, and a softmax of equals is the same everywhere
    torch.nn.init.normal_(told.video_position_embedding.proj.weight, std=0.3)
    assert float(moments(told).std()) > 1e-3


@torch.no_grad()
def test_a_slot_is_heard_in_the_keys_of_every_layer_and_leaves_the_start_plain(plain) -> None:
    without, worn = _with_identity(plain), _with_identity(plain, slot_keys=True)
    without.slot_embedding.weight.zero_()
    worn.slot_embedding.weight.zero_()
    twins = _subjects(1)
    twins = dataclasses.replace(twins, latents=twins.latents.expand(1, 2, -1, -1, -1, -1))  # the same picture twice
    alike, apart = without.encode_identity(twins), worn.encode_identity(twins)
    half = apart.num_subject_tokens // 2
    for same, told in zip(alike.layers, apart.layers, strict=True):
        assert torch.equal(same.key[:, :half], same.key[:, half : 2 * half])
        first, second = told.key[:, :half], told.key[:, half : 2 * half]
        assert float((first - second).std()) > SLOT_KEY / 2
        assert torch.equal(
            told.value[:, :half], told.value[:, half : 2 * half]
        )  # who it is, and not what it looks like
    moved = worn.encode_identity(dataclasses.replace(twins, slots=torch.tensor([[1, 0]])))
    for told, turned in zip(apart.layers, moved.layers, strict=True):
        assert torch.equal(told.key[:, :half], turned.key[:, half : 2 * half])
        assert torch.equal(told.key[:, 2 * half :], turned.key[:, 2 * half :])  # the VLM wears none
    inputs = _inputs()
    assert torch.equal(_run(worn, inputs, references=twins), _run(plain, inputs))
    counts = [parameter_counts(model)["slots"] for model in (without, worn)]
    assert counts[1] == counts[0] * 3  # of the tokens once, and of the keys in both layers


def test_a_zoomed_subject_token_sees_what_wan_sees_in_the_picture_made_half_as_large(plain) -> None:
    zoomed = _with_identity(plain, subject_zoom=2)
    picture = torch.randn(1, tiny.LATENT_CHANNELS, 1, 8, 12)
    tokens = zoomed.subject_patch_embedding(picture)
    assert tokens.shape[-2:] == (4, 6)  # as many as without a zoom; neighbours overlap by half
    for row, column in ((1, 1), (1, 4), (2, 3)):
        window = picture[..., 2 * row - 1 : 2 * row + 3, 2 * column - 1 : 2 * column + 3]
        halved = torch.nn.functional.avg_pool3d(window, (1, 2, 2))
        seen = tokens[..., row : row + 1, column : column + 1]
        torch.testing.assert_close(seen, plain.patch_embedding(halved), atol=1e-5, rtol=0)
    inputs, references = _inputs(), _subjects(2)
    assert torch.equal(_run(zoomed, inputs, references=references), _run(plain, inputs))
    with pytest.raises(ValueError, match="subject_zoom"):
        _with_identity(plain, subject_zoom=0)
