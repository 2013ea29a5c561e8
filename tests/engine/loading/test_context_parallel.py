"""One clip over two processes, on the CPU: what each gives is what one alone gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.media import video
from engine.paths import ROOT


def torchrun(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    return subprocess.run(start, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo listens on the loopback by its Linux name")
def test_two_processes_that_share_a_clip_give_what_one_gives():
    ran = torchrun("tests/support/two_processes.py")
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    assert "3 heads" in told["heads"] and "27 tokens" in told["tokens"]
    assert max(told["identity"], told["plain"], told["sources"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo listens on the loopback by its Linux name")
def test_the_generate_verb_in_two_processes_saves_the_clip_of_one(tiny_root: Path, tmp_path: Path):
    script = (
        "import sys, torch; from pathlib import Path; from engine import paths, presets; from app import cli; "
        f"torch.set_num_threads(1); paths.ROOT = Path({str(tiny_root)!r}); sys.exit(cli.main(sys.argv[1:]))"
    )
    (tmp_path / "clip.py").write_text(script, encoding="utf-8")
    asked = ["generate", "--prompt", "a beach", "--frames", "5", "--steps", "4"]
    shared = torchrun("clip.py", *asked, "--out", "shared.mp4", cwd=tmp_path)
    assert shared.returncode == 0, shared.stderr[-2000:]
    assert shared.stdout.count("shared.mp4") == 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "clip.py", *asked, "--out", "alone.mp4"], cwd=tmp_path, env=environment, check=True)
    clips = [video.read_frames(tmp_path / f"{name}.mp4", display_scale=4) for name in ("shared", "alone")]
    assert np.array_equal(*clips)
    assert not [path for path in tmp_path.rglob("*.mp4") if path.stem not in ("shared", "alone")]
