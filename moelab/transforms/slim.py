"""One-shot slimming: every expert loses the neurons that weigh least.

A neuron's weight is the norm of its row of the gate and the up matrix and its column of the down
matrix together; with text, the norm of what it adds to the layer's output, ||h|| * ||down||. This
is not SlimMoE (arXiv 2506.18349), which shrinks experts in stages and distils the model after each:
nothing is trained here, so it shows what there is for distillation to make up for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moelab.transforms.activations import Seen
from moelab.transforms.layers import Size


@dataclass(frozen=True)
class Slim:
    """All experts, each with its heaviest neurons only.

    Parameters
    ----------
    keep
        Share of an expert's neurons that are left, 0 to 1.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: above 0, at most 1")

    def left(self, size: Size) -> tuple[int, int]:
        """Experts of a layer and neurons of an expert afterwards."""
        return size.experts, self._kept(size.neurons)

    def needed_bytes(self, size: Size) -> int:
        """Bytes of a layer at 16 bit."""
        return 2 * size.experts * self._kept(size.neurons) * size.width

    @classmethod
    def at_bits(cls, bits: float, size: Size) -> Slim | None:
        """With this many bits a weight of the whole expert at most."""
        left = min(int(bits * size.neurons / 16), size.neurons)
        return cls(keep=left / size.neurons) if left else None

    def __call__(
        self, points: torch.Tensor, seen: Seen | None, layer: int
    ) -> tuple[torch.Tensor, None]:
        """A layer's experts ``[E, F', 3D]``; the neurons that stay keep their order."""
        if seen is None:
            weight = points.norm(dim=-1)  # [E, F]
        else:
            weight = seen.hidden * points[..., -(points.shape[-1] // 3) :].norm(dim=-1)
        at = weight.topk(self._kept(points.shape[1]), dim=-1).indices.sort(dim=-1).values  # [E, F']
        return torch.stack([expert[rows] for expert, rows in zip(points, at, strict=True)]), None

    def _kept(self, neurons: int) -> int:
        return max(1, round(self.keep * neurons))
