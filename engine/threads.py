"""How long OpenMP's threads spin while they wait for one another on a processor.

In:  a process's environment, before torch is imported.
Out: the same environment with a short spin, where nobody has set one.
Knows nothing of torch. Standard library only.

torch's operations on a processor are shared by a team of threads that meet after each of them. A thread that waits
spins first, and sleeps when that takes too long. By default it spins so long that, beside other busy programs, it
takes the core from the very thread it waits for. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) cures that, but waking up
again costs more than most of a small model's operations. A short spin gives both; docs/measurements.md has the figures
(`python launch.py bench threads`).
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

SPIN_COUNT = "1000"  # turns of libgomp's loop, which torch's Linux builds bring; its default is 300,000
BLOCK_TIME_MS = "1"  # of LLVM's and Intel's runtime, which torch brings elsewhere; its default is 200
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever sets one of these has decided


def limit_spinning(environment: MutableMapping[str, str], system: str = sys.platform) -> None:
    """Set the short spin, unless this environment already says how threads wait."""
    if any(name in environment for name in WAITING):
        return
    if system == "linux":
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
    else:
        environment["KMP_BLOCKTIME"] = BLOCK_TIME_MS
