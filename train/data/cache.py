"""A folder of encoded samples, read into memory and drawn from in batches.

In:  shards `<folder>/<kind>-<number>.safetensors`, each of one shape (`train.toybox.scenes` writes the toybox's).
Out: random batches of one shape.
Knows nothing of what the samples show, of losses or of optimizers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from train.data.batch import Batch, NullConditioning, Shard, join_shards, take_rows

RENAMED = {"owner": "instance_ids"}
"""Names of tensors in shards written before the studio used the field's words, and their names now."""


def read_shard(path: Path) -> Shard:
    """The tensors of one shard, in the precision they were written in."""
    return {RENAMED.get(name, name): tensor for name, tensor in load_file(path).items()}


class Cache:
    """All shards of a folder in memory, sorted into buckets of one shape, so that no batch holds padding subjects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: set[str] = set()
        self.buckets: dict[str, dict[tuple[int, int], list[Shard]]] = {"still": {}, "clip": {}}
        self._white = NullConditioning.load(folder).white

    def refresh(self) -> int:
        """Read shards written since the last call (a cache can grow while training runs); returns how many are held."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.read:
                continue
            shard = read_shard(path)
            shape = (shard["references"].shape[1], shard["references"].shape[2])
            self.buckets[path.name.split("-")[0]].setdefault(shape, []).append(shard)
            self.read.add(path.name)
        return len(self.read)

    def draw(self, kind: str, size: int, rng: np.random.Generator, shape: np.random.Generator | None = None) -> Batch:
        """A random batch of one shape, in fp32: bucket by its share of samples, rows evenly from up to four shards.

        `shape` decides the bucket, `rng` all else; left out, `rng` decides both.
        """
        buckets = list(self.buckets[kind].values())
        weights = np.array([sum(map(_count_rows, shards)) for shards in buckets], float)
        shards = buckets[int((shape or rng).choice(len(buckets), p=weights / weights.sum()))]
        chosen = [shards[int(i)] for i in rng.integers(0, len(shards), min(4, size))]
        shares = [size // len(chosen) + (i < size % len(chosen)) for i in range(len(chosen))]
        parts = [
            take_rows(shard, rng.integers(0, _count_rows(shard), share))
            for shard, share in zip(chosen, shares, strict=True)
        ]
        return join_shards(parts, self._white, rng)


def _count_rows(shard: Shard) -> int:
    return len(shard["latents"])
