"""Rounding that knows its inputs: GPTQ (arXiv 2210.17323), as QMoE (arXiv 2310.16795) uses it.

A matrix is rounded column by column, and what a column loses is made up for by those that are not
rounded yet, as far as their inputs go together: with H = X.T X of the inputs X and U the upper
Cholesky factor of its inverse, the error e of column j becomes ``e / U[j, j] * U[j, k]`` off every
column k behind it. A group's scale is fitted when its first column comes, to the weights as they
have become. A row that would lose more so than by plain rounding stays plainly rounded. What it
does not know: the error that other matrices make.

N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moelab.store.groups import GROUP, compiled

DAMPENING = 0.1
"""Of the mean of H's diagonal, added to it: inputs that were never seen count so much. QMoE's."""


def feed_back(
    rows: np.ndarray,
    hessian: np.ndarray,
    ranges: Callable[[np.ndarray], np.ndarray],
    top: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Groups ``[N * K / 64, 64]`` that round to what is wanted, and their (scale, offset) pairs.

    Parameters
    ----------
    rows
        The matrix, float32 ``[N, K]``, K whole groups.
    hessian
        ``X.T @ X``, of at most K columns: what is behind them is padding. All zeros, where there
        were no inputs, give plain rounding.
    ranges
        From groups ``[G, 64]`` to pairs ``[G, 2]``, float32 that float16 holds.
    top
        The highest code.
    """
    count, width = rows.shape
    plain = ranges(rows.reshape(-1, GROUP)).reshape(count, -1, 2)
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        return rows.reshape(-1, GROUP), plain.reshape(-1, 2)
    h = np.eye(width) * mean
    h[: len(hessian), : len(hessian)] = hessian
    h[np.diag_indices(width)] += DAMPENING * mean
    upper = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
    moved, pairs = rows.copy(), np.empty_like(plain)
    for first in range(0, width, GROUP):
        last = first + GROUP
        group = np.ascontiguousarray(moved[:, first:last])
        pairs[:, first // GROUP] = own = ranges(group)
        errors = np.empty_like(group)
        _round_group(group, own, top, upper[first:last, first:last], errors)
        moved[:, first:last] = group
        moved[:, last:] -= errors @ upper[first:last, last:]
    lost = [_lost(rows, *one, top, h) for one in ((moved, pairs), (rows, plain))]
    worse = lost[0] > lost[1]
    moved[worse], pairs[worse] = rows[worse], plain[worse]
    return moved.reshape(-1, GROUP), pairs.reshape(-1, 2)


@compiled()
def _round_group(
    group: np.ndarray, pairs: np.ndarray, top: int, upper: np.ndarray, errors: np.ndarray
) -> None:
    """Columns of one group [N, 64] in turn, each error taken off those behind it."""
    low, high = np.float32(0), np.float32(top)
    for n in range(group.shape[0]):
        w, scale, offset = group[n], pairs[n, 0], pairs[n, 1]
        inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
        for j in range(GROUP):
            code = min(max(np.rint((w[j] - offset) * inverse), low), high)
            error = (w[j] - (scale * code + offset)) / upper[j, j]
            errors[n, j] = error
            for k in range(j + 1, GROUP):
                w[k] -= error * upper[j, k]


def _lost(
    rows: np.ndarray, moved: np.ndarray, pairs: np.ndarray, top: int, h: np.ndarray
) -> np.ndarray:
    """Squared error of each row's output [N] when `moved` is rounded."""
    groups = moved.reshape(*pairs.shape[:2], GROUP)
    scale, offset = pairs[..., :1], pairs[..., 1:]
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    rounded = scale * ((groups - offset) * inverse).round().clip(0, top) + offset
    error = rounded.reshape(rows.shape) - rows
    return ((error @ h) * error).sum(axis=1)
