"""One row of weights meets one token, or `TILE` of them: the dot products under the kernels.

bfloat16 or float16 weights meet float32 activations, packed codes integer ones (int16 at 8 bit,
int8 below). All arguments are addresses; a row is whole groups of 64. They are emitted as LLVM
vectors: codes are unpacked in registers, once for all tokens, and multiplied 16 or 32 at a time.
What AVX2 has one instruction for, other machines (and any machine under ``MOELAB_PORTABLE=1``) do
in plain vector arithmetic: `_from_half` and `_products`.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moelab.store.groups import GROUP, compiled


def _has_avx2() -> bool:
    if os.environ.get("MOELAB_PORTABLE", "0") not in ("", "0"):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx2", "fma", "f16c"))


AVX2 = _has_avx2()
"""Whether the kernels use AVX2's own instructions, or what every machine has."""

_intrinsic = cast("Callable[..., Any]", intrinsic)
_FILES = [
    Path(__file__).with_name(name)
    for name in ("row_dots.py", "cores.py", "chunks.py", "kernels.py")
]
_TEXT = hashlib.blake2b(b"".join(f.read_bytes() for f in _FILES), digest_size=4).hexdigest()
# Infinities and NaN must mean what they mean, so fastmath's nnan and ninf stay off.
AHEAD = 1024
"""Bytes ahead of a row dot that its weights are fetched, past the caches.

Weights are read once a token. Through the caches they push out what torch and Python need next.
A token of 4 x 64 experts of 2048 x 1024 at 4 bit took 23 to 26 ms, fetched past them 18 to 22; half
of it is saved between the kernels (three and two runs in turn, two cores of an AMD EPYC).
"""
TILE = 4
"""Tokens that meet a row at once where there are many: their sums stay in registers."""
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, with a cache key that knows MOELAB_PORTABLE and the text of these files.

    numba's own key knows the CPU and the file of the function, not what it calls elsewhere.
    """
    function.__qualname__ += f"@{'avx2' if AVX2 else 'portable'}-{_TEXT}"
    is_dot = function.__name__ == "dot"
    return compiled(fastmath=_FAST, forceinline=is_dot)(function)


def intrinsic_of(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make ``emit(builder, args)`` a function of compiled code with this signature."""

    def decorate(emit: Callable[..., Any]) -> Any:
        found = signature, lambda _c, b, _s, values: emit(b, values)
        forms = (
            lambda _context: found,
            lambda _context, x: found,  # noqa: ARG005
            lambda _context, x, y: found,  # noqa: ARG005
        )
        return _intrinsic(forms[len(signature.args)])

    return decorate


# ---- memory at an address, as LLVM sees it --------------------------------------------------

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_Builder = Any  # ir.IRBuilder, whose methods have no types
_F16, _F32, _V = ir.HalfType(), ir.FloatType(), ir.VectorType


def _load(b: _Builder, address: ir.Value, offset: ir.Value | int, kind: ir.Type) -> ir.Value:
    """An unaligned load of `kind` from address + offset."""
    where = b.add(address, offset if isinstance(offset, ir.Value) else _I64(offset))
    loaded = b.load(b.inttoptr(where, ir.PointerType(kind)))
    loaded.align = 1
    return loaded


def _fetch(b: _Builder, address: ir.Value, nbytes: int, *, keep: bool) -> None:
    """Fetch weights that come soon, see `AHEAD`; to keep them in a cache more tokens need them."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(_I8), _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    for line in range(0, nbytes, 64):
        at = b.inttoptr(b.add(address, _I64(AHEAD + line)), ir.PointerType(_I8))
        b.call(fetch, [at, _I32(0), _I32(3 if keep else 0), _I32(1)])


def _from_half(b: _Builder, half: Any) -> ir.Value:
    """Float16 values, given as <n x i16>, as <n x float>."""
    n = half.type.count
    if AVX2:
        return b.fpext(b.bitcast(half, _V(_F16, n)), _V(_F32, n))
    # Integer arithmetic: fpext is a library call on CPUs without F16C, and numba links none.
    h, floats = b.zext(half, _V(_I32, n)), _V(_F32, n)
    magnitude = b.bitcast(b.shl(b.and_(h, _splat(0x7FFF, n, _I32)), _splat(13, n, _I32)), floats)
    rebased = b.bitcast(b.fmul(magnitude, _splat(2.0**112, n, _F32)), h.type)
    sign = b.shl(b.and_(h, _splat(0x8000, n, _I32)), _splat(16, n, _I32))
    return b.bitcast(b.or_(rebased, sign), floats)


# ---- row dot products -----------------------------------------------------------------------


def _splat(value: float, lanes: int = 32, kind: ir.Type = _I8) -> ir.Constant:
    return ir.Constant(_V(kind, lanes), [value] * lanes)


_bfloat16 = intrinsic_of(types.float32(types.intp))(
    lambda b, at: b.bitcast(b.shl(b.zext(_load(b, at[0], 0, _I16), _I32), _I32(16)), _F32)
)
_float16 = intrinsic_of(types.float32(types.intp))(
    lambda b, at: b.extract_element(_from_half(b, _load(b, at[0], 0, _V(_I16, 1))), _I32(0))
)


@kernel
def half_value(bfloat: bool, address: int) -> Any:
    """One 16-bit weight."""
    return _bfloat16(address) if bfloat else _float16(address)


def _permute(b: _Builder, value: Any, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(value, value, ir.Constant(_V(_I32, len(lanes)), lanes))


def _call(b: _Builder, name: str, result: ir.Type, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _products(b: _Builder, codes: Any, x: ir.Value, *, signed: bool) -> ir.Value:
    """Codes times activations in twice their width, neighbours added: 2n lanes become n."""
    lanes, kind = codes.type.count, _I32 if signed else _I16
    if AVX2:
        name = "llvm.x86.avx2.pmadd.wd" if signed else "llvm.x86.avx2.pmadd.ub.sw"
        return _call(b, name, _V(kind, lanes // 2), codes, x)
    wide = _V(kind, lanes)
    products = b.mul((b.sext if signed else b.zext)(codes, wide), b.sext(x, wide))
    even, odd = (_permute(b, products, list(range(first, lanes, 2))) for first in (0, 1))
    return b.add(even, odd)


def _shift_right(b: _Builder, value: Any, count: int) -> ir.Value:
    """Shift bytes, two at a time: the neighbour's bits that come in are for the caller to mask."""
    lanes = value.type.count // 2
    words = b.bitcast(value, _V(_I16, lanes))
    return b.bitcast(b.lshr(words, _splat(count, lanes, _I16)), value.type)


def _codes(b: _Builder, group: ir.Value, bits: int) -> list[ir.Value]:
    """One packed group: at 8 bit four <16 x i16> of codes, below two <32 x i8>."""
    if bits == 8:
        return [b.sext(_load(b, group, 16 * i, _V(_I8, 16)), _V(_I16, 16)) for i in range(4)]
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


def _group_dot(b: _Builder, codes: list[ir.Value], x: ir.Value, bits: int) -> ir.Value:
    """Sum of code * xq over one group, as <8 x float> partial sums.

    8 bit: 64 * 127 * 32767 fits in 32 bits. Below: two products are added in 16 bits, and
    4 * 15 * 127 fits.
    """
    wide = bits == 8
    kind = _V(_I16, 16) if wide else _V(_I8, 32)
    sums = [
        _products(b, some, _load(b, x, 32 * i, kind), signed=wide) for i, some in enumerate(codes)
    ]
    if wide:
        total = b.add(b.add(*sums[:2]), b.add(*sums[2:]))
    else:
        total = _products(b, b.add(*sums), _splat(1, 16, _I16), signed=True)
    return b.sitofp(total, _V(_F32, 8))


def _fma(b: _Builder, total: ir.Value, x: ir.Value, y: ir.Value) -> None:
    b.store(_call(b, "llvm.fmuladd.v8f32", _V(_F32, 8), x, y, b.load(total)), total)


def _sum(b: _Builder, totals: list[ir.Value]) -> ir.Value:
    """The sum of all lanes of all accumulators."""
    vectors = [b.load(total) for total in totals]
    while len(vectors) > 1:
        vectors = [b.fadd(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    result = vectors[0]
    for lanes in (4, 2, 1):
        low = _permute(b, result, list(range(lanes)))
        result = b.fadd(low, _permute(b, result, list(range(lanes, 2 * lanes))))
    return b.extract_element(result, _I32(0))


def _dots_of_codes(bits: int, tokens: int) -> Any:
    """Row dot products for codes with so many tokens: four groups a turn, then the rest one by one.

    The first token's is returned; of several all are written to ``out``. Their codes lie
    ``2 * width`` bytes apart, because those of 8 bit and of fewer share a buffer of int16.
    """

    @_intrinsic
    def dots(_: Any, r: Any, p: Any, x: Any, xp: Any, n: Any, w: Any, out: Any) -> Any:  # noqa: ARG001
        def emit(_c: Any, b: _Builder, _s: Any, args: list[ir.Value]) -> ir.Value:
            row, pairs, xq, x_pairs, groups, width, out = args
            zeros = ir.Constant(_V(_F32, 8), [0.0] * 8)
            # One token alone waits for its own sums: it takes four in turn.
            totals = [
                [cgutils.alloca_once_value(b, zeros) for _ in range(4 if tokens == 1 else 1)]
                for _ in range(tokens)
            ]
            # Odd lanes count, even are dropped.
            offsets = [cgutils.alloca_once_value(b, zeros) for _ in range(tokens)]
            codes_of = [b.add(xq, b.mul(width, _I64(2 * t))) for t in range(tokens)]
            pairs_of = [b.add(x_pairs, b.mul(groups, _I64(8 * t))) for t in range(tokens)]
            turns = b.lshr(groups, _I64(2))

            def add_groups(first: ir.Value, count: int) -> None:
                codes_at = b.add(row, b.mul(first, _I64(8 * bits)))
                _fetch(b, codes_at, 8 * bits * count, keep=tokens > 1)
                own = _from_half(b, _load(b, pairs, b.mul(first, _I64(4)), _V(_I16, 2 * count)))
                its = b.mul(first, _I64(8))
                products = [b.fmul(own, _load(b, at, its, _V(_F32, 2 * count))) for at in pairs_of]
                lanes = ir.Constant(_V(_I32, 8), [0, 1, 2, 3, 2, 3, 2, 3])
                for product, offset in zip(products, offsets, strict=True):
                    none = ir.Constant(product.type, [0.0] * 2 * count)
                    padded = product if count == 4 else b.shuffle_vector(product, none, lanes)
                    b.store(b.fadd(b.load(offset), padded), offset)
                for k in range(count):
                    g = b.add(first, _I64(k))
                    codes = _codes(b, b.add(row, b.mul(g, _I64(8 * bits))), bits)
                    step = b.mul(g, _I64(2 * GROUP if bits == 8 else GROUP))
                    for xq_t, product, sums in zip(codes_of, products, totals, strict=True):
                        dot = _group_dot(b, codes, b.add(xq_t, step), bits)
                        _fma(b, sums[k % len(sums)], dot, _permute(b, product, [2 * k] * 8))

            with cgutils.for_range(b, turns) as loop:
                add_groups(b.mul(loop.index, _I64(4)), 4)
            with cgutils.for_range(b, groups, b.mul(turns, _I64(4))) as loop:
                add_groups(loop.index, 1)
            odd = ir.Constant(_V(_F32, 8), [float(k % 2) for k in range(8)])
            found = []
            for sums, offset in zip(totals, offsets, strict=True):
                _fma(b, sums[0], b.load(offset), odd)
                found.append(_sum(b, sums))
            return _written(b, found, out)

        return types.float32(*[types.intp] * 7), emit

    return dots


def _dots_of_half(bfloat: bool, tokens: int) -> Any:
    """The same for 16-bit weights, 64 a turn in eight accumulators; tokens lie K floats apart."""

    @_intrinsic
    def dots(_: Any, r: Any, a: Any, n: Any, out: Any) -> Any:  # noqa: ARG001
        def emit(_c: Any, b: _Builder, _s: Any, args: list[ir.Value]) -> ir.Value:
            row, x, groups, out = args
            f8, w8 = _V(_F32, 8), _V(_I32, 8)
            zeros = ir.Constant(f8, [0.0] * 8)
            totals = [
                [cgutils.alloca_once_value(b, zeros) for _ in range(8 // tokens)]
                for _ in range(tokens)
            ]
            with cgutils.for_range(b, groups) as loop:
                w_at = b.add(row, b.mul(loop.index, _I64(2 * GROUP)))
                _fetch(b, w_at, 2 * GROUP, keep=tokens > 1)
                for k in range(8):
                    w = _load(b, w_at, 16 * k, _V(_I16, 8))
                    if bfloat:
                        w = b.bitcast(b.shl(b.zext(w, w8), _splat(16, 8, _I32)), f8)
                    else:
                        w = _from_half(b, w)
                    for t, sums in enumerate(totals):
                        place = b.add(b.mul(groups, _I64(t)), loop.index)
                        its = _load(b, b.add(x, b.mul(place, _I64(4 * GROUP))), 32 * k, f8)
                        _fma(b, sums[k % len(sums)], w, its)
            return _written(b, [_sum(b, sums) for sums in totals], out)

        return types.float32(*[types.intp] * 4), emit

    return dots


def _written(b: _Builder, found: list[ir.Value], out: ir.Value) -> ir.Value:
    """The first token's result; of several, all are also written to ``out``."""
    for t, value in enumerate(found if len(found) > 1 else []):
        b.store(value, b.inttoptr(b.add(out, _I64(4 * t)), ir.PointerType(_F32)))
    return found[0]


_dot8, _dot4, _dot3, _dot2 = (_dots_of_codes(bits, 1) for bits in (8, 4, 3, 2))
_tile8, _tile4, _tile3, _tile2 = (_dots_of_codes(bits, TILE) for bits in (8, 4, 3, 2))
_dot_bfloat16, _dot_float16 = (_dots_of_half(bfloat, 1) for bfloat in (True, False))
_tile_bfloat16, _tile_float16 = (_dots_of_half(bfloat, TILE) for bfloat in (True, False))


@kernel
def dot(
    bits: int, bfloat: bool, row: int, pairs: int, x: int, xq: int, x_pairs: int, groups: int
) -> Any:
    """One row of weights times one token, at any tier.

    At 16 bit the sum of weight * activation, below of (scale * code + offset) * activation.
    """
    if bits == 16 and bfloat:
        return _dot_bfloat16(row, x, groups, 0)
    if bits == 16:
        return _dot_float16(row, x, groups, 0)
    if bits == 8:
        return _dot8(row, pairs, xq, x_pairs, groups, 0, 0)
    if bits == 4:
        return _dot4(row, pairs, xq, x_pairs, groups, 0, 0)
    if bits == 3:
        return _dot3(row, pairs, xq, x_pairs, groups, 0, 0)
    return _dot2(row, pairs, xq, x_pairs, groups, 0, 0)


@kernel
def dots(
    bits: int,
    bfloat: bool,
    row: int,
    pairs: int,
    x: int,
    xq: int,
    x_pairs: int,
    groups: int,
    out: int,
) -> None:
    """One row times `TILE` tokens, at any tier, to float32s at ``out``."""
    width = groups * GROUP
    if bits == 16 and bfloat:
        _tile_bfloat16(row, x, groups, out)
    elif bits == 16:
        _tile_float16(row, x, groups, out)
    elif bits == 8:
        _tile8(row, pairs, xq, x_pairs, groups, width, out)
    elif bits == 4:
        _tile4(row, pairs, xq, x_pairs, groups, width, out)
    elif bits == 3:
        _tile3(row, pairs, xq, x_pairs, groups, width, out)
    else:
        _tile2(row, pairs, xq, x_pairs, groups, width, out)
