"""Leave out what need not be computed: steps whose velocity can be told from the two before.

In:  the guided prediction of one clip, its noise levels, and how much error a row of left-out steps may gather.
Out: a prediction that asks the model in some steps and in the others draws a line through its last two answers.
Knows nothing of models, branches or conditionings: whatever gives a velocity can be left out.

A clip's velocity bends much in its first steps, little in the middle, and again in its last ones. How much, every
answer of the model tells by itself: it is compared with the line that would have stood in for it. A line misses a curve
by its bend times the distances to both points it was drawn through, so the next misses are known before they happen,
and their sum is held below the tolerance. Nothing has to be calibrated for a model, a schedule or a number of steps.

All branches of guidance are left out in the same steps. Merging them is linear (but for "apg"), so the line
through two merged velocities is the merged lines of the branches, and one state serves all of them. Left out in steps
of their own, they contradict each other, and guidance makes that louder (docs/log.md).

Source: forecasts of features as in TaylorSeer, arXiv 2503.06923, of first order and for the whole forward; the rule
that chooses the steps is the error estimate of an adaptive solver (Hairer, Norsett, Wanner, II.4).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.diffusion.solvers import Predict, Solver
from engine.presets import StepCacheModes

FIRST = 3  # a line takes two answers, and a third one tells how well it fits
IN_A_ROW = 4  # a bend that was measured further back says little


def with_step_cache(word: str | None, caching: StepCacheModes, predict: Predict, solver: Solver) -> Predict:
    """The prediction of one clip under the word that its document says: off (`predict` itself), careful or fast."""
    if word in (None, "off"):
        return predict
    tolerance = getattr(caching, word).tolerance
    return StepCache(predict, solver.sigmas[:-1].tolist(), tolerance)


class StepCache:
    """The prediction of one clip with steps left out; made anew for every clip, so nothing is carried over.

    Args:
        predict: the guided velocity; called in some steps only.
        levels: noise levels at which it will be asked, falling, (steps,).
        tolerance: relative error that left-out steps may gather between two answers, > 0.
    """

    def __init__(self, predict: Predict, levels: Sequence[float], tolerance: float) -> None:
        self.computed = 0
        """Steps in which the model was asked."""
        self._predict = predict
        self._levels = levels
        self._tolerance = tolerance
        self._answers: list[tuple[float, Tensor]] = []  # the last two, with their levels
        self._bend = 0.0
        self._gathered = 0.0
        self._in_a_row = 0
        self._step = 0

    def __call__(self, latents: Tensor, time: float) -> Tensor:
        """Velocity of the next step; in the latents' shape, asked of the model or forecast."""
        level, last = self._levels[self._step], self._step == len(self._levels) - 1
        self._step += 1
        if self.computed >= FIRST and not last and self._in_a_row < IN_A_ROW:
            gathered = self._gathered + self._bend * self._distances(level)
            if gathered <= self._tolerance:
                self._gathered, self._in_a_row = gathered, self._in_a_row + 1
                return self._line(level)
        velocity = self._predict(latents, time)
        if len(self._answers) == 2:
            miss = (velocity - self._line(level)).norm() / velocity.norm()
            self._bend = miss.item() / self._distances(level)
        self._answers = [*self._answers[-1:], (level, velocity)]
        self._gathered, self._in_a_row, self.computed = 0.0, 0, self.computed + 1
        return velocity

    def _line(self, level: float) -> Tensor:
        """The straight line through the last two answers, at this level."""
        (before, earlier), (after, later) = self._answers
        return later + (later - earlier) * ((level - after) / (after - before))

    def _distances(self, level: float) -> float:
        (before, _), (after, _) = self._answers
        return (after - level) * (before - level)
