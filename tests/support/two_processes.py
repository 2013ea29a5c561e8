"""Run by torchrun in test_context_parallel.py: the same forward alone and shared, and how far apart they are."""

from __future__ import annotations

import inspect
import json
import sys

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from engine import tiny
from engine.diffusion import conditioning
from engine.loading import context_parallel
from engine.messages import StudioError
from engine.models.subject_tower import References

CPU = torch.device("cpu")


def apart(kind: str, height: int) -> float:
    torch.manual_seed(0)
    model = tiny.stir(tiny.transformer(), 1.0)
    inputs = (torch.randn(1, tiny.LATENT_CHANNELS, 3, height, 6), torch.tensor([500.0]), torch.randn(1, 8, 32))
    picture = torch.randn(1, tiny.LATENT_CHANNELS, 1, 4, 8)
    references = References(torch.randn(1, 2, 1, tiny.LATENT_CHANNELS, 4, 4), vlm_states=torch.randn(1, 5, 48))
    if kind != "identity":
        known = inspect.signature(WanTransformer3DModel.__init__).parameters
        model = WanTransformer3DModel(**{key: value for key, value in model.config.items() if key in known}).eval()

    def seen() -> torch.Tensor:
        if kind == "sources":
            encoded = conditioning.Encoded(inputs[2], inputs[2], sources=(picture,))
            return conditioning.prepare("sources", model, encoded).predict(inputs[0], 0.5, "full")
        more = {} if kind == "plain" else {"identity": model.encode_identity(references)}
        return model(*inputs, return_dict=False, **more)[0]

    with torch.no_grad():
        alone = seen()
        context_parallel.split_tokens(model, CPU)
        shared: list[int] = []
        model.blocks[1].register_forward_pre_hook(lambda block, given: shared.append(given[0].shape[1]))
        missed = (alone - seen()).abs().max().item()
    assert shared == [13 if kind == "sources" else 9]  # half of the clip's 18 tokens and the picture's 8
    return missed


def main() -> None:
    torch.set_num_threads(1)
    with context_parallel.join_processes() as rank:
        told = {}
        for kind in ("identity", "plain", "sources"):
            told[kind] = apart(kind, height=4)  # 18 tokens
        for reason in ("heads", "tokens"):
            try:
                if reason == "tokens":
                    apart("identity", height=6)  # 27, which two do not divide
                else:
                    context_parallel.split_tokens(tiny.transformer(num_attention_heads=3, attention_head_dim=16), CPU)
            except StudioError as error:
                told[reason] = error.why
        if rank == 1:
            sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
