"""ResMoE: what a layer's experts share once, and of each expert the largest differences from it.

Source: "ResMoE" (arXiv 2503.06881). An expert is a cloud of F points, one a neuron: its rows of the
gate and the up matrix and its column of the down matrix. The barycentre W_c of the E clouds is
found by turns: each cloud's neurons are put into the order T_e nearest to W_c, and W_c becomes
their mean. An expert computes the same in any order of its neurons. Of T_e W_e - W_c the largest
magnitudes stay, the others are 0. No text is read.

Not as there: the transport is one-to-one at every turn (with equal masses it is in the end), and
truncated SVD as the other way to compress what differs is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moelab.transforms.activations import Seen
from moelab.transforms.assignment import matched
from moelab.transforms.layers import Size


@dataclass(frozen=True)
class ResMoE:
    """Barycentre and pruned differences, added up and written out.

    Parameters
    ----------
    density
        Share of each expert's differences that stay.
    turns
        Of finding the barycentre, at most; it ends where no order changes.
    """

    density: float = 0.25
    turns: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density={self.density}: from 0 to 1")
        if self.turns < 1:
            raise ValueError(f"turns={self.turns}: 1 or more")

    def left(self, size: Size) -> tuple[int, int]:
        """Experts of a layer and neurons of an expert afterwards."""
        return size.experts, size.neurons

    def needed_bytes(self, size: Size) -> int:
        """Bytes of a layer: W_c, the values that stay, and a bit for each place, all values 16 bit.

        The positions are a bit map, which is smaller than a list of places from 1/16 on.
        """
        kept = round(self.density * size.each)
        return 2 * size.each + size.experts * (2 * kept + -(-size.each // 8))

    @classmethod
    def at_bits(cls, bits: float, size: Size) -> ResMoE | None:
        """With this many bits a weight at most; None where barycentre and bit map take more."""
        density = (bits - 1 - 16 / size.experts) / 16
        return cls(density=min(density, 1.0)) if density >= 0 else None

    def __call__(
        self, points: torch.Tensor, seen: Seen | None, layer: int
    ) -> tuple[torch.Tensor, None]:
        """A layer's experts ``[E, F, 3D]``, their neurons in the order of the barycentre's."""
        centre, ordered = barycentre(points, self.turns)
        return torch.stack([centre + largest(e - centre, self.density) for e in ordered]), None


def barycentre(points: torch.Tensor, turns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_c ``[F, 3D]`` of a layer, and its experts ``[E, F, 3D]`` in the order nearest to it."""
    centre, orders = points[0], None
    for _ in range(turns):
        before, orders = orders, torch.stack([matched(centre, expert) for expert in points])
        if before is not None and torch.equal(before, orders):
            break
        centre = _ordered(points, orders).mean(0)
    assert orders is not None
    return centre, _ordered(points, orders)


def _ordered(points: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    return torch.stack([expert[order] for expert, order in zip(points, orders, strict=True)])


def largest(weights: torch.Tensor, density: float) -> torch.Tensor:
    """The largest magnitudes of a tensor, as many as ``density`` says; all others 0."""
    kept = round(density * weights.numel())
    out, flat = torch.zeros(weights.numel()), weights.flatten()
    at = flat.abs().topk(kept).indices
    out[at] = flat[at]
    return out.view_as(weights)
