"""Merging predictions: what scales of zero and one must give back."""

from __future__ import annotations

import pytest
import torch

from engine.diffusion import guidance
from engine.diffusion.guidance import apg, apply_guidance, branches, cfg, chain
from engine.job import Sampling

SHAPE = (1, 4, 2, 3, 3)


@pytest.fixture
def velocities() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(SHAPE) for name in ("none", "subjects", "text", "full")}


def _settings(kind: str, joint_scale: float = 2.5, subjects: float = 5.0, text: float = 7.5) -> Sampling:
    return Sampling(guidance=kind, guidance_scale=joint_scale, subject_scale=subjects, text_scale=text)


@pytest.mark.parametrize("kind", ["none", "cfg", "dual", "chained"])
def test_scales_of_one_give_back_the_full_prediction(velocities, kind):
    merged = apply_guidance(_settings(kind, 1, 1, 1), velocities.__getitem__)
    torch.testing.assert_close(merged, velocities["full"])


@pytest.mark.parametrize("kind", ["cfg", "dual", "chained"])
def test_scales_of_zero_give_back_the_prediction_without_conditions(velocities, kind):
    assert torch.equal(apply_guidance(_settings(kind, 0, 0, 0), velocities.__getitem__), velocities["none"])


def test_the_first_link_of_a_chain_stands_alone(velocities):
    dual = apply_guidance(_settings("dual", subjects=1, text=0), velocities.__getitem__)
    chained = apply_guidance(_settings("chained", subjects=0, text=1), velocities.__getitem__)
    torch.testing.assert_close(dual, velocities["subjects"])
    torch.testing.assert_close(chained, velocities["text"])


@pytest.mark.parametrize("kind", ["dual", "chained"])
def test_equal_scales_make_every_chain_the_joint_way(velocities, kind):
    merged = apply_guidance(_settings(kind, subjects=2.5, text=2.5), velocities.__getitem__)
    torch.testing.assert_close(merged, cfg(velocities["none"], velocities["full"], 2.5))


def test_with_a_subject_scale_of_one_dual_guides_the_prompt_alone(velocities):
    merged = apply_guidance(_settings("dual", subjects=1, text=4.0), velocities.__getitem__)
    whole = chain(velocities["none"], velocities["subjects"], velocities["full"], 1, 4.0)
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (_settings("none"), ("full",)),
        (_settings("cfg"), ("none", "full")),
        (_settings("cfg", joint_scale=1), ("full",)),
        (_settings("dual"), ("none", "subjects", "full")),
        (_settings("apg"), ("none", "subjects", "full")),
        (_settings("chained"), ("none", "text", "full")),
        (_settings("dual", subjects=1), ("subjects", "full")),
    ],
)
def test_only_the_predictions_that_are_needed_are_made(velocities, settings, asked):
    made = []
    apply_guidance(settings, lambda branch: made.append(branch) or velocities[branch], torch.randn(SHAPE), 0.5)
    assert tuple(made) == asked == branches(settings)


def test_a_push_across_the_clean_clip_passes_whole_and_one_along_it_by_half():
    latents, velocity = torch.randn(SHAPE), torch.randn(SHAPE)
    clean = latents - 0.5 * velocity
    across = torch.randn(SHAPE)
    across -= clean * ((across * clean).sum((1, 3, 4), keepdim=True) / clean.pow(2).sum((1, 3, 4), keepdim=True))
    for push, expected in ((across, across), (clean, 0.5 * clean)):
        merged = apg(velocity - push, velocity, velocity, latents, 0.5, 3.0, 2.0)
        torch.testing.assert_close(merged, velocity - push + 3.0 * expected)


def test_a_push_is_as_long_as_the_limit_in_each_frame_of_the_clean_clip_that_it_would_pass(monkeypatch):
    latents, none, push = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    push[:, :, 1] *= 1e3
    monkeypatch.setattr(guidance, "ALONG", 1.0)
    short, long = (apg(none, none + push, none + push, latents, 0.2, 1.0, 0.0) - none).unbind(2)
    torch.testing.assert_close(short, push[:, :, 0])
    torch.testing.assert_close(long, push[:, :, 1] * (guidance.LONGEST / (0.2 * push[:, :, 1].norm())))


def test_projected_guidance_without_its_limits_is_dual(velocities, monkeypatch):
    monkeypatch.setattr(guidance, "ALONG", 1.0)
    whole = chain(velocities["none"], velocities["subjects"], velocities["full"], 5.0, 7.5)
    merged = apply_guidance(_settings("apg"), velocities.__getitem__, torch.randn(SHAPE), 0.5)
    torch.testing.assert_close(merged, whole)
    still = apply_guidance(_settings("apg", subjects=0, text=0), velocities.__getitem__, torch.randn(SHAPE), 0.5)
    assert torch.equal(still, velocities["none"])


def test_velocities_of_different_shapes_are_refused(velocities):
    with pytest.raises(ValueError, match="one shape"):
        chain(velocities["none"], velocities["full"][:, :2], velocities["full"], 1, 1)
    with pytest.raises(ValueError, match="one shape"):
        cfg(velocities["none"], velocities["full"][:, :2], 1)
