"""An expert as bytes: one contiguous blob per tier, the same on disk, in memory and in the kernels.

At 16 bit a blob is the checkpoint's own bfloat16 or float16 bytes. Below that every weight matrix
becomes unsigned codes (signed at 8 bit) in groups of 64 along its last dimension, followed by one
float16 (scale, offset) pair per group: ``weight = scale * code + offset``. At 4, 3 and 2 bits each
group's range is searched, because rounding to the nearest of four levels between min and max
wastes them on outliers. At 12 bit matrices are the 16-bit ones in fewer bytes (`zipped`). Tier 1 is
ternary: weights -scale, 0 and scale, five in a byte, one float16 scale a group; 1.875 bit a weight.
Biases and other 1-D tensors stay at 16 bit; a last dimension that 64 does
not divide is padded, and the padding is dropped when decoding. One tier may instead hold the blocks
of a GGUF file as they are (`blocks`). What the codec knows of activations is what it is given: the
Hessians of `gptq`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from moelab.store.blocks import BLOCK, KINDS, Kind, take_apart
from moelab.store.groups import GROUP, TERNARY
from moelab.store.groups import code_bytes as group_bytes
from moelab.store.rows import Fit, dequantise, quantise, refuse
from moelab.store.zipped import ZIPPED, code_bytes, table_bytes, unzip_words, zip_words

__all__ = ["GROUP", "KNOWN_TIERS", "PAGE", "TIERS", "ZIPPED", "Fit", "Layout", "decode", "encode"]
__all__ += ["TERNARY", "matrices", "nbytes", "payload_bytes"]

TIERS = (16, 8, 4, 3, 2)
"""What is packed unless other tiers are asked for."""
KNOWN_TIERS = (16, ZIPPED, 8, 4, 3, 2, TERNARY)
PAGE = 4096
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Layout:
    """What one expert looks like, in blob order.

    Parameters
    ----------
    tensors : tuple of (name, shape)
        For example ``(("gate_up_proj", (2048, 2048)), ("down_proj", (2048, 1024)))``.
    dtype : {"bfloat16", "float16"}
        The dtype of the 16-bit tier: the checkpoint's own.
    blocks : {"", "Q8_0", "Q4_0", "Q4_1", "MXFP4"}
        A GGUF file's blocks, which the tier of their bits holds as they are.
    turned : bool
        Rows of a blob are columns of the tensors, as where a family has [in, out]: a row is what
        makes one output.

    Examples
    --------
    >>> layout = Layout((("gate_up_proj", (256, 192)), ("down_proj", (192, 128))), "bfloat16")
    >>> payload_bytes(layout, 16), nbytes(layout, 4)
    (147456, 45056)
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str
    blocks: str = ""
    turned: bool = False

    def __post_init__(self) -> None:
        tensors = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in self.tensors)
        object.__setattr__(self, "tensors", tensors)
        names = [name for name, _ in tensors]
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"layout dtype {self.dtype!r} is not a 16-bit dtype; use one of {tuple(_DTYPES)}"
            )
        if not tensors or len(set(names)) != len(names):
            raise ValueError(f"layout tensors {names} must be one or more different names")
        for name, shape in tensors:
            if not shape or min(shape) < 1:
                raise ValueError(
                    f"layout tensor {name!r} has shape {shape}; give one or more positive sizes"
                )
        if self.blocks and self.blocks not in KINDS:
            raise ValueError(f"layout blocks {self.blocks!r} are none of {', '.join(KINDS)}")
        rows = (self.rows(shape) for _, shape in tensors if len(shape) > 1)
        if self.blocks and any(row[-1] % BLOCK for row in rows):
            raise ValueError(f"layout {tensors} has rows that are not whole blocks of {BLOCK}")

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor has in the blob."""
        return shape[::-1] if self.turned else shape

    def kind(self, bits: int) -> Kind | None:
        """The blocks that a tier holds; None where it holds none."""
        kind = KINDS.get(self.blocks)
        return kind if kind and kind.bits == bits else None

    def form(self, bits: int) -> int:
        """What the kernels call a tier: its bits, or the form of its blocks."""
        kind = self.kind(bits)
        return kind.form if kind else bits


def payload_bytes(layout: Layout, bits: int) -> int:
    """Return the exact bytes of one expert at `bits`, without padding to a page."""
    _check_bits(bits, layout)
    shapes = [layout.rows(shape) for _, shape in layout.tensors]
    return sum(map(sum, (_sizes(shape, bits, layout.kind(bits)) for shape in shapes)))


def nbytes(layout: Layout, bits: int) -> int:
    """Return the bytes one expert takes at `bits` on disk, in memory and in the budget.

    This is `payload_bytes` rounded up to whole pages of 4096 bytes.
    """
    return -(-payload_bytes(layout, bits) // PAGE) * PAGE


def encode(
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    bits: int,
    *,
    fit: Fit | None = None,
    hessians: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> np.ndarray:
    """Turn one expert into a blob.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        The expert's tensors by name, with the layout's shapes; any floating dtype. At the tier of
        the layout's blocks matrices are the file's bytes, uint8, row by row.
    layout : Layout
        The expected shapes, and the dtype of the 16-bit tier.
    bits : {16, 12, 8, 4, 3, 2, 1}
        The tier; 1 is ternary.
    fit : callable
        Chooses the range of each group at 4, 3 and 2 bits, see `Fit`; default the searched one.
    hessians : mapping of str to numpy.ndarray
        Of matrices that are rounded by GPTQ below 8 bit: X.T @ X of their inputs X, ``[K, K]``.

    Returns
    -------
    numpy.ndarray
        uint8, of shape ``[nbytes(layout, bits)]``, zero after the payload.

    Raises
    ------
    ValueError
        On an unknown tier, missing or misshapen tensors, NaN or infinite weights, weights that
        float16 scales cannot hold (beyond 65504), a ``fit`` that returns something else, and at 12
        bit on float16 weights and on more exceptions than there is room for.
    """
    blob = np.zeros(nbytes(layout, bits), np.uint8)
    if set(tensors) != {name for name, _ in layout.tensors}:
        raise ValueError(
            f"got tensors {sorted(tensors)}, the layout has "
            f"{[name for name, _ in layout.tensors]}; pass exactly those"
        )
    start, kind = 0, layout.kind(bits)
    for name, shape in layout.tensors:
        tensor, given = tensors[name].detach(), shape
        if kind and len(shape) > 1:
            *rows, width = layout.rows(shape)
            given = (*rows, width // BLOCK * kind.nbytes)
        if tuple(tensor.shape) != given:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the layout says {given}; "
                "pass the expert as its module holds it"
            )
        if layout.turned and not kind:
            tensor = tensor.t()
        if _stays_half(shape, bits):
            parts = [_to_half(name, tensor, _DTYPES[layout.dtype])]
        elif bits == ZIPPED:
            words = _to_half(name, tensor, torch.bfloat16).reshape(-1).view(np.uint16)
            parts = zip_words(name, words)
        elif kind:
            parts = take_apart(name, tensor.numpy(), kind)
        else:
            parts = quantise(name, tensor, bits, fit, hessians.get(name))
        for part in parts:
            raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            blob[start : start + raw.size] = raw
            start += raw.size
    return blob


def decode(
    blob: np.ndarray, layout: Layout, bits: int, *, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Turn a blob back into an expert's tensors.

    Parameters
    ----------
    blob : numpy.ndarray
        uint8, of shape ``[nbytes(layout, bits)]``.
    layout, bits
        As given to `encode`.
    dtype : torch.dtype
        The dtype of the result. At 16 and 12 bit the exact inverse of `encode`, whenever `dtype`
        can hold the checkpoint's values.

    Returns
    -------
    dict of str to torch.Tensor
        The tensors own their memory: they stay valid when the blob is overwritten.

    Raises
    ------
    ValueError
        On an unknown tier, or a blob of another size than ``nbytes(layout, bits)``.
    """
    check_blob(blob, layout, bits)
    blob = np.ascontiguousarray(blob)
    result, start, kind = {}, 0, layout.kind(bits)
    for name, shape in layout.tensors:
        stored = layout.rows(shape)
        codes, pairs = _sizes(stored, bits, kind)
        middle, end = start + codes, start + codes + pairs
        if _stays_half(shape, bits) or bits == ZIPPED:
            found = _half(blob[start:end].copy(), stored, layout.dtype, bits)
        else:
            found = dequantise(blob[start:middle], blob[middle:end], stored, bits, kind)
        result[name] = (found.t() if layout.turned else found).to(dtype).contiguous()
        start = end
    return result


def matrices(blob: np.ndarray, layout: Layout, bits: int) -> list[torch.Tensor]:
    """The tensors of a blob of 16 or 12 bit, as its rows have them; of 16 bit views of it.

    Raises
    ------
    ValueError
        On a blob of another size than ``nbytes(layout, bits)``.
    """
    check_blob(blob, layout, bits)
    found, start = [], 0
    for _, shape in layout.tensors:
        stored = layout.rows(shape)
        end = start + sum(_sizes(stored, bits, None))
        found.append(_half(blob[start:end], stored, layout.dtype, bits))
        start = end
    return found


def check_blob(blob: np.ndarray, layout: Layout, bits: int) -> None:
    """Raise ValueError unless `blob` has the dtype and size of an expert at `bits`."""
    expected = nbytes(layout, bits)
    if blob.dtype != np.uint8 or blob.shape != (expected,):
        raise ValueError(
            f"blob is {blob.dtype} of shape {blob.shape}, {bits} bit needs uint8 of shape "
            f"({expected},); read the whole expert, padding included"
        )


def _check_bits(bits: int, layout: Layout) -> None:
    if bits not in KNOWN_TIERS:
        raise ValueError(f"bits={bits!r} is not a tier; use one of {KNOWN_TIERS}")
    if bits == ZIPPED and layout.dtype != "bfloat16":
        raise ValueError(
            f"{bits} bit holds bfloat16 weights, whose mantissas have 7 bits; these are "
            f"{layout.dtype}, whose 10 leave too little to save: leave out tier {bits}"
        )


def _stays_half(shape: tuple[int, ...], bits: int) -> bool:
    return bits == 16 or len(shape) == 1


def _sizes(shape: tuple[int, ...], bits: int, kind: Kind | None) -> tuple[int, int]:
    """Bytes of a tensor's codes, and of its (scale, offset) pairs or its table."""
    if _stays_half(shape, bits):
        return 2 * math.prod(shape), 0
    if bits == ZIPPED:
        return code_bytes(math.prod(shape)), table_bytes(math.prod(shape))
    if kind:
        blocks = math.prod(shape) // BLOCK
        return blocks * BLOCK * bits // 8, blocks * kind.scales
    groups = math.prod(shape[:-1]) * -(-shape[-1] // GROUP)
    return groups * group_bytes(bits), groups * (2 if bits == TERNARY else 4)


def _half(raw: np.ndarray, shape: tuple[int, ...], dtype: str, bits: int) -> torch.Tensor:
    """A tensor of 16 or 12 bit from its bytes."""
    if not _stays_half(shape, bits):
        raw = unzip_words(raw, math.prod(shape)).view(np.uint8)
    return torch.from_numpy(raw).view(_DTYPES[dtype]).reshape(shape)


def _to_half(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """The tensor's 16-bit bytes as uint16; refuses what is not finite."""
    half = tensor.to(device="cpu", dtype=dtype).contiguous()
    if not math.isfinite(half.abs().max()):
        refuse(name, tensor, torch.finfo(dtype).max)
    return half.view(torch.int16).numpy()
