"""A layer's routing as tuples and arrays, and the shape of a store for those who decide."""

from __future__ import annotations

import torch

from moelab.scheduling.stream import Shape
from moelab.store.store import Store


class Routed:
    """A layer's routing without what counts for nothing (out of range, weight 0).

    ``experts`` and ``weights`` are tuples ``[T][<=K]``; ``idx`` and ``gates`` numpy ``[T, K]``.
    """

    __slots__ = ("experts", "gates", "idx", "weights")

    def __init__(self, idx: torch.Tensor, weights: torch.Tensor, count: int) -> None:
        self.idx = idx.numpy()
        self.gates = weights.float().numpy()
        rows = list(zip(self.idx.tolist(), self.gates.tolist(), strict=True))
        kept = [[(e, w) for e, w in zip(*r, strict=True) if 0 <= e < count and w] for r in rows]
        self.experts = tuple(tuple(e for e, _ in r) for r in kept)
        self.weights = tuple(tuple(w for _, w in r) for r in kept)


def shape_of(store: Store) -> Shape:
    """What the scheduler must know of a store."""
    return Shape(tuple(store.experts_per_layer), store.top_k, dict(store.slot_bytes))
