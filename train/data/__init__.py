"""Samples as tensors: batches, and the cache they are drawn from. Knows nothing of worlds, models or losses."""
