"""UMT5 and Qwen2.5-VL: texts and pictures become states. Training calls the same functions on batches.

In:  rendered prompts, prepared pictures (uint8, RGB), the loaded encoders and their tokenizers.
Out: states on the encoder's device, fp32.
Knows nothing of jobs, presets or the transformer.

Shapes: B texts, L text tokens, T VLM tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine.media.pictures import Pixels

MAX_TEXT_TOKENS = 512  # Wan's; a tokenizer with a smaller `model_max_length` lowers it

PICTURE_TOKENS = 64  # most tokens of one picture in the VLM; more cost attention in every step and say little


@torch.no_grad()
def text_states(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel) -> Tensor:
    """UMT5's states of B texts, zero behind each text's end: (B, L, text_dim), fp32.

    L is the tokenizer's `model_max_length`, at most 512: Wan attends to the zeros too, so the length is a part of
    what it was trained on.
    """
    length = min(MAX_TEXT_TOKENS, tokenizer.model_max_length)
    words = tokenizer(
        list(texts),
        padding="max_length",
        max_length=length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    numbers, mask = words["input_ids"].to(encoder.device), words["attention_mask"].to(encoder.device)
    states = encoder(numbers, mask).last_hidden_state.float()
    return states * mask.unsqueeze(-1)


def vlm_turn(prompt: str, picture_tokens: Sequence[Sequence[int]]) -> str:
    """The user's turn as text: every subject's pictures behind its number, then the prompt.

    Args:
        prompt: rendered.
        picture_tokens: for each subject, how many tokens each of its pictures takes.
    """
    shown = ""
    for number, counts in enumerate(picture_tokens, start=1):
        marks = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
        shown += f"subject {number}: {marks}\n"
    return f"<|im_start|>user\n{shown}{prompt}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def vlm_states(
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Sequence[Pixels]]],
    tokenizer: PreTrainedTokenizerBase,
    vlm: Qwen2_5_VLForConditionalGeneration,
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the VLM after reading prompts and pictures (R6: prompt and all references at once).

    Args:
        prompts: B rendered prompts.
        pictures: for each prompt, for each subject, its pictures; an empty list where there is none.

    Returns:
        States (B, T, vlm_dim), fp32, and a mask (B, T) that is True where a token is no padding.
    """
    inputs = vlm_inputs(prompts, pictures, tokenizer, vlm)
    states = vlm.model(**inputs).last_hidden_state.float()
    return states, inputs["attention_mask"].bool()


def vlm_inputs(
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Sequence[Pixels]]],
    tokenizer: PreTrainedTokenizerBase,
    vlm: Qwen2_5_VLForConditionalGeneration,
) -> dict[str, Tensor]:
    """What the VLM takes: input_ids, attention_mask, mm_token_type_ids, and the pictures' patches when there are any.

    transformers' own processor needs torchvision, which does not exist for every torch build; this is the tokenizer,
    the picture processor and the expansion of `<|image_pad|>` in ten lines.
    """
    flat: list[Pixels] = []
    for subjects in pictures:
        for subject in subjects:
            flat.extend(subject)
    patches: dict[str, Any] = {}
    counts: list[int] = []
    if flat:
        processor = picture_processor(vlm)
        patches = dict(processor(images=flat, return_tensors="pt"))
        counts = (patches["image_grid_thw"].prod(dim=-1) // processor.merge_size**2).tolist()
    remaining = iter(counts)
    turns: list[str] = []
    for prompt, subjects in zip(prompts, pictures, strict=True):
        picture_tokens = [list(itertools.islice(remaining, len(subject))) for subject in subjects]
        turns.append(vlm_turn(prompt, picture_tokens))
    words = tokenizer(turns, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    numbers = words["input_ids"]
    inputs = {
        "input_ids": numbers,
        "attention_mask": words["attention_mask"],
        "mm_token_type_ids": (numbers == vlm.config.image_token_id).int(),
        **patches,
    }
    return {name: value.to(vlm.device) for name, value in inputs.items()}


def picture_processor(vlm: Qwen2_5_VLForConditionalGeneration) -> Qwen2VLImageProcessorPil:
    """Cuts pictures into this VLM's patches, at most 64 tokens a picture."""
    vision: Any = vlm.config.vision_config
    token = (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": token, "longest_edge": PICTURE_TOKENS * token},
    )
