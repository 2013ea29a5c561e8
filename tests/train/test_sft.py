"""The recipe at tiny size: a still is a short clip, a cut run is a whole run, what is dropped is dropped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from safetensors.torch import save_file
from torch import Tensor

from engine import presets
from engine.models.identity_wan import IdentityAttention, IdentityWanTransformer3DModel
from engine.models.subject_tower import LayerIdentity, References
from engine.resolve import check_frames
from train import cpu_attention
from train.data.batch import Batch, NullConditioning, Shard, cut_from_clip, join_shards, mask_pictures
from train.data.cache import Cache
from train.data.encode import instance_ids_of_latents
from train.runs import checkpoint
from train.sft import attention_losses, loss, models, trainer
from train.sft.conditions import draw_conditions
from train.sft.config import SftConfig, nest, read_run
from train.sft.loss import COARSE, TrainingStep, draw_moments, kind_at, weighted_error
from train.toybox import recipe, scenes, world

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
BLANK = NullConditioning(text=torch.zeros(1, 5, 8), white=torch.full((4,), 3.0))
IDENTITY = {**WAN, "identity_layers": 1, "max_subjects": 4, "vlm_dim": 6}


def config_of(**values: object) -> SftConfig:
    """A config from values without their groups."""
    return SftConfig.model_validate(nest(values))


def changed(config: SftConfig, **values: object) -> SftConfig:
    """The config with values of its groups changed."""
    whole = config.model_dump()
    for group, own in nest(values).items():
        whole[group] |= own
    return SftConfig.model_validate(whole)


def batch_of(shard: Shard) -> Batch:
    return join_shards([shard], BLANK.white, np.random.default_rng(0))


def alignment(config: SftConfig) -> list[loss.AuxiliaryLoss]:
    weights = config.losses
    return [
        attention_losses.AttentionAlignment(2, subject=weights.subject_alignment, caption=weights.caption_alignment)
    ]


def step_of(model: torch.nn.Module, config: SftConfig) -> TrainingStep:
    return TrainingStep(model, config, BLANK, alignment(config))


def shard(kind: str, subjects: int, seed: int) -> Shard:
    frames = 3 if kind == "clip" else 1
    g = torch.Generator().manual_seed(seed)
    instance_ids = torch.zeros(6, frames, 4, 4, dtype=torch.uint8)
    instance_ids[:, :, :2, :2] = 1
    return {
        "latents": torch.randn(6, 4, frames, 4, 4, generator=g).half(),
        "instance_ids": instance_ids,
        "text": torch.randn(6, 5, 8, generator=g).half(),
        "numbers": torch.tensor([[0, 1, 0, 2, 0]], dtype=torch.uint8).repeat(6, 1),
        "references": torch.randn(6, subjects, 1, 4, 4, 4, generator=g).half(),
        "vlm": torch.randn(6, 7 + seed, 6, generator=g).half(),
        "vlm_mask": torch.ones(6, 7 + seed, dtype=torch.bool),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    (folder / "null").mkdir(parents=True)
    save_file(vars(BLANK), folder / "null" / "blank.safetensors")
    for number, (kind, subjects) in enumerate((("still", 1), ("still", 2), ("clip", 2), ("still", 2))):
        save_file(shard(kind, subjects, number), folder / f"{kind}-{number:05d}.safetensors")
    return folder


def run_folder(folder: Path, cache: Path, **values: object) -> Path:
    folder.mkdir()
    config = config_of(cache=str(cache), **{"kind": "identity", "architecture": IDENTITY, "steps": 8, **values})
    (folder / "run.json").write_text(config.model_dump_json(), encoding="utf-8")
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    saved = checkpoint.load(run)
    assert saved is not None
    return saved[1]["model"] | {f"ema/{key}": t for key, t in saved[1]["ema"].items()}


def test_a_run_that_is_cut_and_goes_on_ends_with_the_same_weights(tmp_path: Path, cache: Path) -> None:
    whole, cut = run_folder(tmp_path / "whole", cache), run_folder(tmp_path / "cut", cache)
    assert trainer.train(whole, seconds=60)
    assert not trainer.train(cut, seconds=60, updates=3)
    assert trainer.train(cut, seconds=60)
    first, second = weights(whole), weights(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_make_one_run_and_agree_on_its_weights(tmp_path: Path, cache: Path) -> None:
    run = run_folder(tmp_path / "team", cache, steps=4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "-m", "train.sft", str(run)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(run)
    assert saved is not None and saved[0] == 4
    alone = run_folder(tmp_path / "alone", cache, steps=4)
    trainer.train(alone, seconds=60)
    first, second = weights(run), weights(alone)
    assert any(not torch.equal(first[key], second[key]) for key in first)  # the other one's batches count too


def test_stills_clips_and_sparse_clips_have_their_shares_and_are_spread_evenly() -> None:
    config = config_of(kind="identity", cache="", architecture=IDENTITY, steps=1, clip_share=0.75, sparse_share=2 / 3)
    kinds = [kind_at(step, config) for step in range(400)]
    assert (kinds.count("still"), kinds.count("clip"), kinds.count("sparse")) == (100, 100, 200)
    assert all(sorted(kinds[i : i + 4]) == sorted(kinds[:4]) for i in range(0, 400, 4))


def test_some_frames_of_a_clip_are_told_which_moments_they_are() -> None:
    torch.manual_seed(0)
    model = models.new_model(
        config_of(kind="identity", cache="", architecture={**IDENTITY, "video_positions": True}, steps=1)
    )
    told: list[tuple[Tensor, ...]] = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: told.append((given[0], *given[3])))
    latents, text = torch.randn(1, 4, 5, 4, 4), torch.randn(1, 5, 8)
    moments = (0, 2, 4)
    with torch.no_grad():
        model(latents, torch.tensor([500.0]), text)
        model(latents[:, :, list(moments)], torch.tensor([500.0]), text, frame_indices=moments)
        model(latents[:, :, list(moments)], torch.tensor([500.0]), text)
    (whole, *tables), (chosen, *chosen_tables), (untold, *_) = told
    assert torch.equal(whole.unflatten(1, (5, -1))[:, list(moments)].flatten(1, 2), chosen)
    assert not torch.equal(chosen, untold)
    for all_of, ours in zip(tables, chosen_tables, strict=True):
        assert torch.equal(all_of.unflatten(1, (5, -1))[:, list(moments)].flatten(1, 2), ours)


def test_a_model_goes_on_with_positions_that_it_has_not_had(tmp_path: Path) -> None:
    first = config_of(kind="identity", cache="", architecture=IDENTITY, steps=1)
    models.new_model(first).save_pretrained(tmp_path)
    grown = changed(first, start=str(tmp_path), architecture={**IDENTITY, "video_positions": True})
    model = models.new_model(grown)
    assert 0 < float(model.video_position_embedding.proj.weight.detach().std()) < 2 * models.POSITION_STD
    for name, value in models.new_model(changed(first, start=str(tmp_path))).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    rates = {id(p): group["peak"] for group in models.new_optimizer(model, grown).param_groups for p in group["params"]}
    assert rates[id(model.video_position_embedding.proj.weight)] == models.ZERO_START * grown.optimizer.learning_rate
    models.new_model(config_of(kind="base", cache="", architecture=WAN, steps=1)).save_pretrained(tmp_path / "plain")
    for start in ("", str(tmp_path / "plain")):  # a run of its own, and one upon a plain base
        assert models.new_model(changed(grown, start=start)).video_position_embedding.proj.weight.any()
    worn = models.new_model(changed(grown, architecture={**IDENTITY, "slot_keys": True}))
    assert float(worn.subject_blocks[0].slot_key.weight.detach().std()) > 0.1
    other = changed(grown, architecture={**IDENTITY, "num_layers": 3})
    with pytest.raises(ValueError, match="another architecture"):
        models.new_model(other)


def test_a_sparse_clip_holds_both_of_its_ends() -> None:
    """Positions are relative: from frames in the middle alone no model can tell when they are."""
    rng = np.random.default_rng(0)
    drawn = [draw_moments(7, 3, rng) for _ in range(40)]
    assert all(first == 0 and last == 6 and 0 < between < 6 for first, between, last in drawn)
    assert {between for _, between, _ in drawn} == {1, 2, 3, 4, 5}
    assert draw_moments(3, 5, rng) == (0, 1, 2)

    config = config_of(kind="identity", cache="", architecture=IDENTITY, steps=1, known_region=0, sparse_frames=3)
    whole = shard("clip", 1, 0)
    whole["latents"] = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(6, 4, 7, 4, 4).clone()
    whole["instance_ids"] = torch.zeros(6, 7, 4, 4, dtype=torch.uint8)
    ear = Ear()
    step_of(ear, config)(batch_of(whole), (0,), sparse=True)
    assert ear.latents.shape[2] == 3 and ear.told["frame_indices"][0] == 0 and ear.told["frame_indices"][2] == 6


def test_a_plain_wan_refuses_to_look_at_moments() -> None:
    with pytest.raises(ValueError, match="sparse_share"):
        config_of(kind="base", cache="", architecture=WAN, steps=1, sparse_share=0.5)


def test_more_weight_on_motion_counts_what_moves_together_and_neither_stillness_nor_detail() -> None:
    missed, even = torch.randn(2, 3, 5, 8, 8), torch.ones(2, 1, 5, 8, 8)
    weight = 1 + torch.rand(2, 1, 5, 8, 8)
    torch.testing.assert_close(
        weighted_error(missed, weight, 0.0), (missed.square() * weight).sum() / (weight.sum() * 3)
    )
    still = missed.mean(2, keepdim=True).expand_as(missed)
    checks = torch.tensor([1.0, -1.0]).repeat(4)
    detail = (missed.mean((-2, -1), keepdim=True) * checks).expand_as(missed)
    for unmoved in (still, detail):
        torch.testing.assert_close(weighted_error(unmoved, even, 5.0), weighted_error(unmoved, even, 0.0))
    together = (missed - still).mean((-2, -1), keepdim=True).expand_as(missed)
    plain = weighted_error(together, even, 0.0)
    torch.testing.assert_close(weighted_error(together, even, 5.0), (1 + 5 * COARSE**2) * plain)
    assert weighted_error(torch.zeros_like(missed), weight, 5.0) == 0


def test_motion_inside_a_known_region_alone_counts() -> None:
    weight = torch.zeros(1, 1, 3, 4, 4)
    weight[:, :, :2, 1:3] = 1
    weight[:, :, 1:, :, 1:3] = 1  # it moves with its subject
    missed = torch.randn(1, 2, 3, 4, 4)
    elsewhere = torch.where(weight > 0, missed, torch.randn_like(missed))
    assert torch.equal(weighted_error(missed, weight, 2.0), weighted_error(elsewhere, weight, 2.0))


def test_training_lowers_the_loss_on_what_it_trains_on(cache: Path) -> None:
    config = config_of(kind="identity", cache=str(cache), architecture=IDENTITY, steps=60, known_region=0)
    model, dealt = models.new_model(config), Cache(cache)
    dealt.refresh()
    batch = dealt.draw("still", 6, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss, parts = step_of(model, config)(batch, (0,))
        losses.append(parts["error"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_the_region_alignment_loss_falls_when_each_place_looks_at_whoever_is_there() -> None:
    attention = IdentityAttention(8, 2, 1e-6)
    torch.nn.init.eye_(attention.to_q.weight)
    torch.nn.init.zeros_(attention.to_q.bias)
    directions = torch.eye(8) - 1 / 8  # what the norm before the query leaves of eight unlike tokens
    instance_ids = torch.tensor([[1, 1, 2, 0]])
    z = directions[[0, 0, 4, 2]].unsqueeze(0)
    keys = directions[[0, 0, 4, 4, 2]].unsqueeze(0) * 9  # two of each subject, one of the VLM
    subjects = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).unsqueeze(0)

    def loss(key: Tensor, instance_ids: Tensor, near: Tensor = subjects) -> float:
        seen = attention_losses.RecordedAttention(pictures=[(attention, z, LayerIdentity(key, key, None, None))])
        return attention_losses.region_alignment_loss(seen, instance_ids, near).item()

    swapped = keys[:, [2, 3, 0, 1, 4]]
    assert loss(keys, instance_ids) < 0.5 * loss(swapped, instance_ids)
    assert loss(keys, instance_ids, subjects.flip(-1)) == pytest.approx(loss(swapped, instance_ids), rel=1e-4)
    assert loss(keys, torch.tensor([[1, 1, 2, -1]])) < loss(keys, instance_ids)
    assert loss(keys, torch.full_like(instance_ids, -1)) == 0
    half = subjects * torch.tensor([1.0, 0, 1, 0])  # one part of each subject is the right one
    assert loss(keys, instance_ids, half) > loss(keys, instance_ids)


def test_the_reading_loss_falls_when_each_place_reads_the_word_that_numbers_whoever_is_there() -> None:
    reader = WanAttention(dim=8, heads=2, dim_head=4, cross_attention_dim_head=4)
    for projection in (reader.to_q, reader.to_k):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    words = 3 * torch.eye(8)[[7, 0, 6, 1, 5]].unsqueeze(0)  # "subject 1 meets subject 2"
    numbers = torch.tensor([[0, 1, 0, 2, 0]])
    instance_ids = torch.tensor([[1, 2, 0, 1]])

    def loss(z: Tensor, instance_ids: Tensor, numbers: Tensor = numbers) -> float:
        return attention_losses.word_alignment_loss(
            attention_losses.RecordedAttention(words=[(reader, z, words)]), instance_ids, numbers
        ).item()

    reads = 3 * torch.eye(8)[[0, 1, 7, 0]].unsqueeze(0)
    assert loss(reads, instance_ids) < 0.5 * loss(reads, torch.tensor([[2, 1, 0, 2]]))
    assert loss(reads, instance_ids, numbers.flip(1)) == pytest.approx(
        loss(reads, torch.tensor([[2, 1, 0, 2]])), rel=1e-5
    )
    elsewhere = reads.clone()
    elsewhere[0, 2] = 9.0  # nobody is there, so nothing is asked
    assert loss(elsewhere, instance_ids) == loss(reads, instance_ids)
    other_heads = reads.clone()
    other_heads[..., 4:] = 5.0  # the second head may read what it likes
    reader.norm_q = torch.nn.Identity()
    assert loss(other_heads, instance_ids) == pytest.approx(loss(reads, instance_ids))
    assert (
        loss(reads, torch.zeros_like(instance_ids)) == loss(reads, torch.full_like(instance_ids, 3)) == 0
    )  # 3 is never numbered


def test_the_slot_alignment_loss_asks_for_the_slot_and_not_for_what_a_picture_looks_like() -> None:
    attention, worn = IdentityAttention(8, 2, 1e-6), 2 * torch.eye(8)[:4]
    torch.nn.init.eye_(attention.to_q.weight)
    torch.nn.init.zeros_(attention.to_q.bias)
    instance_ids = torch.tensor([[1, 2, 0, -1]])
    z = 3 * torch.eye(8)[[0, 1, 5, 6]].unsqueeze(0)

    def loss(z: Tensor, instance_ids: Tensor, count: int = 2) -> float:
        return attention_losses.slot_alignment_loss(
            attention_losses.RecordedAttention(slots=[(attention, z, worn)]), instance_ids, count
        ).item()

    assert loss(z, instance_ids) < 0.5 * loss(z, torch.tensor([[2, 1, 0, -1]]))
    assert loss(z, instance_ids) < loss(z, instance_ids, count=4)  # more to be taken for
    elsewhere = z.clone()
    elsewhere[0, 2:] = 7 * torch.randn(2, 8)
    assert loss(elsewhere, instance_ids) == pytest.approx(loss(z, instance_ids))
    assert loss(z, instance_ids.clamp(max=1), count=1) == 0  # alone there is nothing to tell
    assert loss(z, torch.zeros_like(instance_ids)) == 0


def test_keys_that_wear_no_slots_are_not_asked_for_them(cache: Path) -> None:
    dealt = Cache(cache)
    dealt.refresh()
    batch = dealt.draw("clip", 4, np.random.default_rng(0))
    assert batch.references.shape[1] == 2
    batch.instance_ids[:, :, 2:, 2:] = 2
    for worn in (False, True):
        architecture = {**IDENTITY, "slot_keys": worn}
        config = config_of(kind="identity", cache=str(cache), architecture=architecture, steps=1, drop_both=0)
        _, parts = step_of(models.new_model(config), config)(batch, (0,))
        assert (parts["names"] > 0) == worn


def test_whose_caption_was_dropped_is_asked_to_read_nothing(cache: Path) -> None:
    config = config_of(kind="identity", cache=str(cache), architecture=IDENTITY, steps=1, drop_subjects=0)
    model, dealt = models.new_model(config), Cache(cache)
    dealt.refresh()
    batch = dealt.draw("still", 4, np.random.default_rng(0))
    silent = changed(config, drop_text=1.0, drop_both=0.0)
    told = changed(config, drop_text=0.0, drop_both=0.0)
    assert step_of(model, silent)(batch, (0,))[1]["reads"] == 0
    assert step_of(model, told)(batch, (0,))[1]["reads"] > 0


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_counterpart_of_a_place_is_the_same_part_of_a_larger_mirrored_or_moved_picture(mirrored: bool) -> None:
    white = torch.zeros(4)
    part = torch.randn(4, 2, 2)  # a subject of four parts
    latents = torch.full((1, 4, 2, 8, 8), 7.0)
    latents[0, :, 0, 2:4, 4:6] = part
    latents[0, :, 1, 5:7, 1:3] = part  # it moves
    instance_ids = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
    instance_ids[0, 0, 2:4, 4:6] = instance_ids[0, 1, 5:7, 1:3] = 2
    references = torch.zeros(1, 2, 1, 4, 8, 8)
    references[0, 0, 0, :, 3:5, 3:5] = 1.0
    larger = part.repeat_interleave(2, 1).repeat_interleave(2, 2)
    references[0, 1, 0, :, 3:7, 1:5] = larger.flip(-1) if mirrored else larger
    near = attention_losses.counterparts(latents, instance_ids, references, mask_pictures(references, white), patch=1)
    assert near.shape == (1, 2 * 64, 2 * 64)
    held = instance_ids.flatten() > 0
    assert not near[0, ~held].any() and not near[0, :, :64].any()  # nobody else's place, and not the other subject
    shown = references[0, 1, 0].flatten(1)[:, near[0, held, 64:].argmax(-1)]
    assert torch.equal(shown, latents.flatten(2)[0][:, held])
    references[0, 1] += 1.0  # no white rim: the whole picture counts
    drawn = mask_pictures(references, white)
    assert bool(
        (attention_losses.counterparts(latents, instance_ids, references, drawn, patch=1)[0, held, 64:] == 1).all()
    )


def test_identity_blocks_start_from_the_base_as_it_is(tmp_path: Path, cache: Path) -> None:
    base = run_folder(tmp_path / "base", cache, kind="base", architecture=WAN, steps=3)
    trainer.train(base, seconds=60)
    config = config_of(kind="identity", cache=str(cache), architecture=IDENTITY, steps=1, start=str(base))
    plain, upon = models.new_model(read_run(base)).eval(), models.new_model(config).eval()
    models.load_average(plain, base)
    batch = batch_of(shard("still", 2, 5))
    inputs = (batch.latents, torch.full((6,), 500.0), batch.text)
    references = References(batch.references, vlm_states=batch.vlm, vlm_mask=batch.vlm_mask)
    with torch.no_grad():
        assert torch.equal(plain(*inputs).sample, upon(*inputs, references=references).sample)


def test_an_exported_model_holds_the_averages_in_half_precision_and_training_goes_on_from_it(
    tmp_path: Path, cache: Path
) -> None:
    run = run_folder(tmp_path / "run", cache)
    trainer.train(run, seconds=60)
    models.export(run, tmp_path / "model")
    model = IdentityWanTransformer3DModel.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    saved = checkpoint.load(run)
    assert saved is not None
    for key, tensor in saved[1]["ema"].items():
        assert torch.equal(model.get_parameter(key), tensor.half().float()), key
    config = config_of(kind="identity", cache=str(cache), architecture=IDENTITY, steps=1, start=str(tmp_path / "model"))
    onward = models.new_model(config)
    assert all(torch.equal(onward.get_parameter(key), model.get_parameter(key)) for key in saved[1]["ema"])


def test_conditions_are_dropped_in_their_shares_and_take_the_vlm_along() -> None:
    config = config_of(kind="identity", cache="", architecture=IDENTITY, steps=1)
    count = 4000
    batch = batch_of({
        "latents": torch.zeros(count, 4, 1, 1, 1), "instance_ids": torch.zeros(count, 1, 1, 1, dtype=torch.uint8),
        "text": torch.ones(count, 1, 1), "numbers": torch.zeros(count, 1),
        "references": torch.zeros(count, 2, 1, 4, 1, 1), "vlm": torch.zeros(count, 3, 1),
        "vlm_mask": torch.ones(count, 3, dtype=torch.bool),
    })  # fmt: skip
    nothing = NullConditioning(text=torch.zeros(1, 1, 1), white=torch.zeros(4))
    said = draw_conditions(batch, config, nothing, torch.Generator().manual_seed(0))
    text, references = said.text, said.shown
    assert references is not None
    assert torch.equal(said.without_text.flatten(), text.flatten() == 0)
    no_text, no_subjects = text.flatten() == 0, ~references.mask.flatten(1).any(1)
    shares = [(no_text & ~no_subjects), (no_subjects & ~no_text), (no_text & no_subjects)]
    assert all(abs(share.float().mean().item() - 0.1) < 0.02 for share in shares)
    assert torch.equal(references.vlm_mask.any(1), ~(no_text | no_subjects))
    assert torch.equal(references.mask.flatten(1).any(1), references.mask.flatten(1).all(1))


def test_noise_levels_that_share_their_subjects_cost_what_they_cost_apart(cache: Path) -> None:
    config = config_of(kind="identity", cache="", architecture=IDENTITY, steps=1, timesteps_per_sample=3, drop_both=0)
    model, dealt = models.new_model(config), Cache(cache)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    dealt.refresh()
    batch = dealt.draw("still", 4, np.random.default_rng(0))
    references = References(batch.references, vlm_states=batch.vlm, vlm_mask=batch.vlm_mask)
    thrice = References(*(None if t is None else t.repeat_interleave(3, 0) for t in vars(references).values()))
    inputs = [t.repeat_interleave(3, 0) for t in (batch.latents, torch.full((4,), 300.0), batch.text)]
    with torch.no_grad():
        shared = model(*inputs, identity=model.encode_identity(references).repeat_interleave(3)).sample
        apart = model(*inputs, references=thrice).sample
    assert torch.allclose(shared, apart, atol=1e-5)


@pytest.mark.parametrize("shift", [2.5, 12.0])
def test_few_noise_levels_lie_below_the_last_one_of_the_preset_and_the_others_follow_as_before(shift: float) -> None:
    plain = loss.noise_levels(40_000, shift, torch.Generator().manual_seed(0))
    levels = loss.noise_levels(40_000, shift, torch.Generator().manual_seed(0), final_sigma=0.5, below=0.1)
    under, before = (float((each < 0.5).float().mean()) for each in (levels, plain))
    assert under == pytest.approx(min(0.1, before), abs=0.01)
    for share in (0.25, 0.5, 0.75):
        above = [each[each >= 0.5].quantile(share).item() for each in (levels, plain)]
        assert above[0] == pytest.approx(above[1], abs=0.01)
    assert float(levels.min()) > 0 and float(levels.max()) < 1


@pytest.mark.parametrize("masked", [False, True])
def test_quick_attention_is_attention(masked: bool) -> None:
    query, key, value = (torch.randn(2, 3, length, 8) for length in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(cpu_attention.plain_attention(query, key, value, mask), theirs)
    with pytest.raises(ValueError, match="is_causal"):
        cpu_attention.plain_attention(query, key, value, is_causal=True)


def test_what_is_quick_ends_with_the_pass_and_takes_products_in_half_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with cpu_attention.fast_training():
        assert torch.nn.functional.scaled_dot_product_attention is cpu_attention.plain_attention
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.nn.functional.scaled_dot_product_attention is before
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with cpu_attention.fast_training():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_in_pair_references_show_each_subject_as_the_clip_has_it_on_white_paper() -> None:
    tensors = shard("clip", 2, 0)
    tensors["latents"] = torch.randn(6, 4, 3, 8, 8)
    tensors["instance_ids"] = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    tensors["instance_ids"][:, :, 4, 4:6], tensors["instance_ids"][:, :, 4, 3] = 1, 2
    tensors["references"] = torch.zeros(6, 2, 2, 4, 8, 8)
    cut, drawn = cut_from_clip(
        tensors["latents"], tensors["instance_ids"], BLANK.white, (2, 2), np.random.default_rng(1)
    )
    assert cut.shape == tensors["references"].shape and torch.equal(cut[:, :, 0], cut[:, :, 1])
    assert torch.equal(drawn[:, :, 0], (cut[:, :, 0] != 3).any(2))
    drawn = drawn[:, :, 0]
    assert drawn.sum((2, 3)).tolist() == [[2, 1]] * 6
    for row in range(6):
        seen = cut[row, 0, 0][:, drawn[row, 0]]
        assert any(torch.equal(seen, tensors["latents"][row, :, frame, 4, 4:6]) for frame in range(3))


def test_in_pair_references_are_for_the_first_half_of_a_run() -> None:
    config = config_of(kind="identity", cache="", architecture=IDENTITY, steps=100, in_pair=1.0, timesteps_per_sample=1)
    batch = batch_of(shard("still", 2, 0))

    def seen_at(step: int) -> Tensor:
        model = models.new_model(config)
        shown: list[Tensor] = []
        model.encode_identity = lambda references: shown.append(references.latents)  # type: ignore[method-assign]
        step_of(model, config)(batch, (step,))
        return shown[0]

    assert torch.equal(seen_at(0), batch.in_pair)
    assert torch.equal(seen_at(50), batch.references)


class Ear(torch.nn.Module):
    """Predicts zero and keeps what it was asked."""

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, **told: Any) -> tuple[Tensor]:
        self.latents, self.timestep, self.told = latents, timestep, told
        return (torch.zeros_like(latents),)

    def encode_identity(self, references: References) -> None:
        """It knows nobody."""


def test_a_known_region_is_clean_at_time_zero_and_costs_nothing() -> None:
    config = config_of(kind="base", cache="", architecture=WAN, steps=1, timesteps_per_clip=1, known_region=1.0)
    tensors = shard("clip", 2, 0)
    tensors["instance_ids"] = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    tensors["instance_ids"][:, :, :2, :2] = 1
    tensors["latents"] = torch.randn(6, 4, 3, 8, 8)
    tensors["references"] = torch.zeros(6, 2, 1, 4, 8, 8)
    batch, ear = batch_of(tensors), Ear()
    before, _ = step_of(ear, config)(batch, (0,))
    inside = torch.zeros(6, 3, 8, 8, dtype=torch.bool)
    inside[:, :, :4, :4] = True  # the subject's patch and one more on every side
    asked = ear.timestep.unflatten(1, (3, 4, 4)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(asked > 0, inside)
    outside = ~inside.unsqueeze(1).expand_as(batch.latents)
    assert torch.equal(ear.latents[outside], batch.latents[outside])
    assert not torch.equal(ear.latents[~outside], batch.latents[~outside])
    tensors["latents"] = torch.where(outside, batch.latents + 3, batch.latents)
    assert torch.equal(step_of(ear, config)(batch_of(tensors), (0,))[0], before)


def test_a_batch_is_of_one_shape_and_its_padding_is_masked(cache: Path) -> None:
    dealt = Cache(cache)
    assert dealt.refresh() == 4
    assert dealt.refresh() == 4
    rng = np.random.default_rng(0)
    shapes = {tuple(dealt.draw("still", 5, rng).references.shape) for _ in range(40)}
    assert shapes == {(5, 1, 1, 4, 4, 4), (5, 2, 1, 4, 4, 4)}
    batch = dealt.draw("still", 8, rng)
    assert len(batch) == 8 and batch.vlm.shape[:2] == batch.vlm_mask.shape
    assert dealt.draw("clip", 3, rng).latents.shape == (3, 4, 3, 4, 4)


def test_a_latent_cell_belongs_to_whoever_fills_most_of_it() -> None:
    clip = world.render(world.make_scene(5, num_subjects=2), num_frames=17)
    instance_ids = instance_ids_of_latents(clip.instance_ids, frames=5, cells=(16, 16))
    assert instance_ids.shape == (5, 16, 16)
    for i in range(5):
        pixels = clip.instance_ids[4 * i]
        for y, x in np.argwhere(instance_ids[i].numpy() > 0):
            cell = pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            assert int(instance_ids[i, y, x]) in cell
        assert set(np.unique(pixels)) - {0} == set(np.unique(instance_ids[i].numpy())) - {0}


def test_a_saved_state_replaces_the_one_before_only_when_it_is_whole(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"model": {"a": torch.ones(2)}})
    (tmp_path / "state.new.safetensors").write_bytes(b"half a file")
    saved = checkpoint.load(tmp_path)
    assert saved is not None and saved[0] == 1 and torch.equal(saved[1]["model"]["a"], torch.ones(2))
    checkpoint.save(tmp_path, 2, {"model": {"a": torch.zeros(2)}}, {"loss": 0.5})
    assert checkpoint.load(tmp_path)[0] == 2  # type: ignore[index]


# --- sizes ---


def test_a_larger_size_has_ten_million_parameters_and_the_frozen_parts_of_the_small_one(tmp_path: Path) -> None:
    size = recipe.SIZES["s"]
    config = read_run(recipe.prepare_run(tmp_path, "identity", size, tmp_path / "base", **recipe.IDENTITY))
    with torch.device("meta"):
        model = IdentityWanTransformer3DModel(**config.model.architecture)
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 11e6
    large, small = recipe.preset_of(size), presets.load("toybox")
    assert (large.name, large.sizes[0].width, large.num_frames) == ("toybox-s", 128, 17)
    assert large.components.transformer != small.components.transformer
    assert large.components.vae == small.components.vae and large.components.judges == small.components.judges
    assert check_frames(large.num_frames, large) == 17
    for stage in ("text", "adopt"):
        with pytest.raises(SystemExit):
            recipe.main([stage, "--size", "s", "--state", str(tmp_path)])


def test_a_cache_holds_clips_of_the_size_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "SHARD", {"still": 2, "clip": 2})
    encoders = scenes.load_encoders(recipe.ASSETS)
    number = next(n for n in range(100) if scenes.shape_of_shard(n) == ("clip", 2, 1))
    large = scenes.make_shard(number, encoders, recipe.SIZES["s"].form)
    assert large["latents"].shape == (2, 16, 17, 32, 32)
    assert large["references"].shape == (2, 2, 1, 16, 32, 32) and large["instance_ids"].shape == (2, 17, 32, 32)
    small = scenes.make_shard(number, encoders)
    assert small["latents"].shape == (2, 16, 17, 16, 16)
    assert torch.equal(small["text"], large["text"])  # the same scenes
