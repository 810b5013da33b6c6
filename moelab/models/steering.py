"""Masks and preferences of the routers, handed on only when they change."""

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
        self._told: dict[int, tuple] = {}  # layer -> (mask, bias)

    def steers(self, layer: int) -> bool:
        """Whether a mask or a bias applies to the layer."""
        return layer in self._told

    def steer(
        self, layer: int, allowed: Sequence[bool] | None, bias: Sequence[float] | None
    ) -> None:
        """Tell a router whom it may choose (bool [E]) and whom to prefer (float [E]), or None."""
        now = (
            None if allowed is None else tuple(allowed),
            None if bias is None else tuple(bias),
        )
        mask, wish = self._told.get(layer, (None, None))
        if now[0] != mask:
            allow = None if now[0] is None else torch.tensor(now[0], dtype=torch.bool)
            self._adapter.set_mask(layer, allow)
            self._told[layer] = (now[0], wish)
        if now[1] != wish:
            prefer = None if now[1] is None else torch.tensor(now[1], dtype=torch.float32)
            self._adapter.set_bias(layer, prefer)
            self._told[layer] = now
        if now == (None, None):
            self._told.pop(layer, None)

    def release(self) -> None:
        """Every router as it is."""
        for layer in list(self._told):
            self.steer(layer, None, None)
