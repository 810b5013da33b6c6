"""SwiGLU experts straight from their blobs: one call per layer, each expert at its own tier.

A row of weights meets a token in one inlined dot product. At 16 bit it widens bfloat16 or float16
to float32 and keeps float32 activations. Below, activations become integers with one scale per group
of 64, int16 at 8 bit and int8 under it, and AVX2 multiplies and adds 16 or 32 codes at a time; a
group's dot product is ``scale * xs * sum(code * xq) + offset * xs * sum(xq)``. Nothing is unpacked to memory, so reading
the blob is the cost. Other machines, and any machine under ``MOELAB_PORTABLE=1``, run plain loops
with the same arithmetic. Kernels compile at first use and are cached on disk. What they do not
know: biases, other activations, and devices other than the CPU.

Letters: T tokens, n experts, H model width, I inner width, K a row's length.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moelab.store.codecs import GROUP, TIERS, Layout, compiled, decode, encode, nbytes

__all__ = ["AVX2", "supports", "swiglu_experts", "swiglu_prefill", "warm_up"]


def _has_avx2() -> bool:
    if os.environ.get("MOELAB_PORTABLE", "0") not in ("", "0"):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx2", "fma", "f16c"))


AVX2 = _has_avx2()
"""Whether the AVX2 kernels run, or the portable loops."""

# Infinities and NaN must mean what they mean, so fastmath's nnan and ninf stay off.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with a cache of its own: numba's key knows the CPU, not MOELAB_PORTABLE."""
    function.__qualname__ += "_avx2" if AVX2 else "_portable"
    return compiled(fastmath=_FAST)(function)


# ---- memory at an address, as LLVM sees it --------------------------------------------------

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F16, _F32, _V = ir.HalfType(), ir.FloatType(), ir.VectorType


def _load(b: ir.IRBuilder, address: ir.Value, offset: ir.Value | int, kind: ir.Type) -> ir.Value:
    """An unaligned load of `kind` from address + offset."""
    where = b.add(address, offset if isinstance(offset, ir.Value) else _I64(offset))
    loaded = b.load(b.inttoptr(where, ir.PointerType(kind)))
    loaded.align = 1
    return loaded


@intrinsic
def _load_u8(_context, address):  # type: ignore[no-untyped-def]
    def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
        return b.zext(_load(b, args[0], 0, _I8), _I32)

    return types.int32(types.intp), emit


@intrinsic
def _load_i8(_context, address):  # type: ignore[no-untyped-def]
    def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
        return b.sext(_load(b, args[0], 0, _I8), _I32)

    return types.int32(types.intp), emit


@intrinsic
def _load_i16(_context, address):  # type: ignore[no-untyped-def]
    def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
        return b.sext(_load(b, args[0], 0, _I16), _I32)

    return types.int32(types.intp), emit


@intrinsic
def _load_f32(_context, address):  # type: ignore[no-untyped-def]
    return types.float32(types.intp), lambda _c, b, _s, args: _load(b, args[0], 0, _F32)


@intrinsic
def _load_bfloat16(_context, address):  # type: ignore[no-untyped-def]
    def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
        return b.bitcast(b.shl(b.zext(_load(b, args[0], 0, _I16), _I32), _I32(16)), _F32)

    return types.float32(types.intp), emit


@intrinsic
def _load_float16(_context, address):  # type: ignore[no-untyped-def]
    """Integer arithmetic only: fpext needs a library call on CPUs without F16C."""

    def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
        h = b.zext(_load(b, args[0], 0, _I16), _I32)
        magnitude = b.bitcast(b.shl(b.and_(h, _I32(0x7FFF)), _I32(13)), _F32)
        rebased = b.bitcast(b.fmul(magnitude, _F32(2.0**112)), _I32)
        return b.bitcast(b.or_(rebased, b.shl(b.and_(h, _I32(0x8000)), _I32(16))), _F32)

    return types.float32(types.intp), emit


# ---- row dot products with AVX2 -------------------------------------------------------------


def _splat(value: int, lanes: int = 32, kind: ir.Type = _I8) -> ir.Constant:
    return ir.Constant(_V(kind, lanes), [value] * lanes)


def _permute(b: ir.IRBuilder, value: ir.Value, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(value, value, ir.Constant(_V(_I32, len(lanes)), lanes))


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _shift_right(b: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """Shift bytes, two at a time: the neighbour's bits that come in are for the caller to mask."""
    lanes = value.type.count // 2
    words = b.bitcast(value, _V(_I16, lanes))
    return b.bitcast(b.lshr(words, _splat(count, lanes, _I16)), value.type)


def _codes_avx2(b: ir.IRBuilder, group: ir.Value, bits: int) -> list[ir.Value]:
    """One packed group of 4, 3 or 2 bits as two <32 x i8> of codes."""
    if bits == 4:
        v = _load(b, group, 0, _V(_I8, 32))
        return [b.and_(v, _splat(15)), b.lshr(v, _splat(4))]
    half = _load(b, group, 0, _V(_I8, 16))
    lanes = ir.Constant(_V(_I32, 32), list(range(32)))
    v = b.shuffle_vector(half, _shift_right(b, half, 2), lanes)
    codes = [b.and_(v, _splat(3)), b.and_(_shift_right(b, v, 4), _splat(3))]
    if bits == 3:
        plane = _permute(b, _load(b, group, 16, _V(_I8, 8)), [k % 8 for k in range(32)])
        for i in (0, 1):
            masks = ir.Constant(_V(_I8, 32), [1 << (4 * i + k // 8) for k in range(32)])
            is_set = b.icmp_unsigned("!=", b.and_(plane, masks), _splat(0))
            codes[i] = b.or_(codes[i], b.select(is_set, _splat(4), _splat(0)))
    return codes


def _group_dot_avx2(b: ir.IRBuilder, group: ir.Value, x: ir.Value, bits: int) -> ir.Value:
    """Sum of code * xq over one group, as <8 x float> partial sums.

    8 bit: 64 * 127 * 32767 fits in 32 bits. Below: pmaddubsw adds two products in 16 bits, and
    4 * 15 * 127 fits.
    """
    v32, v16, v8 = _V(_I8, 32), _V(_I16, 16), _V(_I32, 8)
    if bits == 8:
        parts = [
            _call(b, "llvm.x86.avx2.pmadd.wd", v8,
                  b.sext(_load(b, group, 16 * i, _V(_I8, 16)), v16), _load(b, x, 32 * i, v16))
            for i in range(4)
        ]
        return b.sitofp(b.add(b.add(*parts[:2]), b.add(*parts[2:])), _V(_F32, 8))
    sums = [
        _call(b, "llvm.x86.avx2.pmadd.ub.sw", v16, codes, _load(b, x, 32 * i, v32))
        for i, codes in enumerate(_codes_avx2(b, group, bits))
    ]
    wide = _call(b, "llvm.x86.avx2.pmadd.wd", v8, b.add(*sums), _splat(1, 16, _I16))
    return b.sitofp(wide, _V(_F32, 8))


def _fma(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> None:
    b.store(_call(b, "llvm.fma.v8f32", _V(_F32, 8), x, y, b.load(total)), total)


def _sum(b: ir.IRBuilder, totals: list[ir.Value]) -> ir.Value:
    """The sum of all lanes of all accumulators."""
    vectors = [b.load(total) for total in totals]
    while len(vectors) > 1:
        vectors = [b.fadd(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    result = vectors[0]
    for lanes in (4, 2, 1):
        low = _permute(b, result, list(range(lanes)))
        result = b.fadd(low, _permute(b, result, list(range(lanes, 2 * lanes))))
    return b.extract_element(result, _I32(0))


def _dot_avx2(bits: int) -> Any:
    """Row dot product for codes: four groups a turn, then the rest one by one."""

    @intrinsic
    def dot(_context, row, pairs, xq, x_pairs, groups):  # type: ignore[no-untyped-def]
        def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
            row, pairs, xq, x_pairs, groups = args
            zeros = ir.Constant(_V(_F32, 8), [0.0] * 8)
            totals = [cgutils.alloca_once_value(b, zeros) for _ in range(4)]
            offsets = cgutils.alloca_once_value(b, zeros)  # odd lanes count, even are dropped
            turns = b.lshr(groups, _I64(2))

            def add_groups(first: ir.Value, count: int) -> None:
                halves = _load(b, pairs, b.mul(first, _I64(4)), _V(_F16, 2 * count))
                products = b.fmul(
                    b.fpext(halves, _V(_F32, 2 * count)),
                    _load(b, x_pairs, b.mul(first, _I64(8)), _V(_F32, 2 * count)),
                )
                padded = products if count == 4 else b.shuffle_vector(
                    products, ir.Constant(products.type, [0.0] * 2),
                    ir.Constant(_V(_I32, 8), [0, 1, 2, 3, 2, 3, 2, 3]),
                )
                b.store(b.fadd(b.load(offsets), padded), offsets)
                for k in range(count):
                    g = b.add(first, _I64(k))
                    group = b.add(row, b.mul(g, _I64(8 * bits)))
                    x = b.add(xq, b.mul(g, _I64(2 * GROUP if bits == 8 else GROUP)))
                    dots = _group_dot_avx2(b, group, x, bits)
                    _fma(b, totals[k], dots, _permute(b, products, [2 * k] * 8))

            with cgutils.for_range(b, turns) as loop:
                add_groups(b.mul(loop.index, _I64(4)), 4)
            with cgutils.for_range(b, groups, b.mul(turns, _I64(4))) as loop:
                add_groups(loop.index, 1)
            odd = [float(k % 2) for k in range(8)]
            b.store(b.fmul(b.load(offsets), ir.Constant(_V(_F32, 8), odd)), offsets)
            _fma(b, totals[0], b.load(offsets), ir.Constant(_V(_F32, 8), [1.0] * 8))
            return _sum(b, totals)

        return types.float32(*[types.intp] * 5), emit

    return dot


def _dot_half_avx2(half: ir.Type | None) -> Any:
    """Row dot product for 16-bit weights (None: bfloat16), 64 at a time in eight accumulators."""

    @intrinsic
    def dot(_context, row, x, groups):  # type: ignore[no-untyped-def]
        def emit(_c, b, _s, args):  # type: ignore[no-untyped-def]
            row, x, groups = args
            f8, w8 = _V(_F32, 8), _V(_I32, 8)
            totals = [
                cgutils.alloca_once_value(b, ir.Constant(f8, [0.0] * 8)) for _ in range(8)
            ]
            with cgutils.for_range(b, groups) as loop:
                w_at = b.add(row, b.mul(loop.index, _I64(2 * GROUP)))
                x_at = b.add(x, b.mul(loop.index, _I64(4 * GROUP)))
                for k, total in enumerate(totals):
                    w = _load(b, w_at, 16 * k, _V(half or _I16, 8))
                    if half is None:
                        w = b.bitcast(b.shl(b.zext(w, w8), _splat(16, 8, _I32)), f8)
                    else:
                        w = b.fpext(w, f8)
                    _fma(b, total, w, _load(b, x_at, 32 * k, f8))
            return _sum(b, totals)

        return types.float32(*[types.intp] * 3), emit

    return dot


# ---- row dot products anywhere --------------------------------------------------------------


@_kernel
def _dot_portable(bits, row, pairs, xq, x_pairs, groups):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for g in range(groups):
        q, x, dot = row + g * 8 * bits, xq + g * GROUP, np.int32(0)
        if bits == 8:
            for j in range(GROUP):
                dot = np.int32(dot + _load_i8(q + j) * _load_i16(x + g * GROUP + 2 * j))
        elif bits == 4:
            for j in range(32):
                c = _load_u8(q + j)
                dot = np.int32(dot + (c & 15) * _load_i8(x + j))
                dot = np.int32(dot + (c >> 4) * _load_i8(x + 32 + j))
        else:
            for k in range(4):
                for j in range(16):
                    c = (_load_u8(q + j) >> (2 * k)) & 3
                    if bits == 3:
                        plane = _load_u8(q + 16 + (j & 7))
                        c |= ((plane >> (2 * k + (j >> 3))) & 1) << 2
                    dot = np.int32(dot + c * _load_i8(x + 16 * k + j))
        scale = _load_float16(pairs + 4 * g) * _load_f32(x_pairs + 8 * g)
        offset = _load_float16(pairs + 4 * g + 2) * _load_f32(x_pairs + 8 * g + 4)
        total += np.float32(dot) * scale + offset
    return total


@_kernel
def _dot_bfloat16_portable(row, x, groups):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(groups * GROUP):
        total += _load_bfloat16(row + 2 * j) * _load_f32(x + 4 * j)
    return total


@_kernel
def _dot_float16_portable(row, x, groups):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(groups * GROUP):
        total += _load_float16(row + 2 * j) * _load_f32(x + 4 * j)
    return total


def _portable(bits: int) -> Any:
    @_kernel
    def dot(row, pairs, xq, x_pairs, groups):  # type: ignore[no-untyped-def]
        return _dot_portable(bits, row, pairs, xq, x_pairs, groups)

    return dot


if AVX2:
    _dot8, _dot4, _dot3, _dot2 = (_dot_avx2(bits) for bits in (8, 4, 3, 2))
    _dot_bfloat16, _dot_float16 = _dot_half_avx2(None), _dot_half_avx2(_F16)
else:
    _dot8, _dot4, _dot3, _dot2 = (_portable(bits) for bits in (8, 4, 3, 2))
    _dot_bfloat16, _dot_float16 = _dot_bfloat16_portable, _dot_float16_portable


# ---- one layer's experts --------------------------------------------------------------------


@_kernel
def _quantise_rows(x, levels, xq, x_pairs):  # type: ignore[no-untyped-def]
    """float32 [T, K] -> integer codes, and per group scale and scale * sum(codes)."""
    for t in range(x.shape[0]):
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


@_kernel
def _linear(address, bits, bfloat, rows, tokens, x, xq, x_pairs, out):  # type: ignore[no-untyped-def]
    """out[t] = W @ x[t] for the given tokens; returns the address after W."""
    width = x.shape[1]
    groups, row_bytes = width // GROUP, width * bits // 8
    pairs = address + rows * row_bytes
    at_x, at_xq, at_pairs = x.ctypes.data, xq.ctypes.data, x_pairs.ctypes.data
    for r in range(rows):
        w, p = address + r * row_bytes, pairs + r * groups * 4
        for t in tokens:
            fx, qx, px = at_x + t * width * 4, at_xq + t * xq.shape[1], at_pairs + t * groups * 8
            if bits == 16 and bfloat:
                out[t, r] = _dot_bfloat16(w, fx, groups)
            elif bits == 16:
                out[t, r] = _dot_float16(w, fx, groups)
            elif bits == 8:
                out[t, r] = _dot8(w, p, qx, px, groups)
            elif bits == 4:
                out[t, r] = _dot4(w, p, qx, px, groups)
            elif bits == 3:
                out[t, r] = _dot3(w, p, qx, px, groups)
            else:
                out[t, r] = _dot2(w, p, qx, px, groups)
    return pairs if bits == 16 else pairs + rows * groups * 4


@_kernel
def _silu_mul(hidden, act):  # type: ignore[no-untyped-def]
    """act = silu(gate) * up, for one token."""
    inner = len(act)
    for j in range(inner):
        act[j] = hidden[j] / (np.float32(1) + np.exp(-hidden[j])) * hidden[inner + j]


@_kernel
def _experts(addresses, bits, x, gate, out, inner, bfloat):  # type: ignore[no-untyped-def]
    """Serve every expert to the tokens whose gate weight for it is not zero.

    Returns -1, or the index of an expert that cannot be, in which case nothing was done.
    """
    for e in range(len(addresses)):
        tier = bits[e]
        known = tier == 16 or tier == 8 or tier == 4 or tier == 3 or tier == 2
        if not known or addresses[e] == 0:
            return e
    count, width = x.shape
    x8 = np.empty((count, width), np.int8)
    x16 = np.empty((count, 2 * width), np.int8)  # int16 codes
    x8_pairs = np.empty((count, width // GROUP, 2), np.float32)
    x16_pairs = np.empty((count, width // GROUP, 2), np.float32)
    a = np.empty((count, 2 * inner), np.int8)
    a_pairs = np.empty((count, inner // GROUP, 2), np.float32)
    hidden = np.empty((count, 2 * inner), np.float32)
    act = np.empty((count, inner), np.float32)
    result = np.empty((count, width), np.float32)
    if (bits == 8).any():
        _quantise_rows(x, 32767, x16.view(np.int16), x16_pairs)
    if (bits < 8).any():
        _quantise_rows(x, 127, x8, x8_pairs)
    for e in range(len(addresses)):
        tokens = np.flatnonzero(gate[e])
        if len(tokens) == 0:
            continue
        start, tier = np.int64(addresses[e]), bits[e]
        xq, x_pairs = (x16, x16_pairs) if tier == 8 else (x8, x8_pairs)
        down = _linear(start, tier, bfloat, 2 * inner, tokens, x, xq, x_pairs, hidden)
        for t in tokens:
            _silu_mul(hidden[t], act[t])
            if tier == 8:
                _quantise_rows(act[t:t + 1], 32767, a[t:t + 1].view(np.int16), a_pairs[t:t + 1])
            elif tier < 8:
                _quantise_rows(act[t:t + 1], 127, a[t:t + 1], a_pairs[t:t + 1])
        _linear(down, tier, bfloat, width, tokens, act, a, a_pairs, result)
        for t in tokens:
            for j in range(width):
                out[t, j] += gate[e, t] * result[t, j]
    return -1


# ---- what the engine calls ------------------------------------------------------------------

_UINTP, _INT64, _FLOAT32 = np.dtype(np.uintp), np.dtype(np.int64), np.dtype(np.float32)


def _check(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.carray:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; pass a writeable C-contiguous "
            f"{dtype.name} array of shape {shape}"
        )


def supports(
    layout: Layout,
    *,
    activation: str,
    is_concatenated: bool = True,
    is_transposed: bool = False,
    has_bias: bool = False,
    has_gate: bool = True,
) -> bool:
    """Say whether the kernels serve experts of this kind.

    They serve SwiGLU: ``down_proj @ (silu(gate) * up)`` with gate and up stacked in one matrix.

    Parameters
    ----------
    layout : Layout
        The expert's tensors: exactly ``gate_up_proj [2I, H]``, then ``down_proj [H, I]``.
    activation : str
        The gate's activation function; "silu" and "swish" are served.
    is_concatenated, is_transposed, has_bias, has_gate : bool
        The expert module's attributes of the same names in transformers.

    Examples
    --------
    >>> layout = Layout((("gate_up_proj", (256, 192)), ("down_proj", (192, 128))), "bfloat16")
    >>> supports(layout, activation="silu"), supports(layout, activation="gelu")
    (True, False)
    """
    if activation not in ("silu", "swish") or not (is_concatenated and has_gate):
        return False
    if is_transposed or has_bias:
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
    """Add the weighted outputs of a layer's experts to `out`, for few tokens (T up to about 8).

    ``out[t] += gate[e, t] * swiglu_e(x[t])``. The GIL is released; the memory at `addrs` must
    stay valid until the call returns. A token whose gate weight is zero costs nothing.

    Parameters
    ----------
    addrs : numpy.ndarray
        uintp ``[n]``, where each expert's blob starts; no alignment is needed.
    bits : numpy.ndarray
        int64 ``[n]``, each expert's tier.
    x : numpy.ndarray
        float32 ``[T, H]``.
    gate : numpy.ndarray
        float32 ``[n, T]``.
    out : numpy.ndarray
        float32 ``[T, H]``, added to.
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
    _check("out", out, _FLOAT32, (tokens, width))
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
    """Return one expert's output for many tokens, with torch's threads.

    Parameters
    ----------
    blob : numpy.ndarray
        uint8, of shape ``[nbytes(layout, bits)]``.
    bits : {16, 8, 4, 3, 2}
        The blob's tier.
    layout : Layout
        A layout that `supports` accepts.
    x : torch.Tensor
        float32 ``[n, H]``.

    Returns
    -------
    torch.Tensor
        float32 ``[n, H]``.

    Notes
    -----
    Weights are decoded to float32: on AVX2 machines torch multiplies 16-bit matrices by more than
    one token several times slower than float32 ones.
    """
    weights = decode(blob, layout, bits)
    gate, up = F.linear(x, weights["gate_up_proj"]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights["down_proj"])


def warm_up() -> None:
    """Compile every kernel and codec, or load them from numba's cache on disk."""
    layout = Layout((("gate_up_proj", (128, 64)), ("down_proj", (64, 64))), "bfloat16")
    tensors = {name: torch.ones(shape) for name, shape in layout.tensors}
    blobs = [encode(tensors, layout, bits) for bits in TIERS]
    decode(blobs[1], layout, TIERS[1])
    swiglu_experts(
        np.array([blob.ctypes.data for blob in blobs], np.uintp),
        np.array(TIERS, np.int64),
        np.ones((1, 64), np.float32),
        np.ones((len(TIERS), 1), np.float32),
        np.zeros((1, 64), np.float32),
        inner=64,
        half=layout.dtype,
    )
