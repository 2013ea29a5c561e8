"""The model of a run: made, grown from another, given to an optimizer, exported.

In:  a run's config, and the model folder or run it starts from.
Out: a transformer, its AdamW with the learning-rate schedule, or a model folder in half precision.
Knows nothing of data or losses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from engine.models.identity_wan import IdentityWanTransformer3DModel
from train.runs import checkpoint
from train.sft.config import SftConfig, read_run

BETAS = (0.9, 0.99)  # of AdamW

POSITION_STD = 0.1  # standard deviation that the weights of a video's positions start with

ZERO_START = 4.0  # times the rate, for what starts at zero


def new_model(config: SftConfig) -> WanTransformer3DModel:
    """Random weights, or the averaged weights of the run it starts from with untrained identity blocks."""
    torch.manual_seed(config.seed)
    kind = _model_class(identity=config.model.kind == "identity")
    if not config.model.start:
        model = kind(**config.model.architecture)
        if isinstance(model, IdentityWanTransformer3DModel):
            _randomise_positions(model)
        return model
    source = load_start(Path(config.model.start))
    if isinstance(source, kind):
        return _add_missing_parts(source, config.model.architecture)
    extra = {key: value for key, value in config.model.architecture.items() if key not in source.config}
    return _randomise_positions(IdentityWanTransformer3DModel.from_plain_wan(source, **extra))


def _model_class(*, identity: bool) -> type[WanTransformer3DModel]:
    """Wan with identity blocks, or plain Wan."""
    if identity:
        return IdentityWanTransformer3DModel
    return WanTransformer3DModel


def _randomise_positions(model: Any) -> Any:
    """Draw the weights of the video's positions at random, so that they matter from the first update.

    A model that has to equal Wan starts them at zero; from there they had hardly moved after 600 updates.
    """
    if model.video_position_embedding is not None:
        nn.init.normal_(model.video_position_embedding.proj.weight, std=POSITION_STD)
    return model


def _add_missing_parts(source: WanTransformer3DModel, architecture: dict[str, Any]) -> WanTransformer3DModel:
    """The model with the parts that its architecture did not have so far, newly started; itself when it has all."""
    held = {key: value for key, value in source.config.items() if not key.startswith("_")}
    if {**held, **architecture} == held:
        return source
    grown = type(source)(**{**held, **architecture})
    _randomise_positions(grown)
    checkpoint.load_weights(grown, source.state_dict(), may_lack=_is_new_part)
    return grown


def _is_new_part(key: str) -> bool:
    """Whether a weight belongs to a part that a model may be given after it was trained without it."""
    return "video_position_embedding." in key or ".slot_key." in key


def load_start(start: Path) -> WanTransformer3DModel:
    """The model of a folder, or a run's model with its averaged weights."""
    if (start / "config.json").exists():
        name = json.loads((start / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind = _model_class(identity=name == IdentityWanTransformer3DModel.__name__)
        return kind.from_pretrained(start, torch_dtype=torch.float32)
    model = new_model(read_run(start))
    load_average(model, start)
    return model


def load_average(model: nn.Module, run: Path) -> int:
    """Put a run's averaged weights into a model; returns their step."""
    saved = checkpoint.load(run)
    if saved is None:
        raise FileNotFoundError(f"nothing has been trained in {run}")
    step, groups, _ = saved
    checkpoint.load_weights(model, groups["ema"])
    return step


def new_optimizer(model: nn.Module, config: SftConfig) -> torch.optim.AdamW:
    """AdamW; what starts at zero moves faster, as B of a low-rank pair does (LoRA+, arXiv 2402.12354)."""
    rates: dict[float, list[nn.Parameter]] = {1.0: [], ZERO_START: []}
    for name, parameter in model.named_parameters():
        rate = 1.0
        if name.endswith((".identity.to_out.weight", "video_position_embedding.proj.weight")):
            rate = ZERO_START
        rates[rate].append(parameter)
    groups = [{"params": own, "peak": rate * config.optimizer.learning_rate} for rate, own in rates.items() if own]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=config.optimizer.weight_decay, fused=True)


def schedule(step: int, config: SftConfig) -> float:
    """Share of the peak rates: warm-up over 100 updates, flat, linear to zero over the last of them."""
    falling = (config.steps - step) / (config.optimizer.decay_fraction * config.steps)
    return min(1.0, (step + 1) / 100, max(0.01, falling))


def export(run: Path, folder: Path) -> None:
    """Write the averaged weights as a model folder in half precision, shards of at most 15 MB."""
    config = read_run(run)
    model = new_model(config)
    load_average(model, run)
    model.half().save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")
