"""Run folders and cached shards that an earlier studio wrote are read under today's names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from train.data.batch import join_shards
from train.data.cache import read_shard
from train.sft.config import nest, read_run


def test_a_run_folder_and_a_shard_of_before_go_on_under_todays_names(tmp_path: Path) -> None:
    before = {
        "kind": "identity", "cache": "latents", "start": "", "architecture": {"num_layers": 2}, "steps": 8, "noises": 3,
        "clip_noises": 1, "fall": 0.5, "binding": 0.2, "reading": 0.3, "drop_text": 0.4, "ema": 0.9, "seed": 3,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(before), encoding="utf-8")
    config = read_run(tmp_path)
    assert (config.model.kind, config.data.cache, config.steps, config.seed) == ("identity", "latents", 8, 3)
    assert (config.noise.timesteps_per_sample, config.noise.timesteps_per_clip) == (3, 1)
    assert (config.losses.subject_alignment, config.losses.caption_alignment) == (0.2, 0.3)
    assert (config.optimizer.decay_fraction, config.dropout.text, config.checkpoint.ema) == (0.5, 0.4, 0.9)
    (tmp_path / "run.json").write_text(config.model_dump_json(), encoding="utf-8")
    assert read_run(tmp_path) == config
    with pytest.raises(KeyError, match="unheard"):
        nest({"unheard": 1})

    now = {
        "latents": torch.zeros(2, 3, 1, 4, 4), "instance_ids": torch.ones(2, 1, 4, 4, dtype=torch.uint8),
        "text": torch.zeros(2, 5, 6), "numbers": torch.zeros(2, 5), "references": torch.zeros(2, 1, 1, 3, 4, 4),
        "vlm": torch.zeros(2, 7, 8), "vlm_mask": torch.ones(2, 7, dtype=torch.bool),
    }  # fmt: skip
    save_file(now, tmp_path / "now.safetensors")
    now["owner"] = now.pop("instance_ids")
    save_file(now, tmp_path / "before.safetensors")
    old, new = read_shard(tmp_path / "before.safetensors"), read_shard(tmp_path / "now.safetensors")
    assert old.keys() == new.keys() and torch.equal(old["instance_ids"], new["instance_ids"])
    batch = join_shards([old, new], torch.zeros(3), np.random.default_rng(0))
    assert len(batch) == 4 and batch.reference_masks.shape == (4, 1, 1, 4, 4) and batch.in_pair.shape[:3] == (4, 1, 1)
