"""A GGUF file as a checkpoint: its tensors under transformers' names, one expert at a time.

`gguf_header` makes a folder of what the file says besides; `GgufCheckpoint` reads weights from the
file itself. What is stored in 16 or 32 bits keeps its values; quantised blocks are unpacked by the
`gguf` package, or handed on as they are (`raw`). What it does not know: families whose names are
not in `FAMILIES`, and what a block means (`moelab.store.blocks`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moelab.models.shards import _CHUNK, DTYPES, GGUF, Checkpoint, TensorInfo

ATTENTION = {
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FREQS = "rope_freqs.weight"
"""What divides the frequencies of rotary embeddings; the header's reader takes it in."""
BARE = {
    **dict.fromkeys(("self_attn.sinks", "layer_scalar"), "weight"),
    "block_sparse_moe.e_score_correction_bias": "bias",
    **dict.fromkeys(("router.scale", "router.per_expert_scale"), "scale"),
}
"""What is no weight of a module in transformers, and its ending in a file."""


@dataclass(frozen=True)
class Family:
    """How one architecture of llama.cpp is called in transformers.

    ``layer`` has names within a layer, ``experts`` those of each expert's matrices; ``more`` is
    said in config.json besides, ``count`` and ``inner`` what it calls the number and the width of
    experts; ``permuted``: rows of queries and keys lie in pairs, as llama.cpp's rotary embedding
    has them; ``fused``: experts are one tensor [E, in, out], rows of gate and up in turn;
    ``whole``: one tensor [E, out, in], as in the file.
    """

    model_type: str
    architecture: str
    layer: dict[str, str]
    experts: dict[str, str]
    more: dict[str, Any]
    count: str = "num_experts"
    inner: str = "moe_intermediate_size"
    permuted: bool = False
    fused: bool = False
    whole: bool = False
    top_k: str = "num_experts_per_tok"


_PARTS = {x: f"mlp.experts.{{}}.{x}_proj" for x in ("gate", "up", "down")}
_MIXTRAL = {
    x: f"block_sparse_moe.experts.{{}}.{w}"
    for x, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
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
        inner="intermediate_size",
    ),
    "llama": Family(
        "mixtral",
        "MixtralForCausalLM",
        {"ffn_gate_inp": "block_sparse_moe.gate"},
        _MIXTRAL,
        {},
        count="num_local_experts",
        inner="intermediate_size",
        permuted=True,
    ),
    "minimax-m2": Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {
            "ffn_gate_inp": "block_sparse_moe.gate",
            "exp_probs_b": "block_sparse_moe.e_score_correction_bias",
        },
        _MIXTRAL,
        {},
        count="num_local_experts",
        inner="intermediate_size",
    ),
    "gpt-oss": Family(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "ffn_gate_inp": "mlp.router",
            "attn_sinks": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
        },
        {x: f"mlp.experts.{x}_proj" for x in ("gate", "up", "down")},
        {},
        count="num_local_experts",
        inner="intermediate_size",
        fused=True,
    ),
    "gemma4": Family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        _DENSE
        | {
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            "layer_output_scale": "layer_scalar",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm": "post_feedforward_layernorm",
            **{f"post_ffw_norm_{i}": f"post_feedforward_layernorm_{i}" for i in (1, 2)},
        },
        {x: f"experts.{x}_proj" for x in ("gate_up", "down")},
        {"enable_moe_block": True, "hidden_size_per_layer_input": 0},
        whole=True,
        top_k="top_k_experts",
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

    resumes = True

    def __init__(self, path: Path) -> None:
        self.path = path
        note = json.loads((path / GGUF).read_text("utf-8"))
        self.files = [Path(file) for file in note["files"]]
        self.info = {}
        self._parts: dict[str, GgufInfo] = {}  # of fused experts, one by one
        self._note = note
        self._family = FAMILIES[note["architecture"]]
        for number, file in enumerate(self.files):
            for tensor in open_reader(file).tensors:
                self._add(number, tensor)
        for name, part in self._parts.items():
            stem, _, expert = name.rpartition(".")
            if self._family.fused and expert == "0" and ".up_proj" not in stem:
                self._fuse(stem, part)

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

    def row(self, key: str, index: int, *, raw: bool = False) -> torch.Tensor:
        """Read `weight[index : index + 1]` of experts that transformers has as one tensor.

        ``raw``: of blocks their bytes, as rows of the file.
        """
        read = self.raw if raw else self.weight
        if self._family.whole:
            return read(f"{key}.{index}")[None]
        stems = dict.fromkeys(key.replace("gate_up_proj", f"{x}_proj") for x in ("gate", "up"))
        whole = torch.stack([read(f"{stem}.{index}") for stem in stems], 1).flatten(0, 1)
        return (whole.T if whole.ndim == 2 and whole.dtype != torch.uint8 else whole)[None]

    def _bytes(self, key: str) -> tuple[GgufInfo, np.ndarray]:
        info = self._parts[key] if key in self._parts else self.info[key]
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
            fused = self._family.fused or self._family.whole
            into = self._parts if fused and re.search(r"_exps\.[wb]", tensor.name) else self.info
            into[name] = GgufInfo(shard, dtype, own, start, start + each, tensor.tensor_type, heads)
            if into is self._parts and self._family.whole and i == 0:
                every = replace(into[name], shape=shape, stop=start + tensor.n_bytes)
                self.info[name.removesuffix(".0")] = every

    def _fuse(self, stem: str, first: GgufInfo) -> None:
        """Enter the one tensor [E, in, out] that transformers has of these parts."""
        experts = sum(name.rpartition(".")[0] == stem for name in self._parts)
        gated = ".gate_proj" in stem
        shape = (experts, *first.shape[1:], first.shape[0] * (2 if gated else 1))
        self.info[stem.replace("gate_proj", "gate_up_proj")] = replace(first, shape=shape)

    def _named(self, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """(transformers' name, shape) of what a tensor holds: one, or one of each expert."""
        family = self._family
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias|scale)", name)
        if name == ROPE_FREQS:
            return []
        if found is None:
            stem, _, end = name.rpartition(".")
            return [(f"{ENDS[stem]}.{end}" if stem in ENDS else name, shape)]
        layer, stem, end = found.groups()
        prefix = f"model.layers.{layer}"
        expert = end != "scale" and re.fullmatch(r"ffn_(gate|up|down|gate_up)_exps", stem)
        if expert and (family.fused or family.whole):
            part = family.experts[expert[1]] + ("_bias" if end == "bias" else "")
            return [(f"{prefix}.{part}.{e}", shape[1:]) for e in range(shape[0])]
        if expert and end == "weight":
            parts = family.experts[expert[1]]
            return [(f"{prefix}.{parts.format(e)}.weight", shape[1:]) for e in range(shape[0])]
        stem += ".scale" * (end == "scale")
        own = (ATTENTION | family.layer).get(stem, stem)
        if own.endswith("shared_expert_gate") and len(shape) == 1:
            shape = (1, *shape)
        if own in BARE:
            return [(f"{prefix}.{own}", shape)]
        return [(f"{prefix}.{own}.{end}", shape)]


def open_reader(file: Path) -> Any:
    """The file's header and where its tensors lie.

    Raises
    ------
    ImportError
        The package that reads it is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{file} is a GGUF file, which needs: pip install gguf") from error
    return GGUFReader(file)
