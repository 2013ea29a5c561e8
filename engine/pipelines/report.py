"""The identity report of one clip: who is measured by which evaluator, and where the report is written.

In:  a job, its preset and the model pool.
Out: a `Reporter` that sees every frame; its report and strip beside the clip.
Knows nothing of how an evaluator works (`engine.identity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine import presets
from engine.identity.faces import FaceFiles, Faces
from engine.identity.report import REPORT, STRIP, IdentityReport
from engine.identity.reporter import Assignment, Evaluator, Reporter
from engine.identity.things import THINGS, Things
from engine.identity.toybox import Drawn, Judges
from engine.job import GenerateJob, Subject
from engine.loading.pool import ModelPool
from engine.media import pictures
from engine.pipelines.files import explain_os_errors
from engine.presets import Preset


def new_reporter(job: GenerateJob, preset: presets.Preset, pool: ModelPool) -> Reporter | None:
    """Who judges the clip while it is decoded; None where nobody is to be recognised, or no judge is there."""
    answers = assign_evaluators(job, preset, pool)
    if not answers:
        return None
    # Judges of drawings are quick; those of the real world look at one frame of each that the VAE packs together.
    every = 1 if preset.components.judges else preset.frames_per_latent
    return Reporter(answers, fps=preset.fps, num_frames=job.num_frames or 1, every=every)


def write_report(reporter: Reporter | None, report: IdentityReport | None, clip: Path) -> Path | None:
    """Report and outlined frames beside the clip; what an earlier clip of that name left there goes."""
    path = clip.with_suffix(REPORT)
    with explain_os_errors(clip.parent):
        for old in (path, clip.with_suffix(STRIP)):
            old.unlink(missing_ok=True)
        if reporter is None or report is None:
            return None
        path.write_text(report.as_json(), encoding="utf-8")
        reporter.write_strip(clip.with_suffix(STRIP))
    return path


def assign_evaluators(job: GenerateJob, preset: Preset, pool: ModelPool) -> tuple[Assignment, ...]:
    """Everyone who is to be recognised, with the witness that knows them.

    Raises:
        StudioError: a witness's files are there, but damaged.
    """
    asked = [(at, each) for at, each in enumerate(job.subjects) if each.role != "background" and each.weight > 0]
    shown = {at: pictures.prepare_subject(each, size=preset.reference_size) for at, each in asked}

    def answer(witness: Evaluator, own: Sequence[tuple[int, Subject]]) -> Assignment:
        return Assignment(witness, tuple((each.name, at) for at, each in own))

    if not asked:
        return ()
    if preset.components.judges:
        return (answer(Drawn(pool.part("judges", preset, build=Judges.load), list(shown.values())), asked),)
    found, left = [], asked
    if preset.has("faces"):
        faces: FaceFiles = pool.part("faces", preset, build=FaceFiles)
        known = {at: faces.known(shown[at]) for at, each in asked if each.role == "person"}
        people = [(at, each) for at, each in asked if len(known.get(at, ()))]
        left = [(at, each) for at, each in asked if not len(known.get(at, ()))]
        if people:
            found.append(answer(Faces(faces, [known[at] for at, _ in people]), people))
    if left and all(preset.has(part) for part in THINGS):
        parts = [pool.part(part, preset) for part in THINGS]
        things = Things(*parts, nouns=[each.noun for _, each in left], pictures=[shown[at] for at, _ in left])
        found.append(answer(things, left))
    return tuple(found)
