"""The bundled model as a GGUF file, by the names and layouts of llama.cpp's converter.

So that a file like those that people own is at hand without a download. What it does not write: a
tokenizer in the file; tokenizer.json is put beside it.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from moelab.models.gguf_file import ATTENTION, ENDS, FAMILIES

ARCHITECTURE = "qwen3moe"
BLOCKS = ("F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What the `gguf` package can write."""


def write(folder: Path, file: Path, blocks: str) -> None:
    """See `moelab.demo.gguf`; ``folder`` is the checkpoint's."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    if blocks not in BLOCKS:
        raise ValueError(f"blocks={blocks!r}: one of {', '.join(BLOCKS)}")
    kind = GGMLQuantizationType[blocks]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_name("moelab demo")
    for key, name in {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "context_length": "max_position_embeddings",
        "feed_forward_length": "intermediate_size",
        "expert_used_count": "num_experts_per_tok",
    }.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", config[name])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for name in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", config[f"{name}_token_id"])
    for name, value in _tensors(folder / "model.safetensors").items():
        small = value.ndim < 2 or "gate_inp" in name  # as llama.cpp has them: in 32 bits
        own = GGMLQuantizationType.F32 if small else kind
        writer.add_tensor(name, quants.quantize(value, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, file.parent / name)


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names; experts of a layer are one ``[E, rows, columns]``."""
    family = FAMILIES[ARCHITECTURE]
    names = {theirs: own for own, theirs in (ATTENTION | family.layer).items()}
    ends = {theirs: own for own, theirs in ENDS.items()}
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for name, tensor in load_file(file).items():
        value = tensor.float().numpy()
        stem = name.removesuffix(".weight")
        if stem in ends:
            found[f"{ends[stem]}.weight"] = value
            continue
        layer, own = stem.removeprefix("model.layers.").split(".", 1)
        if own in names:
            found[f"blk.{layer}.{names[own]}.weight"] = value
            continue
        *_, number, part = own.split(".")
        experts[f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"][int(number)] = value
    return found | {name: np.stack([r[e] for e in sorted(r)]) for name, r in experts.items()}
