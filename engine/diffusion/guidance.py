"""Merge the predictions of one step into the velocity the sampler follows.

In:  velocities of the same noisy latents under different conditions, flow convention v = noise - data.
Out: one velocity of the same shape. Knows nothing of models, prompts or schedules.

The conditions have names, the same everywhere:
    none      neither subjects nor prompt: the negative prompt alone
    subjects  the subjects, the negative prompt in place of the prompt, no VLM
    text      the prompt through UMT5 alone
    full      everything

The VLM has read prompt and pictures together, so it speaks in "full" only; training drops it in the same way (a VLM
reading without its subjects is something a model never sees).

Shapes: B clips, C latent channels, F latent frames, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from engine.job import Sampling
from engine.resolve import ResolvedSampling

LONGEST = 50.0  # longest push that `apg` lets through, in one latent frame of the clean clip
ALONG = 0.5  # what it keeps of a push's part along the clean clip, which lifts contrast and colour

Branch = Literal["none", "subjects", "text", "full"]


def branches(sampling: Sampling | ResolvedSampling) -> tuple[Branch, ...]:
    """The predictions that one step needs, in the order they are made. As many forwards as there are names."""
    if sampling.guidance == "dual":
        # With a subject scale of 1 the prediction without subjects cancels out: the prompt alone is guided.
        if sampling.subject_scale == 1:
            return ("subjects", "full")
        return ("none", "subjects", "full")
    if sampling.guidance == "apg":
        return ("none", "subjects", "full")
    if sampling.guidance == "chained":
        return ("none", "text", "full")
    if sampling.guidance == "cfg" and sampling.guidance_scale != 1:
        return ("none", "full")
    return ("full",)  # no guidance, or a scale of 1, where the other prediction would cancel out


def apply_guidance(
    sampling: Sampling | ResolvedSampling,
    predict: Callable[[Branch], Tensor],
    latents_BCFHW: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Ask for the predictions that this way of guiding needs, and merge them.

    Args:
        sampling: with every field its guidance uses filled in (a preset does that).
        predict: velocity (B, C, F, H, W) of one branch.
        latents_BCFHW, sigma: what is denoised and its noise level in (0, 1]; "apg" alone asks for them.
    """
    v = {branch: predict(branch) for branch in branches(sampling)}
    if sampling.guidance == "dual" and "none" not in v:
        return cfg(v["subjects"], v["full"], _set(sampling.text_scale))
    if sampling.guidance == "dual":
        return chain(v["none"], v["subjects"], v["full"], _set(sampling.subject_scale), _set(sampling.text_scale))
    if sampling.guidance == "apg":
        assert latents_BCFHW is not None and sigma is not None, "projected guidance looks at the clean clip"
        scales = _set(sampling.subject_scale), _set(sampling.text_scale)
        return apg(v["none"], v["subjects"], v["full"], latents_BCFHW, sigma, *scales)
    if sampling.guidance == "chained":
        return chain(v["none"], v["text"], v["full"], _set(sampling.text_scale), _set(sampling.subject_scale))
    if "none" in v:
        return cfg(v["none"], v["full"], _set(sampling.guidance_scale))
    return v["full"]


def _set(scale: float | None) -> float:
    assert scale is not None, "a resolved job has every scale that its guidance uses"
    return scale


def cfg(v_none_BCFHW: Tensor, v_full_BCFHW: Tensor, scale: float) -> Tensor:
    """Away from neither, towards both at once; the paper's way (2.5, one number for pictures and prompt).

    Args:
        v_none_BCFHW, v_full_BCFHW: velocities without and with everything.
        scale: weight >= 0, no unit. 1 gives back `v_full_BCFHW`, 0 `v_none_BCFHW`.

    Source: classifier-free guidance, eq. 6 of arXiv 2207.12598, written from the unconditional side.
    """
    _same_shape(v_none_BCFHW, v_full_BCFHW)
    return v_none_BCFHW + scale * (v_full_BCFHW - v_none_BCFHW)


def chain(
    v_none_BCFHW: Tensor, v_first_BCFHW: Tensor, v_full_BCFHW: Tensor, first_scale: float, then_scale: float
) -> Tensor:
    """First towards one condition, then from there towards both, each with a weight of its own.

    With the subjects first it is "dual", as Phantom samples (subjects 5.0, text 7.5); with the prompt first,
    "chained". The two differ in what the second weight means: dual's text weight acts on a clip that knows its
    subjects, chained's subject weight on a clip that knows its prompt.

    Args:
        v_none_BCFHW: velocity without either condition.
        v_first_BCFHW: velocity with the first one alone.
        v_full_BCFHW: velocity with both.
        first_scale, then_scale: weights >= 0, no unit. Both 1 gives back `v_full_BCFHW`.

    Raises:
        ValueError: the three velocities differ in shape.

    Source: InstructPix2Pix, eq. 3, arXiv 2211.09800, with subjects in place of its input image.
    """
    _same_shape(v_none_BCFHW, v_first_BCFHW, v_full_BCFHW)
    towards_first = v_first_BCFHW - v_none_BCFHW
    towards_both = v_full_BCFHW - v_first_BCFHW
    return v_none_BCFHW + first_scale * towards_first + then_scale * towards_both


def apg(
    v_none_BCFHW: Tensor,
    v_subjects_BCFHW: Tensor,
    v_full_BCFHW: Tensor,
    latents_BCFHW: Tensor,
    sigma: float,
    subject_scale: float,
    text_scale: float,
) -> Tensor:
    """ "dual", its two pushes shortened: no longer than `LONGEST` in a frame, and weaker where they only add contrast.

    Both are measured on the clean clip that the velocities point to, frame by frame. A push along it changes how loud
    it is rather than what it shows; half of that part is dropped.

    Args:
        v_none_BCFHW, v_subjects_BCFHW, v_full_BCFHW: velocities without either, with the subjects, with everything.
        latents_BCFHW: the noisy latents they were predicted for.
        sigma: their noise level, in (0, 1].
        subject_scale, text_scale: weights >= 0, no unit. Both 0 gives back `v_none_BCFHW`.

    Source: `normalized_guidance_chain` in bernini/models/wan_diffusion.py, bytedance/Bernini 8c805a5, at the values of
    its `r2v_apg` (eta .5, norm_threshold 50, momentum 0); the idea is APG, arXiv 2410.02416.
    """
    _same_shape(v_none_BCFHW, v_subjects_BCFHW, v_full_BCFHW, latents_BCFHW)
    merged = v_none_BCFHW
    steps = ((subject_scale, v_none_BCFHW, v_subjects_BCFHW), (text_scale, v_subjects_BCFHW, v_full_BCFHW))
    for scale, before, after in steps:
        merged = merged + scale * _shorten_push(after - before, latents_BCFHW - sigma * after, sigma)
    return merged


def _shorten_push(push: Tensor, clean: Tensor, sigma: float) -> Tensor:
    frame = (1, 3, 4)  # all but clips and latent frames
    length = sigma * torch.linalg.vector_norm(push, dim=frame, keepdim=True)
    push = push * (LONGEST / length).clamp(max=1)
    direction = normalize(clean, dim=frame)  # pyright: ignore[reportArgumentType] - several dims, unlike its stub
    return push - (1 - ALONG) * (push * direction).sum(frame, keepdim=True) * direction


def _same_shape(*velocities: Tensor) -> None:
    shapes = [tuple(v.shape) for v in velocities]
    if len(set(shapes)) > 1:
        raise ValueError(f"guidance merges velocities of one shape, got {shapes}")
