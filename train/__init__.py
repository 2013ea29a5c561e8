"""Makes checkpoints: the toybox world, data, training loops, rewards. Imports engine, never app."""
