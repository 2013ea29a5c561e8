"""Supervised fine-tuning by rectified flow. Knows nothing of where samples come from."""
