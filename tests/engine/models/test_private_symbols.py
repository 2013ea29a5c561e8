"""The private names of other libraries that our code stands on: an update that renames one is told of here."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from engine import tiny

MODULES = {
    "diffusers.hooks._helpers": ("TransformerBlockMetadata", "TransformerBlockRegistry"),
    "diffusers.models._modeling_parallel": (
        "ContextParallelConfig",
        "ContextParallelInput",
        "ContextParallelOutput",
        "ParallelConfig",
    ),
    "diffusers.quantizers.gguf.utils": ("dequantize_functions",),
    "diffusers.loaders.single_file_utils": ("convert_wan_transformer_to_diffusers",),
    "diffusers.utils.peft_utils": ("apply_lora_scale",),
    "diffusers.models.attention_dispatch": ("AttentionBackendName", "attention_backend", "dispatch_attention_fn"),
    "transformers.conversion_mapping": ("get_model_conversion_mapping",),
    "transformers.core_model_loading": ("WeightRenaming", "rename_source_key"),
    "torch.distributed._functional_collectives": (),
}


@pytest.mark.parametrize("module", [*MODULES])
def test_a_module_still_offers_what_we_take_from_it(module: str) -> None:
    found = import_module(module)
    assert [name for name in MODULES[module] if not hasattr(found, name)] == []


def test_wans_vae_still_keeps_what_streaming_reads() -> None:
    vae = tiny.vae()
    vae.clear_cache()
    assert isinstance(vae._feat_map, list) and vae._conv_idx == [0]
    assert callable(AutoencoderKLWan._decode)
    assert WanCausalConv3d(1, 1, 3, padding=1)._padding == (1, 1, 1, 1, 2, 0)


def test_models_and_processors_still_have_the_names_that_are_set_on_them() -> None:
    assert {"_no_split_modules", "_repeated_blocks"} <= set(dir(tiny.transformer()))
    assert hasattr(ModelMixin, "enable_gradient_checkpointing")
    assert WanAttnProcessor._parallel_config is None
    module = torch.nn.Linear(1, 1)
    assert {"_forward_hooks", "_parameters", "_buffers", "_compiled_call_impl"} <= set(dir(module))
    assert callable(torch._foreach_lerp_) and isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
