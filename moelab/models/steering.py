"""Masks and preferences of the routers, handed on only when they change.

The engine states both before every layer; a router's `SteeredRouting` is made anew only where one
of them differs from what is in force. What it does not know: which part wants it, and why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moelab.models.adapter import Adapter


class Steering:
    """The mask and the bias in force, layer by layer.

    Parameters
    ----------
    adapter
        Of the model that is steered.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._set: dict[int, tuple] = {}  # layer -> (mask, bias), where there is one of them

    def steers(self, layer: int) -> bool:
        """Whether a mask or a bias applies to the layer."""
        return layer in self._set

    def steer(
        self,
        layer: int,
        allowed: Sequence[bool] | np.ndarray | None,
        bias: Sequence[float] | np.ndarray | None,
    ) -> None:
        """Set a layer's mask (bool [E], the experts allowed) and bias (float [E]), or None."""
        mask = None if allowed is None else tuple(allowed)
        wish = None if bias is None else tuple(bias)
        before = self._set.get(layer, (None, None))
        if mask != before[0]:
            self._adapter.set_mask(layer, None if mask is None else torch.tensor(mask).bool())
            self._set[layer] = (mask, before[1])  # before the bias, which may be refused
        if wish != before[1]:
            self._adapter.set_bias(layer, None if wish is None else torch.tensor(wish).float())
            self._set[layer] = (mask, wish)
        if mask is wish is None:
            self._set.pop(layer, None)

    def release(self) -> None:
        """Every router as it is."""
        for layer in list(self._set):
            self.steer(layer, None, None)
