"""PuzzleMoE: two experts share one set of magnitudes, told apart by masks and signs.

Source: "PuzzleMoE" (arXiv 2511.04805). Of a pair i, j, weight by weight,

    D      = ||Wi| - |Wj|| / (|Wi| + |Wj|),   similar where D <= tau
    A      = |W| * ||X||2, X the weight's input on sample text
    shared = (|Wi| + |Wj|) / 2 where similar, else |W| of the one with the larger A (i at equality)
    Wi     = sign(Wi) * shared where similar or Ai >= Aj, else 0;  Wj the other way round

Pairs are drawn at random. A pair's entry takes the 16 bits of one bfloat16: five of exponent, from
2**-15 up, and the three that this frees for two masks and one more sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moelab.transforms.activations import Seen
from moelab.transforms.layers import Size

LEAST = 2.0**-15
"""The smallest magnitude that five bits of exponent hold beside masks and signs."""


@dataclass(frozen=True)
class Puzzle:
    """Pairs of experts merged by masks; both are written out.

    Parameters
    ----------
    tau
        Relative difference up to which two magnitudes count as the same.
    seed
        Of the pairs.
    """

    tau: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}: from 0 to 1")

    def left(self, size: Size) -> tuple[int, int]:
        """Experts of a layer and neurons of an expert afterwards."""
        return size.experts, size.neurons

    def needed_bytes(self, size: Size) -> int:
        """Bytes of a layer as the paper packs it; where E is odd, one expert stays alone."""
        return 2 * (size.experts - size.experts // 2) * size.each

    @classmethod
    def at_bits(cls, bits: float, size: Size) -> Puzzle | None:
        """With this many bits a weight at most; it has one size only."""
        return cls() if 8 * cls().needed_bytes(size) <= bits * size.weights else None

    def __call__(
        self, points: torch.Tensor, seen: Seen | None, layer: int
    ) -> tuple[torch.Tensor, None]:
        """A layer's experts ``[E, F, 3D]`` after the merge of its pairs."""
        out = points.clone()
        scale = seen.scale(points.shape[-1]) if seen else torch.ones(len(points), 1, 1)
        for i, j in self.pairs(len(points), layer):
            out[i], out[j] = merged(points[i], points[j], scale[i], scale[j], self.tau)
        return out, None

    def pairs(self, experts: int, layer: int) -> Iterator[tuple[int, int]]:
        """Which experts of a layer are merged; of an odd number one is not."""
        order = np.random.default_rng((self.seed, layer)).permutation(experts).tolist()
        return zip(order[::2], order[1::2], strict=False)


def merged(
    one: torch.Tensor,
    other: torch.Tensor,
    scale: torch.Tensor,
    other_scale: torch.Tensor,
    tau: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both experts of a pair as their shared magnitudes give them; scales broadcast to weights."""
    a, b = one.abs(), other.abs()
    similar = (a - b).abs() <= tau * (a + b)
    first = a * scale >= b * other_scale
    shared = torch.where(similar, (a + b) / 2, torch.where(first, a, b)).clamp_min(LEAST)
    return (
        _sign(one) * shared * (first | similar),
        _sign(other) * shared * (~first | similar),
    )


def _sign(weights: torch.Tensor) -> torch.Tensor:
    """One bit of it: 0 has a sign too."""
    return torch.where(torch.signbit(weights), -1.0, 1.0)
