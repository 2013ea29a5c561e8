"""The loss of one training step: noise levels, known regions, dropped conditions, weighted error, auxiliary losses.

In:  a batch, a model and the run's config.
Out: a scalar to differentiate, and its parts for the log.
Knows nothing of optimizers, files, or the world that samples come from.

Shapes: B samples, C latent channels, F latent frames, h x w latent pixels, N subjects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.diffusion.solvers import add_noise, shifted, starting_noise, unshifted
from train.data.batch import Batch, NullConditioning
from train.sft.conditions import Asked, Conditions, draw_conditions
from train.sft.config import Kind, NoiseConfig, SftConfig

COARSE = 4  # latent pixels; two video tokens


def noise_levels(
    count: int, shift: float, generator: torch.Generator, final_sigma: float = 0.0, below: float = 0.1
) -> Tensor:
    """Logit-normal noise levels, shifted, (B,) in (0, 1).

    Args:
        final_sigma: where above 0, at most the share `below` of the levels lies under it; the others follow the same
            distribution above it.
    """
    drawn = torch.randn(count, generator=generator, device=generator.device)
    if final_sigma > 0:
        normal = torch.distributions.Normal(0.0, 1.0)
        start = unshifted(final_sigma, shift)
        under = NormalDist().cdf(math.log(start / (1 - start)))  # share of the levels below final_sigma
        kept = min(below, under)
        share = normal.cdf(drawn)  # uniform; its first part is narrowed, the rest stretched
        low, high = torch.zeros_like(share), 1 - (1 - share) * (1 - under) / (1 - kept)
        if kept:
            low = share * under / kept
        drawn = normal.icdf(torch.where(share < kept, low, high).clamp(1e-6, 1 - 1e-6))
    return shifted(torch.sigmoid(drawn), shift)


def surroundings(instance_ids: Tensor, count: int, patch: int, generator: torch.Generator) -> Tensor:
    """Where a clip is to be made anew: one subject's patches over all frames, a patch wider on every side.

    Args:
        instance_ids: (B, F, h, w), slots from 1 to `count`, 0 for the background.

    Returns:
        (B, F, h / patch, w / patch), True inside; around a random subject of each clip, everywhere where it shows none.
    """
    slots = torch.arange(1, count + 1, device=instance_ids.device)
    present = (instance_ids.unsqueeze(1) == slots.view(1, -1, 1, 1, 1)).flatten(2).any(2)  # (B, count)
    lots = torch.rand(present.shape, generator=generator, device=instance_ids.device).masked_fill(~present, -1)
    drawn = torch.where(present.any(1), lots.argmax(1) + 1, 0)
    held = (instance_ids == drawn.view(-1, 1, 1, 1)).float()
    coarse = nn.functional.max_pool2d(held, patch)
    return nn.functional.max_pool2d(coarse, 3, stride=1, padding=1) > 0


class AuxiliaryLoss(Protocol):
    """Something else that a pass is asked beside the velocity."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Of each of its parts, by name."""
        ...

    def record(self, model: Any) -> AbstractContextManager[Any]:
        """Inside, what it needs of the model's forward is noted down."""
        ...

    def __call__(self, recorded: Any, asked: Asked, /) -> dict[str, Tensor]:
        """Its parts, each a scalar, from what was noted down."""
        ...


class TrainingStep(nn.Module):
    """A model and its loss as one module, which DDP can wrap: latents, texts, references and masks -> a scalar.

    Args:
        model: Wan, plain or with identity blocks.
        config: of the run.
        blank: what stands where nothing is said.
        auxiliary: further losses; they need identity blocks.
    """

    def __init__(
        self, model: Any, config: SftConfig, blank: NullConditioning, auxiliary: Sequence[AuxiliaryLoss] = ()
    ) -> None:
        super().__init__()
        self.model, self._config, self._blank, self._auxiliary = model, config, blank, tuple(auxiliary)

    def forward(
        self, batch: Batch, place: tuple[int, ...], *, sparse: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rectified flow: x_t = (1 - t) x_0 + t noise, v = noise - x_0, mean of |v_model - v|^2 where it is asked.

        Reading two subjects costs as much as the frame they are in, so each sample meets several levels at once.

        Args:
            place: the update, and whatever tells this batch from others of it; it seeds noise and dropout.
            sparse: of clips, only some moments.

        Returns:
            The loss, and its parts without gradients.
        """
        config = self._config
        rng = np.random.default_rng((config.seed, *place, 1))
        generator = torch.Generator(batch.latents.device).manual_seed(int(rng.integers(2**62)))
        in_pair = config.data.in_pair * max(0.0, 1 - 2 * place[0] / config.steps)
        said = draw_conditions(batch, config, self._blank, generator, in_pair)
        frame_indices: tuple[int, ...] | None = None
        if sparse:
            frame_indices = draw_moments(batch.latents.shape[2], config.data.sparse_frames, rng)
            batch = _take_frames(batch, frame_indices)
        noised = self._add_noise(batch, said.text, frame_indices, rng, generator)
        predicted, parts = self._predict(noised, said, batch)
        error = weighted_error(predicted - noised.target, noised.weight, config.losses.motion_weight)
        whole = error
        for loss in self._auxiliary:
            for name, share in loss.weights.items():
                if name in parts:
                    whole = whole + share * parts[name]
        return whole, {name: part.detach() for name, part in {"error": error, **parts}.items()}

    def _add_noise(
        self,
        batch: Batch,
        text: Tensor,
        frame_indices: tuple[int, ...] | None,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> Noised:
        """Every sample at several noise levels; of some clips only a region is to be made, the rest is given clean."""
        config = self._config
        moving = batch.latents.shape[2] > 1
        repeats, shift, shared_noise = _noise_settings(config.noise, moving=moving, sparse=frame_indices is not None)
        clean, instance_ids, text = (
            each.repeat_interleave(repeats, 0) for each in (batch.latents, batch.instance_ids, text)
        )
        t = noise_levels(len(clean), shift, generator, config.noise.final_sigma, config.noise.below_final)
        noise = starting_noise(tuple(clean.shape), generator, shared_noise)
        noisy, target = add_noise(clean, noise, t)
        weight = 1 + config.losses.subject_weight * (instance_ids > 0).float().unsqueeze(1)
        timestep = t * 1000
        if moving and rng.random() < config.data.known_region:
            made = surroundings(instance_ids, batch.references.shape[1], self._patch, generator)
            timestep = (timestep.view(-1, 1, 1, 1) * made).flatten(1)
            wide = made.float().repeat_interleave(self._patch, -1).repeat_interleave(self._patch, -2).unsqueeze(1)
            noisy = torch.where(wide > 0, noisy, clean)
            weight = weight * wide
        return Noised(noisy, timestep, text, target, weight, repeats, frame_indices)

    @property
    def _patch(self) -> int:
        return int(self._config.model.architecture.get("patch_size", (1, 2, 2))[-1])

    def _predict(self, noised: Noised, said: Conditions, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The velocity, and the parts of the auxiliary losses."""
        more: dict[str, Any] = {"return_dict": False}
        if noised.frame_indices is not None:
            more["frame_indices"] = noised.frame_indices
        identity = None
        if said.shown is not None:
            identity = self.model.encode_identity(said.shown)
        if identity is None or said.shown is None:
            return self.model(noised.latents, noised.timestep, noised.text, **more)[0], {}
        more["identity"] = identity.repeat_interleave(noised.repeats)
        with ExitStack() as stack:
            recorded = [stack.enter_context(loss.record(self.model)) for loss in self._auxiliary]
            predicted = self.model(noised.latents, noised.timestep, noised.text, **more)[0]
        asked = Asked(batch, said, said.shown, noised.repeats)
        parts: dict[str, Tensor] = {}
        for loss, seen in zip(self._auxiliary, recorded, strict=True):
            parts |= loss(seen, asked)
        return predicted, parts


@dataclass(frozen=True)
class Noised:
    """What the model is given of a batch, every sample `repeats` times in a row, and what it should answer."""

    latents: Tensor  # (B * repeats, C, F, h, w)
    timestep: Tensor  # (B * repeats,), or one of each token
    text: Tensor  # (B * repeats, L, text_dim)
    target: Tensor  # velocities
    weight: Tensor  # (B * repeats, 1, F, h, w), of the places; 0 where nothing is asked
    repeats: int
    frame_indices: tuple[int, ...] | None  # which frames of longer clips these are


def draw_moments(frames: int, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The first frame, the last, and random ones between them: `count` frame numbers of `frames`, sorted.

    Wan's positions are relative: without both ends no frame could tell which moment it is.
    """
    between = rng.choice(np.arange(1, frames - 1), min(count, frames) - 2, replace=False)
    return (0, *sorted(int(moment) for moment in between), frames - 1)


def _take_frames(batch: Batch, moments: tuple[int, ...]) -> Batch:
    """These frames of every clip."""
    chosen = list(moments)
    return replace(batch, latents=batch.latents[:, :, chosen], instance_ids=batch.instance_ids[:, chosen])


def _noise_settings(noise: NoiseConfig, *, moving: bool, sparse: bool) -> tuple[int, float, float]:
    """Noise levels of each sample, their shift, and the share of noise that its frames have in common."""
    if not moving:
        return noise.timesteps_per_sample, noise.shift, 0.0
    if sparse:
        return noise.timesteps_per_clip, noise.sparse_shift, noise.shared_noise
    return noise.timesteps_per_clip, noise.clip_shift, noise.shared_noise


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


def kind_at(step: int, config: SftConfig) -> Kind:
    """Whether an update takes stills, clips, or some moments of clips; each share is spread evenly."""

    def turn(number: int, share: float) -> bool:
        return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)

    if not turn(step, config.data.clip_share):
        return "still"
    clips_so_far = int(step * config.data.clip_share + 1e-9)
    if turn(clips_so_far, config.data.sparse_share):
        return "sparse"
    return "clip"
