"""AdamW for a few processes on one machine that share one copy of the parameters.

Parameters, both moments and every worker's gradient lie in anonymous shared memory, flat.  After
the backward pass each worker sums and updates only its own slice, then all go on: no gradient is
sent anywhere, and the optimiser's work is divided.  Two single-threaded workers are faster than
one process with two OpenMP threads, and do not collapse when the machine is busy.

It needs `fork` (Linux, macOS): shared memory is inherited, not named, so /dev/shm may be small.
"""

from __future__ import annotations

import mmap
from multiprocessing.context import ForkContext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

PATIENCE_S = 3600.0  # a worker that waits longer than this for another one gives up


def shared_zeros(*shape: int) -> Tensor:
    """An fp32 tensor that forked processes see the same."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(mmap.mmap(-1, 4 * count), dtype=torch.float32).view(shape)


class SharedAdamW:
    """The parameters of `model`, made shared, and their optimiser.

    Parameters
    ----------
    model
        Its parameters become views of `self.parameters` at once.
    workers
        Processes that will call `join` and then `step` together.
    betas, weight_decay
        As in AdamW; vectors (norm weights) do not decay.

    Attributes
    ----------
    parameters, exp_avg, exp_avg_sq : Tensor
        Flat fp32 [P]; read them only between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        workers: int,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        self._views = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # matrices first
        self._matrices = sum(p.numel() for p in self._views if p.dim() >= 2)
        self.size = sum(p.numel() for p in self._views)
        self.workers, self._betas, self._decay = workers, betas, weight_decay
        self.parameters, self.exp_avg, self.exp_avg_sq = (shared_zeros(self.size) for _ in "pms")
        self._gradients = shared_zeros(workers, self.size)
        self._norms = shared_zeros(workers)
        self._barrier = ForkContext().Barrier(workers)
        for p, flat in zip(self._views, self._split(self.parameters), strict=True):
            flat.copy_(p.data)
            p.data = flat

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self._views])
        return [part.view_as(p) for part, p in zip(parts, self._views, strict=True)]

    def wait(self) -> None:
        """Return when every worker is here."""
        if self.workers > 1:
            self._barrier.wait(PATIENCE_S)

    def abort(self) -> None:
        """Make every waiting worker raise `BrokenBarrierError`."""
        self._barrier.abort()

    def join(self, rank: int, steps_done: int) -> None:
        """Take slice `rank` of the parameters; call it in the worker, before `step`."""
        self.rank = rank
        cuts = [self.size * i // self.workers for i in range(self.workers + 1)]
        self._mine = slice(cuts[rank], cuts[rank + 1])
        border = min(max(self._matrices, self._mine.start), self._mine.stop)
        parts = [slice(self._mine.start, border), slice(border, self._mine.stop)]
        groups = []
        for part, decay in zip(parts, (self._decay, 0.0), strict=True):
            if part.start == part.stop:
                continue
            leaf = self.parameters[part]
            leaf.grad = self._gradients[0, part]
            groups.append({"params": [leaf], "weight_decay": decay})
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=self._betas, fused=True)
        for group, part in zip(groups, (p for p in parts if p.start < p.stop), strict=True):
            self._adam.state[group["params"][0]] = {
                "step": torch.tensor(float(steps_done)),
                "exp_avg": self.exp_avg[part],
                "exp_avg_sq": self.exp_avg_sq[part],
            }

    def step(
        self, lr: float, *, clip: float = 1.0, between: Callable[[], None] = lambda: None
    ) -> float:
        """Average the workers' gradients, clip their norm and update; all workers together.

        `between` runs when every worker has made its gradient and none has gone on: what rank 0
        wrote for the others before this call is seen there.  Returns the gradient's norm.
        """
        mine = self._gradients[self.rank]
        for p, flat in zip(self._views, self._split(mine), strict=True):
            assert p.grad is not None
            torch.div(p.grad, self.workers, out=flat)
            p.grad = None
        self.wait()
        between()
        total = self._gradients[0, self._mine]
        for other in self._gradients[1:]:
            total.add_(other[self._mine])
        self._norms[self.rank] = total.norm()
        self.wait()
        norm = float(self._norms.norm())
        if norm > clip:
            total.mul_(clip / norm)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self.wait()
        return norm
