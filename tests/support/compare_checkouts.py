"""Do two checkouts of this repository make the same frames? The same jobs are run in both and compared bit for bit.

The identity reports are compared, too: their figures are taken from the frames before a codec has rounded them.

In:  the folder of another checkout that has a `.venv` of its own or a link to one.
Out: a line per job on stdout; exit code 1 when any frame differs.
Knows nothing of either checkout's modules: both are driven by their command line, and read the same documents
(version 3, which every checkout since then opens) and the same files of tiny random models.

    python -m tests.support.compare_checkouts ../before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.identity.report import REPORT
from engine.media import video
from engine.paths import ROOT
from tests.engine.loading.test_lora_clips import write_lora
from tests.engine.pipelines.test_public_models import write_kinds

SAMPLES = ROOT / "assets" / "samples"
SCALE = 4  # both write each pixel of these small clips four times across and down
KINDS = {
    "phantom": {"transformer": "plain", "conditioning": "frames", "guidance": "dual"},
    "vace": {"transformer": "side", "conditioning": "side", "guidance": "joint"},
    "bernini": {"transformer": "plain", "conditioning": "sources", "guidance": "projected"},
}
SCALES = {"guidance_scale": 2.5, "subject_scale": 2.0, "text_scale": 3.0}


def sample_job(count: int, prompt: str, **values: Any) -> dict[str, Any]:
    """A toybox job of version 3 with the first shipped subjects."""
    names = ("fox", "kite", "cat", "car")[:count]
    subjects = [{"name": name, "pictures": [{"path": str(SAMPLES / f"{name}.png")}]} for name in names]
    return {"version": 3, "preset": "toybox", "prompt": prompt, "subjects": subjects, "seed": 11, **values}


def jobs() -> dict[str, dict[str, Any]]:
    """The sanity clip, and jobs that reach every part of the engine."""
    chase = "@fox chases @kite on a beach"
    small = {"sampling": {"num_inference_steps": 12}}
    style = [{"path": "style.safetensors", "weight": 0.5}]
    return {
        "one subject": sample_job(1, "@fox walks to the left in a forest", **small),
        "two subjects": sample_job(2, chase, **small),
        "three subjects": sample_job(3, "@fox meets @kite, @cat jumps on a meadow", **small),
        "four subjects": sample_job(4, "@fox jumps, @kite spins, @cat wobbles, @car grows", **small),
        "LoRA": sample_job(2, chase, loras=style, **small) | {"preset": "tiny"},
        "int8": sample_job(2, chase, precision="int8", **small),
        "nf4": sample_job(2, chase, precision="nf4", **small),
        "step cache": sample_job(2, chase, sampling={"num_inference_steps": 20, "cache": "fast"}),
        "UniPC": sample_job(2, chase, sampling={"num_inference_steps": 12, "scheduler": "unipc", "shift": 5.0}),
        **{name: sample_job(2, chase, **small) | {"preset": name} for name in KINDS},
    }


def write_presets(models: Path) -> None:
    """Presets of one's own for tiny random models, in the words that both checkouts read."""
    write_kinds(models / "kinds")
    (models / "loras").mkdir(parents=True)
    write_lora(models / "loras" / "style.safetensors", seed=5)
    toybox = json.loads((ROOT / "presets" / "toybox.json").read_text(encoding="utf-8"))
    toybox["caching"] = toybox.pop("step_cache")
    parts = {part: f"kinds/{part}" for part in toybox["components"]} | {"judges": "kinds/judges"}
    (models / "presets").mkdir()
    for name, kind in {"tiny": {}, **KINDS}.items():
        own = toybox | {"name": name, "title": name, "components": {**parts, "transformer": "kinds/transformer"}}
        sampling = {**toybox["sampling"], **SCALES, "guidance": kind.get("guidance", "joint")}
        sampling["cache"] = sampling.pop("step_cache")
        own["sampling"] = sampling
        if kind:
            own["components"]["transformer"] = f"kinds/{kind['transformer']}"
            own |= {"conditioning": kind["conditioning"], "mention": "noun", "shared_noise": 0.0, "size_multiple": 8}
        (models / "presets" / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")


def frames_in(checkout: Path, document: Path, clip: Path, models: Path) -> np.ndarray:
    """The native frames that a checkout makes of a document, uint8 (F, H, W, 3).

    Raises:
        RuntimeError: it made none; holds its last words.
    """
    command = [sys.executable, "-m", "app.cli", "generate", str(document), "--out", str(clip)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "IDCRAFTER_MODELS": str(models)}
    ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        raise RuntimeError(f"{checkout.name} made no clip of {document.name}: {ran.stderr[-500:]}")
    return video.read_frames(clip, display_scale=SCALE)


def main(arguments: list[str] | None = None) -> int:
    """Run every job in both checkouts; 1 when any frame differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.compare_checkouts", description=__doc__)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    other = parser.parse_args(arguments).other.resolve()
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        write_presets(models)
        documents = {"sanity clip": (other / "assets" / "sanity.json").read_text(encoding="utf-8")}
        documents |= {name: json.dumps(job) for name, job in jobs().items()}
        for name, text in documents.items():
            document = Path(folder) / f"{name.replace(' ', '-')}.json"
            document.write_text(text, encoding="utf-8")
            before = frames_in(other, document, document.with_suffix(".before.mp4"), models)
            after = frames_in(ROOT, document, document.with_suffix(".after.mp4"), models)
            reports = [document.with_suffix(f".{side}{REPORT}").read_bytes() for side in ("before", "after")]
            same = before.shape == after.shape and np.array_equal(before, after) and reports[0] == reports[1]
            different += not same
            moving = bool((before != before[0]).any())
            verdict = "the same frames" if same else "DIFFERENT"
            sys.stdout.write(f"{name}: {verdict}, {len(before)} of {before.shape[1:3]}, moving: {moving}\n")
            sys.stdout.flush()
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
