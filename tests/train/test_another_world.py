"""The training loop on footage that nobody drew: a folder of clips, masks and captions, and tiny random encoders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from engine.media import video
from train.runs import checkpoint

CLIPS = 10


def write_footage(folder: Path) -> Path:
    """Ten clips of noise with a moving square, its mask beside each, and a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(CLIPS):
        masks = np.zeros((5, 32, 32), np.uint8)
        for frame in range(5):
            masks[frame, 8:20, 4 + 2 * frame : 16 + 2 * frame] = 1
        colour = rng.integers(0, 255, 3)
        frames = rng.integers(100, 160, (5, 32, 32, 3)).astype(np.uint8)
        frames[masks > 0] = colour
        path = folder / f"{number}.mp4"
        with video.ClipWriter(path, fps=8, size=(32, 32), document="{}") as writer:
            for frame in frames:
                writer.write(frame)
        np.save(folder / f"{number}.npy", masks)
        path.with_suffix(".txt").write_text(f"subject 1, a square, moves to the right, {number}", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_somebodys_own_footage_trains_through_the_same_loop_without_the_toybox(tmp_path: Path) -> None:
    write_footage(tmp_path / "footage")
    program = dedent(
        """
        import json, sys
        from pathlib import Path
        import numpy as np, torch
        from engine import tiny
        from engine.loading.pool import ModelPool
        from engine.media import video
        from train.data.encode import Encoders, Sample, encode_samples, write_null, write_shard
        from train.sft import trainer
        from train.sft.attention_losses import AttentionAlignment
        from train.sft.config import SftConfig

        home = Path(sys.argv[1])
        torch.manual_seed(0)
        preset, pool = tiny.preset_of(tiny.write_tiny(home / "tiny")), ModelPool(torch.device("cpu"))
        parts = ("vae", "tokenizer", "text_encoder", "vlm_tokenizer", "vlm")
        encoders = Encoders(*(pool.part(part, preset) for part in parts))
        samples = []
        for path in sorted((home / "footage").glob("*.mp4")):
            frames, masks = video.read_frames(path), np.load(path.with_suffix(".npy"))
            picture = np.full_like(frames[0], 255)
            picture[masks[0] > 0] = frames[0][masks[0] > 0]
            samples.append(Sample(frames, masks, path.with_suffix(".txt").read_text(encoding="utf-8"), [[picture]]))
        cache = home / "cache"
        write_null(cache, encoders, pixels=32)
        write_shard(cache / "clip-00000.safetensors", encode_samples(samples, encoders))
        stills = [Sample(s.frames[:1], s.instance_ids[:1], s.caption, s.pictures) for s in samples]
        write_shard(cache / "still-00001.safetensors", encode_samples(stills, encoders))
        held = {name: value for name, value in tiny.transformer().config.items() if not name.startswith("_")}
        config = SftConfig.model_validate({
            "model": {"kind": "identity", "architecture": held}, "data": {"cache": str(cache), "clip_share": 0.5},
            "steps": 20, "optimizer": {"learning_rate": 0.002}, "seed": 1,
        })
        run = home / "run"
        run.mkdir()
        (run / "run.json").write_text(config.model_dump_json(), encoding="utf-8")
        whole = trainer.train(run, seconds=300, auxiliary=[AttentionAlignment(2, subject=0.1, caption=0.1)])
        print(json.dumps({"whole": whole, "toybox": [name for name in sys.modules if name.startswith("train.toybox")]}))
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"whole": True, "toybox": []}
    saved = checkpoint.load(tmp_path / "run")
    assert saved is not None and saved[0] == 20
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seen = {name for line in lines for name in json.loads(line)}
    assert {"still error", "clip error", "clip looks", "clip names"} <= seen
