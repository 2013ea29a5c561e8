"""From noise to a clip: noise levels, solver steps, the loop.

In:  noise, and a `predict(latents, sigma)` that returns the velocity v = noise - data.
Out: clean latents. Knows nothing of models, prompts, guidance or video.

Time runs from 1 (noise) to 0 (clean) and is called sigma: x_sigma = (1 - sigma) * x_0 + sigma * noise (paper, eq. 1).

Shapes: B clips, C latent channels, F latent frames, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from engine.messages import StudioError

Predict = Callable[[Tensor, float], Tensor]


def sigmas(num_inference_steps: int, shift: float, final_sigma: float = 0.0) -> Tensor:
    """Noise levels of a clip: (steps + 1,) fp32, from 1 down to 0.

    Args:
        num_inference_steps: how many steps, so evaluations of the model, >= 1.
        shift: > 0; above 1 more steps fall where there is much noise, and layout is decided there.
        final_sigma: level of the last evaluation, after the shift, in [0, 1). Its step leads to 0 at once, so the clip
            is the clean estimate there. 0: the levels go on evenly to the end.

    Source: Wan's rule, s -> shift * s / (1 + (shift - 1) * s) on evenly spaced s (shift 3 at 480p, 5 at 720p).
    """
    if final_sigma == 0:
        even = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
    else:
        evaluated = torch.linspace(1, unshifted(final_sigma, shift), num_inference_steps, dtype=torch.float64)
        even = torch.cat([evaluated, evaluated.new_zeros(1)])
    return shifted(even, shift).float()


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Wan's shift of noise levels in [0, 1]; 0 and 1 stay where they are."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshifted(sigma: float, shift: float) -> float:
    """The level in [0, 1] that `shifted` moves to `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def starting_noise(shape: tuple[int, ...], generator: torch.Generator, shared: float = 0.0) -> Tensor:
    """Gaussian noise of unit variance, fp32.

    Args:
        shape: (B, C, F, H, W).
        generator: on the CPU where every device should start from the same; the noise is where it is.
        shared: the share of the variance that all frames of a clip have in common, 0 to 1. Frames that start alike
            end alike, which a model with little temporal attention has no other way to. Only for models trained so.

    Source: the mixed noise of PYoCo, arXiv 2305.10474, section 3.3; 0 is Wan's own.
    """
    drawn = {"generator": generator, "device": generator.device, "dtype": torch.float32}
    own = torch.randn(shape, **drawn)
    if shared == 0:
        return own
    common = torch.randn((*shape[:2], 1, *shape[3:]), **drawn)
    return shared**0.5 * common + (1 - shared) ** 0.5 * own


def add_noise(x_0: Tensor, noise: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
    """Clean latents at a noise level, and the velocity a model should predict there.

    Args:
        x_0, noise: (B, C, F, H, W).
        sigma_B: (B,), in [0, 1].

    Returns:
        x_sigma and v = noise - x_0, both of x_0's shape, so that x_sigma - sigma * v = x_0.
    """
    sigma = sigma_B.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1))
    return (1 - sigma) * x_0 + sigma * noise, noise - x_0


# --- solvers --------------------------------------------------------------------------------------------------------


class Solver(Protocol):
    """Follows the velocity from one noise level to the next."""

    sigmas: Tensor  # (steps + 1,), fp32, falling, the last one 0
    times: Tensor  # (steps,), fp32, what a model is told of each level; Wan's UniPC leaves out thousandths' fractions

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """Latents at `sigmas[index]` -> latents at `sigmas[index + 1]`, fp32."""
        ...


class Euler:
    """A straight line from one level to the next."""

    def __init__(self, num_inference_steps: int, shift: float, final_sigma: float = 0.0) -> None:
        self.sigmas = sigmas(num_inference_steps, shift, final_sigma)
        self.times = self.sigmas[:-1]

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """x + (sigma_next - sigma) * v."""
        return latents + (self.sigmas[index + 1] - self.sigmas[index]).item() * velocity


class UniPC:
    """diffusers' second-order multistep solver, as presets use it that were trained with it.

    Args:
        num_inference_steps, shift, final_sigma: as in `sigmas`.
        first, last: noise levels before the shift; of diffusers' own Wan pipelines where left out.
    """

    def __init__(
        self,
        num_inference_steps: int,
        shift: float,
        final_sigma: float = 0.0,
        *,
        first: float = 1.0,
        last: float = 1 / 1000,
    ) -> None:
        self._scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
        )
        # Called a list there, used as an array.
        levels: Any = np.linspace(first, last, num_inference_steps + 1)[:-1]
        if final_sigma > 0:
            levels = np.linspace(first, unshifted(final_sigma, shift), num_inference_steps)
        self._scheduler.set_timesteps(sigmas=levels)
        self.sigmas = self._scheduler.sigmas.clone()
        self.times = self._scheduler.timesteps.float() / 1000

    def step(self, velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        """One step of the scheduler, which counts for itself."""
        timestep = self._scheduler.timesteps[index]
        return self._scheduler.step(velocity, timestep, latents, return_dict=False)[0]


def wan_unipc(num_inference_steps: int, shift: float, final_sigma: float = 0.0) -> UniPC:
    """UniPC at the levels of Wan's own code, and so of Phantom's and of Bernini's (by diffusers 0.35.2).

    The first is .999, the last before 0 a step lower.
    """
    return UniPC(num_inference_steps, shift, final_sigma, first=0.999, last=0.0)


SOLVERS: dict[str, Callable[..., Solver]] = {"euler": Euler, "unipc": UniPC, "wan_unipc": wan_unipc}


def level(solver: Solver, time: float) -> float:
    """The noise level at which a model is told this time."""
    return solver.sigmas[(solver.times - time).abs().argmin()].item()


# --- the loop -------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step that has been made."""

    index: int  # from 0
    total: int
    sigma: float  # noise level it started from
    latents: Tensor  # after the step
    x_0: Tensor  # the clean clip as the model saw it in this step


def denoise(latents: Tensor, predict: Predict, solver: Solver, on_step: Callable[[Step], None]) -> Tensor:
    """Walk from noise to clean latents.

    Args:
        latents: noise, (B, C, F, H, W).
        predict: velocity at latents and a time of the solver's; in any dtype.
        solver: where to evaluate and how to step.
        on_step: called after every step; what it raises ends the loop (that is how a clip is cancelled).

    Returns:
        Clean latents, fp32.

    Raises:
        StudioError: a prediction holds NaN or infinity, or the whole clip has become one flat colour.
    """
    # fp32 here: in bf16 a step is smaller than the rounding error of the latents for the last part of the way.
    latents = latents.float()
    total = len(solver.sigmas) - 1
    for index in range(total):
        sigma = solver.sigmas[index].item()
        velocity = predict(latents, solver.times[index].item()).float()
        x_0 = latents - sigma * velocity
        check_alive(x_0, index + 1, total)
        latents = solver.step(velocity, latents, index)
        on_step(Step(index, total, sigma, latents, x_0))
    return latents


def check_alive(x_0: Tensor, step: int, total: int) -> None:
    """Stop a clip that can only end black.

    Raises:
        StudioError: NaN, infinity, or no difference left between any two latent pixels.
    """
    spread = (x_0.amax(dim=(-2, -1)) - x_0.amin(dim=(-2, -1))).amax()  # NaN and infinity come through
    if bool(torch.isfinite(spread)) and spread > 0:
        return
    fault = "it is one flat colour."
    if not bool(torch.isfinite(spread)):
        fault = "it holds NaN."
    raise StudioError(
        what=f"The clip broke at step {step} of {total}: {fault}",
        why="Suspects, likeliest first: a guidance scale that is too high, half precision overflowing on this device, "
        "a damaged weights or LoRA file.",
        next_step="Lower the guidance scale to about 3; if it breaks again, run `python launch.py doctor`.",
        field="sampling",
    )
