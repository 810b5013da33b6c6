"""The mixture while it is being trained: a dense feed-forward layer with a mask.

All neurons are computed and those of unchosen experts are multiplied by zero. That costs what the
dense layer costs, gathers nothing, and lets a gradient reach the experts that were *not* chosen:
near the threshold, the choice is treated as if it were smooth (a straight-through estimate). The
dense weights stay frozen; what trains is the router, the norms and low-rank corrections, small
enough to ship. The routing is Glm4Moe's: sigmoid scores, a bias for the choice only, weights
normalised over the chosen and scaled by their number.

Letters: T tokens, D model width, F neurons, E experts, K active, R rank.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from moelab.demo.mixture import FORMAT, SAMPLE, Delta, Shape, sample

ROUTER = ("mlp.router", "mlp.bias")
"""How the names of a router's parameters end."""

_SOFTNESS = 0.05  # of the straight-through threshold, in units of sigmoid scores


class Adapted(nn.Module):
    """A frozen matrix, and bias, with a trainable low-rank correction: ``x (W + B A)^T + bias``."""

    def __init__(self, weight: torch.Tensor, rank: int, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = bias  # the copy's own, frozen with it
        self.a = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, inputs]`` to ``[T, outputs]``."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)

    def merged(self) -> torch.Tensor:
        """The corrected matrix."""
        return self.weight + self.b @ self.a


class MaskedMoE(nn.Module):
    """One feed-forward layer as a mixture, computed densely under a mask.

    ``top_k`` are its active experts; a tensor ``[batch]`` gives each sequence its own number.
    """

    order: torch.Tensor

    def __init__(self, mlp: Any, order: torch.Tensor, shape: Shape) -> None:
        super().__init__()
        gate, up, down = (getattr(mlp, f"{n}_proj").weight for n in ("gate", "up", "down"))
        self.register_buffer("order", order)
        self.shape, self.width = shape, shape.width(len(order))
        self.gate_up = Adapted(torch.cat([gate[order], up[order]]), shape.ranks[1])
        self.down = Adapted(down[:, order], shape.ranks[2])
        self.router = nn.Parameter(torch.zeros(shape.experts, gate.shape[1]))
        self.bias = nn.Parameter(torch.zeros(shape.experts))
        self.top_k: int | torch.Tensor = shape.experts

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """Gate weights ``[batch, T, E]``: zero where an expert is not chosen, 1 on average."""
        return route(torch.sigmoid(F.linear(x, self.router)), self.bias, self.top_k)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The neurons' activations before the mask, ``[batch, T, F]``."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return F.silu(gate) * up

    def masked(self, x: torch.Tensor) -> torch.Tensor:
        """The neurons' activations times their expert's gate weight."""
        gates = self.gates(x)
        mask = gates.unsqueeze(-1).expand(*gates.shape, self.width).flatten(-2)
        shared, routed = self.hidden(x).split([self.shape.shared, mask.shape[-1]], -1)
        return torch.cat([shared, routed * mask], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, T, D]`` to the same."""
        return self.down(self.masked(x))


def route(scores: torch.Tensor, bias: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
    """Glm4Moe's gate weights from sigmoid scores, with a gradient for the choice itself.

    ``scores`` are ``[..., E]``; ``bias``, ``[E]``, is added for the choice only; ``top_k`` is one
    number, or an int64 tensor ``[batch]`` for scores ``[batch, T, E]``.
    """
    if isinstance(top_k, int):
        top_k = torch.full((len(scores),), top_k)
    active = top_k.view(-1, *[1] * (scores.dim() - 1))  # a number per leading index
    choice = scores + bias
    ranked = choice.sort(-1, descending=True).values
    last = (active - 1).expand(*scores.shape[:-1], 1)
    high = ranked.gather(-1, last)
    low = ranked.gather(-1, (last + 1).clamp(max=scores.shape[-1] - 1))
    hard = (choice >= high).to(scores.dtype)
    soft = torch.sigmoid((choice - (low + high) / 2) / _SOFTNESS)
    weights = scores * (hard + soft - soft.detach())
    return weights * (active / (scores * hard).sum(-1, keepdim=True))


class Student(nn.Module):
    """A dense Llama-like model with masked mixtures for feed-forward layers.

    Parameters
    ----------
    dense
        The model to start from; it is copied, and its weights are frozen in the copy.
    orders
        Of each layer's neurons, as in a `Delta`.
    shape
        What the mixture looks like.
    """

    model: Any

    def __init__(self, dense: nn.Module, orders: Sequence[torch.Tensor], shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = copy.deepcopy(dense).requires_grad_(requires_grad=False)
        for layer, order in zip(self.model.model.layers, orders, strict=True):
            layer.mlp = MaskedMoE(layer.mlp, order.long(), shape)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                dense_one = getattr(layer.self_attn, name)
                adapted = Adapted(dense_one.weight, shape.ranks[0], dense_one.bias)
                setattr(layer.self_attn, name, adapted)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.requires_grad_()
        self.model.model.norm.weight.requires_grad_()

    @property
    def mixtures(self) -> list[MaskedMoE]:
        """The feed-forward layers, in order."""
        return [layer.mlp for layer in self.model.model.layers]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, by name."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def delta(self) -> Delta:
        """Everything that is not in the dense model: what trained, and the neurons' order."""
        tensors = {name: p.detach() for name, p in self.trained()}
        if not tensors:
            raise ValueError("a student that was rounded has no delta; save it before")
        for i, mixture in enumerate(self.mixtures):
            tensors[f"model.layers.{i}.mlp.order"] = mixture.order.to(torch.int32)
        return Delta(self.shape, tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> Student:
        """Put a delta's values in place, whose order of neurons must be this one's; itself.

        Raises
        ------
        ValueError
            A tensor is missing or has another shape.
        """
        for name, parameter in self.trained():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = list(tensors[name].shape) if name in tensors else "missing"
                raise ValueError(f"{name} is {found}, not {list(parameter.shape)}")
            parameter.copy_(tensors[name])
        return self

    @torch.no_grad()
    def rounded(self, dtype: torch.dtype) -> Student:
        """Round in place what a checkpoint of this type would round; itself, to be measured only.

        Routers stay as they are: where two experts are nearly equal, a rounded one chooses
        another.
        """
        for module in self.model.modules():
            if isinstance(module, Adapted):
                module.weight.copy_(module.merged())
                module.b.zero_()
        for name, parameter in self.model.named_parameters():
            if not name.endswith(ROUTER):
                parameter.copy_(parameter.to(dtype))
        self.requires_grad_(requires_grad=False)
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids ``[batch, T]`` to the last hidden states ``[batch, T, D]``."""
        return self.model.model(ids, use_cache=False).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states to logits."""
        return self.model.lm_head(hidden)


def set_top_k(student: Student, top_k: int | torch.Tensor) -> None:
    """Set the number of active experts in every layer."""
    for mixture in student.mixtures:
        mixture.top_k = top_k


def orders(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The order of the neurons of each layer in a delta's tensors."""
    count = sum(name.endswith(".mlp.order") for name in tensors)
    return [tensors[f"model.layers.{i}.mlp.order"] for i in range(count)]


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
    path, tensors = Path(path), {}
    for name, value in student.delta().tensors.items():
        tensors[name] = (value.half() if value.is_floating_point() else value).contiguous()
        if value.is_floating_point() and not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; train at a lower rate")
    shape = json.dumps(asdict(student.shape))
    metadata = {"format": FORMAT, "shape": shape, "facts": json.dumps(facts or {})}
    partial = path.with_name(f"{path.name}.partial")
    save_file({**tensors, SAMPLE: sample(student.model)}, partial, metadata=metadata)
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
    delta = Delta.load(path, dense)
    student = Student(dense, orders(delta.tensors), delta.shape).eval()
    return student.load(delta.tensors), delta.facts
