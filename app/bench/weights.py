"""What loading and rounding weights costs: measurements that need files and processes of their own.

In:  room for a 5.7 GB file in a temporary folder; the preset whose rounding is measured.
Out: figures for the report. A child of this module loads that file while its parent watches its memory.
Knows nothing of how figures are written down.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.bench import random_files
from app.bench.full_clips import run_watched
from app.bench.report import Figure
from engine import presets
from engine.loading.pool import ModelPool
from engine.messages import StudioError
from engine.resolve import resolve

SPARE = 0.5e9  # what Python, torch and the libraries take themselves, and copies of a few rows


# --- loading ---------------------------------------------------------------------------------------------------------


def measure_loading(_: str) -> Iterator[Figure]:
    """One file of Wan 1.3B in fp32, random: memory of a process that loads it, beside the library's own way."""
    from engine.loading import quantize

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file, shapes = Path(folder) / "wan-1.3b.safetensors", random_files.shapes_of(_wan)
        largest = 4 * max(math.prod(shape) for shape in shapes.values())
        random_files.write_random(file, random_files.in_wans_names(shapes))
        for precision in ("int8", "nf4"):
            peak, told = _watched("ours", file, precision)
            limit = told["size"] + largest + SPARE
            beyond = (peak - told["size"] - largest) / 1e6
            yield Figure(
                f"loading-{precision}",
                f"Loading one 5.7 GB file as {precision} ({told['size'] / 1e9:.2f} GB): peak of private memory, "
                f"and beyond the model and its largest tensor",
                f"{peak / 1e9:.2f} GB, {beyond:.0f} MB beyond",
                f"≤ {limit / 1e9:.2f} GB",
                peak <= limit,
            )
            yield Figure(f"loading-time-{precision}", f"The same, time ({precision})", f"{told['seconds']:.0f} s")
            predicted = quantize.predict_bytes(_wan, precision, _usual())
            off = abs(predicted / told["size"] - 1)
            yield Figure(
                f"predicted-{precision}",
                f"Size of that model as planned ({precision})",
                f"{off:.2%} off",
                "≤ 1 %",
                off <= 0.01,
            )
        peak, told = _watched("library", file, "int8")
        what = f"diffusers' from_single_file, then quanto ({told['size'] / 1e9:.2f} GB): peak of private memory"
        yield Figure("loading-library", what, f"{peak / 1e9:.2f} GB, {told['seconds']:.0f} s")


def _wan() -> Any:
    shape = presets.load("wan-1.3b").shape
    assert shape is not None
    return random_files.wan(shape)


def _usual() -> Any:
    from engine.loading.parts import load_part

    return load_part.usual_dtype("transformer", load_part.device())


def _watched(how: str, file: Path, precision: str) -> tuple[int, dict[str, Any]]:
    """Peak of a child's private memory while it loads, and what it said at the end."""
    command = [sys.executable, "-X", "utf8", "-m", "app.bench.weights", how, str(file), precision]
    code, said = run_watched(command)
    if code or not said:
        raise StudioError(
            f"The process that loads {file.name} as {precision} failed.",
            f"Its code is {code}.",
            "See above.",
        )
    return max(peak for _, peak in said), said[-1][0]


def _child(how: str, file: Path, precision: Any) -> dict[str, Any]:
    import torch

    from engine.loading import quantize
    from engine.loading.parts import load_part

    began = time.monotonic()
    if how == "ours":
        model = load_part.load("transformer", file, load_part.device(), precision)
    else:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
        from optimum.quanto import freeze, qint8
        from optimum.quanto import quantize as by_quanto

        with tempfile.TemporaryDirectory() as folder, quantize.no_weights():
            _wan().save_config(folder)
            config = Path(folder)
            model = WanTransformer3DModel.from_single_file(
                str(file), config=str(config), torch_dtype=_usual(), local_files_only=True
            )
        names = [name for name, module in model.named_modules() if quantize.form_of(name, module, "int8")]
        by_quanto(model, weights=qint8, include=names)
        freeze(model)
    assert not any(tensor.is_meta for tensor in model.parameters())
    del torch
    return {"size": quantize.num_bytes(model), "seconds": time.monotonic() - began}


# --- rounding --------------------------------------------------------------------------------------------------------

LIMITS = {"int8": 0.01, "fp8": None, "nf4": 0.10}
JOBS = (("onething", 3, 1), ("creaturething", 2, 2), ("samekind", 5, 2), ("four", 1, 4))


def measure_rounding(preset: str) -> Iterator[Figure]:
    """One forward with rounded weights against the full ones, over jobs of the benchmark and six noise levels."""
    errors, sizes = one_forward_errors(preset)
    for precision, found in errors.items():
        limit = LIMITS[precision]
        figure = Figure(
            f"rounding-{precision}",
            f"{preset}, {precision}: relative error of one forward, over 4 jobs and 6 noise levels "
            f"(transformer {sizes[precision] / 1e6:.1f} MB)",
            f"{found:.4f}",
        )
        if limit is not None:
            figure = replace(figure, limit=f"≤ {limit:g}", holds=found <= limit)
        yield figure
    yield from measure_clips(preset)


def measure_clips(preset: str, count: int = 12) -> Iterator[Figure]:
    """Held-out jobs of two subjects made with rounded weights, beside the same with full ones."""
    import numpy as np

    from engine import presets, run
    from engine.media import video
    from train.evaluation.step_cache import psnr
    from train.toybox.contact_sheet import held_out_job

    jobs = [held_out_job(number, preset=preset) for number in range(count)]
    scale, made = presets.load(preset).display_scale, {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in (None, *LEAST):
            pool = ModelPool()
            saved = [
                run.run(
                    job.model_copy(update={"precision": precision}),
                    lambda message: None,
                    outputs=Path(folder),
                    clip=Path(folder) / f"{precision}-{number}.mp4",
                    pool=pool,
                )
                for number, job in enumerate(jobs)
            ]
            frames = [video.read_frames(each.clip, display_scale=scale) for each in saved]
            made[precision] = frames, float(np.mean([each.weakest or 0.0 for each in saved]))
    whole, weakest = made[None]
    for precision, least in LEAST.items():
        frames, likeness = made[precision]
        decibels = [psnr(first, second) for first, second in zip(whole, frames, strict=True)]
        yield Figure(
            f"clips-{precision}",
            f"{preset}, {precision}: {count} jobs, change of the weakest likeness (frames beside full weights)",
            f"{likeness - weakest:+.3f} ({np.mean(decibels):.1f} dB, lowest {min(decibels):.1f})",
            f"≥ {least:g}",
            likeness - weakest >= least,
        )


LEAST = {"int8": -0.01, "nf4": -0.03}


def one_forward_errors(
    name: str, jobs: tuple[tuple[str, int, int], ...] = JOBS, precisions: tuple[Any, ...] = ("int8", "fp8", "nf4")
) -> tuple[dict[str, float], dict[str, int]]:
    """||rounded - full|| / ||full|| of the velocity with prompt and subjects, and what each model holds, in bytes.

    The latents are those that the full model passes through on ten steps of the preset's own schedule.
    """
    from engine import presets
    from engine.diffusion import conditioning, solvers
    from engine.loading import quantize
    from engine.loading.parts import load_part
    from engine.loading.pool import ModelPool
    from engine.media.pictures import prepare_subjects
    from engine.pipelines import encode, generate
    from train.toybox import benchmark

    pool, preset = ModelPool(), presets.load(name)
    full, vae = pool.part("transformer", preset), pool.part("vae", preset)
    seen: list[tuple[Any, list[tuple[Any, float, Any]]]] = []
    for category, number, subjects in jobs:
        resolved = prepare_subjects(resolve(benchmark.draw_case(name, category, number, subjects).job, preset))
        encoded = encode.encode_job(resolved, pool)
        way = conditioning.prepare(preset.conditioning, full, encoded)
        passed: list[tuple[Any, float, Any]] = []
        solvers.denoise(
            generate.starting_latents(resolved, full, vae, way.lead),
            _noting(way.predict, passed),
            solvers.SOLVERS["euler"](10, resolved.sampling.shift),
            lambda step: None,
        )
        seen.append((encoded, [passed[step] for step in (0, 2, 4, 6, 8, 9)]))
    errors, sizes = {}, {"full": quantize.num_bytes(full)}
    for precision in precisions:
        rounded = load_part("transformer", preset.place("transformer"), pool.device, precision)
        apart = whole = 0.0
        for encoded, passed in seen:
            way = conditioning.prepare(preset.conditioning, rounded, encoded)
            for latents, sigma, velocity in passed:
                apart += float((way.predict(latents, sigma, "full") - velocity).pow(2).sum())
                whole += float(velocity.pow(2).sum())
        errors[precision], sizes[precision] = (apart / whole) ** 0.5, quantize.num_bytes(rounded)
    return errors, sizes


def _noting(predict: Callable[..., Any], passed: list[tuple[Any, float, Any]]) -> Callable[[Any, float], Any]:
    def noted(latents: Any, sigma: float) -> Any:
        velocity = predict(latents, sigma, "full")
        passed.append((latents.clone(), sigma, velocity.clone()))
        return velocity

    return noted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m app.bench.weights", description="A child of the measurements.")
    parser.add_argument("how", choices=("ours", "library"))
    parser.add_argument("file", type=Path)
    parser.add_argument("precision")
    given = parser.parse_args()
    sys.stdout.write(json.dumps(_child(given.how, given.file, given.precision)) + "\n")
