"""Tiny components with random weights, in the classes and the folder layout of the real ones.

In:  a folder and a seed.
Out: transformer, vae, text_encoder, tokenizer, vlm, vlm_tokenizer and judges in that folder, no download.
Knows nothing of training: such a model draws noise. Tests run on it, and a clone without a checkpoint starts with it.

    python -m engine.tiny FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from engine import presets
from engine.identity.toybox import Judges
from engine.models.identity_wan import IdentityWanTransformer3DModel
from engine.presets import Components, Preset

TEXT_DIM = 32
TEXT_TOKENS = 64  # room for a short byte-level prompt; real Wan reads 512
VLM_DIM = 48
LATENT_CHANNELS = 16
VLM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def transformer(**changes: Any) -> IdentityWanTransformer3DModel:
    """Three Wan blocks, the first two with identity blocks, untrained: it draws what Wan draws."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 3,
        "rope_max_seq_len": 128,
        "identity_layers": 2,
        "max_subjects": 4,
        "vlm_dim": VLM_DIM,
    }
    return IdentityWanTransformer3DModel(**{**config, **changes}).eval()


def stir(model: IdentityWanTransformer3DModel, size: float = 0.3) -> IdentityWanTransformer3DModel:
    """Move stage 3's output projections off zero, as training would, so that subjects show."""
    for name, parameter in model.named_parameters():
        if name.endswith("identity.to_out.weight"):
            torch.nn.init.normal_(parameter, std=size)
    return model


def vae() -> AutoencoderKLWan:
    """4x in space and in time, one level fewer than the real one."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so no text is unknown; </s> at the end, as UMT5's does."""
    special = ("<pad>", "</s>", "<unk>")
    raw = _byte_tokenizer(special)
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, with Qwen's marks for turns and pictures."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(VLM_SPECIAL),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[*VLM_SPECIAL[1:]],
        padding_side="left",
    )


def _byte_tokenizer(special: tuple[str, ...]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special, *alphabet))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(special))
    return raw


def text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """One layer of UMT5's encoder."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).eval()


def vlm(words: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of Qwen2.5-VL; a 64 px picture is 16 tokens."""
    numbers = {token: number for number, token in enumerate(VLM_SPECIAL)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": VLM_DIM,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
            "bos_token_id": numbers["<|endoftext|>"],
            "eos_token_id": numbers["<|im_end|>"],
            "pad_token_id": numbers["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "out_hidden_size": VLM_DIM,
            "fullatt_block_indexes": [1],
        },
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=len(words) + 1,  # never written: references are stills
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def write_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Write all components under `folder`; the same seed gives the same weights. Returns the folder."""
    words, vlm_words = tokenizer(), vlm_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {
            "transformer": stir(transformer()),
            "vae": vae(),
            "text_encoder": text_encoder(len(words)),
            "vlm": vlm(vlm_words),
        }
        judges = Judges("tiny", 8, ["stands still"], ["left", "right"], ["beach"], ["fox"])
    for name, part in parts.items():
        part.save_pretrained(folder / name, safe_serialization=True)
    words.save_pretrained(folder / "tokenizer")
    judges.save(folder / "judges")
    vlm_words.save_pretrained(folder / "vlm_tokenizer")
    return folder


def preset_of(folder: Path) -> Preset:
    """The toybox preset with these components in place of its own."""
    toybox = presets.load("toybox")
    named = set(type(toybox.components).model_fields) - {"distill"}
    parts = {part: str((folder / part).resolve()) for part in named}
    return toybox.model_copy(update={"components": Components(**parts)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write tiny random components, in the layout of the real ones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_tiny(arguments.folder, seed=arguments.seed)
