"""How large a model and a job are: numbers in the weights, bytes beside them, operations of a forward.

In:  a preset's shape, safetensors files' headers, a resolved job.
Out: counts and bytes. Knows nothing of torch, of machines or of limits.

What a forward needs beside the weights was read off the models themselves on the meta device (test_predicted_memory.py
does it again): its largest moment is either the inside of a block's feed-forward part, or one of Wan's norms in fp32.

Units: bytes unless a name says otherwise; a token is one patch of the video.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engine import lora_files
from engine.job import Subject
from engine.media.pictures import FILL
from engine.messages import StudioError
from engine.models import umt5
from engine.presets import Preset, Shape
from engine.resolve import ResolvedJob

MB = 10**6
Precision = Literal["fp32", "bf16", "fp8", "int8", "nf4"]

# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """What one block holds, or all that is in no block. A projection bears "any" precision, or eight "bits"."""

    linears: tuple[tuple[str, int, int, int], ...] = ()  # projections: how few bits they bear, in, out, how many
    fine: int = 0  # numbers kept in fp32 where the rest is bf16
    other: int = 0

    def num_bytes(self, precision: Precision, plain: int = 2) -> float:
        """Its size at a precision, where a number that is not quantized takes `plain` bytes: 2 in bf16, else 4."""
        if precision == "fp32":
            return self._unquantized_bytes(4)
        if precision == "bf16":
            return self._unquantized_bytes(2)
        quantized = 0.0
        for bears, i, o, n in self.linears:
            form = precision
            if precision == "nf4" and bears == "bits":
                form = "int8"
            quantized += n * _quantized_bytes(form, i, o, plain)
        return 4 * self.fine + plain * self.other + quantized

    def _unquantized_bytes(self, plain: int) -> int:
        return 4 * self.fine + plain * (self.other + sum(i * o * n for _, i, o, n in self.linears))


def _quantized_bytes(form: str, inputs: int, outputs: int, plain: int) -> float:
    """Bytes of one quantized projection: 8 bits and a scale a row, or 4 bits and a scale for 64 (scales in 8 bits)."""
    if form == "nf4":
        return inputs * outputs * (0.5 + 1 / 64 + 4 / (64 * 256))
    return inputs * outputs + plain * outputs


@dataclass(frozen=True)
class Weights:
    """A part of a model: stacks of equal blocks (how many, which, and whether they run once per clip), and the rest."""

    stacks: tuple[tuple[int, Block, bool], ...] = ()
    rest: Block = Block()

    def num_bytes(self, precision: Precision, plain: int = 2) -> int:
        """All of it."""
        each = sum(n * block.num_bytes(precision, plain) for n, block, _ in self.stacks)
        return round(self.rest.num_bytes(precision, plain) + each)

    def visiting(self, precision: Precision, plain: int = 2) -> int:
        """What is on the device at once when the blocks visit it two at a time (`engine.loading.offload`)."""
        sizes = [(min(2, n) * block.num_bytes(precision, plain), once) for n, block, once in self.stacks]
        lasting = sum(size for size, once in sizes if not once)
        briefly = max((size for size, once in sizes if once), default=0)
        return round(self.rest.num_bytes(precision, plain) + lasting + briefly)

    def largest_block(self, precision: Precision, plain: int = 2) -> int:
        """Of the largest one."""
        return round(max((block.num_bytes(precision, plain) for _, block, _ in self.stacks), default=0))


def transformer_weights(shape: Shape) -> Weights:
    """Wan's transformer, with VACE's branch or identity blocks where the shape has them."""
    D, F, patch = shape.dim, shape.ffn_dim, math.prod(shape.patch)
    attention = (("any", D, D, 6), ("bits", D, D, 2))
    ffn = (("any", D, F, 1), ("any", F, D, 1))
    wan = Block((*attention, *ffn), fine=8 * D, other=8 * D + F + D + 4 * D)
    carrier = Block((*wan.linears, ("any", D, D, 2)), wan.fine, wan.other + 2 * D + 2 * D + D)
    subject = Block((("any", D, D, 11),), fine=6 * D, other=11 * D + 5 * D)
    side = Block((*wan.linears, ("bits", D, D, 1)), wan.fine, wan.other + D)
    K, V = shape.identity_layers, shape.vace_layers
    time = shape.freq_dim * D + D + D * D + D
    other = (shape.in_channels * patch + 1) * D + (shape.out_channels * patch) * (D + 1)
    other += 6 * D * (D + 1) + (shape.text_dim + 1) * D + D * (D + 1)
    if K:
        other += (shape.in_channels * patch + 1) * D + 4 * D  # the subjects' patches, four slots
    if K and shape.vlm_dim:
        other += 2 * shape.vlm_dim + (shape.vlm_dim + 1) * D + D * (D + 1)
    if V:
        other += (6 * shape.z_dim * patch + 1) * D + D * (D + 1)
    stacks = [(K, carrier, False), (shape.num_layers - K, wan, False), (K, subject, True), (V, side, False)]
    if not K:
        stacks = [(1, _in_eight_bits(wan), False), (shape.num_layers - 1, wan, False), (V, side, False)]
    else:
        stacks = [(1, _in_eight_bits(carrier), False), (K - 1, carrier, False), *stacks[1:]]
    if V:
        stacks = [*stacks[:-1], (1, _in_eight_bits(side), False), (V - 1, side, False)]
    return Weights(tuple(stack for stack in stacks if stack[0]), Block(fine=time + 2 * D, other=other))


def _in_eight_bits(block: Block) -> Block:
    """The first of a stack: every later one builds on what it rounds (`engine.loading.quantize.EIGHT_BITS`)."""
    return Block(tuple(("bits", i, o, n) for _, i, o, n in block.linears), block.fine, block.other)


def _encoder(width: int, kv: int, ffn: int, *, bits: tuple[str, str] = ("any", "any")) -> Block:
    """A block of a language or vision model: queries, keys, values, output, and a gated feed-forward part.

    Args:
        bits: what its projections bear, and what the last one of the feed-forward part does.
    """
    usual, last = bits
    linears = ((usual, width, width, 2), (usual, width, kv, 2), (usual, width, ffn, 2), (last, ffn, width, 1))
    return Block(linears, other=2 * width)


UMT5_XXL = Weights(
    ((24, _encoder(4096, 4096, 10240, bits=("any", "bits")), False),), Block(other=256384 * 4096 + 4096 * 2)
)
QWEN_7B = Weights(
    (
        (28, _encoder(3584, 512, 18944), False),
        (32, _encoder(1280, 1280, 3420, bits=("bits", "bits")), False),
    ),
    Block(other=2 * 152064 * 3584 + 5120 * (5120 + 3584) + 1176 * 1280),
)
WAN_VAE = Weights((), Block(other=126_892_531))
PUBLISHED = {"text_encoder": UMT5_XXL, "vlm": QWEN_7B, "vae": WAN_VAE}
"""Parts that every preset on the Hub shares, for as long as their files are not here to be asked."""


def part_weights(preset: Preset, part: str) -> Weights:
    """How many numbers a part is made of: by its files' headers where they are here, else by what is published."""
    if not getattr(preset.components, part):
        return Weights()
    place = preset.place(part)
    if place.is_file():
        files = [place]
    else:
        files = sorted(place.glob("*.safetensors"))
    if files and all(file.suffix == ".safetensors" for file in files):
        return _count_from_headers(part.replace("_", " "), files)
    if part == "transformer" and preset.shape is not None:
        return transformer_weights(preset.shape)
    if part in PUBLISHED and (part in preset.downloads() or place.is_file()):
        return PUBLISHED[part]
    return Weights(rest=Block(other=sum(file.stat().st_size for file in place.glob("*")) // 2))


_IN_A_BLOCK = re.compile(r"(?:^|\.)(blocks|vace_blocks|subject_blocks|block|layers)\.(\d+)\.")
_FINE = re.compile(r"(norm[123]|scale_shift_table|modulation|time_embedder|time_embedding)(\.|$)")


def _count_from_headers(part: str, files: Iterable[Path]) -> Weights:
    """Count what safetensors files hold by their headers alone."""
    stacks: dict[str, dict[str, list[tuple[str, tuple[int, ...]]]]] = {}
    rest: list[tuple[str, tuple[int, ...]]] = []
    for file in files:
        shapes = header(file, part)
        names: dict[str, str] = {}
        if part == "text encoder":
            names = umt5.names(shapes)
        for own_name, shape in shapes.items():
            key = names.get(own_name, own_name)
            found = _IN_A_BLOCK.search(key)
            if found is None:
                rest.append((key, shape))
            else:
                stack = key[: found.start(1)] + found[1]
                stacks.setdefault(stack, {}).setdefault(found[2], []).append((key, shape))
    counted = []
    for name, blocks in stacks.items():
        for block in blocks.values():  # blocks of one stack may differ: some carry identity blocks
            counted.append((1, _block(block, linears=True), name.endswith("subject_blocks")))
    return Weights(_merge_equal_blocks(counted), _block(rest, linears=False))


def _merge_equal_blocks(stacks: list[tuple[int, Block, bool]]) -> tuple[tuple[int, Block, bool], ...]:
    counts: dict[tuple[Block, bool], int] = {}
    for number, block, once in stacks:
        counts[block, once] = counts.get((block, once), 0) + number
    return tuple((number, block, once) for (block, once), number in counts.items())


def _block(tensors: list[tuple[str, tuple[int, ...]]], *, linears: bool) -> Block:
    found: dict[tuple[str, int, int], int] = {}
    fine = other = 0
    for key, shape in tensors:
        if linears and len(shape) == 2 and key.endswith(".weight") and "embedding" not in key:
            bears = "any"
            if _EIGHT_BITS.search(key) and "subject_blocks" not in key:
                bears = "bits"
            found[bears, shape[1], shape[0]] = found.get((bears, shape[1], shape[0]), 0) + 1
        elif _FINE.search(key):
            fine += math.prod(shape)
        else:
            other += math.prod(shape)
    return Block(tuple((*linear, number) for linear, number in sorted(found.items())), fine, other)


_EIGHT_BITS = re.compile(
    r"(^|\.)(vace_)?blocks\.0\.|(to_out\.0|_attn\.o)\.weight$|vace_blocks\..*proj_(in|out)\.|DenseReluDense\.wo\.|visual\."
)
"""What `engine.loading.quantize` keeps in eight bits where the rest has four, in any layout's names."""


def header(file: Path, part: str = "file") -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a safetensors file holds, without reading the weights.

    Raises:
        StudioError: the header is damaged or larger than the file.
    """
    try:
        with file.open("rb") as opened:
            [length] = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is larger than the file")
            entries = json.loads(opened.read(length))
        return {key: tuple(entries[key]["shape"]) for key in entries if key != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise StudioError(
            f"The {part} in {file.parent.name} cannot be loaded.",
            f"{file.name} is no whole safetensors file ({str(error)[:100]}).",
            "Fetch it again under Models.",
            field="preset",
        ) from None


# --- what a job needs beside the weights -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A job in the model's terms: all of it that memory and time depend on."""

    tokens: int  # of the clip with what is drawn or read beside it
    latent_frames: int
    pixels: int  # of one frame
    pictures: int
    subject_tokens: int  # that identity blocks read, the VLM's among them
    forwards: int  # in one step
    steps: int
    source_tokens: int = 0  # among `tokens`, those that only branches with subjects have
    alone: int = 0  # among `forwards`, those that know of no subjects
    frames: int = 1  # of the clip
    lora_bytes: int = 0  # of the files
    is_judged: bool = False  # somebody is to be recognised
    precision: Precision | None = None  # of the transformer, where the job names one


VLM_TOKENS = 256  # a prompt and what the pictures add, for a start
TEXT_TOKENS = 512
FORWARDS = {"none": 1, "cfg": 2, "dual": 3, "apg": 3, "chained": 3}
ALONE = {"none": 0, "cfg": 1, "dual": 1, "apg": 1, "chained": 2}  # of them, the branches without subjects


def load_of(resolved: ResolvedJob) -> Load:
    """A job in the model's terms: its tokens, pixels, pictures and forwards. Its preset has a shape."""
    preset, document = resolved.preset, resolved.document
    shape = preset.shape
    assert shape is not None
    shown = [subject for subject in document.subjects if subject.weight > 0]
    pictures = 0
    if preset.conditioning != "none":
        pictures = sum(len(subject.pictures) for subject in shown)
    lead = 0
    if preset.conditioning in ("frames", "identity+frames", "side"):
        lead = pictures
    latent_frames = 1 + (resolved.num_frames - 1) // preset.frames_per_latent + lead
    side = shape.vae_spatial * shape.patch[1]
    subject_tokens = 0
    if shape.identity_layers and pictures:
        each = math.ceil(preset.reference_size / side) ** 2
        subject_tokens = pictures * each + VLM_TOKENS * bool(shape.vlm_dim)
    sources = 0
    if preset.conditioning == "sources":
        sources = _source_tokens(shown, preset.reference_size, side)
    return Load(
        tokens=latent_frames * (resolved.width // side) * (resolved.height // side) + sources,
        latent_frames=latent_frames,
        pixels=resolved.width * resolved.height,
        pictures=pictures,
        subject_tokens=subject_tokens,
        forwards=FORWARDS[resolved.sampling.guidance],
        steps=resolved.sampling.num_inference_steps,
        source_tokens=sources,
        alone=ALONE[resolved.sampling.guidance],
        frames=resolved.num_frames,
        lora_bytes=lora_files.num_bytes(document),
        is_judged=bool(shown),
        precision=document.precision,
    )


def _source_tokens(shown: Sequence[Subject], size: int, side: int) -> int:
    """Tokens of the pictures at their own sizes, as if each were square; in truth there are fewer."""
    tokens = 0
    for subject in shown:
        longest: float = size
        if subject.cut_out and subject.role != "background":
            longest = size * FILL
        tokens += len(subject.pictures) * math.ceil(longest / side) ** 2
    return tokens


def forward_bytes(shape: Shape, tokens: int, plain: int) -> int:
    """The most that one forward holds beside the weights.

    Args:
        plain: bytes of a number, 2 or 4. In bf16 Wan's norms still work in fp32.
    """
    D, head = shape.dim, shape.dim // shape.num_heads
    inside = 2 * plain * shape.ffn_dim + 4 * plain * D
    normed = 30 * D
    if plain == 2:
        normed = 22 * D
    beside = 2 * 4 * head + 4 * plain * shape.in_channels  # RoPE in fp32; latents
    hints = 0
    if shape.vace_layers:
        hints = (shape.vace_layers + 1) * plain * D
    text = TEXT_TOKENS * (2 * D + shape.text_dim) * plain
    return tokens * (max(inside, normed) + beside + hints) + text


def cache_bytes(shape: Shape, load: Load, plain: int) -> int:
    """The identity cache: a key and a value of every subject token in each of its layers."""
    return shape.identity_layers * load.subject_tokens * 2 * shape.dim * plain


DECODE = 19_550  # bytes a pixel of Wan's VAE in fp32, one latent frame at a time with its memory of those before
DECODE_TILE = 256  # pixels of a tile's side
ENCODE_PICTURE = 3_880
ENCODE_VIDEO = 14_300


def clip_flops(shape: Shape, load: Load) -> float:
    """Of all forwards of a clip; those that know of no subjects are without their sources."""
    alone = replace(load, tokens=load.tokens - load.source_tokens)
    step = (load.forwards - load.alone) * flops(shape, load) + load.alone * flops(shape, alone)
    return load.steps * step


def flops(shape: Shape, load: Load) -> float:
    """Of one forward: projections, attention over the video, over the text, and over the subjects."""
    D, S = shape.dim, load.tokens
    blocks = shape.num_layers + shape.vace_layers
    projections = 2 * S * (6 * D * D + 2 * D * shape.ffn_dim) + 2 * TEXT_TOKENS * 2 * D * D
    attention = 4 * S * S * D + 4 * S * TEXT_TOKENS * D
    identity = shape.identity_layers * (2 * S * 2 * D * D + 4 * S * load.subject_tokens * D)
    return blocks * (projections + attention) + identity
