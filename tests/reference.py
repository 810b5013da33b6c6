"""What the tests hold a layer and a run against: layers without the engine, logits by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moelab.engine.generation import Decoder
from moelab.models.adapter import attach, expert_forward, load_skeleton
from moelab.models.checkpoint import ExpertReader


class Served:
    """A skeleton that gets every expert from its checkpoint; `seen` is told of every layer."""

    def __init__(self, folder: Path) -> None:
        self.model = load_skeleton(folder, dtype=torch.float32)
        self.reader = ExpertReader(self.model, folder)
        self.adapter = attach(self.model, self.run)

    def run(self, layer, x, idx, weights, scale_input):
        facts = self.adapter.layers[layer]
        assert idx.shape == weights.shape == (len(x), facts.top_k)
        self.seen(layer, idx, weights)
        fetch = lambda expert: self.reader(layer, expert)  # noqa: E731
        return run_experts(facts.module, x, idx, weights, fetch, scale_input=scale_input)


def run_experts(
    module: Any,
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    fetch: Callable[[int], dict[str, torch.Tensor]],
    *,
    scale_input: bool = False,
) -> torch.Tensor:
    """Run one whole layer, summing in the order of transformers' eager implementation.

    Parameters
    ----------
    module
        The layer's experts module.
    x
        Input, [T, D].
    idx, weights
        The router's choice, [T, K]. Indices outside 0..E-1 and weights of 0 are not fetched.
    fetch
        expert -> its tensors by name.
    scale_input
        The weight multiplies the expert's input instead of its output (Llama 4).

    Returns
    -------
    Tensor
        [T, D], in the type of `x`.
    """
    out = torch.zeros_like(x)
    active = (idx >= 0) & (idx < module.num_experts) & (weights != 0)  # [T, K]
    for expert in torch.unique(idx[active]).tolist():
        position, token = torch.where(((idx == expert) & active).T)
        share = weights[token, position, None]
        rows = x[token]
        y = expert_forward(module, rows * share if scale_input else rows, fetch(expert))
        out.index_add_(0, token, (y if scale_input else y * share).to(out.dtype))
    return out


def logits_of(lab: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The engine's logits after the prompt and after each of these tokens, ``[T + 1, V]``."""
    lab._engine.new_sequence()
    decoder, steps = Decoder(lab._engine), []
    for new in (prompt, *([token] for token in tokens)):
        steps.append(decoder.step(new).clone())
        lab._engine.end_of_token()
    return torch.stack(steps)
