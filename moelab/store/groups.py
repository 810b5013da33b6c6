"""Sixty-four weights as codes: fit a group's range, pack its codes, unpack them again.

A group is ``weight = scale * code + offset``. The loops are compiled with numba, because the range
search visits every weight 26 times. They take finite weights only; `codecs` refuses the others.

A ternary group has codes 0 to 2 and ``offset = -scale``: its weights are -scale, 0 and scale. Code
j is digit j // 13, to base 3, of byte j % 13, which holds ``ceil(256 n / 243)`` of its five digits'
number n, the first being worth most: times 3, the next digit is what no longer fits the byte. That
fixed point is llama.cpp's (TQ1_0 in ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

GROUP = 64
TERNARY = 1
"""The tier of ternary weights: 13 bytes of codes a group, 1.6 bit a weight, and a float16 scale."""
IN_A_BYTE = 5  # ternary codes: 3 ** 5 = 243


def code_bytes(bits: int) -> int:
    """Bytes of a group's codes."""
    return -(-GROUP // IN_A_BYTE) if bits == TERNARY else GROUP * bits // 8


def top_code(bits: int) -> int:
    """The highest code, below 8 bit."""
    return 2 if bits == TERNARY else 2**bits - 1


def fit_scales(groups: np.ndarray) -> np.ndarray:
    """The scale of least squares of each ternary group, float32 ``[G]``, exactly.

    Where k weights are not 0 their mean magnitude is the best scale, and ``sum ** 2 / k`` is what
    it explains: so they are the k largest, and k is found by trying all.
    """
    sums = np.cumsum(-np.sort(-np.abs(groups), axis=1), axis=1, dtype=np.float64)  # [G, 64]
    count = np.arange(1, groups.shape[1] + 1)
    best = (sums * sums / count).argmax(axis=1)
    return (sums[np.arange(len(groups)), best] / count[best]).astype(np.float32)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit`, GIL-free and cached on disk, or uncached where no folder can be written."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        settings = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # neither __pycache__ nor the user's cache folder is writable
            return njit(**settings)(function)

    return decorate


@compiled(fastmath=True)
def fit_ranges(groups: np.ndarray, levels: int, pairs: np.ndarray) -> None:
    """Search each group's (scale, offset): shrink the range, refit by least squares, keep the best.

    For given codes q the best scale is cov(q, w) / var(q), and it explains cov(q, w)^2 / var(q)
    of the group's variance: the largest explained share is the smallest error.
    """
    zero, top = np.float32(0), np.float32(levels)
    for g in range(groups.shape[0]):
        w = groups[g]
        low, high, total = w[0], w[0], zero
        for j in range(GROUP):
            low, high, total = min(low, w[j]), max(high, w[j]), total + w[j]
        mean, best = total / np.float32(GROUP), np.float32(-1)
        pairs[g, 0], pairs[g, 1] = zero, mean
        if high - low < np.float32(1e-7):  # constant, or below what float16 resolves
            continue
        for step in range(13):
            scale = (high - low) * np.float32(1 - 0.05 * step) / top
            offset = (low + high - scale * top) / np.float32(2)
            for _ in range(2):
                inverse, sum_q, sum_qq, sum_qw = np.float32(1) / scale, zero, zero, zero
                for j in range(GROUP):
                    q = min(max(np.rint((w[j] - offset) * inverse), zero), top)
                    sum_q += q
                    sum_qq += q * q
                    sum_qw += q * (w[j] - mean)
                variance = sum_qq - sum_q * sum_q / np.float32(GROUP)
                if variance <= zero or sum_qw <= zero:
                    break
                scale = sum_qw / variance
                offset = mean - scale * sum_q / np.float32(GROUP)
                if sum_qw * scale > best:
                    best = sum_qw * scale
                    pairs[g, 0], pairs[g, 1] = scale, offset


@compiled()
def _pack_planes(q: np.ndarray, bits: int, packed: np.ndarray) -> None:
    for j in range(16):
        a, b, c, d = q[j] & 3, q[16 + j] & 3, q[32 + j] & 3, q[48 + j] & 3
        packed[j] = a | b << 2 | c << 4 | d << 6
    if bits == 3:
        for j in range(8):
            plane = 0
            for t in range(8):
                plane |= (q[8 * t + j] >> 2) << t
            packed[16 + j] = plane


@compiled()
def _pack_trits(q: np.ndarray, packed: np.ndarray) -> None:
    for j in range(len(packed)):
        number = 0
        for at in range(j, IN_A_BYTE * len(packed), len(packed)):
            number = 3 * number + (np.int32(q[at]) if at < GROUP else 0)
        packed[j] = (256 * number + 242) // 243


@compiled()
def pack_codes(groups: np.ndarray, pairs: np.ndarray, bits: int, packed: np.ndarray) -> None:
    """Round each group to its levels and pack the codes.

    8 bit: one signed byte each. 4 bit: code j low, code 32 + j high in byte j. 2 bit: codes j,
    16 + j, 32 + j, 48 + j in byte j. 3 bit: the low two bits as at 2 bit, then 8 bytes, whose
    byte j holds in bit t the high bit of code 8 t + j. Ternary: as the module says.
    """
    low, high = np.float32(0), np.float32(2 if bits == TERNARY else 2**bits - 1)
    if bits == 8:
        low, high = np.float32(-127), np.float32(127)
    q = np.empty(GROUP, np.uint8)
    for g in range(groups.shape[0]):
        scale, offset = pairs[g, 0], pairs[g, 1]
        inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
        for j in range(GROUP):
            code = min(max(np.rint((groups[g, j] - offset) * inverse), low), high)
            q[j] = np.int32(code) & 255
        if bits == 8:
            packed[g] = q
        elif bits == 4:
            for j in range(32):
                packed[g, j] = q[j] | q[32 + j] << 4
        elif bits == TERNARY:
            _pack_trits(q, packed[g])
        else:
            _pack_planes(q, bits, packed[g])


@compiled()
def unpack_codes(
    packed: np.ndarray, pairs: np.ndarray, bits: int, groups: np.ndarray, values: np.ndarray
) -> None:
    """The inverse of `pack_codes`: float32 weights of each group; ``values`` of codes, if any."""
    size = groups.shape[1]
    for g in range(groups.shape[0]):
        scale, offset = pairs[g, 0], pairs[g, 1]
        for j in range(size):
            if bits == 8:
                q = np.int32(np.int8(packed[g, j]))
            elif bits == 4:
                high = np.int32(j >= size // 2)
                q = np.int32(packed[g, j - high * (size // 2)] >> (4 * high) & 15)
                if len(values):
                    q = np.int32(values[q])
            elif bits == TERNARY:
                rest = np.int32(packed[g, j % packed.shape[1]])
                for _ in range(j // packed.shape[1]):
                    rest = 3 * rest & 255
                q = 3 * rest >> 8
            else:
                q = np.int32(packed[g, j & 15] >> (2 * (j >> 4)) & 3)
                if bits == 3:
                    q |= np.int32(packed[g, 16 + (j & 7)] >> (j >> 3) & 1) << 2
            groups[g, j] = scale * np.float32(q) + offset
