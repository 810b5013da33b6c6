"""Masks and preferences of the routers, handed on only when they change.

A router's steering is compiled from both (`routing.SteeredRouting`), which costs more than to
compare what is asked for with what was told. What it does not know: who wants it, and why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moelab.models.adapter import Adapter


class Steering:
    """What each layer's router is told about whom to choose.

    Parameters
    ----------
    adapter
        Of the model whose routers they are.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._told: dict[int, tuple] = {}  # layer -> (mask, bias), where there is one of them

    def steers(self, layer: int) -> bool:
        """Whether a mask or a bias applies to the layer."""
        return layer in self._told

    def steer(
        self, layer: int, allowed: Sequence[bool] | None, bias: Sequence[float] | None
    ) -> None:
        """Tell a router whom it may choose (bool [E]) and whom to prefer (float [E]), or None."""
        mask = None if allowed is None else tuple(allowed)
        wish = None if bias is None else tuple(bias)
        told = self._told.get(layer, (None, None))
        if mask != told[0]:
            self._adapter.set_mask(layer, None if mask is None else torch.tensor(mask).bool())
            self._told[layer] = (mask, told[1])  # before the bias, which may be refused
        if wish != told[1]:
            self._adapter.set_bias(layer, None if wish is None else torch.tensor(wish).float())
            self._told[layer] = (mask, wish)
        if mask is wish is None:
            self._told.pop(layer, None)

    def release(self) -> None:
        """Every router as it is."""
        for layer in list(self._told):
            self.steer(layer, None, None)
