"""The toybox benchmark: two hundred and seventy held-out jobs, made and judged, and one table with intervals.

In:  a preset, a number of jobs, a set of judges.
Out: a table; with a folder, the jobs in OpenS2V's layout, clips named by id, and every figure as JSON.
Knows nothing of training. Published figures come from the `test` judges, which nothing selects by.

    python launch.py evaluate toybox             # every third job, no withheld or swapped references
    python launch.py evaluate toybox --full --out results

A subject counts as recognised when the clip shows more of its own picture than of any of fifteen others of its kind,
each looked for in turn. The same jobs are made again with references withheld, and two-subject ones with references
swapped.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image
from torch import Tensor
from torch.nn import functional

from engine import presets
from engine.identity.crops import crop_subjects, to_unit
from engine.identity.toybox import MOMENTS, SEEN, Finder, Judges
from engine.job import GenerateJob, Subject, make_job
from engine.loading.pool import ModelPool
from engine.media import video
from engine.messages import StudioError, duration
from engine.models.vae import clip_latents, decode_frames
from engine.paths import ROOT
from engine.pipelines.prompt import render_prompt
from train.evaluation.clips import make_frames
from train.evaluation.grain import measure_grain
from train.evaluation.statistics import Interval, as_text, interval, spearman
from train.toybox import world
from train.toybox.contact_sheet import job_of, verbs_for
from train.toybox.world import captions

ASSETS = ROOT / "assets" / "judges"
CANDIDATES = 16  # pictures of one kind, the own one among them
# OpenS2V's eight categories in miniature: name -> how many jobs, and how many subjects.
CATEGORIES = {
    "onecreature": (30, 1),
    "onething": (30, 1),
    "onepatchwork": (30, 1),
    "twocreatures": (30, 2),
    "creaturething": (15, 2),
    "samekind": (15, 2),
    "three": (60, 3),
    "four": (60, 4),
}
REDUCED = 3  # without --full, every third job


@dataclass(frozen=True)
class Case:
    """One job with what is true about it; `instead` is what is made where that differs from what is asked about."""

    id: str
    scene: world.Scene
    job: GenerateJob
    instead: GenerateJob | None = None


@dataclass(frozen=True)
class Verdict:
    """What the judges found in one clip; shares of 1, None where a question does not apply."""

    id: str
    subjects: int
    recognised: tuple[bool, ...]
    likeness: tuple[float, ...]
    presence: tuple[float, ...]
    count: bool
    verb: bool
    direction: bool | None
    place: bool
    copied: float
    acted: float
    """How sure the judge is of the right verb."""
    kind: tuple[bool, ...] = ()
    """Whether each subject that has a kind shows it; patchwork has none."""
    grain: float = math.nan
    """How uneven even background is, in levels of 255; NaN where none is seen."""
    flicker: float = math.nan
    """How much even background changes from frame to frame, in levels of 255."""
    drawn: float | None = None
    """How sure the critic is that the frames were drawn; None where the set has none."""

    @property
    def score(self) -> float:
        """One number for a clip: its weakest likeness, and how sure the judge is that the right thing happens."""
        return (min(self.likeness) + self.acted) / 2


# --- the jobs --------------------------------------------------------------------------------------------------------


def list_cases(preset: str = "toybox", *, every: int = 1) -> list[Case]:
    """The benchmark's jobs in order; `every` takes each n-th of every category."""
    cases = []
    for category, (count, subjects) in CATEGORIES.items():
        cases += [draw_case(preset, category, number, subjects) for number in range(0, count, every)]
    return cases


def draw_case(preset: str, category: str, number: int, subjects: int) -> Case:
    """One job: held-out identities of the category's kinds, a prompt as a person would write it, no attributes."""
    rng = np.random.default_rng((81, list(CATEGORIES).index(category), number))
    cast = tuple(_identity(rng, kind) for kind in _kinds(rng, category, subjects))
    scene = world.make_scene(
        int(rng.integers(2**30)), subjects=cast, verb=str(rng.choice(verbs_for(subjects))), split="heldout"
    )
    pictures = [world.reference_picture(subject, number)[0] for subject in cast]
    return Case(f"{category}_{number + 1}", scene, job_of(preset, scene, pictures, seed=number))


def _kinds(rng: np.random.Generator, category: str, subjects: int) -> list[str]:
    """The kinds of a category's subjects."""

    def creature() -> str:
        return str(rng.choice(world.CREATURES))

    def thing() -> str:
        return str(rng.choice(world.THINGS))

    if category == "onepatchwork":
        return [world.PATCHWORK]
    if category == "onething":
        return [thing()]
    if category == "onecreature":
        return [creature()]
    if category == "samekind":
        return [str(rng.choice(world.KINDS))] * 2
    if category == "twocreatures":
        return [creature(), creature()]
    kinds = []
    for place in range(subjects):  # creatures and things in turn
        if place % 2 == 0:
            kinds.append(creature())
        else:
            kinds.append(thing())
    return kinds


def _identity(rng: np.random.Generator, kind: str) -> world.ToySubject:
    return world.make_subject(world.subject_seed(int(rng.integers(world.IDENTITIES)), "heldout"), kind)


def withhold_references(case: Case, *, attributes: bool) -> Case:
    """The same job from words alone, as the model was taught to read them; with attributes said, or without."""
    rng = np.random.default_rng([84, *case.id.encode()])
    subjects = []
    for subject, identity in zip(case.job.subjects, case.scene.subjects, strict=True):
        noun = subject.noun
        if attributes:
            noun = captions.describe(identity, rng)
        subjects.append(subject.model_copy(update={"noun": noun}))
    words = render_prompt(case.job.prompt, subjects, "slot")
    return replace(case, instead=make_job(preset=case.job.preset, prompt=words, seed=case.job.seed))


def swap_references(case: Case) -> Case:
    """A two-subject job whose pictures have changed places, and with them who is asked about; the words stay."""
    first, second = case.job.subjects
    pair: tuple[Subject, ...] = (
        first.model_copy(update={"pictures": second.pictures}),
        second.model_copy(update={"pictures": first.pictures}),
    )
    scene = replace(case.scene, subjects=case.scene.subjects[::-1])
    return replace(case, job=case.job.model_copy(update={"subjects": pair}), scene=scene)


# --- judging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(case: Case, frames: np.ndarray, judges: Judges) -> Verdict:
    """What a clip shows of its job: uint8 (F, H, W, 3) native frames."""
    scene = case.scene
    pictures = [to_unit(torch.from_numpy(_decode_picture(subject)[None])) for subject in case.job.subjects]
    seen = to_unit(torch.from_numpy(frames))
    finder = Finder(judges, seen)
    matches = [finder.match(own) for own in pictures]
    instance_ids = finder.shares(matches).argmax(1)
    masks = torch.stack([instance_ids == slot for slot in range(1, len(pictures) + 1)], 1).float()  # (F, N, H, W)
    there = masks.mean((2, 3)) >= SEEN
    recognised, likeness, copied, kinds = [], [], [], []
    for slot, subject in enumerate(scene.subjects):
        shown = there[:, slot]
        cuts = None
        if bool(shown.any()):
            cuts = crop_subjects(seen[shown], masks[shown, slot])
            copied.append(_measure_copying(cuts, subject, pictures[slot]))
        if subject.kind != world.PATCHWORK:
            kinds.append(cuts is not None and _shows_kind(judges, cuts, subject.kind))
        candidates = torch.cat([pictures[slot], _draw_others(case.id, slot, subject)])
        looks = _measure_looks(judges, seen, finder, matches, slot, candidates)
        recognised.append(looks[0] > max(looks[1:]))
        likeness.append(0.0)
        if cuts is not None:
            cosine = (judges.embedder(cuts) @ judges.embedder(crop_subjects(pictures[slot])).T).mean()
            likeness[-1] = float(judges.likeness(cosine).clamp(min=0) * shown.float().mean())
    presence = there.float().mean(0).tolist()
    action = scene.actions[0]
    acted, verb, direction = _judge_action(judges, seen, masks, action)
    place = judges.places[int(judges.place(seen).mean(0).argmax())] == scene.background
    count = all(share >= 0.5 for share in presence)
    mean_copied = 0.0
    if copied:
        mean_copied = float(np.mean(copied))
    drawn_probability = None
    if judges.critic is not None:
        drawn_probability = float(judges.drawn_probability(seen).mean())
    return Verdict(
        case.id,
        len(pictures),
        tuple(recognised),
        tuple(likeness),
        tuple(presence),
        count,
        verb,
        direction,
        place,
        mean_copied,
        acted,
        tuple(kinds),
        *measure_grain(frames, _widen(masks.any(1))),
        drawn_probability,
    )


def _widen(masks: Tensor) -> np.ndarray:
    """(F, H, W), three pixels wider on every side: outlines and what a decoder smears of them are no background."""
    return functional.max_pool2d(masks.float().unsqueeze(1), 7, 1, 3)[:, 0].bool().numpy()


def _shows_kind(judges: Judges, cuts: Tensor, kind: str) -> bool:
    """Whether the cut-outs of a clip, taken together, show this kind more than any other and than none of them."""
    shares = judges.embedder.describe(cuts)[1].softmax(1).mean(0)
    return int(shares.argmax()) == judges.kinds.index(kind)


def _measure_looks(
    judges: Judges, frames: Tensor, finder: Finder, matches: Sequence[Tensor], slot: int, candidates: Tensor
) -> list[float]:
    """How much a clip looks like each candidate (P, 3, H, W) for one slot: mean cosine over all frames, 0 where it is
    not seen. Looks alone: the candidates are all of one kind, so what kind it is tells nothing of them apart.

    Every candidate is looked for with its own picture, beside the other slots' subjects, so that none has the advantage
    that what is cut out was chosen by it.

    Args:
        matches: what `finder` gave for each slot's own pictures.
    """
    known, _ = judges.embedder.describe(crop_subjects(candidates))
    found: list[float] = []
    for candidate, vector in zip(candidates, known, strict=True):
        instead = [*matches[:slot], finder.match(candidate[None]), *matches[slot + 1 :]]
        mask = (finder.shares(instead).argmax(1) == slot + 1).float()  # (F, H, W)
        there = mask.mean((1, 2)) >= SEEN
        if not bool(there.any()):
            found.append(0.0)
            continue
        looks, _ = judges.embedder.describe(crop_subjects(frames[there], mask[there]))
        found.append(float((looks @ vector).clamp(min=0).sum()) / len(frames))
    return found


def _decode_picture(subject: Subject) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(subject.pictures[0].png))) as image:
        return np.array(image.convert("RGB"))


def _draw_others(id: str, slot: int, subject: world.ToySubject) -> Tensor:
    """Pictures of other held-out identities of the same kind."""
    rng = np.random.default_rng([83, slot, *id.encode()])
    others = [_identity(rng, subject.kind) for _ in range(CANDIDATES - 1)]
    pictures = [world.reference_picture(other, int(rng.integers(2**20)))[0] for other in others]
    return to_unit(torch.from_numpy(np.stack(pictures)))


def _measure_copying(cuts: Tensor, subject: world.ToySubject, picture: Tensor) -> float:
    """How much nearer the cut-outs come to the very picture that was given than to others of the same subject.

    Mean square distances of cut-outs that fill their square; 0 when the pose is free, above it when it is copied.
    """
    others = [world.reference_picture(subject, 900 + number)[0] for number in range(4)]
    given, rest = crop_subjects(picture), crop_subjects(to_unit(torch.from_numpy(np.stack(others))))
    to_given = (cuts - given).square().mean((1, 2, 3))
    to_rest = (cuts.unsqueeze(1) - rest).square().mean((2, 3, 4)).mean(1)
    return float((to_rest - to_given).mean())


def _judge_action(
    judges: Judges, frames: Tensor, masks: Tensor, action: world.Action
) -> tuple[float, bool, bool | None]:
    """How sure the judge is of the action's verb; whether it sees the verb and, where there is one, the direction."""
    moments = torch.linspace(0, len(frames) - 1, MOMENTS).round().long()
    actor = masks[moments, action.slots[0] - 1]
    other = torch.zeros_like(actor)
    if len(action.slots) > 1:
        other = masks[moments, action.slots[1] - 1]
    verbs, ways = judges.action(frames[moments][None], actor[None], other[None])
    asked, shares = judges.verbs.index(action.verb), judges.verb_shares(verbs)[0]
    direction = None
    if action.direction:
        direction = judges.directions[int(ways[0].argmax())] == action.direction
    return float(shares[asked]), int(shares.argmax()) == asked, direction


def round_trip(frames: np.ndarray, vae: AutoencoderKLWan) -> np.ndarray:
    """uint8 (F, H, W, 3) -> the same through the VAE."""
    with torch.no_grad():
        latents = clip_latents(torch.from_numpy(frames)[None], vae)
        return np.concatenate([np.stack(group) for group in decode_frames(latents, vae)])


def measure_agreement(cases: Sequence[Case], verdicts: Sequence[Verdict], folder: Path, other: Judges) -> float:
    """Spearman's correlation of the verdicts' scores with another set's on the same clips, -1 to 1."""
    scale = presets.load(cases[0].job.preset).display_scale
    clips = [video.read_frames(folder / f"{each.id}.mp4", display_scale=scale) for each in cases]
    theirs = [judge(each, frames, other).score for each, frames in zip(cases, clips, strict=True)]
    return spearman([verdict.score for verdict in verdicts], theirs)


# --- making ----------------------------------------------------------------------------------------------------------


def make_and_judge(
    cases: Sequence[Case], judges: Judges, folder: Path, say: Callable[[str], None], name: str
) -> list[Verdict]:
    """Make every clip into a folder and judge it, with progress and time left."""
    pool, verdicts, began = ModelPool(), [], time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(cases, start=1):
        frames = make_frames(each.instead or each.job, folder / f"{each.id}.mp4", pool)
        verdicts.append(judge(each, frames, judges))
        left = (time.monotonic() - began) / number * (len(cases) - number)
        say(f"{name}: {number} of {len(cases)}, about {duration(left)} left")
    return verdicts


def judge_ground_truth(cases: Sequence[Case], judges: Judges, preset: presets.Preset) -> list[Verdict]:
    """The same questions asked of ground truth after the VAE: the most that the judges can find."""
    vae = ModelPool().part("vae", preset)
    clips = [world.render(each.scene, num_frames=preset.num_frames).frames for each in cases]
    return [judge(each, round_trip(frames, vae), judges) for each, frames in zip(cases, clips, strict=True)]


def _as_list(answer: float | None) -> list[float]:
    """The answer to a question as figures: none where the question does not apply."""
    if answer is None or math.isnan(answer):
        return []
    return [float(answer)]


QUESTIONS: dict[str, Callable[[Verdict], list[float]]] = {
    "own picture first of 16": lambda v: [float(x) for x in v.recognised],
    "kind": lambda v: [float(x) for x in v.kind],
    "likeness": lambda v: list(v.likeness),
    "weakest likeness": lambda v: [min(v.likeness)],
    "seen": lambda v: list(v.presence),
    "everyone there": lambda v: [float(v.count)],
    "verb": lambda v: [float(v.verb)],
    "direction": lambda v: _as_list(v.direction),
    "place": lambda v: [float(v.place)],
    "pose copied": lambda v: [v.copied],
    "grain": lambda v: _as_list(v.grain),
    "flicker": lambda v: _as_list(v.flicker),
    "taken for drawn": lambda v: _as_list(v.drawn),
}


def table(verdicts: dict[str, list[Verdict]]) -> dict[str, dict[str, Interval | None]]:
    """Row -> question -> mean, low, high; a row for all jobs and one for each number of subjects."""
    rows = {}
    for name, found in verdicts.items():
        rows[name] = _summarise(found)
        for count in sorted({v.subjects for v in found}):
            own = [v for v in found if v.subjects == count]
            rows[f"{name}, {count} subject{'s' if count > 1 else ''}"] = _summarise(own)
    return rows


def _summarise(verdicts: Sequence[Verdict]) -> dict[str, Interval | None]:
    """Question -> mean, low, high over these clips."""
    figures = {}
    for question, ask in QUESTIONS.items():
        figures[question] = interval([ask(verdict) for verdict in verdicts])
    return figures


def load_judges(name: str) -> Judges:
    """A set of judges as it ships.

    Raises:
        StudioError: it does not ship yet.
    """
    if not (ASSETS / name / "config.json").is_file():
        raise StudioError(
            f"The {name} judges are not here.",
            "They are taught on drawings, and this clone comes without them.",
            f"Teach them with `python -m train.toybox.judges {name}`, or ask others with --judges.",
        )
    return Judges.load(ASSETS / name)


def main(argv: list[str] | None = None) -> int:
    """Make, judge, print the table; 1 with a sentence when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python launch.py evaluate", description="Measure identity on held-out jobs.")
    parser.add_argument("preset", nargs="?", default="toybox")
    parser.add_argument("--full", action="store_true", help="all 270 jobs, and withheld and swapped references")
    parser.add_argument("--out", type=Path, help="folder for jobs, clips, reports and the table; kept")
    parser.add_argument("--judges", default="test", choices=["test", "reward"], help="which set judges")
    parser.add_argument("--every", type=int, help="each n-th job of every category; 3, with --full 1")
    parser.add_argument("--controls", type=int, default=1, help="withheld and swapped references in each n-th of those")
    options = parser.parse_args(argv)
    every = options.every
    if not every:
        every = 1 if options.full else REDUCED
    judges, jobs = load_judges(options.judges), list_cases(options.preset, every=every)
    controls = list_cases(options.preset, every=every * options.controls)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        verdicts = {"made": make_and_judge(jobs, judges, folder / "clips", _say, "clips")}
        if options.full:
            pairs = [each for each in controls if len(each.scene.subjects) == 2]
            again = {
                "references withheld": [withhold_references(each, attributes=False) for each in controls],
                "attributes said, references withheld": [
                    withhold_references(each, attributes=True) for each in controls
                ],
                "references swapped": [swap_references(each) for each in pairs],
            }
            for name, others in again.items():
                verdicts[name] = make_and_judge(
                    others, judges, folder / name.replace(", ", "-").replace(" ", "-"), _say, name
                )
        verdicts["ground truth"] = judge_ground_truth(jobs, judges, presets.load(options.preset))
        rows = table(verdicts)
        print(as_text(rows))  # noqa: T201
        other = load_judges("reward" if judges.name == "test" else "test")
        agreed = measure_agreement(jobs, verdicts["made"], folder / "clips", other)
        print(f"\nThe {other.name} judges put these clips in the same order: Spearman {agreed:.2f}.")  # noqa: T201
        if options.out:
            _write(options.out, jobs, verdicts, {"judges": judges.name, "agreement": agreed, "rows": rows})
    return 0


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _write(
    folder: Path,
    jobs: Sequence[Case],
    verdicts: dict[str, list[Verdict]],
    figures: dict[str, Any],
) -> None:
    """Jobs in OpenS2V's layout, pictures beside them, and all figures."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    listed = {}
    for each in jobs:
        paths = []
        for subject in each.job.subjects:
            path = pictures / f"{each.id}_{subject.name}.png"
            path.write_bytes(base64.b64decode(subject.pictures[0].png))
            paths.append(path.relative_to(folder).as_posix())
        kinds = [subject.kind for subject in each.scene.subjects]
        listed[each.id] = {"img_paths": paths, "prompt": each.job.prompt, "class_label": kinds}
    (folder / "jobs.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")
    found = {}
    for name, own in verdicts.items():
        found[name] = [vars(verdict) for verdict in own]
    whole = {"world": world.VERSION, **figures, "verdicts": found}
    (folder / "table.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StudioError as error:
        _say(str(error))
        sys.exit(1)
