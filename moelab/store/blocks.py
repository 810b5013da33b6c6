"""A GGUF file's own blocks of 32 weights as a tier: codes and scales are copied, never rounded.

In a blob all codes of a matrix come first, then all scales, as for groups of 64; code j of a block
is the low half of byte j, code 16 + j the high one (one signed byte each at 8 bit), and
``weight = scale * value + offset``. The value is the code or, in MXFP4, what the table of E2M1
numbers has at its place. Formats as ggml's ``ggml-common.h`` has them; K-quants are not among them,
whose scales are themselves rounded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

BLOCK = 32
VALUES = np.array([12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0], np.uint8)
"""E2M1 numbers (sign, two bits of exponent, one of mantissa), doubled, and 12 added."""


class Kind(NamedTuple):
    """One format of blocks.

    ``form`` is what the kernels call it: its bits, and 32 times its number. ``scales`` are bytes
    beside the codes: a half scale, halves scale and offset, or an exponent (E8M0). ``centre`` is
    the value that stands for 0, where no offset is stored.
    """

    form: int
    scales: int
    centre: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.form & 31

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return BLOCK * self.bits // 8 + self.scales


KINDS = {
    "Q8_0": Kind(32 + 8, 2, 0),
    "Q4_0": Kind(64 + 4, 2, 8),
    "Q4_1": Kind(96 + 4, 4, 0),
    "MXFP4": Kind(128 + 4, 1, 12),
}


def own_blocks(stored: Collection[str], tiers: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The file's blocks where a tier can hold them, and the tiers: more bits would hold no more."""
    name = next(iter(stored)) if len(stored) == 1 else ""
    if name not in KINDS or KINDS[name].bits not in tiers:
        return "", tiers
    return name, tuple(bits for bits in tiers if bits <= KINDS[name].bits)


def take_apart(name: str, raw: np.ndarray, kind: Kind) -> list[np.ndarray]:
    """Codes ``[blocks, 4 * bits]`` and scales ``[blocks, scales]`` of a file's blocks, uint8.

    Raises
    ------
    ValueError
        A scale is no finite number.
    """
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.nbytes)
    scales, codes = blocks[:, : kind.scales], blocks[:, kind.scales :]
    with np.errstate(over="ignore", invalid="ignore"):
        largest = pairs_of(scales, kind) * np.float32(VALUES.max())
    if not np.isfinite(largest).all():
        raise ValueError(f"{name} has NaN or infinite weights; repair the checkpoint first")
    return [codes, scales]


def pairs_of(scales: np.ndarray, kind: Kind) -> np.ndarray:
    """(scale, offset) of blocks, float32 ``[blocks, 2]``, from uint8 ``[blocks, scales]``."""
    if kind.scales == 1:  # E8M0, halved as the values are doubled: the two least are subnormal
        bits = scales.astype(np.uint32)
        bits = np.where(bits < 2, np.uint32(1 << 21) << bits, (bits - 1) << 23)
        found = bits.astype(np.uint32).view(np.float32)
    else:
        found = np.ascontiguousarray(scales).view(np.float16).astype(np.float32)
    return np.stack(
        [found[:, 0], found[:, 1] if kind.scales == 4 else -kind.centre * found[:, 0]], 1
    )
