"""A GGUF file as a checkpoint: its tensors under transformers' names, one expert at a time.

`unfold` writes what a GGUF file says of configuration and tokenizer into a folder, as transformers
has it, with a note of where the file lies; `GgufCheckpoint` then reads weights from the file
itself. What is stored in 16 or 32 bits keeps its values; quantised blocks are unpacked by the
`gguf` package, or handed on as they are (`raw`). What it does not know: families whose names are
not in `FAMILIES`, and what a block means (`moelab.store.blocks`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moelab.models.shards import _CHUNK, DTYPES, GGUF, Checkpoint, TensorInfo

SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "feed_forward_length": "intermediate_size",
    "expert_used_count": "num_experts_per_tok",
}
"""Keys of a GGUF header, behind its architecture's name, and what config.json calls them."""
ATTENTION = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IGNORED = ("rope_freqs.",)
BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template.*", "generation_config.json")


@dataclass(frozen=True)
class Family:
    """How one architecture of llama.cpp is called in transformers.

    ``layer`` has names within a layer, ``experts`` those of each expert's matrices; ``more`` is
    said in config.json besides, ``count`` what it calls the number of experts; ``permuted``: rows
    of queries and keys lie in pairs, as llama.cpp's rotary embedding has them.
    """

    model_type: str
    architecture: str
    layer: dict[str, str]
    experts: dict[str, str]
    more: dict[str, Any]
    count: str = "num_experts"
    permuted: bool = False


_PARTS = {x: f"mlp.experts.{{}}.{x}_proj" for x in ("gate", "up", "down")}
_MIXTRAL = {"gate": "w1", "down": "w2", "up": "w3"}
_SHARED = {f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")}
_DENSE = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
FAMILIES = {
    "qwen2moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _ROUTER | _SHARED | _DENSE | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
        _PARTS,
        {"qkv_bias": True, "norm_topk_prob": False},
    ),
    "qwen3moe": Family(
        *("qwen3_moe", "Qwen3MoeForCausalLM", _ROUTER | _DENSE, _PARTS, {"norm_topk_prob": True})
    ),
    "olmoe": Family(
        *("olmoe", "OlmoeForCausalLM", _ROUTER, _PARTS, {"norm_topk_prob": False}),
    ),
    "llama": Family(
        "mixtral",
        "MixtralForCausalLM",
        {"ffn_gate_inp": "block_sparse_moe.gate"},
        {x: f"block_sparse_moe.experts.{{}}.{w}" for x, w in _MIXTRAL.items()},
        {},
        count="num_local_experts",
        permuted=True,
    ),
}


@dataclass(frozen=True)
class GgufInfo(TensorInfo):
    """A tensor of transformers: a part of one in the file, of this type of block."""

    kind: Any
    heads: int = 0  # rows of so many heads lie in pairs

    @property
    def nbytes(self) -> int:
        """Its size as it is read, not as it lies in the file."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> str:
        """Its type in the file."""
        return self.kind.name


class GgufCheckpoint(Checkpoint):
    """The weights of a GGUF file, in the interface of `Checkpoint`.

    Parameters
    ----------
    path
        The folder that `unfold` made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        note = json.loads((path / GGUF).read_text("utf-8"))
        self.files = [Path(file) for file in note["files"]]
        self.info = {}
        self._note = note
        for number, file in enumerate(self.files):
            for tensor in _reader(file).tensors:
                self._add(number, tensor)

    def tensor(self, key: str) -> torch.Tensor:
        """Read one whole tensor; blocks are unpacked into float16."""
        return self.weight(key).to(DTYPES[self.info[key].dtype])

    def weight(self, key: str) -> torch.Tensor:
        """Read one whole tensor; blocks are unpacked into float32, which holds them exactly."""
        from gguf import dequantize

        info, raw = self._bytes(key)
        if info.stored in DTYPES:
            found = torch.from_numpy(raw).view(DTYPES[info.stored]).reshape(info.shape)
        else:
            rows = raw.reshape(int(np.prod(info.shape[:-1])), -1)
            found = torch.from_numpy(dequantize(rows, info.kind)).reshape(info.shape)
        if info.heads:
            pairs = found.reshape(info.heads, -1, 2, *info.shape[1:])
            found = pairs.transpose(1, 2).reshape(info.shape)
        return found.contiguous()

    def raw(self, key: str) -> torch.Tensor:
        """Read one whole tensor; blocks stay as the file has them, uint8, row by row."""
        info, raw = self._bytes(key)
        if info.stored in DTYPES:
            return self.weight(key)
        return torch.from_numpy(raw.reshape(*info.shape[:-1], -1))

    def _bytes(self, key: str) -> tuple[GgufInfo, np.ndarray]:
        info = self.info[key]
        assert isinstance(info, GgufInfo)
        raw = np.empty(info.stop - info.start, np.uint8)
        self._fill(info.shard, raw, info.start)
        return info, raw

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Read `weight[first:last]`."""
        return self.tensor(key)[first:last]

    def chunks(self, key: str) -> Iterator[np.ndarray]:
        """Yield the bytes of one tensor as it is read, uint8, in pieces of at most 1 MiB."""
        whole = self.tensor(key).reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(whole), _CHUNK):
            yield whole[start : start + _CHUNK]

    def _add(self, shard: int, tensor: Any) -> None:
        """Enter a tensor of the file under the names of transformers."""
        shape = tuple(int(n) for n in reversed(tensor.shape))
        named = self._named(tensor.name, shape)
        each = tensor.n_bytes // len(named) if named else 0
        for i, (name, own) in enumerate(named):
            start = int(tensor.data_offset) + i * each
            kind = tensor.tensor_type.name
            dtype = kind if kind in DTYPES else "F16"
            heads = self._note["heads"].get(name.rpartition(".self_attn.")[2], 0)
            self.info[name] = GgufInfo(
                shard, dtype, own, start, start + each, tensor.tensor_type, heads
            )

    def _named(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """(transformers' name, shape) of what a tensor holds: one, or one of each expert."""
        family = FAMILIES[self._note["architecture"]]
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name.startswith(IGNORED):
            return []
        if found is None:
            stem, _, end = name.rpartition(".")
            return [(f"{ENDS[stem]}.{end}" if stem in ENDS else name, shape)]
        layer, stem, end = found.groups()
        prefix = f"model.layers.{layer}"
        expert = re.fullmatch(r"ffn_(gate|up|down)_exps", stem)
        if expert and end == "weight":
            parts = family.experts[expert[1]]
            return [(f"{prefix}.{parts.format(e)}.weight", shape[1:]) for e in range(shape[0])]
        own = (ATTENTION | family.layer).get(stem, stem)
        if own.endswith("shared_expert_gate") and len(shape) == 1:
            shape = (1, *shape)
        return [(f"{prefix}.{own}.{end}", shape)]


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{file} is a GGUF file, which needs: pip install gguf") from error
    return GGUFReader(file)


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
    reader = _reader(parts[0])
    said = {name: field.contents() for name, field in reader.fields.items() if _small(field)}
    architecture = str(said.get("general.architecture"))
    family = FAMILIES.get(architecture)
    if family is None or (architecture == "llama" and not said.get("llama.expert_count")):
        raise ValueError(
            f"{file.name} is of the architecture {architecture!r}; moelab reads GGUF files of the "
            f"mixtures {', '.join(FAMILIES)}, and of others their safetensors checkpoint"
        )
    beside = file.parent / "config.json"
    shapes = {t.name: tuple(map(int, reversed(t.shape))) for p in parts for t in _reader(p).tensors}
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


def _small(field: Any) -> bool:
    return len(field.data) <= 1  # tokens and merges are the tokenizer's


def _config(
    family: Family, architecture: str, said: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """config.json of what the header says; sizes that it leaves out are those of its tensors."""
    known = {
        name: said[f"{architecture}.{key}"]
        for key, name in SIZES.items()
        if f"{architecture}.{key}" in said
    }
    experts = next(shape for name, shape in shapes.items() if name.endswith("ffn_up_exps.weight"))
    known |= {family.count: experts[0], "moe_intermediate_size": experts[1]}
    if architecture in ("olmoe", "llama"):
        known["intermediate_size"] = known.pop("moe_intermediate_size")
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
