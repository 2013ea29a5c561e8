"""Steps that are left out: which, what stands in for them, and that nothing of it outlives a clip."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import Tensor

from engine import tiny
from engine.diffusion import solvers, step_cache
from engine.diffusion.conditioning import Encoded, prepare
from engine.diffusion.guidance import apply_guidance
from engine.job import Sampling
from engine.messages import StudioError
from engine.models.subject_tower import References
from engine.presets import StepCacheModes

SHAPE = (1, 4, 2, 4, 4)
STEPS = 30
LEVELS = [1 - step / STEPS for step in range(STEPS)]


class Curve:
    """A velocity that depends on the time alone; remembers when it was asked."""

    def __init__(self, power: float) -> None:
        self.power, self.asked = power, []

    def __call__(self, latents: Tensor, time: float) -> Tensor:
        self.asked.append(time)
        return torch.full(SHAPE, 1 + time**self.power)


def walk(predict: solvers.Predict, steps: int = STEPS, solver: str = "euler") -> Tensor:
    torch.manual_seed(0)
    return solvers.denoise(torch.randn(SHAPE), predict, solvers.SOLVERS[solver](steps, 1.0), lambda _: None)


@pytest.mark.parametrize("word", [None, "off"])
def test_off_is_the_very_prediction_itself(word):
    curve = Curve(2)
    assert step_cache.with_step_cache(word, StepCacheModes(), curve, solvers.Euler(4, 1.0)) is curve


def test_a_straight_line_is_asked_for_thrice_then_every_fifth_time_and_at_the_end():
    curve = Curve(1)
    left = step_cache.StepCache(curve, LEVELS, 0.001)
    with_gaps, whole = walk(left), walk(Curve(1))
    torch.testing.assert_close(with_gaps, whole)
    asked = [round(STEPS * (1 - time)) for time in curve.asked]
    assert asked == [0, 1, 2, 7, 12, 17, 22, 27, 29] and left.computed == len(asked)


def test_the_more_it_bends_the_more_it_is_asked_and_the_less_is_tolerated_the_nearer_it_stays():
    computed = {}
    for power in (2, 5):
        for tolerance in (1e-4, 1e-2):
            left = step_cache.StepCache(Curve(power), LEVELS, tolerance)
            missed = (walk(left) - walk(Curve(power))).abs().max().item()
            assert missed <= tolerance * 2  # a velocity is below 2 and time runs from 1 to 0
            computed[power, tolerance] = left.computed
    assert computed[5, 1e-2] > computed[2, 1e-2] and computed[2, 1e-4] > computed[2, 1e-2]
    assert computed[2, 1e-2] <= STEPS / 2


@pytest.mark.parametrize("solver", ["unipc", "wan_unipc"])
def test_every_solver_can_be_left_waiting(solver):
    made = solvers.SOLVERS[solver](STEPS, 3.0)
    left = step_cache.with_step_cache("fast", StepCacheModes(), Curve(2), made)
    torch.manual_seed(0)
    clip = solvers.denoise(torch.randn(SHAPE), left, made, lambda _: None)
    assert left.computed < STEPS / 1.5
    torch.testing.assert_close(clip, walk_of(solver), rtol=0, atol=0.05)


def walk_of(solver: str) -> Tensor:
    torch.manual_seed(0)
    return solvers.denoise(torch.randn(SHAPE), Curve(2), solvers.SOLVERS[solver](STEPS, 3.0), lambda _: None)


def test_a_clip_that_breaks_is_noticed_at_the_step_that_asks():
    def broken(latents: Tensor, time: float) -> Tensor:
        return torch.full(SHAPE, float("nan") if time < 0.5 else 1 + time**2)

    with pytest.raises(StudioError, match="holds NaN"):
        walk(step_cache.StepCache(broken, LEVELS, 0.01))


def test_two_steps_leave_nothing_to_leave_out():
    left = step_cache.StepCache(Curve(2), [1.0, 0.5], 10.0)
    assert torch.equal(walk(left, steps=2), walk(Curve(2), steps=2)) and left.computed == 2


@pytest.mark.parametrize("guidance", ["cfg", "dual", "chained"])
def test_the_line_through_merged_velocities_is_the_merged_lines_of_the_branches(guidance):
    """What lets one state stand for a state per branch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformer = tiny.stir(tiny.transformer(), 1.0)
    encoded = Encoded(torch.randn(1, 8, tiny.TEXT_DIM), torch.randn(1, 8, tiny.TEXT_DIM))
    conditions = prepare("identity", transformer, encoded)
    settings = Sampling(guidance=guidance, guidance_scale=2.5, subject_scale=5.0, text_scale=7.5)
    noisy, levels = torch.randn(1, tiny.LATENT_CHANNELS, 2, 4, 4), (0.9, 0.8)
    branches = {
        branch: [conditions.predict(noisy, level, branch) for level in levels]
        for branch in ("none", "subjects", "text", "full")
    }
    merged = [apply_guidance(settings, lambda branch, n=n: branches[branch][n]) for n in (0, 1)]
    lines = apply_guidance(settings, lambda branch: 2 * branches[branch][1] - branches[branch][0])
    torch.testing.assert_close(2 * merged[1] - merged[0], lines, rtol=1e-4, atol=1e-4)


SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 16, "out_channels": 16, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["identity", "none", "frames", "sources", "side"])
def test_whatever_way_subjects_enter_steps_are_left_out_and_untold_nothing_changes(kind):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformer = {
        "identity": lambda: tiny.stir(tiny.transformer(), 1.0),
        "side": lambda: WanVACETransformer3DModel(**SMALL, vace_layers=[0], vace_in_channels=96),
    }.get(kind, lambda: WanTransformer3DModel(**SMALL))()
    encoded = Encoded(
        torch.randn(1, 8, 32),
        torch.randn(1, 8, 32),
        References(torch.randn(1, 1, 1, 16, 4, 4), vlm_states=torch.randn(1, 5, tiny.VLM_DIM)),
        torch.randn(1, 16, 1, 4, 4),
        torch.randn(1, 96, 3, 4, 4),
        (torch.randn(1, 16, 1, 6, 2),),
    )
    conditions = prepare(kind, transformer.eval(), encoded)
    settings, asked = Sampling(guidance="dual", subject_scale=3.0, text_scale=2.0), []

    def predict(latents: Tensor, time: float) -> Tensor:
        return apply_guidance(
            settings, lambda branch: asked.append(branch) or conditions.predict(latents, time, branch)
        )

    def clip(tolerance: float | None) -> tuple[Tensor, int]:
        asked.clear()
        solver = solvers.Euler(12, 1.0)
        torch.manual_seed(1)
        noise = torch.randn(1, 16, conditions.lead + 2, 4, 4)
        left = predict if tolerance is None else step_cache.StepCache(predict, solver.sigmas[:-1].tolist(), tolerance)
        return solvers.denoise(noise, left, solver, lambda _: None), len(asked)

    whole, forwards = clip(None)
    strict, as_many = clip(1e-12)
    few = clip(10.0)[1]
    assert torch.equal(whole, strict) and forwards == as_many == 36
    assert few < forwards / 2 and few % 3 == 0
