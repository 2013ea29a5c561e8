"""Pictures and video files: read, prepared, streamed, written. Knows nothing of models. Imports no torch."""
