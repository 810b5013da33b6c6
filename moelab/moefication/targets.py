"""What the teacher says: its 64 likeliest next tokens at every position, kept on disk.

Distillation reads a text more than once, and the teacher's answer never changes: it is asked once
for each window, when the window first comes up. The tokens that are not among the 64 are counted
together as one more, so that nothing of the probability is lost.

Letters: N windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["LIKELIEST", "Targets", "divergence"]

LIKELIEST = 64


class Targets:
    """The teacher's likeliest next tokens for each window, computed once and kept in files.

    Parameters
    ----------
    teacher
        The dense model.
    ids
        int64 ``[N, T]``.
    folder
        Where to keep them, 256 bytes a token; it must belong to these very windows.
    """

    def __init__(self, teacher: Any, ids: torch.Tensor, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._teacher, self._ids = teacher, ids
        shape = (*ids.shape, LIKELIEST)
        self._tokens = _mapped(folder / "tokens.bin", np.uint16, shape)
        self._logs = _mapped(folder / "logs.bin", np.float16, shape)
        self._known = _mapped(folder / "known.bin", np.uint8, (len(ids),))

    @torch.no_grad()
    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and log-probabilities float32 of some windows, ``[n, T, 64]``."""
        new = rows[self._known[rows] == 0]
        if len(new):
            logits = self._teacher(self._ids[new], use_cache=False).logits
            for row, values in zip(new, logits, strict=True):
                top = (values - values.logsumexp(-1, keepdim=True)).topk(LIKELIEST, -1)
                self._tokens[row] = top.indices.to(torch.uint16).numpy()
                self._logs[row] = top.values.half().numpy()
                self._known[row] = 1
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64))
        return tokens, torch.from_numpy(self._logs[rows].astype(np.float32))


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        with path.open("wb") as stream:
            stream.truncate(size)
    return np.memmap(path, dtype, mode="r+", shape=shape)


def divergence(logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL divergence from the teacher per token, all but its likeliest tokens counted as one.

    Parameters
    ----------
    logits
        The student's, ``[..., V]``.
    tokens, logs
        The teacher's likeliest tokens and their log-probabilities, ``[..., 64]``.
    """
    ours = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    p, q = logs.exp(), ours.exp()
    rest_p = (1 - p.sum(-1)).clamp(min=1e-5)
    rest_q = (1 - q.sum(-1)).clamp(min=1e-5)
    return (p * (logs - ours)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
