"""A layer's routing as requests: unique experts, ranked, with HOBBIT's unimportance score."""

from __future__ import annotations

from collections.abc import Sequence

from moelab.scheduling.stream import Request
from moelab.scheduling.trace import LayerInput


def requests(given: LayerInput) -> list[Request]:
    """The layer's unique experts: a token's by falling weight, a prompt's by falling use."""
    if not given.prefill and len(given.experts) == 1:
        return ranked(given.experts[0], given.weights[0], given.layer)
    seen: dict[int, list[float]] = {}
    for row, weights in zip(given.experts, given.weights, strict=True):
        for expert, weight in zip(row, weights, strict=True):
            seen.setdefault(expert, []).append(weight)
    order = sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Request(e, max(w), tokens=len(w), layer=given.layer) for e, w in order]


def ranked(experts: Sequence[int], weights: Sequence[float], layer: int = 0) -> list[Request]:
    """One token's requests: weights normalised to sum 1, HOBBIT's score = weights ranked before."""
    total = sum(abs(w) for w in weights) or 1.0
    pairs = sorted(zip(experts, weights, strict=True), key=lambda p: (-abs(p[1]), p[0]))
    out, before = [], 0.0
    for rank, (expert, weight) in enumerate(pairs):
        share = abs(weight) / total
        out.append(Request(expert, share, rank, before, layer=layer))
        before += share
    return out
