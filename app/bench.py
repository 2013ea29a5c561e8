"""Measure what docs/measurements.md claims, and write it there.

In:  names of measurements, or none for all of them.
Out: docs/measurements.md, one row per figure with the command, the commit, the day and the machine; a row that is
     measured again replaces the old one.
Knows nothing of how a model is trained. Whatever has to be cold or counted apart runs in a process of its own.

    python launch.py bench [sizes flops memory loop report caches judges identity loading rounding full cards page]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from engine import presets
from engine.job import GenerateJob, make_job, write_job
from engine.messages import Message, Preview, Progress, Saved, StudioError
from engine.paths import ROOT

REPORT = ROOT / "docs" / "measurements.md"
SAMPLES = ROOT / "assets" / "samples"
WAN = {"1.3B": (12, 8960, 30), "14B": (40, 13824, 40)}  # heads, FFN width, layers
FRAMES = (17, 65, 257)


@dataclass(frozen=True)
class Figure:
    """One line of the report. `holds` is None where nothing was promised."""

    key: str
    what: str
    value: str
    limit: str = ""
    holds: bool | None = None


def main(arguments: list[str]) -> int:
    """Run the measurements asked for and write them down; 1 when a promise is broken."""
    parser = argparse.ArgumentParser(prog="python launch.py bench", description="Measure what the documents claim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MEASUREMENTS)}; none means all")
    parser.add_argument("--preset", default="toybox", help="the preset whose speed is measured (toybox)")
    parser.add_argument("--decode", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.decode:
        return _decode_alone(given.decode, given.preset)
    unknown = [name for name in given.names if name not in MEASUREMENTS]
    if unknown:
        raise StudioError(
            f"There is no measurement called {unknown[0]!r}.",
            f"There are {', '.join(MEASUREMENTS)}.",
            "Name some of those.",
        )
    broken = False
    for name in given.names or MEASUREMENTS:
        _tell(f"{name} ...")
        for figure in MEASUREMENTS[name](given.preset):
            verdict = {True: "  holds", False: "  BROKEN", None: ""}[figure.holds]
            _tell(
                f"  {figure.what}: {figure.value}" + (f" (promised: {figure.limit})" if figure.limit else "") + verdict
            )
            write_report(REPORT, [(f"python launch.py bench {name}", figure)])  # at once: some take an hour
            broken = broken or figure.holds is False
    _tell(f"Written to {REPORT.relative_to(ROOT)}.")
    return int(broken)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


# --- counted on the meta device -------------------------------------------------------------------------------------


def _meta_model(size: str) -> Any:
    import torch

    from engine.models.identity_wan import IdentityWanTransformer3DModel

    heads, ffn, layers = WAN[size]
    with torch.device("meta"):
        return IdentityWanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers).eval()


def sizes(_: str) -> Iterator[Figure]:
    """Parameters and cache sizes of the full models."""
    from engine.models.identity_wan import parameter_counts

    wanted = {"1.3B": 1_418_996_800, "14B": 14_288_491_584}
    for size, (heads, *_rest) in WAN.items():
        counts = parameter_counts(_meta_model(size))
        width, base = heads * 128, wanted[size]
        attention = 20 * 13 * (width**2 + width)
        yield Figure(
            f"params-{size}", f"Wan {size}, parameters", f"{counts['base']:,}", f"{base:,}", counts["base"] == base
        )
        yield Figure(
            f"params-identity-{size}",
            f"Identity attention and gates at {size}, parameters",
            f"{counts['attention']:,}",
            f"20 x 13 (d² + d) = {attention:,}",
            counts["attention"] == attention,
        )
        apart = ", ".join(f"{name} {counts[name]:,}" for name in ("norms", "patches", "slots", "vlm"))
        yield Figure(f"params-apart-{size}", f"Listed apart at {size}", apart)
        cache = 20 * 2 * (4 * 1560 + 256) * width * 2
        yield Figure(
            f"cache-{size}", f"Identity cache at {size}, 4 subjects, 256 VLM tokens, bf16", f"{cache / 1e9:.2f} GB"
        )


def flops(_: str) -> Iterator[Figure]:
    """One forward of 1.3B at 480x832x81 with 256 VLM tokens, and what subjects add."""
    model = _meta_model("1.3B")
    base = _tflop(model)
    yield Figure(
        "flop-base", "Wan 1.3B, 480x832x81, one forward", f"{base:.1f} TFLOP", "283.0 ± .1", abs(base - 283) < 0.1
    )
    promised = {(1, True): 4.8, (4, True): 11.4, (1, False): 5.2, (4, False): 15.4}
    for cached in (True, False):
        for count in (1, 2, 3, 4):
            added = 100 * (_tflop(model, subjects=count, cached=cached) / base - 1)
            limit = promised.get((count, cached))
            yield Figure(
                f"flop-{'cached' if cached else 'uncached'}-{count}",
                f"{_subjects(count)} {'with' if cached else 'without'} the identity cache",
                f"+ {added:.2f} %",
                f"+ {limit} ± .2 %" if limit else "",
                None if limit is None else abs(added - limit) <= 0.2,
            )
    for count in (1, 2, 3, 4):
        added = 100 * (_tflop(model, extra_frames=count) / base - 1)
        yield Figure(
            f"flop-concat-{count}", f"{_subjects(count)} concatenated in time, Phantom's way", f"+ {added:.2f} %"
        )


def _subjects(count: int) -> str:
    return f"{count} subject{'s' if count > 1 else ''}"


def _tflop(model: Any, *, subjects: int = 0, cached: bool = False, extra_frames: int = 0) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.models.subject_tower import References

    with torch.device("meta"), torch.no_grad():
        inputs = torch.empty(1, 16, 21 + extra_frames, 60, 104), torch.empty(1), torch.empty(1, 512, 4096)
        references = References(torch.empty(1, subjects, 1, 16, 60, 104), vlm_states=torch.empty(1, 256, 3584))
        given: dict[str, Any] = {"references": references} if subjects else {}
        if cached and subjects:
            given = {"identity": model.encode_identity(references)}
        with FlopCounterMode(display=False) as counter:
            model(*inputs, **given)
    return counter.get_total_flops() / 1e12


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


def loop(preset: str) -> Iterator[Figure]:
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


def report(preset: str) -> Iterator[Figure]:
    """What judging a clip adds to a warm one, at the preset's own steps."""
    from engine.identity.reporter import Reporter
    from engine.loading.pool import ModelPool
    from engine.run import run

    pool, judge, spent = ModelPool(), Reporter._judge, 0.0

    def timed(reporter: Reporter) -> None:
        nonlocal spent
        began = time.perf_counter()
        judge(reporter)
        spent += time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        run(sample_job(preset, sampling={"num_inference_steps": 2}), lambda _: None, outputs=Path(folder), pool=pool)
        Reporter._judge = timed
        try:
            saved = run(sample_job(preset, seed=8), lambda _: None, outputs=Path(folder), pool=pool)
        finally:
            Reporter._judge = judge
    share = spent / saved.seconds
    yield Figure("report-share", "Judging a clip, share of its time", f"{share:.1%}", "≤ 10 %", share <= 0.1)


# --- judges and checkpoint, in processes of their own ----------------------------------------------------------------


def _json_of(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module` prints as JSON; its own progress goes to the terminal."""
    command = [sys.executable, "-X", "utf8", "-m", module, *arguments]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(ran.stdout[ran.stdout.index("{") :])


def judges(preset: str) -> Iterator[Figure]:
    """What both sets of judges are worth on held-out drawings, and which planted faults they notice."""
    promised = {"own of 16": 0.92, "locator IoU": 0.8, "verb": 0.95, "place": 0.98}
    for name in ("test", "reward"):
        found = _json_of("train.toybox.judges", "measure", name)
        for question, least in promised.items():
            key = f"judges-{name}-{question.replace(' ', '-').lower()}"
            value = found[question]
            yield Figure(key, f"{name} judges, drawings: {question}", f"{value:.3f}", f"≥ {least:g}", value >= least)
        yield Figure(f"judges-{name}-critic", f"{name} critic: drawn or generated", f"{found['critic']:.3f}")
        noticed = _json_of("train.toybox.judge_sanity", name)
        told = ", ".join(f"{fault} {share:.2f}" for fault, share in noticed.items())
        least = min(noticed.values())
        yield Figure(f"judges-{name}-faults", f"{name} judges, planted faults noticed", told, "≥ .95", least >= 0.95)


def caches(preset: str) -> Iterator[Figure]:
    """Steps left out, over twelve held-out jobs of two subjects at the preset's own steps and at fifty."""
    for steps in (presets.load(preset).sampling.num_inference_steps or 30, 50):
        found = _json_of("train.toybox.calibrate", preset, "--jobs", "12", "--steps", str(steps))
        for word, fewer in (("off", 1.0), ("careful", 1.5), ("fast", 2.25)):
            row = found[word]
            saved = row["steps"] / row["computed"]
            key, what = f"cache-{word}-{steps}", f"Leave out: {word}, {steps} steps"
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


ASKED = ("own picture first of 16", "everyone there", "verb", "direction", "place", "pose copied", "taken for drawn")
CHANCE = 1 / 16


def identity(preset: str) -> Iterator[Figure]:
    """The benchmark, its controls on every sixth job, by the test judges: mean and 95 % interval over jobs."""
    promised = {
        ("made, 2 subjects", "own picture first of 16"): 0.8,
        ("made, 3 subjects", "own picture first of 16"): 0.7,
        ("made", "direction"): 0.8,
        ("made", "place"): 0.9,
        ("made", "everyone there"): 0.85,
        ("references swapped", "own picture first of 16"): 0.8,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-X", "utf8", "-m", "train.toybox.benchmark", preset, "--full", "--controls", "6"]
        subprocess.run([*command, "--out", folder], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        found = json.loads((Path(folder) / "table.json").read_text(encoding="utf-8"))
    rows, agreed = found["rows"], found["agreement"]
    yield Figure("judges-agree", "Both sets order made clips, Spearman", f"{agreed:.2f}", "≥ .8", agreed >= 0.8)
    for name, asked in rows.items():
        control = not name.startswith(("made", "ground truth"))
        for question in ASKED[:1] if control else ASKED:
            if asked[question] is None:
                continue
            mean, low, high = asked[question]
            least = promised.get((name, question))
            limit, holds = (f"≥ {least:g}", mean >= least) if least is not None else ("", None)
            if name == "references withheld":
                limit, holds = "chance, 0.06", low <= CHANCE <= high
            key = f"{name} {question}".replace(",", "").replace(" ", "-")
            yield Figure(key, f"{name}: {question}", f"{mean:.2f} ({low:.2f} to {high:.2f})", limit, holds)


# --- memory while decoding ------------------------------------------------------------------------------------------


def memory(preset: str) -> Iterator[Figure]:
    """Memory of a process that decodes and writes a clip of 17, 65 and 257 frames.

    What the system reports wavers by tens of megabytes with the allocator's mood, so the promise is held against the
    tensors that are alive between two latent frames, counted exactly; the process's peak stands beside it.
    """
    told: dict[int, dict[str, float]] = {}
    for count in FRAMES:
        command = [sys.executable, "-m", "app.bench", "--decode", str(count), "--preset", preset]
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


def _decode_alone(count: int, name: str) -> int:
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


def page(preset: str) -> Iterator[Figure]:
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

    job, whole = presets.resolve(sample_job(preset))
    document = write_job(pictures.portable(pictures.pack(job, whole)))
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


def _of(module: str, name: str) -> Callable[[str], Iterator[Figure]]:
    """A measurement that lies in a module of its own, imported when it is asked for."""
    return lambda preset: getattr(importlib.import_module(f"app.{module}"), name)(preset)


MEASUREMENTS: dict[str, Callable[[str], Iterator[Figure]]] = {
    "sizes": sizes,
    "flops": flops,
    "memory": memory,
    "loop": loop,
    "report": report,
    "caches": caches,
    "judges": judges,
    "identity": identity,
    "loading": _of("bench_weights", "loading"),
    "rounding": _of("bench_weights", "rounding"),
    "full": _of("bench_full", "full"),
    "cards": _of("bench_cards", "cards"),
    "page": page,
}


# --- the report -----------------------------------------------------------------------------------------------------

HEAD = """\
# Measurements

Written by `python launch.py bench`; do not edit the table by hand. Each row says how to measure it again.

| key | what | measured | promised | holds | command | commit | day | machine |
|---|---|---|---|---|---|---|---|---|
"""
ROW = re.compile(r"^\| `([^`]+)` \|.*\|$")


def write_report(path: Path, figures: list[tuple[str, Figure]]) -> None:
    """Put figures into the report; rows of other keys stay as they are, in their order."""
    text = path.read_text(encoding="utf-8") if path.is_file() else HEAD
    rows = {match[1]: line for line in text.splitlines() if (match := ROW.match(line))}
    made, day, machine = commit(), date.today().isoformat(), describe_machine()
    for command, figure in figures:
        holds = {True: "yes", False: "**no**", None: ""}[figure.holds]
        cells = [f"`{figure.key}`", figure.what, figure.value, figure.limit, holds, f"`{command}`", made, day, machine]
        rows[figure.key] = f"| {' | '.join(cells)} |"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "\n".join(rows.values()) + "\n", encoding="utf-8")


@cache
def commit() -> str:
    """The commit that was measured, with + when files differed from it before the first figure was written."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
        name = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no git"  # a copy without history is measured too
    return name.stdout.strip()


def describe_machine() -> str:
    """Processor, cores, memory, card and torch; nothing that names this computer."""
    import torch

    listed = Path("/proc/cpuinfo")
    processor = platform.processor() or platform.machine()
    if listed.is_file():
        found = re.search(r"model name\s*: (.+)", listed.read_text(encoding="utf-8", errors="replace"))
        processor = found[1] if found else processor
    parts = [
        f"{processor.strip()}, {os.cpu_count()} cores",
        f"{psutil.virtual_memory().total / 2**30:.0f} GB",
        platform.system(),
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        parts.insert(1, torch.cuda.get_device_name())
    return "; ".join(parts).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
