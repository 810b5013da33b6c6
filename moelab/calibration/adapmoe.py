"""AdapMoE's calibration: how sensitive each layer is, and how its hits grow with its cache.

The paper sums Fisher information to get the sensitivity h_l of a layer, which takes gradients and
the experts' weights in memory. Here it is measured, forwards only: every token's experts but the
first are left out of layer l alone, and what that costs in KL divergence is set to ½·h_l·w²:

    h_l = 2 · mean KL / mean Σ w²        (w: normalised gate weights of the experts left out)

Hit ratios are counted on a recorded trace: an LRU cache of c experts hits whatever was among the
last c used of its layer (Mattson's stack distance), so one pass gives every size at once. τ is the
value at which the gate would leave out `LEFT_OUT` of all activations, as in the paper.

T tokens, K active, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from moelab.calibration.measure import digest_of, record, texts_of
from moelab.engine.generation import Stream
from moelab.runs.quality import kl_divergence
from moelab.scheduling.trace import Trace

if TYPE_CHECKING:
    from moelab.calibration.profile import Partial
    from moelab.engine.engine import Engine
    from moelab.lab import Lab

LEFT_OUT = 0.25
"""Share of the activations that the paper's gate saves without loss of accuracy."""


class FirstOnly:
    """Inside, one layer's experts count for nothing but each token's first.

    Attributes
    ----------
    squares
        Σ w² of the experts left out so far.
    """

    def __init__(self, engine: Engine, layer: int) -> None:
        self._adapter, self._layer = engine.adapter, layer
        self._serve = engine.adapter._run_layer
        self.squares = 0.0

    def __enter__(self) -> Self:
        self._adapter._run_layer = self._run
        return self

    def __exit__(self, *_: object) -> None:
        self._adapter._run_layer = self._serve

    def _run(
        self,
        layer: int,
        x: torch.Tensor,  # [T, D]
        idx: torch.Tensor,  # [T, K]
        weights: torch.Tensor,  # [T, K]
        scale_input: bool,
    ) -> torch.Tensor:
        if layer == self._layer:
            share = weights.float().abs()
            share = share / share.sum(-1, keepdim=True).clamp_min(1e-9)
            first = torch.zeros_like(share).scatter_(-1, share.argmax(-1, keepdim=True), 1)
            self.squares += float((share * (1 - first)).square().sum())
            weights = weights * first.to(weights.dtype)
        return self._serve(layer, x, idx, weights, scale_input)


def costs_of_first_only(engine: Engine, ids: Sequence[int]) -> list[tuple[float, float]]:
    """(KL divergence, Σ w² left out) of each layer over the positions of one text, as sums."""

    def logits() -> torch.Tensor:  # [T, V]
        return Stream(engine).forward(ids, keep=len(ids))

    out = []
    with engine.full_precision():
        full = logits()
        for layer in range(engine.shape.layers):
            with FirstOnly(engine, layer) as only:
                out.append((float(kl_divergence(full, logits()).sum()), only.squares))
    return out


def hit_ratios(trace: Trace) -> list[list[float]]:
    """Share of the decoded requests of layer l that an LRU of c experts would hit, ``[L][E + 1]``.

    Each layer has a cache of its own, as in AdapMoE and mixtral-offloading. The experts of one
    token count as used in the order of their rank.
    """
    stacks: list[list[int]] = [[] for _ in trace.shape.experts]
    hits = [np.zeros(count + 1) for count in trace.shape.experts]
    asked = np.zeros(trace.shape.layers)
    for given in trace.steps:
        stack, wanted = stacks[given.layer], [r.expert for r in given.requests()]
        depths = [stack.index(e) + 1 for e in wanted if e in stack]  # before this step moves any
        for expert in wanted:
            if expert in stack:
                stack.remove(expert)
            stack.insert(0, expert)
        if not given.prefill:
            asked[given.layer] += len(wanted)
            for depth in depths:
                hits[given.layer][depth:] += 1
    return [(row / max(n, 1)).tolist() for row, n in zip(hits, asked, strict=True)]


def tau_for(trace: Trace, h: Sequence[float], left_out: float = LEFT_OUT) -> float:
    """τ at which the gate leaves out this share of the decoded activations.

    An expert goes where h·w² < τ, never the first: so τ is a quantile of h·w² over the others.
    """
    asked = [r for s in trace.steps if not s.prefill for r in s.requests()]
    others = [max(h[r.layer], 0.0) * r.weight**2 for r in asked if r.rank > 0]
    if not others:
        return 0.0
    return float(np.quantile(others, min(1.0, left_out * len(asked) / len(others))))


def made_from(
    lab: Lab, *, texts: Sequence[str] | None = None, max_tokens: int = 128
) -> dict[str, Any]:
    """Everything the profile depends on.

    Parameters
    ----------
    lab
        Its model is measured, whatever its settings are.
    texts
        To measure and record on; default the model's own probes.
    max_tokens
        Tokens taken of each text.
    """
    return {
        "texts": digest_of(texts_of(lab, texts)),
        "max_tokens": max_tokens,
        "left_out": LEFT_OUT,
    }


def make(
    lab: Lab,
    *,
    progress: bool,
    partial: Partial,
    texts: Sequence[str] | None = None,
    max_tokens: int = 128,
) -> dict[str, Any]:
    """``h`` ``[L]``, ``hits`` ``[L][E + 1]`` and ``tau``; options as in `made_from`.

    Raises
    ------
    ValueError
        There is no text to measure on.
    """
    given, engine = texts_of(lab, texts), lab._engine
    costs = np.zeros((engine.shape.layers, 2))  # KL and Σ w², sums over all positions
    positions = 0
    for i, text in enumerate(tqdm(given, disable=not progress, desc="adapmoe")):
        ids = lab._encode(text)[:max_tokens]
        positions += len(ids)
        found = partial.get(f"text {i}")
        if found is None:
            found = costs_of_first_only(engine, ids)
            partial.put(f"text {i}", found)
        costs += found
    h = [2 * kl / squares if squares else 0.0 for kl, squares in costs.tolist()]
    trace = record(lab, given, tokens=max_tokens)
    return {
        "h": h,
        "hits": hit_ratios(trace),
        "tau": tau_for(trace, h),
        "kl_of_first_only": (costs[:, 0] / max(positions, 1)).tolist(),
    }
