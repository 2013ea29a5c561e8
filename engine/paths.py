"""Where things are: the checkout itself, and the creator's own folder of models.

In:  this file's own place, and IDCRAFTER_MODELS where somebody has set it.
Out: paths. Knows nothing of what lies there. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: launch.py, assets/, presets/ and the packages lie in it."""


def models_dir() -> Path:
    """Where a creator keeps models that are not part of the repository; `--models-dir` sets it for every process."""
    return Path(os.environ.get("IDCRAFTER_MODELS") or ROOT / "models")
