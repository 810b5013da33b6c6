"""What the header of a GGUF file says, as the folder of a checkpoint.

`unfold` writes configuration and tokenizer as transformers has them, and a note of where the file
lies. What it does not know: tensors (`gguf_file`).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from moelab.models.gguf_file import FAMILIES, ROPE_FREQS, Family, open_reader
from moelab.models.shards import GGUF

SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys of a GGUF header, behind its architecture's name, and what config.json calls them."""
MOST_LAYERS = 256
"""A number for each layer is read; a list that is longer says something else."""
STILL = 1e20
"""A frequency divided by so much, or more, stands still."""
BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template.*", "generation_config.json")


def parts_of(file: Path) -> list[Path]:
    """The files of a split GGUF, or the file itself.

    Raises
    ------
    ValueError
        A part is missing.
    """
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if not found:
        return [file]
    count = int(found[3])
    parts = [file.with_name(f"{found[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{missing[0]} is missing ({len(missing)} of {count} parts); fetch it too")
    return parts


def unfold(file: Path, folder: Path) -> None:
    """Write config.json, the tokenizer, and where the weights are, into an empty folder.

    What lies beside the file as config.json and tokenizer.json is taken instead of what it says.

    Raises
    ------
    ValueError
        The architecture is not known here and no config.json lies beside it, or the like.
    """
    parts = parts_of(file)
    reader = open_reader(parts[0])
    said = {name: field.contents() for name, field in reader.fields.items() if _small(field)}
    architecture = str(said.get("general.architecture"))
    family = FAMILIES.get(architecture)
    if family is None or (architecture == "llama" and not said.get("llama.expert_count")):
        raise ValueError(
            f"{file.name} is of the architecture {architecture!r}; moelab reads GGUF files of the "
            f"mixtures {', '.join(FAMILIES)}, and of others their safetensors checkpoint"
        )
    beside = file.parent / "config.json"
    tensors = {t.name: t for p in parts for t in open_reader(p).tensors}
    shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in tensors.items()}
    if ROPE_FREQS in tensors:
        said[ROPE_FREQS] = _turned(np.array(tensors[ROPE_FREQS].data, np.float32), file)
    if said.get(ROPE_FREQS, 1.0) < 1 and architecture != "gemma4":
        raise ValueError(
            f"{file.name}: by its {ROPE_FREQS} only a part of each head turns with the position, "
            f"which moelab knows of gemma4, not of {architecture}; take its safetensors checkpoint"
        )
    if beside.is_file():
        shutil.copyfile(beside, folder / "config.json")
    else:
        config = _config(family, architecture, said, shapes)
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    _tokenizer(parts[0], folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    q, kv = config["num_attention_heads"], config.get("num_key_value_heads")
    heads = {"q_proj.weight": q, "k_proj.weight": kv or q} if family.permuted else {}
    note = {"architecture": architecture, "files": [str(part) for part in parts], "heads": heads}
    (folder / GGUF).write_text(json.dumps(note), encoding="utf-8")


def _turned(factors: np.ndarray, file: Path) -> float:
    """Share of a head's width that turns with the position, of what divides its frequencies.

    Raises
    ------
    ValueError
        A factor is neither 1 (turns) nor so large that nothing does, or they are mixed.
    """
    turns = int((factors == 1).sum())
    if (factors[:turns] != 1).any() or (factors[turns:] < STILL).any():
        raise ValueError(
            f"{file.name}: its {ROPE_FREQS} scale the turning of positions by {factors.min():g} to "
            f"{factors.max():g}, which moelab does not compute; take its safetensors checkpoint"
        )
    return turns / len(factors)


def _small(field: Any) -> bool:
    return len(field.data) <= MOST_LAYERS  # tokens and merges are the tokenizer's


def _config(
    family: Family, architecture: str, said: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """config.json of what the header says; sizes that it leaves out are those of its tensors."""
    known = {
        name: said[f"{architecture}.{key}"]
        for key, name in SIZES.items()
        if f"{architecture}.{key}" in said
    }
    experts = next(shape for name, shape in shapes.items() if name.endswith("ffn_down_exps.weight"))
    known |= {family.count: experts[0], family.inner: experts[2]}
    known[family.top_k] = said[f"{architecture}.expert_used_count"]
    known["rope_parameters"] = _rope(architecture, said)
    if architecture == "gemma4":
        known |= _gemma4(said, shapes)
    shared = shapes.get("blk.0.ffn_up_shexp.weight")
    known |= {"shared_expert_intermediate_size": shared[0]} if shared else {}
    dense = [i for i in range(known["num_hidden_layers"]) if f"blk.{i}.ffn_up.weight" in shapes]
    known |= {"mlp_only_layers": dense} if dense else {}
    known |= {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": said.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": said.get("tokenizer.ggml.eos_token_id"),
    }
    return known | family.more


def _gemma4(said: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Layers that see a window and layers that see all; the latter have heads of their own.

    Of the latter's width a part turns: as the file's `rope_freqs` say, else a quarter, as in
    transformers.
    """
    local = [bool(x) for x in said["gemma4.attention.sliding_window_pattern"]]
    heads = said["gemma4.attention.head_count_kv"]
    each = heads if isinstance(heads, list) else [heads] * len(local)
    by_kind = dict(zip(local, each, strict=True))
    theta = [said[f"gemma4.rope.freq_base{end}"] for end in ("", "_swa")]
    part = said.get(ROPE_FREQS, 0.25)
    every = {"rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": theta[0]}
    return {
        "layer_types": ["sliding_attention" if x else "full_attention" for x in local],
        "num_key_value_heads": by_kind.get(True, by_kind[False]),
        "num_global_key_value_heads": by_kind.get(False),
        "head_dim": said["gemma4.attention.key_length_swa"],
        "global_head_dim": said["gemma4.attention.key_length"],
        "attention_k_eq_v": f"blk.{local.index(False)}.attn_v.weight" not in shapes,
        "num_kv_shared_layers": said.get("gemma4.attention.shared_kv_layers", 0),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": theta[1]},
            "full_attention": every,
        },
    }


def _rope(architecture: str, said: dict[str, Any]) -> dict[str, Any]:
    """How positions turn: as the header says; GPT-OSS does not round its range of frequencies."""
    about = {
        name.removeprefix(f"{architecture}.rope."): value
        for name, value in said.items()
        if name.startswith(f"{architecture}.rope.")
    }
    kind = about.get("scaling.type", "none")
    found = {"rope_type": "default" if kind == "none" else kind}
    found |= {"rope_theta": about.get("freq_base", 10000.0)}
    turned, head = about.get("dimension_count"), said.get(f"{architecture}.attention.key_length")
    if turned and head and turned != head:
        found["partial_rotary_factor"] = turned / head
    if kind != "none":
        found["factor"] = about["scaling.factor"]
    if kind == "yarn":
        found["truncate"] = architecture != "gpt-oss"
        found["original_max_position_embeddings"] = about["scaling.original_context_length"]
    return found


def _tokenizer(file: Path, folder: Path) -> None:
    """Tokenizer files that lie beside, or what transformers makes of the header.

    Its `AutoTokenizer` asks first for the architecture, which is none of the tokenizer's business.
    """
    from transformers import PreTrainedTokenizerFast

    if (file.parent / "tokenizer.json").is_file():
        for pattern in BESIDE:
            for one in file.parent.glob(pattern):
                shutil.copyfile(one, folder / one.name)
        return
    try:
        made = PreTrainedTokenizerFast(name_or_path=str(file.parent), gguf_file=file.name)
    except Exception as error:
        raise ValueError(
            f"transformers makes no tokenizer of {file.name} ({str(error)[:200]}); put the "
            "model's tokenizer.json beside it"
        ) from error
    made.save_pretrained(folder)
