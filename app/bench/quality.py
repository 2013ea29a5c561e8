"""Figures of quality: judges on drawings, what the step cache loses, the identity benchmark. Each runs in a child.

In:  a preset.
Out: figures.
Knows nothing of how they are taken: train's own commands answer in JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.bench.report import Figure
from engine import presets
from engine.paths import ROOT

# --- judges and checkpoint, in processes of their own ----------------------------------------------------------------


def json_of(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module` prints as JSON; its own progress goes to the terminal."""
    command = [sys.executable, "-X", "utf8", "-m", module, *arguments]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(ran.stdout[ran.stdout.index("{") :])


def measure_judges(preset: str) -> Iterator[Figure]:
    """What both sets of judges are worth on held-out drawings, and which planted faults they notice."""
    promised = {"own of 16": 0.92, "locator IoU": 0.8, "verb": 0.95, "place": 0.98, "kind": 0.9}
    for name in ("test", "reward"):
        found = json_of("train.toybox.judges", "measure", name)
        for question, least in promised.items():
            key = f"judges-{name}-{question.replace(' ', '-').lower()}"
            if question not in found:
                yield Figure(key, f"{name} judges, drawings: {question}", "no such judge yet", f"≥ {least:g}", False)
                continue
            value = found[question]
            yield Figure(key, f"{name} judges, drawings: {question}", f"{value:.3f}", f"≥ {least:g}", value >= least)
        yield Figure(f"judges-{name}-critic", f"{name} critic: drawn or generated", f"{found['critic']:.3f}")
        planted = json_of("train.toybox.judge_sanity", name)
        noticed, likeness = planted["noticed"], planted["likeness"]
        told = ", ".join(f"{fault} {share:.2f}" for fault, share in noticed.items())
        least = min(noticed.values())
        yield Figure(f"judges-{name}-faults", f"{name} judges, planted faults noticed", told, "≥ .95", least >= 0.95)
        for question, share in likeness.items():
            key = f"judges-{name}-{question.replace(' ', '-')}"
            yield Figure(key, f"{name} judges, likeness: {question}", f"{share:.3f}", "≥ .95", share >= 0.95)


def measure_step_cache(preset: str) -> Iterator[Figure]:
    """Steps left out, over twelve held-out jobs of two subjects at the preset's own steps and at fifty."""
    for steps in (presets.load(preset).sampling.num_inference_steps or 30, 50):
        found = json_of("train.toybox.calibrate", preset, "--jobs", "12", "--steps", str(steps))
        for word, fewer in (("off", 1.0), ("careful", 1.5), ("fast", 2.25)):
            row = found[word]
            saved = row["steps"] / row["computed"]
            key, what = f"cache-{word}-{steps}", f"Step cache: {word}, {steps} steps"
            yield Figure(
                key, f"{what}, computed", f"{row['computed']:.1f} ({saved:.2f}x fewer)", f"≥ {fewer:g}x", saved >= fewer
            )
            kept = row["psnr"] >= 25 or row["change"] >= -0.01
            yield Figure(
                f"{key}-loss",
                f"{what}: frames against off (lowest), weakest likeness (change)",
                f"{row['psnr']:.1f} dB ({row['lowest']:.1f}), {row['weakest']:.3f} ({row['change']:+.3f})",
                {"off": "equal", "careful": "≥ 25 dB or -.01"}.get(word, ""),
                {"off": row["lowest"] == 99, "careful": kept}.get(word),
            )


ASKED = (
    "own picture first of 16",
    "kind",
    "everyone there",
    "verb",
    "direction",
    "place",
    "pose copied",
    "grain",
    "flicker",
    "taken for drawn",
)

CHANCE = 1 / 16


def measure_identity(preset: str) -> Iterator[Figure]:
    """The benchmark, its controls on every sixth job, by the test judges: mean and 95 % interval over jobs."""
    promised = {
        ("made, 2 subjects", "own picture first of 16"): 0.9,
        ("made, 3 subjects", "own picture first of 16"): 0.8,
        ("made, 4 subjects", "own picture first of 16"): 0.65,
        ("made", "verb"): 0.82,
        ("made", "direction"): 0.97,
        ("made", "place"): 0.99,
        ("made", "everyone there"): 0.97,
        ("made", "taken for drawn"): 0.4,
        ("references swapped", "own picture first of 16"): 0.8,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-X", "utf8", "-m", "train.toybox.benchmark", preset, "--full", "--controls", "6"]
        subprocess.run([*command, "--out", folder], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        found = json.loads((Path(folder) / "table.json").read_text(encoding="utf-8"))
    rows, agreed = found["rows"], found["agreement"]
    yield Figure("judges-agree", "Both sets order made clips, Spearman", f"{agreed:.2f}", "≥ .8", agreed >= 0.8)
    for name, asked in rows.items():
        questions = ASKED[:1]  # of the controls
        if name.startswith(("made", "ground truth")):
            questions = ASKED
        for question in questions:
            if asked[question] is None:
                continue
            mean, low, high = asked[question]
            least = promised.get((name, question))
            limit, holds = "", None
            if least is not None:
                limit, holds = f"≥ {least:g}", mean >= least
            if name == "references withheld":
                limit, holds = "chance, 0.06", low <= CHANCE <= high
            key = f"{name} {question}".replace(",", "").replace(" ", "-")
            yield Figure(key, f"{name}: {question}", f"{mean:.2f} ({low:.2f} to {high:.2f})", limit, holds)
