"""One row of weights meets one token, or `TILE` of them: the dot products under the kernels.

bfloat16 or float16 weights meet float32 activations, packed codes integer ones (int16 at 8 bit,
int8 below); a row of 12 bit becomes bfloat16 in `widen` before. All arguments are addresses; a row
is whole groups of 64, or of a file's own blocks two for each (`moelab.store.blocks`, whose forms
stand beside the bits). They are emitted as LLVM vectors: codes are unpacked in registers, once for
all tokens, and multiplied 16 or 32 at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from moelab.engine.vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    Builder,
    V,
    add_lanes,
    fma,
    from_half,
    high_products,
    intrinsic,
    kernel,
    load,
    looked_up,
    permute,
    products,
    shift_right,
    splat,
)
from moelab.store.blocks import BLOCK, KINDS, VALUES, Kind
from moelab.store.groups import GROUP, TERNARY, code_bytes
from moelab.store.zipped import COMMON, GROUP_BYTES

AHEAD = 1024
"""Bytes ahead of a row dot that its weights are fetched, past the caches.

Weights are read once a token. Through the caches they push out what torch and Python need next.
A token of 4 x 64 experts of 2048 x 1024 at 4 bit took 23 to 26 ms, fetched past them 18 to 22; half
of it is saved between the kernels (three and two runs in turn, two cores of an AMD EPYC).
"""
TILE = 4
"""Tokens that meet a row at once where there are many: their sums stay in registers."""
FORMS = Q8_0, Q4_0, Q4_1, MXFP4 = tuple(kind.form for kind in KINDS.values())
_KIND = {kind.form: kind for kind in KINDS.values()} | {TERNARY: Kind(TERNARY, 2, 1)}


def _fetch(b: Builder, address: ir.Value, nbytes: int, *, keep: bool) -> None:
    """Fetch weights `AHEAD` of an address; to keep them in a cache more tokens need them."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
    fetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    for line in range(0, nbytes, 64):
        at = b.inttoptr(b.add(address, I64(AHEAD + line)), ir.PointerType(I8))
        b.call(fetch, [at, I32(0), I32(3 if keep else 0), I32(1)])


def _scales(b: Builder, at: ir.Value, first: ir.Value, count: int, form: int) -> ir.Value:
    """(scale, offset) of some groups or blocks in turn, <2 * count x float>."""
    kind = _KIND.get(form)
    if kind is None or kind.scales == 4:
        return from_half(b, load(b, at, b.mul(first, I64(4)), V(I16, 2 * count)))
    if kind.scales == 2:
        scales = from_half(b, load(b, at, b.mul(first, I64(2)), V(I16, count)))
    else:  # exponents; one that float32 has no normal number for counts as 0
        own = b.zext(load(b, at, first, V(I8, count)), V(I32, count))
        least = splat(1, count, I32)
        own = b.select(b.icmp_unsigned("<", own, least), least, own)
        scales = b.shl(b.sub(own, least), splat(23, count, I32))
        scales = b.bitcast(scales, V(F32, count))
    factors = ir.Constant(V(F32, 2 * count), [1.0, -float(kind.centre)] * count)
    return b.fmul(permute(b, scales, [i // 2 for i in range(2 * count)]), factors)


def _trits(b: Builder, group: ir.Value, first: int) -> ir.Value:
    """32 codes of a ternary group, <32 x i8>: bytes as high halves of words, times 3 ** digit."""
    nbytes, places = code_bytes(TERNARY), range(first, first + 32)
    lanes = [place % nbytes for place in places]
    words = b.bitcast(permute(b, load(b, group, 0, V(I8, 16)), lanes), V(I16, 16))
    eight = splat(8, 16, I16)
    halves = b.shl(words, eight), b.and_(words, splat(-256, 16, I16))  # of even places, and of odd
    even, odd = (
        high_products(b, b.mul(half, ir.Constant(V(I16, 16), [3 ** (j // nbytes) for j in own])), 3)
        for half, own in zip(halves, (places[::2], places[1::2]), strict=True)
    )
    return b.bitcast(b.or_(even, b.shl(odd, eight)), V(I8, 32))


def _codes(b: Builder, group: ir.Value, form: int) -> list[ir.Value]:
    """One packed group: at 8 bit <16 x i16> of codes, below two <32 x i8>, of a pair of blocks."""
    bits = form & 31
    if bits == 8:
        vectors = range(2 if form == Q8_0 else 4)
        return [b.sext(load(b, group, 16 * i, V(I8, 16)), V(I16, 16)) for i in vectors]
    if bits == 4:
        v = load(b, group, 0, V(I8, 32))
        codes = [b.and_(v, splat(15)), b.lshr(v, splat(4))]
        table = ir.Constant(V(I8, 32), 2 * VALUES.tolist())
        return [looked_up(b, some, table) for some in codes] if form == MXFP4 else codes
    if form == TERNARY:
        return [_trits(b, group, first) for first in (0, 32)]
    half = load(b, group, 0, V(I8, 16))
    lanes = ir.Constant(V(I32, 32), list(range(32)))
    v = b.shuffle_vector(half, shift_right(b, half, 2), lanes)
    codes = [b.and_(v, splat(3)), b.and_(shift_right(b, v, 4), splat(3))]
    if bits == 3:
        plane = permute(b, load(b, group, 16, V(I8, 8)), [k % 8 for k in range(32)])
        for i in (0, 1):
            masks = ir.Constant(V(I8, 32), [1 << (4 * i + k // 8) for k in range(32)])
            is_set = b.icmp_unsigned("!=", b.and_(plane, masks), splat(0))
            codes[i] = b.or_(codes[i], b.select(is_set, splat(4), splat(0)))
    return codes


def _group_dot(b: Builder, codes: list[ir.Value], x: ir.Value, form: int) -> ir.Value:
    """Sum of code * xq over one group, as <8 x float> partial sums; of two blocks four for each.

    8 bit: 64 * 127 * 32767 fits in 32 bits. Below: two products are added in 16 bits, and
    4 * 24 * 127 fits.
    """
    wide = form & 31 == 8
    kind = V(I16, 16) if wide else V(I8, 32)
    its = [load(b, x, 32 * i, kind) for i in range(len(codes))]
    if _together(form) == 2:  # low halves of both blocks, then high ones
        halves = (list(range(at, at + 16)) for at in (0, 32, 16, 48))
        lanes = [ir.Constant(V(I32, 32), a + c) for a, c in zip(halves, halves, strict=True)]
        its = [b.shuffle_vector(*its, some) for some in lanes]
    sums = [products(b, some, xq, signed=wide) for some, xq in zip(codes, its, strict=True)]
    if wide:
        while len(sums) > 1:
            sums = [b.add(*sums[i : i + 2]) for i in range(0, len(sums), 2)]
        total = sums[0]
    else:
        total = products(b, b.add(*sums), splat(1, 16, I16), signed=True)
    return b.sitofp(total, V(F32, 8))


def _together(form: int) -> int:
    """Groups whose codes share a register: two blocks of 4 bit do."""
    return 2 if form > 32 and form & 31 == 4 else 1


def _dots_of_codes(form: int, tokens: int) -> Any:
    """Row dot products for codes with so many tokens: four groups a turn, then the rest one by one.

    The first token's is returned; of several all are written to ``out``. Their codes lie
    ``2 * width`` bytes apart, because those of 8 bit and of fewer share a buffer of int16.
    """
    bits, size, together = form & 31, BLOCK if form > 32 else GROUP, _together(form)
    nbytes = code_bytes(bits) * size // GROUP

    @intrinsic
    def dots(_: Any, r: Any, p: Any, x: Any, xp: Any, n: Any, w: Any, out: Any) -> Any:  # noqa: ARG001
        def emit(_c: Any, b: Builder, _s: Any, args: list[ir.Value]) -> ir.Value:
            row, pairs, xq, x_pairs, groups, width, out = args
            zeros = ir.Constant(V(F32, 8), [0.0] * 8)
            # One token alone waits for its own sums: it takes four in turn.
            totals = [
                [cgutils.alloca_once_value(b, zeros) for _ in range(4 if tokens == 1 else 1)]
                for _ in range(tokens)
            ]
            # Odd lanes count, even are dropped.
            offsets = [cgutils.alloca_once_value(b, zeros) for _ in range(tokens)]
            codes_of = [b.add(xq, b.mul(width, I64(2 * t))) for t in range(tokens)]
            pairs_of = [b.add(x_pairs, b.mul(groups, I64(8 * t))) for t in range(tokens)]
            turns = b.lshr(groups, I64(2))

            def add_groups(first: ir.Value, count: int) -> None:
                _fetch(b, b.add(row, b.mul(first, I64(nbytes))), nbytes * count, keep=tokens > 1)
                own = _scales(b, pairs, first, count, form)
                its = b.mul(first, I64(8))
                products = [b.fmul(own, load(b, at, its, V(F32, 2 * count))) for at in pairs_of]
                lanes = [min(lane, 2 * count) for lane in range(8)]
                for product, offset in zip(products, offsets, strict=True):
                    none = ir.Constant(product.type, [0.0] * 2 * count)
                    padded = b.shuffle_vector(product, none, ir.Constant(V(I32, 8), lanes))
                    b.store(b.fadd(b.load(offset), padded if count < 4 else product), offset)
                for k in range(0, count, together):
                    g = b.add(first, I64(k))
                    codes = _codes(b, b.add(row, b.mul(g, I64(nbytes))), form)
                    step = b.mul(g, I64(2 * size if bits == 8 else size))
                    scale = [2 * k] * 4 + [2 * (k + together - 1)] * 4
                    for xq_t, product, sums in zip(codes_of, products, totals, strict=True):
                        dot = _group_dot(b, codes, b.add(xq_t, step), form)
                        fma(b, sums[k % len(sums)], dot, permute(b, product, scale))

            with cgutils.for_range(b, turns) as loop:
                add_groups(b.mul(loop.index, I64(4)), 4)
            with cgutils.for_range_slice(b, b.mul(turns, I64(4)), groups, I64(together), I64) as (
                index,
                _count,
            ):
                add_groups(index, together)
            odd = ir.Constant(V(F32, 8), [float(k % 2) for k in range(8)])
            found = []
            for sums, offset in zip(totals, offsets, strict=True):
                fma(b, sums[0], b.load(offset), odd)
                found.append(add_lanes(b, sums))
            return _written(b, found, out)

        return types.float32(*[types.intp] * 7), emit

    return dots


def _dots_of_half(bfloat: bool, tokens: int) -> Any:
    """The same for 16-bit weights, 64 a turn in eight accumulators; tokens lie K floats apart."""

    @intrinsic
    def dots(_: Any, r: Any, a: Any, n: Any, out: Any) -> Any:  # noqa: ARG001
        def emit(_c: Any, b: Builder, _s: Any, args: list[ir.Value]) -> ir.Value:
            row, x, groups, out = args
            f8, w8 = V(F32, 8), V(I32, 8)
            zeros = ir.Constant(f8, [0.0] * 8)
            totals = [
                [cgutils.alloca_once_value(b, zeros) for _ in range(8 // tokens)]
                for _ in range(tokens)
            ]
            with cgutils.for_range(b, groups) as loop:
                w_at = b.add(row, b.mul(loop.index, I64(2 * GROUP)))
                _fetch(b, w_at, 2 * GROUP, keep=tokens > 1)
                for k in range(8):
                    w = load(b, w_at, 16 * k, V(I16, 8))
                    if bfloat:
                        w = b.bitcast(b.shl(b.zext(w, w8), splat(16, 8, I32)), f8)
                    else:
                        w = from_half(b, w)
                    for t, sums in enumerate(totals):
                        place = b.add(b.mul(groups, I64(t)), loop.index)
                        its = load(b, b.add(x, b.mul(place, I64(4 * GROUP))), 32 * k, f8)
                        fma(b, sums[k % len(sums)], w, its)
            return _written(b, [add_lanes(b, sums) for sums in totals], out)

        return types.float32(*[types.intp] * 4), emit

    return dots


@intrinsic
def widen(_: Any, row: Any, table: Any, groups: Any, words: Any) -> Any:  # noqa: ARG001
    """Groups of 12 bit (`moelab.store.zipped`) to bfloat16 at ``words``; whether some are none."""

    def emit(_c: Any, b: Builder, _s: Any, args: list[ir.Value]) -> ir.Value:
        row, table, groups, words = args
        meant = b.lshr(load(b, table, 0, V(I16, 16)), splat(8, 16, I16))
        meant = permute(b, b.trunc(meant, V(I8, 16)), [k % 16 for k in range(32)])
        largest = cgutils.alloca_once_value(b, splat(0))
        in_turn = ir.Constant(V(I32, 64), [k // 2 + 32 * (k % 2) for k in range(64)])
        # Of the next row: it comes while this one is multiplied, which lies in the cache by then.
        row_bytes = b.mul(groups, I64(GROUP_BYTES))
        long = b.icmp_unsigned(">", row_bytes, I64(AHEAD))
        beyond = b.select(long, b.sub(row_bytes, I64(AHEAD)), I64(0))
        with cgutils.for_range(b, groups) as loop:
            at = b.add(row, b.mul(loop.index, I64(GROUP_BYTES)))
            _fetch(b, b.add(at, beyond), GROUP_BYTES, keep=False)
            pairs = load(b, at, GROUP, V(I8, 32))
            for k, codes in enumerate((pairs, shift_right(b, pairs, 4))):
                codes, before = b.and_(codes, splat(15)), b.load(largest)  # noqa: PLW2901
                b.store(b.select(b.icmp_unsigned(">", codes, before), codes, before), largest)
                lows = load(b, at, 32 * k, V(I8, 32))
                found = b.shuffle_vector(lows, looked_up(b, codes, meant), in_turn)
                to = b.add(words, b.add(b.mul(loop.index, I64(2 * GROUP)), I64(64 * k)))
                b.store(found, b.inttoptr(to, ir.PointerType(found.type))).align = 2
        strange = b.icmp_unsigned("==", b.load(largest), splat(COMMON))
        return b.icmp_unsigned("!=", b.bitcast(strange, I32), I32(0))

    return types.boolean(*[types.intp] * 4), emit


def _written(b: Builder, found: list[ir.Value], out: ir.Value) -> ir.Value:
    """The first token's result; of several, all are also written to ``out``."""
    for t, value in enumerate(found if len(found) > 1 else []):
        b.store(value, b.inttoptr(b.add(out, I64(4 * t)), ir.PointerType(F32)))
    return found[0]


_dot8, _dot4, _dot3, _dot2, _dot1 = (_dots_of_codes(bits, 1) for bits in (8, 4, 3, 2, TERNARY))
_tile8, _tile4, _tile3, _tile2, _tile1 = (
    _dots_of_codes(bits, TILE) for bits in (8, 4, 3, 2, TERNARY)
)
_dot_q8_0, _dot_q4_0, _dot_q4_1, _dot_mxfp4 = (_dots_of_codes(form, 1) for form in FORMS)
_tile_q8_0, _tile_q4_0, _tile_q4_1, _tile_mxfp4 = (_dots_of_codes(form, TILE) for form in FORMS)
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
    if bits == 2:
        found = _dot2(row, pairs, xq, x_pairs, groups, 0, 0)
    else:
        found = _dot1(row, pairs, xq, x_pairs, groups, 0, 0)
    return found


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
    elif bits == 2:
        _tile2(row, pairs, xq, x_pairs, groups, width, out)
    else:
        _tile1(row, pairs, xq, x_pairs, groups, width, out)


@kernel
def block_dot(form: int, row: int, pairs: int, xq: int, x_pairs: int, blocks: int) -> Any:
    """`dot` for a row of a file's own blocks."""
    if form == Q8_0:
        return _dot_q8_0(row, pairs, xq, x_pairs, blocks, 0, 0)
    if form == Q4_0:
        return _dot_q4_0(row, pairs, xq, x_pairs, blocks, 0, 0)
    if form == Q4_1:
        return _dot_q4_1(row, pairs, xq, x_pairs, blocks, 0, 0)
    return _dot_mxfp4(row, pairs, xq, x_pairs, blocks, 0, 0)


@kernel
def block_dots(
    form: int, row: int, pairs: int, xq: int, x_pairs: int, blocks: int, out: int
) -> None:
    """`dots` for a row of a file's own blocks."""
    width = blocks * BLOCK
    if form == Q8_0:
        _tile_q8_0(row, pairs, xq, x_pairs, blocks, width, out)
    elif form == Q4_0:
        _tile_q4_0(row, pairs, xq, x_pairs, blocks, width, out)
    elif form == Q4_1:
        _tile_q4_1(row, pairs, xq, x_pairs, blocks, width, out)
    else:
        _tile_mxfp4(row, pairs, xq, x_pairs, blocks, width, out)
