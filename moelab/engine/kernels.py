"""SwiGLU experts straight from their blobs: one call per layer, each expert at its own tier.

At 16 bit weights are widened to float32 and activations stay float32. Below, activations become
integers with one scale per group of 64, int16 at 8 bit and int8 under it, and a group's dot
product is ``scale * xs * sum(code * xq) + offset * xs * sum(xq)``. Nothing is unpacked to memory,
so reading the blob is the cost. Kernels compile at first use, release the GIL and are cached on
disk. What they do not know: biases, other activations, and devices other than the CPU.

Letters: T tokens, n experts, H model width, I inner width, K a row's length.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from moelab.engine.row_dots import AVX2, dot_codes, dot_half, kernel
from moelab.store.codecs import GROUP, TIERS, Layout, check_blob, decode, nbytes
from moelab.store.manifest import Manifest

__all__ = ["AVX2", "KERNEL_TOKENS", "supports", "swiglu_experts", "swiglu_prefill", "warm_up"]

KERNEL_TOKENS = 32
"""Up to so many tokens per expert the kernels are faster than decoding (measured with AVX2)."""

_UINTP, _INT64, _FLOAT32 = np.dtype(np.uintp), np.dtype(np.int64), np.dtype(np.float32)


@kernel
def _quantise_rows(
    x: np.ndarray, tokens: np.ndarray, levels: int, xq: np.ndarray, x_pairs: np.ndarray
) -> None:
    """float32 [T, K] -> integer codes, and per group scale and scale * sum(codes)."""
    for t in tokens:
        for g in range(x_pairs.shape[1]):
            largest, poison = np.float32(0), np.float32(0)
            for j in range(g * GROUP, (g + 1) * GROUP):
                largest = max(largest, abs(x[t, j]))
                poison += x[t, j] * np.float32(0)  # NaN as soon as one value is not finite
            scale = max(largest, np.float32(1e-30)) / np.float32(levels)
            inverse, total = np.float32(1) / scale, np.int32(0)
            for j in range(g * GROUP, (g + 1) * GROUP):
                code = np.int32(0) if poison != 0 else np.int32(np.rint(x[t, j] * inverse))
                xq[t, j] = code
                total += code
            x_pairs[t, g, 0] = scale + poison
            x_pairs[t, g, 1] = np.float32(total) * scale + poison


@kernel
def _quantise(
    x: np.ndarray,
    tokens: np.ndarray,
    int8: bool,
    int16: bool,
    x8: np.ndarray,
    x16: np.ndarray,
    x_pairs: np.ndarray,
) -> None:
    if int8:
        _quantise_rows(x, tokens, 127, x8, x_pairs[0])
    if int16:
        _quantise_rows(x, tokens, 32767, x16, x_pairs[1])


@kernel
def _linear(
    address: int,
    bits: int,
    bfloat: bool,
    rows: int,
    tokens: np.ndarray,
    x: np.ndarray,
    x8: np.ndarray,
    x16: np.ndarray,
    x_pairs: np.ndarray,
    out: np.ndarray,
) -> int:
    """Set out[t] to W @ x[t] for the given tokens; returns the address after W.

    W lies as `codecs.encode` wrote it: all rows of codes, then all rows of (scale, offset) pairs.
    """
    width = x.shape[1]
    groups, row_bytes = width // GROUP, width * bits // 8
    pairs = address + rows * row_bytes
    at_x, at_pairs = x.ctypes.data, x_pairs[int(bits == 8)].ctypes.data
    at_codes, step = (x16.ctypes.data, 2 * width) if bits == 8 else (x8.ctypes.data, width)
    for r in range(rows):  # outside: a row comes from memory once, for all tokens
        w, p = address + r * row_bytes, pairs + r * groups * 4
        for t in tokens:
            if bits == 16:
                out[t, r] = dot_half(bfloat, w, at_x + t * width * 4, groups)
            else:
                codes, px = at_codes + t * step, at_pairs + t * groups * 8
                out[t, r] = dot_codes(bits, w, p, codes, px, groups)
    return pairs if bits == 16 else pairs + rows * groups * 4


@kernel
def _silu_mul(tokens: np.ndarray, hidden: np.ndarray, act: np.ndarray) -> None:
    inner = act.shape[1]
    for t in tokens:
        for j in range(inner):
            h = hidden[t, j]
            act[t, j] = h / (np.float32(1) + np.exp(-h)) * hidden[t, inner + j]


@kernel
def _tokens(gate: np.ndarray, room: np.ndarray) -> np.ndarray:
    """List the tokens to which any of these experts [n, T] has a gate weight."""
    n = 0
    for t in range(gate.shape[1]):
        for e in range(gate.shape[0]):
            if gate[e, t] != 0:
                room[n] = t
                n += 1
                break
    return room[:n]


@kernel
def _experts(
    addresses: np.ndarray,
    bits: np.ndarray,
    x: np.ndarray,
    gate: np.ndarray,
    out: np.ndarray,
    inner: int,
    bfloat: bool,
) -> int:
    """Serve every expert to the tokens whose gate weight for it is not zero; `out` [n, T, H].

    Returns -1, or the index of an expert that cannot be, in which case nothing was done.
    """
    some_int8 = some_int16 = False
    for e in range(len(addresses)):
        if addresses[e] == 0 or bits[e] not in (16, 8, 4, 3, 2):
            return e
        some_int8, some_int16 = some_int8 or bits[e] < 8, some_int16 or bits[e] == 8
    count, width = x.shape
    # Only rows of tokens that are served are ever filled, and only those are read.
    x8, x16 = np.empty((count, width), np.int8), np.empty((count, width), np.int16)
    a8, a16 = np.empty((count, inner), np.int8), np.empty((count, inner), np.int16)
    x_pairs = np.empty((2, count, width // GROUP, 2), np.float32)  # for int8, for int16
    a_pairs = np.empty((2, count, inner // GROUP, 2), np.float32)
    hidden = np.empty((count, 2 * inner), np.float32)
    act = np.empty((count, inner), np.float32)
    result = np.empty((count, width), np.float32)
    room = np.empty(count, np.int64)
    _quantise(x, _tokens(gate, room), some_int8, some_int16, x8, x16, x_pairs)
    for e in range(len(addresses)):
        tokens = _tokens(gate[e : e + 1], room)
        if len(tokens) == 0:
            continue
        start, tier = np.int64(addresses[e]), bits[e]  # [gate; up] first, then down
        down = _linear(start, tier, bfloat, 2 * inner, tokens, x, x8, x16, x_pairs, hidden)
        _silu_mul(tokens, hidden, act)
        _quantise(act, tokens, tier < 8, tier == 8, a8, a16, a_pairs)
        _linear(down, tier, bfloat, width, tokens, act, a8, a16, a_pairs, result)
        for t in tokens:
            for j in range(width):
                out[e, t, j] = gate[e, t] * result[t, j]
    return -1


def _check(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.carray:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; pass a writeable C-contiguous "
            f"{dtype.name} array of shape {shape}"
        )


def supports(layout: Layout, experts: Manifest) -> bool:
    """Say whether the kernels serve experts of this kind.

    They serve SwiGLU: ``down_proj @ (silu(gate) * up)`` with exactly two tensors, gate and up
    stacked as ``gate_up_proj [2I, H]``, then ``down_proj [H, I]``.
    """
    if experts.activation not in ("silu", "swish") or experts.gating != "concatenated":
        return False
    if experts.transposed or experts.has_bias or experts.has_post_norm:
        return False
    if tuple(name for name, _ in layout.tensors) != ("gate_up_proj", "down_proj"):
        return False
    up, down = (shape for _, shape in layout.tensors)
    if len(up) != 2 or len(down) != 2 or up != (2 * down[1], down[0]):
        return False
    return down[0] % GROUP == 0 and down[1] % GROUP == 0


def swiglu_experts(
    addrs: np.ndarray,
    bits: np.ndarray,
    x: np.ndarray,
    gate: np.ndarray,
    out: np.ndarray,
    *,
    inner: int,
    half: str,
) -> None:
    """Compute the weighted outputs of a layer's experts, for few tokens (T up to about 8).

    ``out[e, t] = gate[e, t] * swiglu_e(x[t])``; adding them up is the caller's, in an order that
    does not hang on which of them came first. The GIL is released; the memory at `addrs` must
    stay valid until the call returns. A token whose gate weight is zero costs nothing, and its
    place in `out` is left as it was.

    Parameters
    ----------
    addrs, bits
        uintp and int64 ``[n]``: where each expert's blob starts (at any byte), and its tier.
    x, gate, out
        float32 ``[T, H]``, ``[n, T]``, and ``[n, T, H]``, which is written.
    inner : int
        I, the experts' inner width.
    half : {"bfloat16", "float16"}
        The dtype of the 16-bit tier.

    Raises
    ------
    ValueError
        On arrays of another dtype, shape or memory order, and on unknown tiers.
    """
    n, tokens, width = len(addrs), len(x), x.shape[-1]
    _check("addrs", addrs, _UINTP, (n,))
    _check("bits", bits, _INT64, (n,))
    _check("x", x, _FLOAT32, (tokens, width))
    _check("gate", gate, _FLOAT32, (n, tokens))
    _check("out", out, _FLOAT32, (n, tokens, width))
    if half not in ("bfloat16", "float16"):
        raise ValueError(f"half={half!r} is not a 16-bit dtype; use 'bfloat16' or 'float16'")
    if width % GROUP or inner % GROUP or inner < GROUP or width < GROUP:
        raise ValueError(
            f"widths H={width} and I={inner} must be multiples of {GROUP}; ask supports() first"
        )
    wrong = _experts(addrs, bits, x, gate, out, inner, half == "bfloat16")
    if wrong >= 0:
        raise ValueError(
            f"expert {wrong} of the call has {bits[wrong]} bit at address {addrs[wrong]}; use "
            f"tiers {TIERS} and addresses of blobs in memory"
        )


def swiglu_prefill(blob: np.ndarray, bits: int, layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """One expert's output float32 ``[T, H]`` for any number of tokens ``x`` float32 ``[T, H]``.

    ``blob`` is uint8 ``[nbytes(layout, bits)]``, of a layout that `supports` accepts. Beyond 32
    tokens weights are decoded to float32 and torch multiplies them with its threads;
    up to there the decoding costs more than it saves, and the kernels serve. Decoding to 16-bit
    matrices does not pay: without AVX512 torch multiplies those by more than one token several
    times slower than float32 ones.
    """
    if len(x) <= KERNEL_TOKENS:
        check_blob(blob, layout, bits)
        blob = np.ascontiguousarray(blob)
        x, out = x.contiguous(), x.new_empty((1, *x.shape))
        swiglu_experts(
            np.array([blob.ctypes.data], np.uintp),
            np.array([bits], np.int64),
            x.numpy(),
            np.ones((1, len(x)), np.float32),
            out.numpy(),
            inner=layout.tensors[1][1][1],
            half=layout.dtype,
        )
        return out[0]
    weights = decode(blob, layout, bits)
    gate, up = F.linear(x, weights["gate_up_proj"]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights["down_proj"])


def warm_up() -> None:
    """Compile the kernels and decoders, or load them from numba's cache on disk."""
    layout = Layout((("gate_up_proj", (128, 64)), ("down_proj", (64, 64))), "bfloat16")
    blobs = [np.zeros(nbytes(layout, bits), np.uint8) for bits in TIERS]
    decode(blobs[-1], layout, TIERS[-1])
    swiglu_experts(
        np.array([blob.ctypes.data for blob in blobs], np.uintp),
        np.array(TIERS, np.int64),
        np.ones((1, 64), np.float32),
        np.ones((len(TIERS), 1), np.float32),
        np.empty((len(TIERS), 1, 64), np.float32),
        inner=64,
        half=layout.dtype,
    )
