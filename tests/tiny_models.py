"""Tiny random checkpoints of six families, as unhandy as real ones.

Weights are bfloat16, and shards are dealt tensor by tensor, so that one expert lies in several
files; sizes are no powers of two. Every family writes a byte-level tokenizer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

SHARDS = 3
VOCABULARY = 260

_COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def qwen3_moe(folder: Path, **changes: Any) -> Path:
    """Sizes that 64 divides: the kernels' fast path."""
    settings = {
        "hidden_size": 192,
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    }
    config = transformers.Qwen3MoeConfig(**{**_COMMON, **settings, **changes})
    return write(transformers.Qwen3MoeForCausalLM(config), folder)


def mixtral(folder: Path, **changes: Any) -> Path:
    """w1, w2 and w3 per expert in the checkpoint."""
    settings = {
        "hidden_size": 96,
        "intermediate_size": 80,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    }
    config = transformers.MixtralConfig(**{**_COMMON, **settings, **changes})
    return write(transformers.MixtralForCausalLM(config), folder)


def olmoe(folder: Path, **changes: Any) -> Path:
    """Router weights that do not add up to one."""
    settings = {
        "hidden_size": 96,
        "intermediate_size": 80,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    }
    config = transformers.OlmoeConfig(**{**_COMMON, **settings, **changes})
    return write(transformers.OlmoeForCausalLM(config), folder)


def gpt_oss(folder: Path, **changes: Any) -> Path:
    """Fused, transposed and interleaved experts with biases and a clamp."""
    settings = {
        "hidden_size": 96,
        "intermediate_size": 80,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 24,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = transformers.GptOssConfig(**{**_COMMON, **settings, **changes})
    return write(transformers.GptOssForCausalLM(config), folder)


def deepseek_v3(folder: Path, **changes: Any) -> Path:
    """A dense first layer, a shared expert, sigmoid routing limited to two of three groups."""
    settings = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "moe_intermediate_size": 80,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    config = transformers.DeepseekV3Config(**{**_COMMON, **settings, **changes})
    return write(transformers.DeepseekV3ForCausalLM(config), folder)


def llama4(folder: Path, **changes: Any) -> Path:
    """Top-1 with a weight on the expert's input, a shared expert, attention by chunks."""
    settings = {
        "hidden_size": 128,
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "head_dim": 32,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    }
    config = transformers.Llama4TextConfig(**{**_COMMON, **settings, **changes})
    return write(transformers.Llama4ForCausalLM(config), folder)


def switch(folder: Path, **changes: Any) -> Path:
    """An encoder-decoder, top-1, a dense layer before each sparse one, everything tied."""
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 64,
        "num_heads": 4,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_experts": 6,
        "num_decoder_layers": 6,
        "num_sparse_decoder_layers": 3,
        "expert_capacity": 4,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    config = transformers.SwitchTransformersConfig(**{**settings, **changes})
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 258
    return write(model, folder)


def nllb(folder: Path, **changes: Any) -> Path:
    """An encoder-decoder, top-2, with biases; the first token after the start is forced."""
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 96,
        "encoder_ffn_dim": 80,
        "decoder_ffn_dim": 80,
        "encoder_layers": 4,
        "encoder_sparse_step": 2,
        "encoder_attention_heads": 4,
        "decoder_layers": 3,
        "decoder_sparse_step": 1,
        "decoder_attention_heads": 4,
        "num_experts": 6,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "decoder_start_token_id": 257,
        "max_position_embeddings": 512,
    }
    config = transformers.NllbMoeConfig(**{**settings, **changes})
    model = transformers.NllbMoeForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 77
    return write(model, folder)


ENCODER_DECODERS = {"switch": switch, "nllb": nllb}


def phimoe(folder: Path, **changes: Any) -> Path:
    """As SlimMoE leaves Phi-3.5-MoE: inner sizes 448 (tiny) or 960 (mini) of 6400, fewer heads.

    Heads are pruned and keep their width, so heads x head_dim is no longer the model's width; and
    config.json has the names of its own code, which is never run.
    """
    settings = {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "sliding_window": 512,
    }
    config = transformers.PhimoeConfig(**{**_COMMON, **settings, **changes})
    config.head_dim = 16  # four heads of it are half of the model's width
    write(transformers.PhimoeForCausalLM(config), folder)
    own = {"AutoModelForCausalLM": "modeling_slimmoe.PhiMoEForCausalLM"}
    known = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["PhiMoEForCausalLM"], "auto_map": own, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(known | names))
    return folder


FAMILIES = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
}


def write(model: nn.Module, folder: Path, *, seed: int = 0, dtype: Any = torch.bfloat16) -> Path:
    """Fill a model with random weights and write it in shards, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    randomise(model, seed=seed)
    model.to(dtype).save_pretrained(folder)
    reshard(folder)
    tokenizer().save_pretrained(folder)
    return folder


def randomise(model: nn.Module, *, seed: int = 0) -> None:
    """Weights of the size that keeps activations near one; norms near one; biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def reshard(folder: Path, shards: int = SHARDS) -> None:
    """Deal the tensors of a checkpoint out over several files, one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(mine, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit(source: Path, folder: Path, change: Any = None, **config: Any) -> Path:
    """A copy of a checkpoint in one file, whose tensors went through `change`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
