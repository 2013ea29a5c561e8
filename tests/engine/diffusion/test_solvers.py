"""Noise levels, solvers and the loop."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from engine.diffusion import solvers
from engine.messages import Cancelled, StudioError

SHAPE = (1, 4, 3, 6, 8)


@pytest.fixture(autouse=True)
def one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _ignore(step: solvers.Step) -> None:
    pass


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_noise_levels_fall_from_one_to_zero_by_wans_rule(shift):
    levels = solvers.sigmas(50, shift)
    assert levels[0] == 1 and levels[-1] == 0 and bool((levels.diff() < 0).all())
    assert levels[25].item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1e-6)
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(sigmas=solvers.sigmas(50, shift)[:-1].tolist())
    torch.testing.assert_close(theirs.sigmas.float(), levels)


@pytest.mark.parametrize("name", ["euler", "unipc", "wan_unipc"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_last_noise_level_is_the_last_one_evaluated_and_its_estimate_is_the_clip(name, shift):
    solver = solvers.SOLVERS[name](8, shift, 0.5)
    levels = solver.sigmas
    assert len(levels) == 9 and len(solver.times) == 8 and bool((levels.diff() < 0).all())
    assert levels[-2].item() == pytest.approx(0.5, abs=1e-3) and levels[-1] == 0
    if name == "euler":  # evenly spaced before the shift
        even = [solvers.unshifted(level, shift) for level in levels[:-1].tolist()]
        assert torch.tensor(even).diff().diff().abs().max() < 1e-5

    told = []
    final = solvers.denoise(torch.randn(SHAPE), lambda x, s: x.sin(), solver, told.append)
    assert len(told) == 8 and torch.isfinite(final).all()
    if name == "euler":
        torch.testing.assert_close(final, told[-1].x_0)


def test_without_a_last_noise_level_the_ladder_is_the_one_before():
    for shift in (1.0, 3.0):
        assert torch.equal(solvers.sigmas(30, shift, 0.0), solvers.sigmas(30, shift))
        assert solvers.shifted(torch.tensor(solvers.unshifted(0.4, shift)), shift).item() == pytest.approx(0.4)
    assert solvers.sigmas(1, 3.0, 0.5).tolist() == [1.0, 0.0]


def test_noising_and_the_velocity_lead_back_to_the_clip():
    x_0, noise = torch.randn(3, *SHAPE[1:]), torch.randn(3, *SHAPE[1:])
    sigma = torch.tensor([0.0, 0.4, 1.0])
    noisy, velocity = solvers.add_noise(x_0, noise, sigma)
    assert torch.equal(noisy[0], x_0[0]) and torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy - sigma.view(3, 1, 1, 1, 1) * velocity, x_0)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [1, 7])
def test_an_exact_velocity_is_followed_back_to_the_clip(name, steps):
    x_0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    final = solvers.denoise(noise, lambda x, s: noise - x_0, solvers.SOLVERS[name](steps, 3.0), _ignore)
    torch.testing.assert_close(final, x_0, rtol=0, atol=1e-4)


def test_the_second_order_solver_needs_fewer_steps():
    """Data of N(2, .5): the velocity at (x, sigma) is known in closed form, and so is where a noise ends."""

    def velocity(x, sigma):
        spread = (1 - sigma) ** 2 * 0.25 + sigma**2
        expected = 2 + (1 - sigma) * 0.25 / spread * (x - (1 - sigma) * 2)  # of the clip, given x
        return (x - expected) / max(sigma, 1e-6)

    noise = torch.randn(SHAPE)

    def error(name, steps):
        final = solvers.denoise(noise, velocity, solvers.SOLVERS[name](steps, 1.0), _ignore)
        return (final - (2 + 0.5 * noise)).abs().mean().item()

    assert error("euler", 40) < 0.6 * error("euler", 20) < 0.3 * error("euler", 5)
    assert error("unipc", 20) < 0.5 * error("euler", 20)


def test_steps_are_made_in_full_precision():
    """A model in bf16 must not drag the latents down with it: below one step, bf16 rounding is larger than the step."""
    x_0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    half = (noise - x_0).bfloat16()
    final = solvers.denoise(noise, lambda x, s: half, solvers.Euler(50, 3.0), _ignore)
    assert solvers.denoise(noise.bfloat16(), lambda x, s: half, solvers.Euler(2, 3.0), _ignore).dtype == torch.float32
    rounded = noise.bfloat16()
    for index in range(50):
        rounded = solvers.Euler(50, 3.0).step(half, rounded, index)
    assert (final - x_0).abs().mean() < 0.5 * (rounded.float() - x_0).abs().mean()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_prediction_stops_in_that_step_and_names_suspects(poison):
    asked = []

    def predict(x, sigma):
        asked.append(sigma)
        velocity = torch.randn(SHAPE)
        if len(asked) == 3:
            velocity[0, 1, 2, 3, 4] = poison
        return velocity

    with pytest.raises(StudioError, match=r"step 3 of 8.*guidance scale"):
        solvers.denoise(torch.randn(SHAPE), predict, solvers.Euler(8, 3.0), _ignore)
    assert len(asked) == 3


def test_a_clip_of_one_flat_colour_is_stopped():
    noise = torch.randn(SHAPE)
    with pytest.raises(StudioError, match="one flat colour"):
        solvers.denoise(noise, lambda x, s: x / s, solvers.Euler(4, 3.0), _ignore)


def test_cancelling_ends_the_loop_within_one_step():
    asked = []

    def predict(x, sigma):
        asked.append(sigma)
        return torch.randn(SHAPE)

    def on_step(step: solvers.Step) -> None:
        if step.index == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        solvers.denoise(torch.randn(SHAPE), predict, solvers.Euler(8, 3.0), on_step)
    assert len(asked) == 2


def test_every_step_is_told_with_the_clip_as_the_model_sees_it():
    x_0, noise, told = torch.randn(SHAPE), torch.randn(SHAPE), []
    solvers.denoise(noise, lambda x, s: noise - x_0, solvers.Euler(5, 3.0), told.append)
    assert [step.index for step in told] == [0, 1, 2, 3, 4] and told[0].sigma == 1
    for step in told:
        torch.testing.assert_close(step.x_0, x_0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [0.0, 0.6, 1.0])
def test_frames_share_as_much_of_their_starting_noise_as_asked_and_each_is_plain_noise(shared):
    noise = solvers.starting_noise((1, 16, 5, 32, 32), torch.Generator().manual_seed(3), shared)
    frames = noise[0].transpose(0, 1).flatten(1)
    expected = torch.full((5, 5), shared).fill_diagonal_(1.0)
    torch.testing.assert_close(torch.corrcoef(frames), expected, atol=0.04, rtol=0)
    torch.testing.assert_close(frames.var(1), torch.ones(5), atol=0.05, rtol=0)


def test_without_sharing_the_starting_noise_is_the_generators_own():
    noise = solvers.starting_noise((1, 2, 3, 4, 4), torch.Generator().manual_seed(3))
    assert torch.equal(noise, torch.randn((1, 2, 3, 4, 4), generator=torch.Generator().manual_seed(3)))
