"""What the teacher says: its 64 likeliest next tokens at every position, kept on disk.

Distillation reads a text more than once, and the teacher's answer never changes: it is asked once
for each window, when the window first comes up. The tokens that are not among the 64 are counted
together as one more, so that nothing of the probability is lost.

Letters: N windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["LIKELIEST", "Targets", "divergence"]

LIKELIEST = 64
_LEAST = 1e-5  # probability of all other tokens together, for the logarithm
_ROWS = 128  # tokens whose logits are held at once


class Targets:
    """The teacher's likeliest next tokens for each window, computed once and kept in files.

    Parameters
    ----------
    teacher
        The dense model.
    ids
        int64 ``[N, T]``.
    folder
        Where to keep them, 384 bytes a token; it must belong to these very windows.
    """

    def __init__(self, teacher: Any, ids: torch.Tensor, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._teacher, self._ids = teacher, ids
        shape = (*ids.shape, LIKELIEST)
        parts = {"tokens": (np.int32, shape), "logs": (np.float16, shape)}
        parts["known"] = (np.uint8, (len(ids),))
        files = [(folder / f"{name}.bin", *part) for name, part in parts.items()]
        if not all(_fits(*file) for file in files):  # one without the others says nothing
            for path, dtype, size in files:
                path.write_bytes(b"")
                os.truncate(path, _bytes(dtype, size))
        self._tokens, self._logs, self._known = (
            np.memmap(path, dtype, mode="r+", shape=size) for path, dtype, size in files
        )

    @torch.no_grad()
    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and log-probabilities float32 of some windows, ``[n, T, 64]``."""
        new = rows[self._known[rows] == 0]
        if len(new):
            logits = self._teacher(self._ids[new], use_cache=False).logits
            for row, values in zip(new, logits, strict=True):
                top = (values - values.logsumexp(-1, keepdim=True)).topk(LIKELIEST, -1)
                self._tokens[row] = top.indices.to(torch.int32).numpy()
                self._logs[row] = top.values.half().numpy()
                self._known[row] = 1
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64))
        return tokens, torch.from_numpy(self._logs[rows].astype(np.float32))


def _bytes(dtype: type, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _fits(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == _bytes(dtype, shape)


def divergence(
    hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor
) -> torch.Tensor:
    """Mean KL divergence from the teacher per token, all but its likeliest tokens counted as one.

    Parameters
    ----------
    hidden
        The student's last hidden states, ``[..., D]``.
    head
        The head's matrix ``[V, D]``; no gradient reaches it.
    tokens, logs
        The teacher's likeliest tokens and their log-probabilities, ``[..., 64]``.
    """
    return _Divergence.apply(hidden, head, tokens, logs)


class _Divergence(torch.autograd.Function):
    """Head, divergence and their gradient for a few rows at a time.

    The logits of a whole batch are never held at once: a few rows stay in the processor's cache
    and become their own gradient in place, which takes two thirds of the time. With p the
    teacher's probabilities of its likeliest tokens, q the student's, P and Q what is left of
    each, the gradient of the logits is ``q (sum p - sum q P/Q)``, and at the likeliest tokens
    ``q P/Q - p`` besides.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor
    ) -> torch.Tensor:
        rows = hidden.detach().flatten(0, -2)
        total, gradient = rows.new_zeros(()), torch.empty_like(rows)
        parts = (x.split(_ROWS) for x in (rows, tokens.flatten(0, -2), logs.flatten(0, -2)))
        for i, (states, likeliest, theirs) in enumerate(zip(*parts, strict=True)):
            logits = states @ head.T
            ours, highest = logits.gather(-1, likeliest), logits.amax(-1, keepdim=True)
            total_odds = logits.sub_(highest).exp_().sum(-1, keepdim=True)
            ours = ours - highest - total_odds.log()
            p, q = theirs.exp(), ours.exp()
            sum_p, sum_q = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
            rest_p, rest_q = (1 - sum_p).clamp(min=_LEAST), (1 - sum_q).clamp(min=_LEAST)
            total += (p * (theirs - ours)).sum() + (rest_p * (rest_p / rest_q).log()).sum()
            odds = torch.where(1 - sum_q >= _LEAST, rest_p / rest_q, 0.0)
            logits.mul_((sum_p - odds * sum_q) / total_odds)
            logits.scatter_add_(-1, likeliest, odds * q - p)
            gradient[i * _ROWS : (i + 1) * _ROWS] = logits @ head
        ctx.save_for_backward(gradient.div_(len(rows)).view_as(hidden))
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None, None
