"""Figures that are counted instead of timed: parameters and operations, on the meta device.

In:  the sizes of Wan 1.3B and 14B.
Out: figures. Needs no weights and no card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from app.bench.report import Figure

WAN = {"1.3B": (12, 8960, 30), "14B": (40, 13824, 40)}  # heads, FFN width, layers


# --- counted on the meta device -------------------------------------------------------------------------------------


def _meta_model(size: str) -> Any:
    import torch

    from engine.models.identity_wan import IdentityWanTransformer3DModel

    heads, ffn, layers = WAN[size]
    with torch.device("meta"):
        return IdentityWanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers).eval()


def count_sizes(_: str) -> Iterator[Figure]:
    """Parameters and cache sizes of the full models."""
    from engine.models.identity_wan import parameter_counts

    wanted = {"1.3B": 1_418_996_800, "14B": 14_288_491_584}
    for size, (heads, *_rest) in WAN.items():
        counts = parameter_counts(_meta_model(size))
        width, base = heads * 128, wanted[size]
        attention = 20 * 13 * (width**2 + width)
        yield Figure(
            f"params-{size}", f"Wan {size}, parameters", f"{counts['base']:,}", f"{base:,}", counts["base"] == base
        )
        yield Figure(
            f"params-identity-{size}",
            f"Identity attention and gates at {size}, parameters",
            f"{counts['attention']:,}",
            f"20 x 13 (d² + d) = {attention:,}",
            counts["attention"] == attention,
        )
        apart = ", ".join(f"{name} {counts[name]:,}" for name in ("norms", "patches", "slots", "vlm"))
        yield Figure(f"params-apart-{size}", f"Listed apart at {size}", apart)
        cache = 20 * 2 * (4 * 1560 + 256) * width * 2
        yield Figure(
            f"cache-{size}", f"Identity cache at {size}, 4 subjects, 256 VLM tokens, bf16", f"{cache / 1e9:.2f} GB"
        )


def count_flops(_: str) -> Iterator[Figure]:
    """One forward of 1.3B at 480x832x81 with 256 VLM tokens, and what subjects add."""
    model = _meta_model("1.3B")
    base = _tflop(model)
    yield Figure(
        "flop-base", "Wan 1.3B, 480x832x81, one forward", f"{base:.1f} TFLOP", "283.0 ± .1", abs(base - 283) < 0.1
    )
    promised = {(1, True): 4.8, (4, True): 11.4, (1, False): 5.2, (4, False): 15.4}
    ways = (("cached", True, "with the identity cache"), ("uncached", False, "without the identity cache"))
    for kind, cached, way in ways:
        for count in (1, 2, 3, 4):
            added = 100 * (_tflop(model, subjects=count, cached=cached) / base - 1)
            figure = Figure(f"flop-{kind}-{count}", f"{_subjects(count)} {way}", f"+ {added:.2f} %")
            if (count, cached) in promised:
                limit = promised[count, cached]
                figure = replace(figure, limit=f"+ {limit} ± .2 %", holds=abs(added - limit) <= 0.2)
            yield figure
    for count in (1, 2, 3, 4):
        added = 100 * (_tflop(model, extra_frames=count) / base - 1)
        yield Figure(
            f"flop-concat-{count}", f"{_subjects(count)} concatenated in time, Phantom's way", f"+ {added:.2f} %"
        )


def _subjects(count: int) -> str:
    if count == 1:
        return "1 subject"
    return f"{count} subjects"


def _tflop(model: Any, *, subjects: int = 0, cached: bool = False, extra_frames: int = 0) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from engine.models.subject_tower import References

    with torch.device("meta"), torch.no_grad():
        inputs = torch.empty(1, 16, 21 + extra_frames, 60, 104), torch.empty(1), torch.empty(1, 512, 4096)
        references = References(torch.empty(1, subjects, 1, 16, 60, 104), vlm_states=torch.empty(1, 256, 3584))
        given: dict[str, Any] = {}
        if subjects and cached:
            given = {"identity": model.encode_identity(references)}
        elif subjects:
            given = {"references": references}
        with FlopCounterMode(display=False) as counter:
            model(*inputs, **given)
    return counter.get_total_flops() / 1e12
