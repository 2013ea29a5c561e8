"""UMT5's encoder under the names that its files use, and its sizes as their shapes tell them.

In:  names and shapes of a file's tensors.
Out: the names that transformers gives them; the arguments of its UMT5Config.
Knows nothing of torch, of files, or of what a tensor holds.

Layouts: transformers' own (ComfyUI's copies), Wan's original (`models_t5_umt5-xxl-enc-bf16.pth` and Kijai's copies of
it; Wan-Video/Wan2.1 wan/modules/t5.py) and llama.cpp's (GGUF; LLM_ARCH_T5ENCODER).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

TABLE = "layer.0.SelfAttention.relative_attention_bias"
BUCKETS = 32  # rows of a table of distances, in every UMT5
NAMED = "encoder.block.{}.{}.weight"

# Of one block: our module -> theirs.
_WAN = {
    "layer.0.layer_norm": "norm1",
    **{f"layer.0.SelfAttention.{name}": f"attn.{name}" for name in "qkvo"},
    TABLE: "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_LLAMA = {
    "layer.0.layer_norm": "attn_norm",
    **{f"layer.0.SelfAttention.{name}": f"attn_{name}" for name in "qkvo"},
    TABLE: "attn_rel_b",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}
# Names of the embedding, of a block's weights and of the last norm.
_LAYOUTS = (
    ("token_embedding.weight", r"blocks\.(\d+)\.(.+)\.weight", "norm.weight", _WAN),
    ("token_embd.weight", r"enc\.blk\.(\d+)\.(.+)\.weight", "enc.output_norm.weight", _LLAMA),
)


def names(keys: Iterable[str]) -> dict[str, str]:
    """Name in the file -> name in UMT5EncoderModel; what no layout knows keeps the name it has."""
    keys = list(keys)
    for embedding, block, norm, theirs in _LAYOUTS:
        if embedding not in keys:
            continue
        ours = {name: own for own, name in theirs.items()}
        found = {embedding: "shared.weight", norm: "encoder.final_layer_norm.weight"}
        for key in keys:
            match = re.fullmatch(block, key)
            if match and match[2] in ours:
                found[key] = NAMED.format(match[1], ours[match[2]])
        return {key: found.get(key, key) for key in keys}
    return {key: key for key in keys}


def config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Arguments of UMT5Config.

    Args:
        shapes: of the weights, under transformers' names.

    Raises:
        ValueError: they are no UMT5's; with the reason as a sentence.
    """

    def shape(key: str) -> tuple[int, int]:
        found = shapes.get(key, ())
        if len(found) != 2 or 0 in found:
            if not found:
                raise ValueError(f"{key} is missing.")
            raise ValueError(f"{key} has the shape {found}, not one of two sides.")
        return found[0], found[1]

    numbers = [int(found[1]) for key in shapes if (found := re.match(r"encoder\.block\.(\d+)\.", key))]
    if "shared.weight" not in shapes or not numbers:
        raise ValueError("Its weights are named as in no UMT5.")
    layers = max(numbers) + 1
    tables = [number for number in range(layers) if NAMED.format(number, TABLE) in shapes]
    if tables == [0] and layers > 1:
        raise ValueError("It is a T5, whose blocks share one table of distances, not a UMT5, which has one in each.")
    buckets, heads = shape(NAMED.format(0, TABLE))
    if buckets != BUCKETS:
        raise ValueError(f"Its tables of distances have {buckets} rows, not {BUCKETS} as every UMT5's.")
    vocabulary, width = shape("shared.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(NAMED.format(0, "layer.0.SelfAttention.q"))[0] // heads,
        "d_ff": shape(NAMED.format(0, "layer.1.DenseReluDense.wi_0"))[0],
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
