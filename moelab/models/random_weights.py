"""Weights of a model that nobody trained, in the interface of a checkpoint.

All are cut from one pool of small random numbers: what a matrix costs does not hang on its values.
Vectors (norms, biases) are left out: transformers fills those as it does before a training.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch

from moelab.models.shards import Checkpoint, TensorInfo

SCALE, DRAWN = 0.02, 1 << 22


class RandomWeights(Checkpoint):
    """A checkpoint in bfloat16 with the names and shapes of a model.

    Parameters
    ----------
    shapes
        By the name of a weight in the model; those of one dimension are left out.
    shared
        Those that may all lie in the same memory, as fewer bits are made of them at once.
    """

    random = True

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, shared: Collection[str] = ()
    ) -> None:
        self.path, self.files, self._shared = Path("random weights"), [], shared
        sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items() if len(shape) > 1}
        self.info = {n: TensorInfo(0, "BF16", shapes[n], 0, size) for n, size in sizes.items()}
        drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(SCALE)
        times = -(-max(sizes.values(), default=0) // (2 * DRAWN))
        self._pool = drawn.to(torch.bfloat16).repeat(times)

    def tensor(self, key: str) -> torch.Tensor:
        """One whole weight."""
        shape = self.info[key].shape
        found = self._pool[: math.prod(shape)].view(shape)
        return found if key in self._shared else found.clone()

    def _fill(self, shard: int, buffer: np.ndarray, offset: int) -> None:
        pool = self._pool.view(torch.uint8).numpy()
        buffer[:] = pool[offset : offset + len(buffer)]
