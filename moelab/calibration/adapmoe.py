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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from moelab.calibration.probes import Text, read, record
from moelab.calibration.profile import Kept, once
from moelab.engine.generation import Ids, Stream
from moelab.runs.quality import kl_divergence
from moelab.scheduling.trace import Trace

if TYPE_CHECKING:
    from moelab.engine.engine import Engine
    from moelab.lab import Lab

LEFT_OUT = 0.25
"""Share of the activations that the paper's gate saves without loss of accuracy."""


@contextmanager
def first_only(engine: Engine, layer: int) -> Iterator[list[float]]:
    """Inside, one layer's experts count for nothing but each token's first; lists Σ w² left out."""
    adapter, serve, squares = engine.adapter, engine.adapter._run_layer, []

    def run(at: int, x: Any, idx: Any, weights: torch.Tensor, scale_input: bool) -> torch.Tensor:
        if at == layer:
            share = weights.float().abs()  # [T, K]
            share = share / share.sum(-1, keepdim=True).clamp_min(1e-9)
            first = torch.zeros_like(share).scatter_(-1, share.argmax(-1, keepdim=True), 1)
            squares.append(float((share * (1 - first)).square().sum()))
            weights = weights * first.to(weights.dtype)
        return serve(at, x, idx, weights, scale_input)

    adapter._run_layer = run
    try:
        yield squares
    finally:
        adapter._run_layer = serve


def costs_of_first_only(engine: Engine, ids: Ids) -> list[tuple[float, float]]:
    """(KL divergence, Σ w² left out) of each layer over the positions of one text, as sums."""

    def logits() -> torch.Tensor:  # [T, V]
        return Stream(engine, ids.source).forward(ids, keep=len(ids))

    out = []
    with engine.full_precision():
        full = logits()
        for layer in range(engine.shape.layers):
            with first_only(engine, layer) as squares:
                out.append((float(kl_divergence(full, logits()).sum()), sum(squares)))
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


def made_from(lab: Lab, *, max_tokens: int = 128) -> dict[str, Any]:  # noqa: ARG001
    """What the profile depends on besides the texts."""
    return {"max_tokens": max_tokens, "left_out": LEFT_OUT}


def make(
    lab: Lab, texts: Sequence[Text], made: dict[str, Any], kept: Kept, *, progress: bool
) -> dict[str, Any]:
    """``h`` ``[L]``, ``hits`` ``[L][E + 1]``, ``tau`` and the mean KL that gave h."""
    engine, tokens = lab._engine, made["max_tokens"]
    costs = np.zeros((engine.shape.layers, 2))  # KL and Σ w², sums over all positions
    positions = 0
    for i, text in enumerate(tqdm(texts, disable=not progress, desc="adapmoe")):
        ids = read(lab, text, tokens)
        positions += len(ids)
        costs += once(kept, f"text {i}", partial(costs_of_first_only, engine, ids))
    h = [2 * kl / squares if squares else 0.0 for kl, squares in costs.tolist()]
    trace = record(lab, texts, tokens=tokens)
    return {
        "h": h,
        "hits": hit_ratios(trace),
        "tau": tau_for(trace, h),
        "kl_of_first_only": (costs[:, 0] / max(positions, 1)).tolist(),
    }
