"""The engine makes clips. It imports nothing of `app` or `train`."""
