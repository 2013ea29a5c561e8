"""Run folders and cached shards that an earlier studio wrote are read under today's names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from train.data.cache import read_shard
from train.sft.config import SftConfig, read_run


def test_a_run_folder_and_a_shard_of_before_go_on_under_todays_names(tmp_path: Path) -> None:
    config = SftConfig(kind="identity", cache="", architecture={"num_layers": 2}, steps=8, timesteps_per_sample=3)
    now = json.loads(config.model_dump_json())
    before = {
        "noises": now.pop("timesteps_per_sample"), "clip_noises": now.pop("timesteps_per_clip"),
        "fall": now.pop("decay_fraction"), "binding": now.pop("subject_alignment"),
        "reading": now.pop("caption_alignment"), **now,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(before), encoding="utf-8")
    assert read_run(tmp_path) == config

    now = {
        "latents": torch.zeros(2, 3, 1, 4, 4), "instance_ids": torch.ones(2, 1, 4, 4, dtype=torch.uint8),
        "text": torch.zeros(2, 5, 6), "numbers": torch.zeros(2, 5), "references": torch.zeros(2, 1, 1, 3, 4, 4),
        "vlm": torch.zeros(2, 7, 8), "vlm_mask": torch.ones(2, 7, dtype=torch.bool),
    }  # fmt: skip
    save_file(now, tmp_path / "now.safetensors")
    now["owner"] = now.pop("instance_ids")
    save_file(now, tmp_path / "before.safetensors")
    old, new = read_shard(tmp_path / "before.safetensors"), read_shard(tmp_path / "now.safetensors")
    assert torch.equal(old.instance_ids, new.instance_ids) and len(old) == len(new) == 2
