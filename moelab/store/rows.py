"""One matrix as codes and the scales of its groups, and back; see `groups` for how they lie.

What a range is fitted to: the weights, by a search or a rule of one's own, or, where the inputs of
the matrix are known, what these make of its errors (`gptq`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from moelab.store.blocks import BLOCK, KINDS, VALUES, Kind, pairs_of
from moelab.store.gptq import feed_back
from moelab.store.groups import (
    GROUP,
    TERNARY,
    code_bytes,
    fit_ranges,
    fit_scales,
    pack_codes,
    top_code,
    unpack_codes,
)

FLOAT16_MAX = 65504.0

Fit: TypeAlias = Callable[[np.ndarray, int], np.ndarray]
"""A rule of your own: from groups of weights float32 ``[G, 64]`` and the highest code (15 at 4 bit)
to float32 ``[G, 2]``, so that ``weight = scale * code + offset`` with codes 0 to the highest."""


def refuse(name: str, tensor: torch.Tensor, limit: float) -> NoReturn:
    """Say why a tensor's weights cannot be stored where a weight is at most ``limit``."""
    largest = float(tensor.abs().max())
    if math.isfinite(largest):
        raise ValueError(
            f"{name} has weights up to {largest:.3g}, this tier holds at most {limit:.3g}; "
            "pack with tiers=(16,), which holds all that bfloat16 does"
        )
    raise ValueError(f"{name} has NaN or infinite weights; repair the checkpoint first")


def quantise(
    name: str,
    tensor: torch.Tensor,
    bits: int,
    fit: Fit | None = None,
    hessian: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Packed codes uint8 and pairs float16 [groups, 2], or scales [groups, 1], of one matrix."""
    w = tensor.to(device="cpu", dtype=torch.float32)
    if not float(w.abs().max()) <= FLOAT16_MAX:  # NaN too
        refuse(name, tensor, FLOAT16_MAX)
    rows = w.reshape(-1, w.shape[-1]).numpy()
    padding = -rows.shape[1] % GROUP
    if padding:  # repeat the row's last weight: it widens no range; to a ternary scale 0 is nothing
        mode = "constant" if bits == TERNARY else "edge"
        rows = np.pad(rows, ((0, 0), (0, padding)), mode=mode)
    rows = np.ascontiguousarray(rows)
    groups, ranges = rows.reshape(-1, GROUP), partial(_ranges, bits=bits, fit=fit)
    if hessian is None or bits == 8:
        pairs = ranges(groups)
    else:
        groups, pairs = feed_back(rows, hessian, ranges, top_code(bits))
    codes = np.empty((len(groups), code_bytes(bits)), np.uint8)
    pack_codes(groups, pairs, bits, codes)
    return [codes, pairs[:, :1].astype(np.float16) if bits == TERNARY else pairs.astype(np.float16)]


def _ranges(groups: np.ndarray, bits: int, fit: Fit | None) -> np.ndarray:
    """(scale, offset) of groups ``[G, 64]`` as float16 holds them, float32 ``[G, 2]``."""
    pairs = np.empty((len(groups), 2), np.float32)
    if bits == TERNARY:
        pairs[:, 0] = fit_scales(groups).astype(np.float16)
        pairs[:, 1] = -pairs[:, 0]
    elif bits == 8:
        low, high = groups.min(1), groups.max(1)
        pairs[:, 1] = ((low + high) / 2).astype(np.float16)
        reach = np.maximum(high - pairs[:, 1], pairs[:, 1] - low) / 127
        scale = reach.astype(np.float16)
        scale = np.where(scale < reach, np.nextafter(scale, np.float16(np.inf)), scale)
        pairs[:, 0] = scale  # rounded up, so that no weight is clipped
    else:
        levels = top_code(bits)
        if fit is None:
            fit_ranges(groups, levels, pairs)
        else:
            pairs[:] = _fitted(fit, groups, levels)
        lost = pairs[:, 0] - pairs[:, 0].astype(np.float16)  # much of it when the scale is tiny
        pairs[:, 1] += lost * (levels / 2)  # keeps the middle of the range where it was
    return np.clip(pairs, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).astype(np.float32)


def _fitted(fit: Fit, groups: np.ndarray, levels: int) -> np.ndarray:
    """What a `Fit` returned, checked before it is stored."""
    pairs = np.asarray(fit(groups, levels), np.float32)
    if pairs.shape != (len(groups), 2) or not np.isfinite(pairs).all():
        raise ValueError(
            f"fit={getattr(fit, '__name__', fit)!r} returned shape {pairs.shape}; "
            f"({len(groups)}, 2) of finite (scale, offset) is needed"
        )
    return pairs


def dequantise(
    codes: np.ndarray, pairs: np.ndarray, shape: tuple[int, ...], bits: int, kind: Kind | None
) -> torch.Tensor:
    """The float32 tensor of one matrix's packed codes and pairs."""
    if kind:
        scales = pairs_of(pairs.reshape(-1, kind.scales), kind)
    else:
        scales = pairs.copy().view(np.float16).astype(np.float32)
        if bits == TERNARY:
            scales = np.stack([scales, -scales], axis=1)
        scales = scales.reshape(-1, 2)
    groups = np.empty((len(scales), BLOCK if kind else GROUP), np.float32)
    values = VALUES if kind is KINDS["MXFP4"] else VALUES[:0]
    unpack_codes(codes.reshape(len(scales), -1), scales, bits, groups, values)
    rows = torch.from_numpy(groups).reshape(math.prod(shape[:-1]), -1)
    return rows[:, : shape[-1]].contiguous().reshape(shape)


def fingerprint(fit: Fit) -> str:
    """What tells one rule from another: its name and compiled code."""
    rule = getattr(fit, "__name__", str(fit)), _portable(getattr(fit, "__code__", None))
    return repr(rule)


def _portable(constant: Any) -> Any:
    """A constant of compiled code without what differs from one process to the next."""
    if isinstance(constant, CodeType):
        return constant.co_code, constant.co_names, [_portable(c) for c in constant.co_consts]
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
