"""Supervised fine-tuning by rectified flow: a plain text-to-video base, or identity blocks upon it.

In:  a run folder with `run.json` (an `SftConfig`) and a cache of latents (`train.data`).
Out: `state.safetensors` (weights, averages, moments) and `metrics.jsonl` in the run folder; `export` writes a model.
Knows nothing of pictures, prompts or the page.

    python -m train.sft runs/identity --minutes 30

Shapes: B samples, C latent channels, F latent frames, h x w latent pixels, N subjects.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import Field
from torch import Tensor, nn

from engine.job import Document
from engine.model import IdentityWanTransformer3DModel
from engine.sampling import noised, shifted, starting_noise
from engine.subject_tower import References
from train import checkpoint
from train.binding import Seen, binding_loss, counterparts, naming_loss, reading_loss, tokens_owner, watched
from train.data import Batch, Blank, Cache, cut_from_clip
from train.quick import quick
from train.team import Team

CPU = torch.device("cpu")
BETAS = (0.9, 0.99)  # of AdamW
TOLD = 0.1  # size of the weights of positions that a model starts with
COARSE = 4  # latent pixels; two video tokens
ZERO_START = 4.0  # times the rate, for what starts at zero


class SftConfig(Document):
    """What one supervised run does."""

    kind: Literal["base", "identity"]
    """A plain Wan from words alone, or Wan with identity blocks."""
    cache: str
    """Folder of cached latents."""
    start: str = ""
    """Model folder, or run folder whose averaged weights this one starts from; empty: from random weights."""
    architecture: dict[str, Any]
    """Arguments of the transformer's class."""
    steps: int = Field(ge=1)
    """Updates in all."""
    still_batch: int = Field(3, ge=1)
    """Samples of a pass on single frames, each with all its noise levels; more do not stay in a core's cache."""
    clip_batch: int = Field(1, ge=1)
    """Samples of a pass on clips, each with all its noise levels."""
    sparse_share: float = Field(0.0, ge=0, le=1)
    """Share of clip updates that look at a few moments of more clips; a verb shows in three frames of nine as well."""
    sparse_frames: int = Field(3, ge=2)
    """Frames that such an update takes of each clip: the first, the last, and others drawn at random."""
    sparse_batch: int = Field(4, ge=1)
    """Samples of a pass on such clips, each with as many noise levels as a whole one."""
    sparse_shift: float = Field(16.0, gt=0)
    """Shift of their noise levels: near pure noise a verb alone says who is where at which moment."""
    passes: int = Field(1, ge=1)
    """Passes whose gradients are added up for one update."""
    clip_share: float = Field(1 / 3, ge=0, le=1)
    """Share of updates that take clips; a clip costs two to three stills, and it alone shows what is done."""
    noises: int = Field(4, ge=1)
    """Noise levels drawn for each still of an update; its subjects are read once for all of them."""
    clip_noises: int = Field(2, ge=1)
    """Noise levels drawn for each clip of an update."""
    known_region: float = Field(0.2, ge=0, le=1)
    """Share of clip updates in which everything outside a subject's surroundings is given clean, at time 0."""
    learning_rate: float = Field(7e-4, gt=0)
    """AdamW's peak rate, after a warm-up of 100 updates."""
    fall: float = Field(0.25, gt=0, le=1)
    """Share of the updates, the last ones, over which the rate falls to zero."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's, as a share of its rate."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the averaged weights, which are the ones that are exported."""
    in_pair: float = Field(0.5, ge=0, le=1)
    """Share of samples whose subjects are cut from the clip itself, at first; it falls to zero by half of the steps."""
    drop_text: float = Field(0.1, ge=0, le=1)
    """Share of samples without prompt and VLM."""
    drop_subjects: float = Field(0.1, ge=0, le=1)
    """Share of samples without subjects and VLM."""
    drop_both: float = Field(0.1, ge=0, le=1)
    """Share of samples with neither."""
    subject_weight: float = Field(2.0, ge=0)
    """Extra weight of the loss where a subject is."""
    motion_weight: float = Field(0.0, ge=0)
    """Extra weight of what differs between a clip's frames, seen coarsely: a small part, and what is done."""
    binding: float = Field(0.1, ge=0)
    """Weight of the losses that have a subject's place in the frame look at its own pictures, and ask for its slot."""
    reading: float = Field(0.1, ge=0)
    """Weight of the loss that has a subject's place read, in one head, the word that numbers it."""
    shift: float = Field(2.5, gt=0)
    """Shift of the noise levels of stills; above 1 more are near noise, where pictures have most to say."""
    clip_shift: float = Field(3.0, gt=0)
    """The same for clips: what nine frames share shows through noise that hides it in one."""
    shared_noise: float = Field(0.0, ge=0, le=1)
    """Share of a clip's noise that all of its frames have in common; the preset samples with the same."""
    seed: int = 0
    """Of weights, batches, noise and dropout."""


Kind = Literal["still", "clip", "sparse"]


# --- one step --------------------------------------------------------------------------------------------------------


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Logit-normal noise levels, shifted, (B,) in (0, 1)."""
    return shifted(torch.sigmoid(torch.randn(count, generator=generator, device=generator.device)), shift)


def surroundings(owner: Tensor, patch: int, rng: np.random.Generator) -> Tensor:
    """Where a clip is to be made anew: one subject's patches over all frames, a patch wider on every side.

    Args:
        owner: (B, F, h, w), slots.

    Returns:
        (B, F, h / patch, w / patch), True inside.
    """
    slots = [
        int(rng.choice(np.unique(clip[clip > 0]))) if bool((clip > 0).any()) else 0 for clip in owner.cpu().numpy()
    ]
    held = (owner == torch.tensor(slots, device=owner.device).view(-1, 1, 1, 1)).float()
    coarse = nn.functional.max_pool2d(held, patch)
    return nn.functional.max_pool2d(coarse, 3, stride=1, padding=1) > 0


@contextmanager
def at_moments(model: Any, moments: Tensor, frames: int) -> Iterator[None]:
    """Inside, a clip of M frames is taken for those `moments` (M,) of one of `frames` frames."""

    def whole(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, :, :1].expand(-1, -1, frames, -1, -1),)

    def chosen(module: nn.Module, inputs: tuple[Tensor], output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(chosen(module, inputs, each) for each in output)
        return output.unflatten(1, (frames, -1))[:, moments].flatten(1, 2)

    places = [model.rope, getattr(model, "video_position_embedding", None)]
    handles = [
        handle
        for module in places
        if module is not None
        for handle in (module.register_forward_pre_hook(whole), module.register_forward_hook(chosen))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conditions(
    batch: Batch, config: SftConfig, blank: Blank, generator: torch.Generator, in_pair: float = 0.0
) -> tuple[Tensor, Any]:
    """UMT5 states and `References` of a batch after condition dropout: text .1, subjects .1, both .1."""
    roll = torch.rand(len(batch), generator=generator, device=generator.device)
    no_text = roll < config.drop_text + config.drop_both
    no_subjects = (roll >= config.drop_text) & (roll < config.drop_text + config.drop_both + config.drop_subjects)
    text = torch.where(no_text.view(-1, 1, 1), blank.text, batch.text)
    if config.kind == "base":
        return text, None
    there = (~no_subjects).view(-1, 1, 1).expand(batch.references.shape[:3])
    heard = batch.vlm_mask & ~(no_text | no_subjects).unsqueeze(1)
    pictures = batch.references
    if in_pair > 0:
        same = torch.rand(len(batch), generator=generator, device=generator.device) < in_pair
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
        pictures = torch.where(same.view(-1, 1, 1, 1, 1, 1), cut_from_clip(batch, blank.white, rng), pictures)
    return text, References(pictures, there, vlm_states=batch.vlm, vlm_mask=heard)


def loss_at(
    model: Any, batch: Batch, config: SftConfig, blank: Blank, place: tuple[int, ...], sparse: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """Rectified flow: x_t = (1 - t) x_0 + t noise, v = noise - x_0, mean of |v_model - v|^2 over what has to be made.

    Reading two subjects costs as much as the frame they are in, so each sample meets several levels at once.
    `place` is the update, and whatever tells this batch from others of it; it seeds noise and dropout. `sparse`: of
    clips, only some moments.

    Returns:
        The loss, and its parts as numbers.
    """
    rng = np.random.default_rng((config.seed, *place, 1))
    generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))
    in_pair = config.in_pair * max(0.0, 1 - 2 * place[0] / config.steps)
    text, references = conditions(batch, config, blank, generator, in_pair)
    identity = None if references is None else model.encode_identity(references)

    frames = batch.latents.shape[2]
    moving, placed = frames > 1, nullcontext()
    if sparse:
        # Wan's positions are relative: without both ends no frame could tell which moment it is.
        between = 1 + torch.randperm(frames - 2, generator=generator, device=generator.device)
        ends = between.new_tensor([0, frames - 1])
        moments = torch.cat([ends, between[: config.sparse_frames - 2]]).sort().values
        batch = replace(batch, latents=batch.latents[:, :, moments], owner=batch.owner[:, moments])
        placed = at_moments(model, moments, frames)
    noises = config.clip_noises if moving else config.noises
    shift = config.sparse_shift if sparse else config.clip_shift if moving else config.shift
    clean, owner, text = (each.repeat_interleave(noises, 0) for each in (batch.latents, batch.owner, text))
    t = noise_levels(len(clean), shift, generator)
    noise = starting_noise(tuple(clean.shape), generator, config.shared_noise if moving else 0.0)
    noisy, target = noised(clean, noise, t)
    weight = 1 + config.subject_weight * (owner > 0).float().unsqueeze(1)
    timestep = t * 1000
    patch = int(config.architecture.get("patch_size", (1, 2, 2))[-1])
    if moving and rng.random() < config.known_region:
        made = surroundings(owner, patch, rng)
        timestep = (timestep.view(-1, 1, 1, 1) * made).flatten(1)
        wide = made.float().repeat_interleave(patch, -1).repeat_interleave(patch, -2).unsqueeze(1)
        noisy = torch.where(wide > 0, noisy, clean)
        weight = weight * wide
    if identity is None or references is None:
        with placed:
            predicted = model(noisy, timestep, text, return_dict=False)[0]
        looks = names = reads = predicted.new_zeros(())
    else:
        repeated = identity.repeat_interleave(noises)
        with watched(model) as seen, placed:
            predicted = model(noisy, timestep, text, return_dict=False, identity=repeated)[0]
        looks = names = predicted.new_zeros(())
        if repeated.num_subject_tokens:
            looks, names = _looks(seen, batch, references, blank, patch)
        told = torch.where((text == blank.text).flatten(1).all(1, keepdim=True), 0, tokens_owner(owner, patch))
        reads = reading_loss(seen, told, batch.numbers.repeat_interleave(noises, 0))
    error = weighted_error(predicted - target, weight, config.motion_weight)
    parts = {"error": error, "looks": looks, "names": names, "reads": reads}
    whole = error + config.binding * (looks + names) + config.reading * reads
    return whole, {name: part.item() for name, part in parts.items()}


def weighted_error(missed: Tensor, weight: Tensor, motion_weight: float) -> Tensor:
    """Mean square of what a prediction missed, with more weight on what differs between frames, seen coarsely.

    What is asked for stays the same, the mean of all that fits: each part of the error is least there by itself. Fine
    detail cannot be foretold from words and drowns what can; in means of COARSE x COARSE latent pixels it is quiet.

    Args:
        missed: (B, C, F, h, w). weight: (B, 1, F, h, w), of the places; 0 where nothing is asked.
    """
    channels = missed.shape[1]
    error = (missed.square() * weight).sum() / (weight.sum() * channels).clamp(min=1)
    if motion_weight == 0 or missed.shape[2] == 1:
        return error
    asked = (weight > 0).to(missed.dtype)
    mean = (missed * asked).sum(2, keepdim=True) / asked.sum(2, keepdim=True).clamp(min=1)
    moving, share = (_coarse(each) for each in ((missed - mean) * asked, weight))
    # A mean of n numbers that have nothing in common is n times quieter; those that move together are not.
    moved = COARSE**2 * (moving.square() * share).sum() / (share.sum() * channels).clamp(min=1e-6)
    return error + motion_weight * moved


def _coarse(values: Tensor) -> Tensor:
    """Means over squares of COARSE latent pixels: (B, C, F, h, w) -> (B, C, F, h', w')."""
    flat = nn.functional.avg_pool2d(values.flatten(0, 1), COARSE, ceil_mode=True)
    return flat.unflatten(0, values.shape[:2])


def _looks(seen: Seen, batch: Batch, references: References, blank: Blank, patch: int) -> tuple[Tensor, Tensor]:
    """Binding and naming loss of a batch in which some are asked nothing: without subjects, in background without a
    VLM."""
    assert references.latents is not None and references.mask is not None and references.vlm_mask is not None
    there, heard = (mask.flatten(1).any(1, keepdim=True) for mask in (references.mask, references.vlm_mask))
    owner = tokens_owner(batch.owner, patch)
    asked = torch.where(there & (heard | (owner > 0)), owner, -1)
    near = counterparts(batch.latents, batch.owner, references.latents, blank.white, patch)
    noises = len(seen.pictures[0][1]) // len(batch)
    asked, near = (each.repeat_interleave(noises, 0) for each in (asked, near))
    return binding_loss(seen, asked, near), naming_loss(seen, asked, references.latents.shape[1])


# --- the loop --------------------------------------------------------------------------------------------------------


def new_model(config: SftConfig) -> WanTransformer3DModel:
    """Random weights, or the averaged weights of the run it starts from with untrained identity blocks."""
    torch.manual_seed(config.seed)
    kind = IdentityWanTransformer3DModel if config.kind == "identity" else WanTransformer3DModel
    if not config.start:
        model = kind(**config.architecture)
        return _told(model) if isinstance(model, IdentityWanTransformer3DModel) else model
    source = _started(Path(config.start))
    if isinstance(source, kind):
        return _grown(source, config.architecture)
    extra = {key: value for key, value in config.architecture.items() if key not in source.config}
    return _told(IdentityWanTransformer3DModel.from_plain_wan(source, **extra))


def _told(model: Any) -> Any:
    """Positions are heard at once: started at zero, as in a model that has to equal Wan, they had hardly moved after
    600 updates."""
    if model.video_position_embedding is not None:
        nn.init.normal_(model.video_position_embedding.proj.weight, std=TOLD)
    return model


def _grown(source: WanTransformer3DModel, architecture: dict[str, Any]) -> WanTransformer3DModel:
    """The model itself, or with what its architecture has not had so far, as that starts."""
    held = {key: value for key, value in source.config.items() if not key.startswith("_")}
    if {**held, **architecture} == held:
        return source
    grown = type(source)(**{**held, **architecture})
    _told(grown)
    missing, unexpected = grown.load_state_dict(source.state_dict(), strict=False)
    own = ("video_position_embedding.", ".slot_key.")
    strangers = [key for key in missing if not any(each in key for each in own)] + unexpected
    if strangers:
        raise ValueError(f"the model to start from has another architecture, the first key is {strangers[0]}")
    return grown


def _started(start: Path) -> WanTransformer3DModel:
    """The model of a folder, or a run's model with its averaged weights."""
    if (start / "config.json").exists():
        name = json.loads((start / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind = (
            IdentityWanTransformer3DModel if name == IdentityWanTransformer3DModel.__name__ else WanTransformer3DModel
        )
        return kind.from_pretrained(start, torch_dtype=torch.float32)
    model = new_model(read_run(start))
    load_average(model, start)
    return model


def load_average(model: nn.Module, run: Path) -> int:
    """Put a run's averaged weights into a model; returns their step."""
    saved = checkpoint.load(run)
    if saved is None:
        raise FileNotFoundError(f"nothing has been trained in {run}")
    step, groups, _ = saved
    model.load_state_dict(groups["ema"], strict=False)
    return step


def read_run(run: Path) -> SftConfig:
    """The document of a run folder."""
    return SftConfig.model_validate_json((run / "run.json").read_text(encoding="utf-8"))


def new_optimizer(model: nn.Module, config: SftConfig) -> torch.optim.AdamW:
    """AdamW; what starts at zero moves faster, as B of a low-rank pair does (LoRA+, arXiv 2402.12354)."""
    rates: dict[float, list[nn.Parameter]] = {1.0: [], ZERO_START: []}
    for name, parameter in model.named_parameters():
        zero = name.endswith((".identity.to_out.weight", "video_position_embedding.proj.weight"))
        rates[ZERO_START if zero else 1.0].append(parameter)
    groups = [{"params": own, "peak": rate * config.learning_rate} for rate, own in rates.items() if own]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=config.weight_decay, fused=True)


def kind_at(step: int, config: SftConfig) -> Kind:
    """Whether an update takes stills, clips, or some moments of clips; each share is spread evenly."""

    def turn(number: int, share: float) -> bool:
        return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)

    if not turn(step, config.clip_share):
        return "still"
    return "sparse" if turn(int(step * config.clip_share + 1e-9), config.sparse_share) else "clip"


def schedule(step: int, config: SftConfig) -> float:
    """Share of the peak rates: warm-up over 100 updates, flat, linear to zero over the last of them."""
    return min(1.0, (step + 1) / 100, max(0.01, (config.steps - step) / (config.fall * config.steps)))


def train(run: Path, *, seconds: float, updates: int | None = None) -> bool:
    """Go on with a run for at most `seconds` (and `updates`, when given); True once all its updates are done.

    Under torchrun every process draws batches of its own and the gradients are averaged.
    """
    config, team = read_run(run), Team()
    where = torch.device("cuda", team.rank % torch.cuda.device_count()) if torch.cuda.is_available() else CPU
    model: Any = new_model(config)
    model.to(where).train()
    optimizer = new_optimizer(model, config)
    ema = checkpoint.Ema(model, config.ema)
    step = resume(run, model, ema, optimizer)
    cache = Cache(Path(config.cache))
    cache.refresh()
    blank = Blank.load(Path(config.cache), where)
    last = config.steps if updates is None else min(config.steps, step + updates)
    meter, began, kept = checkpoint.Meter(run.name, config.steps, run, start=step), time.monotonic(), time.monotonic()

    def keep() -> None:
        groups = {"model": dict(model.named_parameters()), "ema": ema.tensors}
        checkpoint.save(run, step, {**groups, "optimizer": checkpoint.optimizer_tensors(optimizer)})

    stop = False
    while step < last and not stop:
        kind = kind_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, config)
        parts = [_one_pass(model, cache, config, blank, kind, (step, team.rank, i)) for i in range(config.passes)]
        stop = team.average_gradients(model, stop=time.monotonic() - began > seconds)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        step += 1
        if team.rank == 0:
            means = {f"{kind} {name}": sum(part[name] for part in parts) / len(parts) for name in parts[0]}
            meter.tick(step, {**means, "norm": float(norm)})
        if time.monotonic() - kept > 180:
            if team.rank == 0:
                keep()
            cache.refresh()
            kept = time.monotonic()
    if team.rank == 0:
        keep()
    return step == config.steps


def _one_pass(
    model: nn.Module, cache: Cache, config: SftConfig, blank: Blank, kind: Kind, place: tuple[int, int, int]
) -> dict[str, float]:
    """Add the gradients of one batch; `place` is (step, process, pass). Returns the parts of its loss."""
    step, _, number = place
    size = {"still": config.still_batch, "clip": config.clip_batch, "sparse": config.sparse_batch}[kind]
    shape = np.random.default_rng((config.seed, step, number, 2))  # one for the team: four subjects are waited for
    batch = cache.draw(
        "still" if kind == "still" else "clip", size, np.random.default_rng((config.seed, *place, 3)), shape
    )
    batch = batch.to(blank.text.device)
    with quick():
        loss, parts = loss_at(model, batch, config, blank, place, sparse=kind == "sparse")
        (loss / config.passes).backward()
    return parts


def resume(run: Path, model: nn.Module, ema: checkpoint.Ema, optimizer: torch.optim.Optimizer) -> int:
    """Put back the run's last save, wherever the model is; the step it belongs to, 0 when there is none."""
    saved = checkpoint.load(run)
    if saved is None:
        return 0
    step, groups, _ = saved
    model.load_state_dict(groups["model"], strict=False)
    ema.restore(groups["ema"], step)
    checkpoint.restore_optimizer(optimizer, groups["optimizer"])
    return step


def export(run: Path, folder: Path) -> None:
    """Write the averaged weights as a model folder in half precision, shards of at most 15 MB."""
    config = read_run(run)
    model = new_model(config)
    load_average(model, run)
    model.half().save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")


def main(argv: list[str] | None = None) -> int:
    """0 when the run is complete, 3 when time ran out first."""
    parser = argparse.ArgumentParser(prog="python -m train.sft", description="Train by rectified flow.")
    parser.add_argument("run", type=Path, help="folder with run.json")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this long; the next call goes on")
    options = parser.parse_args(argv)
    return 0 if train(options.run, seconds=options.minutes * 60) else 3


if __name__ == "__main__":
    sys.exit(main())
