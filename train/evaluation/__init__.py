"""Figures of clips that were made for measuring. Knows nothing of training, and nothing of the toybox."""
