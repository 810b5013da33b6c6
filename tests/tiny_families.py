"""Every Mixture-of-Experts family of transformers as a tiny random model, by one generic rule.

A family's configuration class is shrunk field by field with one table of sizes; the few families
that need something of their own say so in `SPECIAL`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moelab.models.config import _names
from moelab.models.families import find_moe

LIMIT = 10_000_000  # parameters
LAYERS, EXPERTS, TOP_K = 3, 6, 2

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 16,
    "hidden_size": 64,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "max_position_embeddings": 512,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 3,
    "topk_group": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "enable_moe_block": True,
    "expert_capacity": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER_SIZES: dict[str, Any] = {  # vision and audio parts, which are built but not run
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "depth": 1,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "deepstack_visual_indexes": [0],
    "vocab_size": 260,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "d_model": 32,
    "output_dim": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "downsample_hidden_size": 8,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 64,
    "projection_intermediate_size": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "decoder_dim": 32,
    "codebook_size": 64,
    "mlp_dim": 32,
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "global_attn_indexes": [0],
    "image_size": 64,
    "patch_size": 8,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "vision_config": {"mlp_layer_types": ["sparse"]},
    },
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [40, 24],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [3, 3, 2],
        },
    },
    "glm5_next": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "qk_rope_head_dim": 0,
    },
    "muse_spark": {
        "moe_hidden_size": 48,
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
        "audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    },
    "longcat_flash": {
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 40,
        "zero_expert_num": 3,
        "head_dim": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mimo_v2_flash": {"num_key_value_heads": 2, "head_dim": 24},
    "step3p7": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "share_expert_dim": 40,
        "sliding_window": 4,
        "swiglu_limits": [0.0, 0.0, 0.5],
    },
    "zaya": {"num_experts_per_tok": 1},
}
UNDECORATED = ("switch_transformers", "nllb_moe", "llama4", "longcat_flash", "step3p7")


@cache
def names() -> tuple[str, ...]:
    """Model packages of transformers whose experts moelab means to find."""
    root = Path(transformers.models.__path__[0])
    found = []
    for package in pkgutil.iter_modules([str(root)]):
        sources = (file.read_text() for file in (root / package.name).glob("modeling_*.py"))
        if any("@use_experts_implementation" in source for source in sources):
            found.append(package.name)
    return (*found, *UNDECORATED)


def classes(name: str, ends: str = "") -> Iterator[type]:
    """The generating classes of a package, whose names end so."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for key, value in vars(module).items():
        own = inspect.isclass(value) and value.__module__ == module.__name__
        if own and key.endswith(("ForCausalLM", "ForConditionalGeneration")) and key.endswith(ends):
            yield value


def shrink(config_class: type, name: str, sizes: Any = None) -> PreTrainedConfig:
    """A family's configuration with small sizes, parts included."""
    sizes = sizes or SIZES | SPECIAL.get(name, {})
    special = sizes.keys() - SIZES.keys() - OTHER_SIZES.keys()
    known = {f.name for f in fields(config_class)} | special & _names(config_class)
    values = {k: v for k, v in sizes.items() if k in known}
    for part, spec in config_class.sub_configs_defaults.items():
        fixed = hasattr(spec.config_class, "model_type")  # else it is AutoConfig
        kind = spec.config_class if fixed else CONFIG_MAPPING[spec.model_type]
        text = "text" in part or "thinker" in part
        values[part] = shrink(kind, name, sizes if text else OTHER_SIZES | sizes.get(part, {}))
    return config_class(**values)


def build(name: str, ends: str = "") -> nn.Module:
    """The first generating class of a family that can be built tiny and has experts.

    Raises
    ------
    LookupError
        None can; says why for each.
    """
    reasons = []
    for family in classes(name, ends):
        try:
            config = shrink(family.config_class, name)
            config._experts_implementation = "eager"
            with torch.device("meta"):
                blank = family._from_config(config)
            find_moe(blank)
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{family.__name__}: {str(error).splitlines()[-1].strip()}")
            continue
        size = sum(p.numel() for p in blank.parameters())
        if size < LIMIT:
            return family._from_config(config)
        reasons.append(f"{family.__name__}: {size / 1e6:.0f} million parameters")
    raise LookupError("; ".join(reasons) or "no generating class")
