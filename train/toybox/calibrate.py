"""The step cache calibrated on held-out toybox jobs: `train.evaluation.step_cache` behind a command line.

In:  a preset, a number of jobs and of steps.
Out: JSON on stdout; with --write, the preset's own figures go into its file.
Knows nothing of how the figures are taken.

    python -m train.toybox.calibrate toybox --jobs 12 --steps 30
"""

from __future__ import annotations

import argparse
import json
import sys

from engine.job import GenerateJob
from train.evaluation.step_cache import measure, write
from train.toybox.contact_sheet import held_out_job


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and perhaps write."""
    parser = argparse.ArgumentParser(
        prog="python -m train.toybox.calibrate", description="Measure what leaving out costs."
    )
    parser.add_argument("preset", nargs="?", default="toybox")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--steps", type=int, help="denoising steps; left out: the preset's")
    parser.add_argument("--write", action="store_true", help="write share and costs into the preset, at its own steps")
    given = parser.parse_args(argv)
    if given.write and given.steps:
        parser.error("--write takes the preset's own steps; leave out --steps.")
    jobs = [held_out_job(number, preset=given.preset) for number in range(given.jobs)]
    if given.steps:
        jobs = [with_steps(job, given.steps) for job in jobs]
    found = measure(given.preset, jobs)
    print(json.dumps(found, indent=1))  # noqa: T201
    if given.write:
        sys.stderr.write(f"Written to {write(given.preset, found, len(jobs)).name}.\n")
    return 0


def with_steps(job: GenerateJob, steps: int) -> GenerateJob:
    """The job with another number of denoising steps."""
    return job.model_copy(update={"sampling": job.sampling.model_copy(update={"num_inference_steps": steps})})


if __name__ == "__main__":
    sys.exit(main())
