"""Fewer of torch's small operations: between two kernels each costs more than it computes.

A root mean square norm of one token is seven operations over a few kilobytes, done with cold caches
because a layer's weights have just gone through them; here it is one call. A key-value cache that
is concatenated copies all tokens for every new one; here it has room to grow. What it does not
know: families. A norm is replaced where it computes what `RootMeanSquare` does, which is tried.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numba import types
from numba.np.numpy_support import carray
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from moelab.engine.chunks import float32_at
from moelab.engine.vectors import kernel

SAME = 1e-6
"""Largest difference of a norm to ours, relative to its largest output."""


@partial(kernel, any_order=True)
def _mean_square(x: np.ndarray) -> float:
    total = 0.0
    for j in range(len(x)):
        value = x[j]
        total += types.float64(value) * value
    return total / len(x)


@kernel
def _norm(x_at: int, rows: int, width: int, weight_at: int, eps: float, out_at: int) -> None:
    x, out = carray(float32_at(x_at), (rows, width)), carray(float32_at(out_at), (rows, width))
    weight = carray(float32_at(weight_at), width)
    for r in range(rows):
        scale = types.float32(1 / (_mean_square(x[r]) + eps) ** 0.5)
        for j in range(width):
            out[r, j] = weight[j] * (x[r, j] * scale)


class RootMeanSquare:
    """Stands in for a norm: ``weight * x / sqrt(mean(x ** 2) + eps)``, x float32 ``[..., K]``.

    Parameters
    ----------
    module
        With a ``weight`` ``[K]``; its own ``forward`` goes on serving other dtypes.
    eps
        What is added.
    """

    def __init__(self, module: nn.Module, eps: float) -> None:
        self._forward, self._eps = module.forward, eps
        self._weight: torch.Tensor = module.weight.detach()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of each row."""
        width = x.shape[-1]
        if x.dtype is not torch.float32 or width != len(self._weight):
            return self._forward(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        _norm(x.data_ptr(), rows, width, self._weight.data_ptr(), self._eps, out.data_ptr())
        return out


@torch.no_grad()
def serve_norms(model: nn.Module) -> int:
    """Replace the norms that `RootMeanSquare` computes as well; how many they are."""
    found = 0
    for module in model.modules():
        own: Any = module
        weight = getattr(own, "weight", None)
        eps: Any = getattr(own, "variance_epsilon", getattr(own, "eps", None))
        named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))  # T5's are of both kinds
        is_norm = named and isinstance(eps, float)
        if not is_norm or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
            continue
        if weight.dtype is not torch.float32 or weight.device.type != "cpu":
            continue
        ours = RootMeanSquare(module, eps)
        spread = torch.tensor([[1e-4], [1.0], [1e3]])  # small ones show what is added
        x = spread * torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
        theirs = module(x)
        if (ours(x) - theirs).abs().max() <= SAME * theirs.abs().max():
            own.forward = ours
            found += 1
    return found


class GrowingLayer(DynamicLayer):
    """One layer's keys and values ``[B, H, n, K]``, in memory with room for more."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; all keys and values so far."""
        before = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = (key_states[:, :, :0], value_states[:, :, :0])
        count = before + key_states.shape[-2]
        if count > self._room[0].shape[-2]:
            self._room = tuple(_wider(old[:, :, :before], 2 * count) for old in self._room)
        keys, values = self._room
        keys[:, :, before:count], values[:, :, before:count] = key_states, value_states
        self.keys, self.values = keys[:, :, :count], values[:, :, :count]
        return self.keys, self.values

    def rewind(self, count: int) -> None:
        """Keep the first ``count`` tokens; what comes next is written over the others."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :count], self.values[:, :, :count]


def _wider(old: torch.Tensor, count: int) -> torch.Tensor:
    b, h, n, k = old.shape
    new = old.new_empty(b, h, count, k)
    new[:, :, :n] = old
    return new


def growing(config: Any) -> DynamicCache | EncoderDecoderCache:
    """A model's cache, with room to grow in every layer that keeps all tokens.

    An encoder-decoder's is of two parts: what the encoder read comes once and does not grow.
    """
    if config.is_encoder_decoder:  # its configuration may count the encoder's layers
        own = DynamicCache()
        own.layer_class_to_replicate = GrowingLayer
        return EncoderDecoderCache(own, DynamicCache())
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(at) is DynamicLayer else at for at in cache.layers]
    return cache
