"""From a trained student to files: a small delta to ship, and a stock checkpoint to run.

The delta holds what is not in the dense model: routers, norms, low-rank corrections and the order
of the neurons. Dense model and delta together give the student back; the student, its corrections
merged into the matrices, is a `Glm4MoeForCausalLM`, which transformers knows: sigmoid scores,
weights normalised over the chosen experts and scaled by their number, a shared expert, and the
plain rotary attention of Llama. One delta makes a checkpoint for any number of active experts.

Letters: D model width, F neurons, E experts, W an expert's width.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moelab.store.destination import check_room, partial_folder, remove_stale
from moelab.training.moefy.grouping import Grouping
from moelab.training.moefy.student import Adapted, MaskedMoE, Shape, Student

__all__ = ["load_delta", "materialise", "save_delta"]

_FORMAT = "moelab-delta-2"
_SAMPLE = "dense.sample"


def save_delta(
    student: Student, path: str | os.PathLike[str], *, facts: dict[str, Any] | None = None
) -> int:
    """Write a student's delta as one safetensors file of half precision; its size in bytes.

    Parameters
    ----------
    student
        A trained student.
    path
        The file, replaced as a whole.
    facts
        Anything JSON holds: what it was made from, and how.

    Raises
    ------
    ValueError
        A value is not finite in half precision.
    """
    path = Path(path)
    tensors = {
        name: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for name, value in student.delta().items()
    }
    bad = [n for n, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]} holds values that are not finite; train at a lower rate")
    tensors[_SAMPLE] = student.sample()
    metadata = {
        "format": _FORMAT,
        "shape": json.dumps(student.facts()),
        "facts": json.dumps(facts or {}),
    }
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)
    return path.stat().st_size


def load_delta(dense: Any, path: str | os.PathLike[str]) -> tuple[Student, dict[str, Any]]:
    """The student that a delta makes of its dense model, and the facts kept with it.

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
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a {_FORMAT} file; make one with save_delta")
    entries = json.loads(metadata["shape"])
    shape = Shape(**{**entries, "ranks": tuple(entries["ranks"])})
    layers, neurons = dense.config.num_hidden_layers, dense.config.intermediate_size
    orders = [value.long() for name, value in _by_layer(tensors) if name.endswith(".mlp.order")]
    other = (
        f"{path} was made from another model than this one of {layers} layers with {neurons} "
        f"neurons; load the model named in its facts: {metadata['facts']}"
    )
    if [len(order) for order in orders] != [neurons] * layers:
        raise ValueError(other)
    groupings = [Grouping(order, shape.shared, shape.experts) for order in orders]
    student = Student(dense, groupings, shape).eval()
    if not torch.allclose(student.sample(), tensors[_SAMPLE], rtol=1e-3, atol=1e-6):
        raise ValueError(other)
    try:
        student.load_delta(tensors)
    except ValueError as error:
        raise ValueError(f"{other} ({error})") from error
    return student, json.loads(metadata["facts"])


def _by_layer(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Sorted by the numbers in their names."""
    return sorted(tensors.items(), key=lambda pair: [int(n) for n in re.findall(r"\d+", pair[0])])


def config(dense: Any, shape: Shape, top_k: int) -> Any:
    """The Glm4Moe configuration of a student with ``top_k`` active experts."""
    from transformers import Glm4MoeConfig

    theirs = dense.config
    width = shape.width(theirs.intermediate_size)
    heads, attention = theirs.num_attention_heads, dense.model.layers[0].self_attn
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    settings: dict[str, Any] = {name: getattr(theirs, name) for name in kept}
    settings["head_dim"] = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    result = Glm4MoeConfig(
        **settings,
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
def stock(dense: Any, student: Student, *, top_k: int, dtype: torch.dtype = torch.float32) -> Any:
    """The student as transformers' own model.

    Parameters
    ----------
    dense
        The model it was made from; its weights are not read.
    student
        A trained student.
    top_k
        Active experts.
    dtype
        Of its weights, but for the routers, which stay in float32.
    """
    from transformers import Glm4MoeForCausalLM

    with torch.device("meta"):
        model = Glm4MoeForCausalLM(config(dense, student.shape, top_k)).eval()
    state = {
        name: value.to(torch.float32 if ".mlp.gate." in name else dtype, copy=True).contiguous()
        for name, value in _merged(student)
    }
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config)  # its frequencies are in no state dict
    return model


def _merged(student: Student) -> Iterator[tuple[str, torch.Tensor]]:
    """Glm4Moe's tensors one by one, so that only one is held in float32."""
    for name, value in student.model.state_dict().items():
        if "self_attn" not in name and ".mlp." not in name:
            yield name, value
    for i, layer in enumerate(student.model.model.layers):
        for name, part in layer.self_attn.named_children():
            key = f"model.layers.{i}.self_attn.{name}"
            yield f"{key}.weight", part.merged() if isinstance(part, Adapted) else part.weight
            if isinstance(bias := getattr(part, "bias", None), torch.Tensor):
                yield f"{key}.bias", bias
        for name, value in _experts(layer.mlp).items():
            yield f"model.layers.{i}.mlp.{name}", value


def _experts(mixture: MaskedMoE) -> dict[str, torch.Tensor]:
    """One layer's tensors under Glm4Moe's names."""
    shared, count = mixture.shape.shared, mixture.shape.experts
    gate, up = mixture.gate_up.merged().chunk(2)  # [F, D]
    down = mixture.down.merged()  # [D, F]
    width = (len(gate) - shared) // count
    routed = [part[shared:].view(count, width, -1) for part in (gate, up)]  # [E, W, D]
    return {
        "gate.weight": mixture.router,
        "gate.e_score_correction_bias": mixture.bias,
        "experts.gate_up_proj": torch.cat(routed, 1),
        "experts.down_proj": down[:, shared:].view(len(down), count, width).transpose(0, 1),
        "shared_experts.gate_proj.weight": gate[:shared],
        "shared_experts.up_proj.weight": up[:shared],
        "shared_experts.down_proj.weight": down[:, :shared],
    }


def materialise(
    dense: Any,
    student: Student,
    folder: str | os.PathLike[str],
    *,
    top_k: int,
    tokenizer: Any | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the student as a checkpoint folder that `AutoModelForCausalLM` and moelab open.

    The folder appears whole or not at all; one that is there already is replaced.

    Parameters
    ----------
    dense
        The model it was made from.
    student
        A trained student.
    folder
        To write to.
    top_k
        Active experts.
    tokenizer
        Saved beside the model, with its chat template.
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
    remove_stale(folder)
    tensors = {v.data_ptr(): v.nbytes for v in model.state_dict().values()}  # a tied one once
    check_room(folder, sum(tensors.values()), "the checkpoint")
    with partial_folder(folder) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        old = folder.with_name(f"{folder.name}.partial-old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return folder
