"""A dense language model and a delta become a stock mixture of experts.

The delta holds what `moelab.moefy` learnt and the dense model does not have: routers, norms,
low-rank corrections and the order of the neurons. Merged into the dense matrices it is a
`Glm4MoeForCausalLM`, which transformers knows: sigmoid scores, weights normalised over the chosen
experts and scaled by their number, a shared expert, and the plain rotary attention of Llama. One
delta makes a checkpoint for any number of active experts.

Letters: D model width, F neurons, E experts, W an expert's width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moelab.store.destination import check_room, move, partial_folder, remove_stale

FORMAT, SAMPLE = "moelab-delta-2", "dense.sample"
"""What a delta's file says it is, and under which name it knows its dense model again."""


@dataclass(frozen=True)
class Shape:
    """What the mixture looks like.

    Parameters
    ----------
    experts
        Routed experts per layer.
    shared
        Neurons of the shared expert, a multiple of an expert's width.
    ranks
        Ranks of the low-rank corrections of the attention matrices, of gate and up (one for
        both), and of down.
    """

    experts: int = 16
    shared: int = 512
    ranks: tuple[int, int, int] = (16, 32, 64)

    def __post_init__(self) -> None:
        if self.experts < 2 or len(self.ranks) != 3 or min(self.ranks) < 1:
            raise ValueError(f"{self} needs at least 2 experts and three ranks of at least 1")

    @classmethod
    def of(cls, neurons: int) -> Shape:
        """One that fits a layer of so many neurons: a third shared, about 16 experts.

        An expert's width is a multiple of 64 where that is possible, as the kernels like it.
        """
        whole = [w for w in range(1, neurons // 3 + 1) if neurons % w == 0]
        widths = [w for w in whole if w % 64 == 0] or whole
        if not widths:
            raise ValueError(f"{neurons} neurons are too few to be split into experts")
        pieces = min((neurons // w for w in widths), key=lambda count: abs(count - 24))
        shared = max(1, round(pieces / 3))
        return cls(experts=pieces - shared, shared=shared * (neurons // pieces))

    def width(self, neurons: int) -> int:
        """Neurons of one expert of a layer that has so many; a ValueError if it cannot be."""
        width, left = divmod(neurons - self.shared, self.experts)
        if left or width < 1 or self.shared % width or not self.shared:
            raise ValueError(
                f"{neurons} neurons do not split into {self.shared} shared and {self.experts} "
                "experts; the rest must divide equally, and shared be a multiple of their width. "
                f"{Shape.of(neurons)} fits"
            )
        return width

    def active(self, neurons: int, top_k: int) -> float:
        """The share of a layer's neurons that is active for a token."""
        return (self.shared + top_k * self.width(neurons)) / neurons


@dataclass(frozen=True)
class Delta:
    """What was learnt of a dense model.

    Parameters
    ----------
    shape
        The mixture's.
    tensors
        By name: of a layer's matrices ``….a`` ``[rank, inputs]`` and ``….b`` ``[outputs, rank]``,
        its norms, ``mlp.router`` ``[E, D]``, ``mlp.bias`` ``[E]`` and ``mlp.order`` ``[F]``: the
        neurons of the shared expert, then expert 0's, expert 1's and so on.
    facts
        Anything JSON holds: what it was made from, and how.
    """

    shape: Shape
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dense: Any) -> Delta:
        """Read one that was made of this dense model.

        Raises
        ------
        ValueError
            The file is no delta, is damaged, or belongs to another model.
        FileNotFoundError
            There is no such file.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); get it or make it again") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a {FORMAT} file; make one with save_delta")
        entries, known = json.loads(metadata["shape"]), tensors.pop(SAMPLE)
        shape = Shape(**{**entries, "ranks": tuple(entries["ranks"])})
        layers, neurons = dense.config.num_hidden_layers, dense.config.intermediate_size
        orders = [len(value) for name, value in tensors.items() if name.endswith(".mlp.order")]
        if orders != [neurons] * layers or not torch.allclose(
            known, sample(dense), rtol=1e-3, atol=1e-6
        ):
            raise ValueError(
                f"{path} was made from another model than this one of {layers} layers with "
                f"{neurons} neurons; load the model named in its facts: {metadata['facts']}"
            )
        return cls(shape, tensors, json.loads(metadata["facts"]))


def sample(dense: Any) -> torch.Tensor:
    """A few weights that no training changes, float32 ``[64]``, to know the dense model again."""
    first, *_, last = dense.model.layers
    parts = [layer.self_attn.q_proj.weight.flatten()[:32] for layer in (first, last)]
    return torch.cat(parts).detach().float()


def _config(dense: Any, shape: Shape, top_k: int) -> Any:
    """The Glm4Moe configuration with ``top_k`` active experts."""
    from transformers import Glm4MoeConfig

    theirs = dense.config
    width, attention = shape.width(theirs.intermediate_size), dense.model.layers[0].self_attn
    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps "
        "tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    settings: dict[str, Any] = {name: getattr(theirs, name) for name in kept.split()}
    result = Glm4MoeConfig(
        **settings | {"head_dim": attention.head_dim},
        rope_parameters={**theirs.rope_parameters, "partial_rotary_factor": 1.0},
        attention_bias=attention.q_proj.bias is not None,
        moe_intermediate_size=width,
        num_experts_per_tok=top_k,
        n_shared_experts=shape.shared // width,
        n_routed_experts=shape.experts,
        routed_scaling_factor=float(top_k),
        first_k_dense_replace=0,
        norm_topk_prob=True,
        use_qk_norm=hasattr(attention, "q_norm"),
        num_mtp_layers=0,
    )
    result.architectures = ["Glm4MoeForCausalLM"]
    return result


@torch.no_grad()
def stock(dense: Any, student: Any, *, top_k: int, dtype: torch.dtype = torch.float32) -> Any:
    """The mixture as transformers' own model; see `materialise` for the parameters."""
    from transformers import Glm4MoeForCausalLM

    delta = student if isinstance(student, Delta) else student.delta()
    with torch.device("meta"):
        model = Glm4MoeForCausalLM(_config(dense, delta.shape, top_k)).eval()
    state = {
        name: value.to(torch.float32 if ".mlp.gate." in name else dtype, copy=True).contiguous()
        for name, value in _merged(dense, delta)
    }
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config)  # its frequencies are in no state dict
    return model


def _merged(dense: Any, delta: Delta) -> Iterator[tuple[str, torch.Tensor]]:
    """Glm4Moe's tensors one by one, so that only one is held in float32."""
    norms: dict[str, Any] = delta.tensors
    for name, value in dense.state_dict().items():
        if ".self_attn." not in name and ".mlp." not in name:
            yield name, norms.get(name, value)
    for i, layer in enumerate(dense.model.layers):
        for name, part in layer.self_attn.named_children():
            key = f"model.layers.{i}.self_attn.{name}"
            yield f"{key}.weight", _corrected(part.weight, key, delta)
            if isinstance(bias := getattr(part, "bias", None), torch.Tensor):
                yield f"{key}.bias", bias
        for name, value in _experts(layer.mlp, f"model.layers.{i}.mlp", delta).items():
            yield f"model.layers.{i}.mlp.{name}", value


def _corrected(weight: torch.Tensor, key: str, delta: Delta) -> torch.Tensor:
    """A matrix with its low-rank correction, if it has one."""
    if f"{key}.a" not in delta.tensors:
        return weight
    return weight + delta.tensors[f"{key}.b"].float() @ delta.tensors[f"{key}.a"].float()


def _experts(mlp: Any, key: str, delta: Delta) -> dict[str, torch.Tensor]:
    """One layer's tensors under Glm4Moe's names."""
    order = delta.tensors[f"{key}.order"].long()
    shared, count = delta.shape.shared, delta.shape.experts
    gate_up = torch.cat([mlp.gate_proj.weight[order], mlp.up_proj.weight[order]])
    gate, up = _corrected(gate_up, f"{key}.gate_up", delta).chunk(2)  # [F, D]
    down = _corrected(mlp.down_proj.weight[:, order], f"{key}.down", delta)  # [D, F]
    width = (len(gate) - shared) // count
    routed = [part[shared:].view(count, width, -1) for part in (gate, up)]  # [E, W, D]
    return {
        "gate.weight": delta.tensors[f"{key}.router"],
        "gate.e_score_correction_bias": delta.tensors[f"{key}.bias"],
        "experts.gate_up_proj": torch.cat(routed, 1),
        "experts.down_proj": down[:, shared:].view(len(down), count, width).transpose(0, 1),
        "shared_experts.gate_proj.weight": gate[:shared],
        "shared_experts.up_proj.weight": up[:shared],
        "shared_experts.down_proj.weight": down[:, :shared],
    }


def materialise(
    dense: Any,
    student: Any,
    folder: str | os.PathLike[str],
    *,
    top_k: int,
    tokenizer: Any | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a checkpoint folder that `AutoModelForCausalLM` and moelab open.

    The folder appears whole or not at all; one that is there already is replaced.

    Parameters
    ----------
    dense
        The model that the mixture was made from, in float32.
    student
        A `Delta`, or a student of `moelab.moefy`.
    folder
        To write to.
    top_k
        Active experts.
    tokenizer
        Saved beside the model, with its chat template; without one moelab does not pack it.
    dtype
        Of the weights, but for the routers, which stay in float32.

    Raises
    ------
    ValueError
        The number of active experts is impossible.
    StoreError
        The disk is too small.
    """
    if not 1 <= top_k <= student.shape.experts:
        raise ValueError(
            f"top_k={top_k} is not possible with {student.shape.experts} experts; choose 1 to "
            f"{student.shape.experts}"
        )
    folder = Path(folder)
    model = stock(dense, student, top_k=top_k, dtype=dtype)
    model.generation_config = dense.generation_config
    tensors = {v.data_ptr(): v.nbytes for v in model.state_dict().values()}  # a tied one once
    check_room(folder, sum(tensors.values()), "the checkpoint")
    remove_stale(folder)
    with partial_folder(folder) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        move(partial, folder, overwrite=True)
    return folder
