"""Figures of time and memory: the sampling loop, the report, decoding, the page and its first clip.

In:  a preset, and the sample subjects.
Out: figures; every clip goes into a temporary folder.
Knows nothing of the report they are written to.
"""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from app.bench.report import Figure
from engine import presets
from engine.job import GenerateJob, make_job, write_job
from engine.messages import Message, Preview, Progress, Saved, StudioError
from engine.paths import ROOT
from engine.resolve import resolve

SAMPLES = ROOT / "assets" / "samples"

FRAMES = (17, 65, 257)


# --- speed of a warm worker -----------------------------------------------------------------------------------------


def sample_job(preset: str, **changes: Any) -> GenerateJob:
    """Two of the shipped subjects, one chasing the other."""
    pictures = sorted(SAMPLES.glob("*.png"))[:2]
    subjects = [{"name": path.stem, "pictures": [{"path": str(path)}]} for path in pictures]
    prompt = " chases ".join(f"@{path.stem}" for path in pictures) + " on a beach"
    return make_job(**{"preset": preset, "prompt": prompt, "subjects": subjects, "seed": 7, **changes})


class Stopwatch:
    """Hears what a run says, and times the forwards of its transformer from within."""

    def __init__(self, transformer: Any) -> None:
        self.forward = 0.0
        self.preview = 0.0
        self.marks: dict[str, list[float]] = {}
        self._first_forward = 0.0
        self._last = time.perf_counter()
        self._plain = transformer.forward
        self._transformer = transformer

    def __enter__(self) -> Stopwatch:
        def timed(*inputs: Any, **more: Any) -> Any:
            began = time.perf_counter()
            self._first_forward = self._first_forward or began
            result = self._plain(*inputs, **more)
            self.forward += time.perf_counter() - began
            return result

        self._transformer.forward = timed
        return self

    def __exit__(self, *_: object) -> None:
        self._transformer.forward = self._plain

    def __call__(self, message: Message) -> None:
        now = time.perf_counter()
        if isinstance(message, Preview):
            self.preview += now - self._last
        elif isinstance(message, Progress):
            self.marks.setdefault(message.stage, []).append(now)
        self._last = now

    @property
    def loop(self) -> float:
        """From the first forward to the end of the last step, without the previews."""
        return self.marks["sample"][-1] - self._first_forward - self.preview

    @property
    def decode(self) -> float:
        """From the last step to the last decoded frame."""
        return self.marks["decode"][-1] - self.marks["sample"][-1]


def measure_loop(preset: str) -> Iterator[Figure]:
    """Fifty steps in a warm worker: what is not the model's own work."""
    from engine.loading.pool import ModelPool
    from engine.run import run

    pool = ModelPool()
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder)
        run(sample_job(preset, sampling={"num_inference_steps": 2}), lambda _: None, outputs=outputs, pool=pool)
        job = sample_job(preset, seed=8, sampling={"num_inference_steps": 50})
        # Other words than in the first run: prompt and pictures are encoded, as they are for a new clip.
        job = job.model_copy(update={"prompt": job.prompt.replace("beach", "meadow")})
        with Stopwatch(pool.part("transformer", presets.load(preset))) as watch:
            saved = run(job, watch, outputs=outputs, pool=pool)
        same = run(job, lambda _: None, outputs=outputs, pool=pool)
        identical = _frames_of(saved, preset) == _frames_of(same, preset)
    ratio = watch.loop / watch.forward
    rest = saved.seconds - watch.loop - watch.preview - watch.decode
    steps = f"50 steps, {job.num_frames or presets.load(preset).num_frames} frames, 2 subjects"
    yield Figure("loop-ratio", f"Sampling loop over its forwards ({steps})", f"{ratio:.3f}", "≤ 1.05", ratio <= 1.05)
    yield Figure(
        "loop-rest", "Everything but sampling, previews and decoding, warm", f"{rest:.2f} s", "≤ 1.5 s", rest <= 1.5
    )
    yield Figure("loop-step", "One step", f"{1000 * watch.loop / 50:.0f} ms")
    yield Figure("loop-preview", "Previews, all of them", f"{watch.preview:.2f} s")
    yield Figure("loop-decode", "Decoding", f"{watch.decode:.2f} s")
    yield Figure("loop-total", "The clip, warm", f"{saved.seconds:.1f} s")
    yield Figure("loop-same", "The same job again gives identical frames", str(identical).lower(), "true", identical)


def _frames_of(saved: Saved, preset: str) -> bytes:
    from engine.media import video

    return video.read_frames(saved.clip, display_scale=presets.load(preset).display_scale).tobytes()


# --- the identity report ---------------------------------------------------------------------------------------------


def measure_report(preset: str) -> Iterator[Figure]:
    """What judging a clip adds to a warm one, at the preset's own steps."""
    from engine.loading.pool import ModelPool
    from engine.run import run

    pool = ModelPool()
    with tempfile.TemporaryDirectory() as folder:
        run(sample_job(preset, sampling={"num_inference_steps": 2}), lambda _: None, outputs=Path(folder), pool=pool)
        saved = run(sample_job(preset, seed=8), lambda _: None, outputs=Path(folder), pool=pool)
    share = saved.judging_s / saved.seconds
    yield Figure("report-share", "Judging a clip, share of its time", f"{share:.1%}", "≤ 10 %", share <= 0.1)


# --- memory while decoding ------------------------------------------------------------------------------------------


def measure_memory(preset: str) -> Iterator[Figure]:
    """Memory of a process that decodes and writes a clip of 17, 65 and 257 frames.

    What the system reports wavers by tens of megabytes with the allocator's mood, so the promise is held against the
    tensors that are alive between two latent frames, counted exactly; the process's peak stands beside it.
    """
    told: dict[int, dict[str, float]] = {}
    for count in FRAMES:
        command = [sys.executable, "-m", "app.bench.runner", "--decode", str(count), "--preset", preset]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
        told[count] = json.loads(ran.stdout.splitlines()[-1])
        alive, peak = (f"{told[count][name]:.1f} MB" for name in ("alive_mb", "peak_mb"))
        yield Figure(f"decode-memory-{count}", f"Decoding {count} frames: process, peak above the loaded VAE", peak)
        yield Figure(
            f"decode-alive-{count}", f"Decoding {count} frames: tensors alive besides weights and latents", alive
        )
    growth = told[FRAMES[-1]]["alive_mb"] - told[FRAMES[0]]["alive_mb"]
    yield Figure(
        "decode-growth",
        f"Growth of the tensors alive from {FRAMES[0]} to {FRAMES[-1]} frames",
        f"{growth:.1f} MB",
        "none",
        abs(growth) < 0.05,
    )


def decode_alone(count: int, name: str) -> int:
    """Decode and write one clip in this process; what it took above the loaded VAE on stdout."""
    import torch

    from engine.loading.pool import ModelPool
    from engine.media import video
    from engine.models.vae import decode_frames

    preset = presets.load(name)
    vae = ModelPool().part("vae", preset)
    width, height = preset.sizes[0].width, preset.sizes[0].height
    config = vae.config
    shape = (height // config.scale_factor_spatial, width // config.scale_factor_spatial)
    latents = torch.randn(1, config.z_dim, (count - 1) // config.scale_factor_temporal + 1, *shape, device=vae.device)
    this = psutil.Process()
    start, peak, tensors, alive = this.memory_info().rss, 0, _tensor_bytes(), 0
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        with video.ClipWriter(clip, fps=preset.fps, size=(width, height), display_scale=preset.display_scale) as writer:
            for group in decode_frames(latents, vae):
                for frame in group:
                    writer.write(frame)
                peak = max(peak, this.memory_info().rss)
                alive = max(alive, _tensor_bytes())
    result = {"peak_mb": (peak - start) / 2**20, "alive_mb": (alive - tensors) / 2**20}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    import torch

    found = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


# --- from the command to the first clip -----------------------------------------------------------------------------


def measure_page(preset: str) -> Iterator[Figure]:
    """How long until the page answers, and until the first clip of a fresh studio is there."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _studio(Path(folder)) as (address, began):
        _wait_for(address, until=began + 120)
        opened = time.monotonic() - began
        yield Figure("page-answers", "The page answers after the command", f"{opened:.1f} s", "≤ 10 s", opened <= 10)
        took = _first_clip(address, preset)
        yield Figure("first-clip", "First clip after the click, worker cold", f"{took:.1f} s", "≤ 60 s", took <= 60)


@contextmanager
def _studio(folder: Path) -> Iterator[tuple[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    studio = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "--port", str(port), "--outputs", str(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/", began
    finally:
        for process in (*psutil.Process(studio.pid).children(recursive=True), studio):
            process.terminate()
        studio.wait(timeout=30)


def _wait_for(address: str, until: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            if time.monotonic() > until:
                raise StudioError(
                    "The page never answered.", f"{address} stayed silent.", "Start it by hand."
                ) from None
        time.sleep(0.1)


def _first_clip(address: str, preset: str) -> float:
    """Seconds from asking for a clip to having it; pictures ride along, as a page's uploads do."""
    from gradio_client import Client

    from engine.media import pictures

    prepared = pictures.prepare_subjects(resolve(sample_job(preset)))
    document = write_job(pictures.drop_embedded_paths(prepared.document))
    client = Client(address, verbose=False)
    began = time.monotonic()
    row = client.predict(document, api_name="/generate")
    while True:
        state = client.predict(row, api_name="/status")
        if state["state"] == "done":
            return time.monotonic() - began
        if state["state"] not in ("waiting", "running") or time.monotonic() - began > 600:
            raise StudioError("The first clip failed.", str(state["error"]), "Make it by hand and look.")
        time.sleep(0.25)
