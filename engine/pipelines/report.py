"""The identity report of one clip: who is measured by which evaluator, and where the report is written.

In:  a job with its prepared subjects, and the model pool.
Out: a `Reporter` that sees every frame; its report and strip beside the clip.
Knows nothing of how an evaluator works (`engine.identity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.identity.faces import FaceEvaluator, FaceModels
from engine.identity.report import REPORT, STRIP, IdentityReport
from engine.identity.reporter import Assignment, Evaluator, Reporter
from engine.identity.things import THINGS, ThingEvaluator
from engine.identity.toybox import Judges, ToyboxEvaluator
from engine.loading.pool import ModelPool
from engine.pipelines.files import explain_os_errors
from engine.resolve import PreparedSubject, ResolvedJob


def new_reporter(resolved: ResolvedJob, pool: ModelPool) -> Reporter | None:
    """The reporter that judges the clip while it is decoded; None where nobody is to be recognised, or no evaluator is
    there."""
    assignments = assign_evaluators(resolved, pool)
    if not assignments:
        return None
    preset = resolved.preset
    every = preset.frames_per_latent  # one frame of each group that the VAE packs together
    if preset.components.judges:
        every = 1  # judges of drawings are quick
    return Reporter(assignments, fps=preset.fps, num_frames=resolved.num_frames, every=every)


def write_report(reporter: Reporter | None, report: IdentityReport | None, clip: Path) -> Path | None:
    """Write the report and the outlined frames beside the clip; those of an earlier clip of that name are deleted."""
    path = clip.with_suffix(REPORT)
    with explain_os_errors(clip.parent):
        for old in (path, clip.with_suffix(STRIP)):
            old.unlink(missing_ok=True)
        if reporter is None or report is None:
            return None
        path.write_text(report.as_json(), encoding="utf-8")
        reporter.write_strip(clip.with_suffix(STRIP))
    return path


def assign_evaluators(resolved: ResolvedJob, pool: ModelPool) -> tuple[Assignment, ...]:
    """Every subject that is to be recognised, with the evaluator that knows it.

    Raises:
        StudioError: an evaluator's files are there, but damaged.
    """
    preset = resolved.preset
    subjects = [(at, each) for at, each in enumerate(resolved.subjects) if each.role != "background" and each.is_shown]
    if not subjects:
        return ()
    if preset.components.judges:
        judges = pool.part("judges", preset, build=Judges.load)
        return (_assign(ToyboxEvaluator(judges, [each.pictures for _, each in subjects]), subjects),)
    assignments: list[Assignment] = []
    without_face = subjects
    if preset.has("faces"):
        faces: FaceModels = pool.part("faces", preset, build=FaceModels)
        known = {at: faces.known(each.pictures) for at, each in subjects if each.role == "person"}
        people = [(at, each) for at, each in subjects if len(known.get(at, ()))]
        without_face = [(at, each) for at, each in subjects if not len(known.get(at, ()))]
        if people:
            assignments.append(_assign(FaceEvaluator(faces, [known[at] for at, _ in people]), people))
    if without_face and all(preset.has(part) for part in THINGS):
        things = ThingEvaluator(
            *[pool.part(part, preset) for part in THINGS],
            nouns=[each.noun for _, each in without_face],
            pictures=[each.pictures for _, each in without_face],
        )
        assignments.append(_assign(things, without_face))
    return tuple(assignments)


def _assign(evaluator: Evaluator, subjects: Sequence[tuple[int, PreparedSubject]]) -> Assignment:
    return Assignment(evaluator, tuple((each.name, at) for at, each in subjects))
