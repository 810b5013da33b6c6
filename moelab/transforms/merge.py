"""Task-agnostic pruning by merging: similar experts of a layer become one, and so do their rows.

After "Diversifying the Expert Knowledge for Task-Agnostic Pruning" (arXiv 2407.09590): experts are
grouped by similarity, each group's experts are averaged, and so are its rows of the router. The
model has fewer experts then; top-k stays. With text, similarity is the centred kernel alignment
(CKA) of the experts' outputs on the same tokens; without, the alignment of their weights,

    ||A B'||^2 / (||A A'|| ||B B'||),  A, B [F, 3D] the neurons of two experts,

which does not change with the order of neurons. Ours, where the paper was not read closely enough:
groups are formed by joining the two most similar ones (mean similarity of their members) until as
many are left as are wanted, and neurons are put into the order of the group's first expert's before
the mean is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moelab.transforms.activations import Seen
from moelab.transforms.assignment import matched
from moelab.transforms.layers import Size


@dataclass(frozen=True)
class Merge:
    """Groups of similar experts averaged, with their router rows.

    Parameters
    ----------
    keep
        Share of a layer's experts that are left, 0 to 1.
    align
        Whether neurons are matched before experts are averaged.
    """

    keep: float = 0.5
    align: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: above 0, at most 1")

    def left(self, size: Size) -> tuple[int, int]:
        """Experts of a layer and neurons of an expert afterwards.

        Raises
        ------
        ValueError
            Fewer experts than top-k would be left.
        """
        left = round(self.keep * size.experts)
        if left < size.top_k:
            raise ValueError(
                f"keep={self.keep:g} leaves {left} of {size.experts} experts, the router picks "
                f"{size.top_k} for a token; keep at least {size.top_k / size.experts:g}"
            )
        return left, size.neurons

    def needed_bytes(self, size: Size) -> int:
        """Bytes of a layer at 16 bit."""
        return 2 * round(self.keep * size.experts) * size.each

    @classmethod
    def at_bits(cls, bits: float, size: Size) -> Merge | None:
        """With this many bits a weight of the whole layer at most; None below top-k experts."""
        left = min(int(bits * size.experts / 16), size.experts)
        return cls(keep=left / size.experts) if left >= size.top_k else None

    def __call__(
        self, points: torch.Tensor, seen: Seen | None, layer: int
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """A layer's experts ``[E', F, 3D]``, and ``[E'][...]`` which each is made of."""
        alike = by_outputs(seen.outputs(points)) if seen else by_weights(points)
        groups = grouped(alike, round(self.keep * len(points)))
        return torch.stack([self.mean(points[group]) for group in groups]), groups

    def mean(self, points: torch.Tensor) -> torch.Tensor:
        """One expert ``[F, 3D]`` of a group's."""
        rest = [e[matched(points[0], e)] if self.align else e for e in points[1:]]
        return torch.stack([points[0], *rest]).mean(0)


def by_weights(points: torch.Tensor) -> torch.Tensor:
    """Alignment of the experts' weights ``[E, E]``, 0 to 1."""
    rows = [torch.stack([(a @ b.T).square().sum() for b in points]) for a in points]
    return _alignment(torch.stack(rows))


def by_outputs(outputs: torch.Tensor) -> torch.Tensor:
    """Linear CKA of the experts' outputs ``[E, T, D]`` on the same tokens, ``[E, E]``."""
    centred = outputs - outputs.mean(1, keepdim=True)
    rows = [torch.stack([(a.T @ b).square().sum() for b in centred]) for a in centred]
    return _alignment(torch.stack(rows))


def _alignment(products: torch.Tensor) -> torch.Tensor:
    own = products.diagonal().sqrt()
    return products / (own[:, None] * own).clamp_min(1e-30)


def grouped(alike: torch.Tensor, groups: int) -> list[list[int]]:
    """Experts in so many groups, from their similarity ``[E, E]``; the most similar join first."""
    found = [[expert] for expert in range(len(alike))]
    while len(found) > groups:
        pairs = [(a, b) for a in range(len(found)) for b in range(a + 1, len(found))]
        a, b = max(pairs, key=lambda ab: float(alike[found[ab[0]]][:, found[ab[1]]].mean()))
        found[a] = sorted(found[a] + found.pop(b))
    return found
