"""A run's folder: checkpoint, metrics, curves. Knows nothing of what is trained."""
