"""One matrix in forms that are no tier of a store: what they lose beside the tiers, at which bits.

`REPRESENTATIONS` has by name what a matrix ``[N, K]`` (a row makes one output) comes back as, and
the bits of a weight with its scales. A scale a row is EdgeMoE's (arXiv 2308.14352, section III-B)
and MoQE's (arXiv 2310.02410); ternary rows have QMoE's levels (arXiv 2310.16795), rounded to the
nearest: the tier of ternary weights has one fitted scale for 64, and rounds by GPTQ where it is
packed with texts. What is not here: QMoE's dictionary, which makes the many zeros cheaper, and
kernels. `moelab.calibration.representations` measures them, and a store's tiers beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from moelab.store.codecs import Layout, decode, encode, payload_bytes
from moelab.store.groups import IN_A_BYTE, TERNARY


class Representation(NamedTuple):
    """``bits(K)`` of a weight in rows of K, and ``through(w)``: float32 [N, K] and back."""

    bits: Callable[[int], float]
    through: Callable[[torch.Tensor], torch.Tensor]


def per_channel(w: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes -2^(bits-1) to 2^(bits-1) - 1 and one float16 scale a row: 2 max|w| / (2^bits - 1).

    The largest weight of a row is half a step beyond the last code where it is positive.
    """
    scale = (2 * w.abs().amax(1, keepdim=True) / (2**bits - 1)).half().float()
    codes = (w / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def ternary(w: torch.Tensor) -> torch.Tensor:
    """Every weight to the nearest of its row's least (where below 0), 0, and largest, float16."""
    low = w.amin(1, keepdim=True).clamp_max(0).half().float()
    high = w.amax(1, keepdim=True).clamp_min(0).half().float()
    return torch.where(w > high / 2, high, torch.where(w < low / 2, low, 0.0))


def grouped(w: torch.Tensor, bits: int) -> torch.Tensor:
    """As a store's tier has it: a searched range for every 64 weights."""
    layout = Layout((("w", tuple(w.shape)),), "bfloat16")
    return decode(encode({"w": w}, layout, bits), layout, bits)["w"]


def _grouped(bits: int) -> Representation:
    def of_row(width: int) -> float:
        return 8 * payload_bytes(Layout((("w", (1, width)),), "bfloat16"), bits) / width

    return Representation(of_row, lambda w: grouped(w, bits))


def _per_channel(bits: int) -> Representation:
    return Representation(lambda width: bits + 16 / width, lambda w: per_channel(w, bits))


REPRESENTATIONS = {
    "4 bit, groups": _grouped(4),
    "4 bit, rows": _per_channel(4),
    "2 bit, groups": _grouped(2),
    "2 bit, rows": _per_channel(2),
    "ternary, groups": _grouped(TERNARY),
    "ternary, rows": Representation(
        lambda width: (8 * math.ceil(width / IN_A_BYTE) + 32) / width, ternary
    ),
}
