"""What torch finds on this machine, in a process of its own: one line of JSON on stdout.

In:  nothing.
Out: {"torch", "device", "name", "memory_gb", "forward_ms"}; a crash here takes nothing with it.
Knows nothing of the studio; the doctor reads it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from engine import tiny


def device_and_name() -> tuple[str, str, float]:
    """The device a clip would run on, what it is called, and its memory in GB (0 where it shares the machine's)."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return "cuda", about.name, about.total_memory / 1e9
    if torch.backends.mps.is_available():
        return "mps", "Apple silicon", 0.0
    return "cpu", "the processor alone", 0.0


@torch.inference_mode()
def forward_ms(device: str) -> float:
    """Milliseconds of one forward of a tiny Wan transformer, the second of two; fails when its output is not finite."""
    model: Any = tiny.transformer()
    model.to(device)
    latents = torch.zeros(1, tiny.LATENT_CHANNELS, 2, 8, 8, device=device)
    prompt = torch.zeros(1, 8, tiny.TEXT_DIM, device=device)
    for _ in range(2):
        began = time.perf_counter()
        [velocity] = model(latents, torch.tensor([500.0], device=device), prompt, return_dict=False)
        if not velocity.isfinite().all().item():  # .item() waits for the device
            raise ArithmeticError("the forward's output is not finite")
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    device, name, memory_gb = device_and_name()
    answer = {"torch": torch.__version__, "device": device, "name": name, "memory_gb": round(memory_gb, 1)}
    sys.stdout.write(json.dumps({**answer, "forward_ms": round(forward_ms(device), 1)}) + "\n")
