"""What rounding a file's quantised weights a second time costs, measured on some experts.

The loss is the root mean square of the difference, as a share of that of the weights as the file
has them. What it does not know: the weights that the file was made of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch

from moelab.store.codecs import Layout, decode


class Rounding:
    """Loss of the tiers that do not hold the file's own ``kinds`` of blocks as they are.

    ``squares`` is what is known by now: bits -> of the differences, of the weights.
    """

    def __init__(
        self, kinds: Collection[str], layout: Layout, squares: dict[int, list[float]]
    ) -> None:
        self._kinds, self._layout, self._squares = kinds, layout, squares

    def measure(self, tensors: Mapping[str, torch.Tensor], blob: np.ndarray, bits: int) -> None:
        """Hold an expert's blob at a tier against its matrices as the file has them."""
        if not self._kinds or self._layout.kind(bits):
            return
        found, squares = decode(blob, self._layout, bits), self._squares
        for name, tensor in tensors.items():
            if tensor.ndim > 1:
                own = tensor.float()
                pair = [float(t.square().sum()) for t in (found[name] - own, own)]
                before = squares.get(bits, (0.0, 0.0))
                squares[bits] = [a + b for a, b in zip(before, pair, strict=True)]

    def note(self, measured: int, experts: int) -> str:
        """What a store should say of it; empty where nothing was rounded again."""
        if not self._squares:
            return ""
        of = (f"{b} bit {np.sqrt(d / max(w, 1e-30)):.2g}" for b, (d, w) in self._squares.items())
        return (
            f"{', '.join(sorted(self._kinds))} blocks of the GGUF file are rounded again, measured "
            f"on {measured} of {experts} experts as a share of their size: {', '.join(of)}"
        )
