"""Vectors of weights as LLVM has them: loads at addresses, conversions, products, sums.

What AVX2 has one instruction for, other machines (and any machine under ``MOELAB_PORTABLE=1``) do
in plain vector arithmetic: `from_half`, `products`, `looked_up`. What it does not know: how weights
are packed (`row_dots`).
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
from numba.extending import intrinsic as _intrinsic

from moelab.store import blocks, groups, mixed, zipped
from moelab.store.groups import compiled


def _has_avx2() -> bool:
    if os.environ.get("MOELAB_PORTABLE", "0") not in ("", "0"):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx2", "fma", "f16c"))


AVX2 = _has_avx2()
"""Whether the kernels use AVX2's own instructions, or what every machine has."""

intrinsic = cast("Callable[..., Any]", _intrinsic)
_NAMES = ("vectors.py", "row_dots.py", "cores.py", "chunks.py", "kernels.py")
_NAMES += (blocks.__file__, groups.__file__, mixed.__file__, zipped.__file__)
_FILES = [Path(__file__).parent / name for name in _NAMES]
_TEXT = hashlib.blake2b(b"".join(f.read_bytes() for f in _FILES), digest_size=4).hexdigest()
# Infinities and NaN must mean what they mean, so fastmath's nnan and ninf stay off. A loop that
# stores is compiled twice, for arrays that may overlap and for others, and which one runs hangs on
# where they lie: with reassoc or arcp the two may round differently.
_FAST = {"contract", "nsz"}


def kernel(function: Callable[..., Any], *, any_order: bool = False) -> Callable[..., Any]:
    """Compile, with a cache key that knows MOELAB_PORTABLE and the text of these files.

    numba's own key knows the CPU and the file of the function, not what it calls elsewhere.
    ``any_order`` lets sums be added in any order, for functions that store nothing.
    """
    function.__qualname__ += f"@{'avx2' if AVX2 else 'portable'}-{_TEXT}"
    is_dot = function.__name__ == "dot"
    fast = _FAST | {"reassoc"} if any_order else _FAST
    return compiled(fastmath=fast, forceinline=is_dot)(function)


def intrinsic_of(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make ``emit(builder, args)`` a function of compiled code with this signature."""

    def decorate(emit: Callable[..., Any]) -> Any:
        found = signature, lambda _c, b, _s, values: emit(b, values)
        forms = (
            lambda _context: found,
            lambda _context, x: found,  # noqa: ARG005
            lambda _context, x, y: found,  # noqa: ARG005
        )
        return intrinsic(forms[len(signature.args)])

    return decorate


# ---- memory at an address, as LLVM sees it --------------------------------------------------

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
Builder = Any  # ir.IRBuilder, whose methods have no types
F16, F32, V = ir.HalfType(), ir.FloatType(), ir.VectorType


def load(b: Builder, address: ir.Value, offset: ir.Value | int, kind: ir.Type) -> ir.Value:
    """An unaligned load of `kind` from address + offset."""
    where = b.add(address, offset if isinstance(offset, ir.Value) else I64(offset))
    loaded = b.load(b.inttoptr(where, ir.PointerType(kind)))
    loaded.align = 1
    return loaded


def from_half(b: Builder, half: Any) -> ir.Value:
    """Float16 values, given as <n x i16>, as <n x float>."""
    n = half.type.count
    if AVX2:
        return b.fpext(b.bitcast(half, V(F16, n)), V(F32, n))
    # Integer arithmetic: fpext is a library call on CPUs without F16C, and numba links none.
    h, floats = b.zext(half, V(I32, n)), V(F32, n)
    magnitude = b.bitcast(b.shl(b.and_(h, splat(0x7FFF, n, I32)), splat(13, n, I32)), floats)
    rebased = b.bitcast(b.fmul(magnitude, splat(2.0**112, n, F32)), h.type)
    sign = b.shl(b.and_(h, splat(0x8000, n, I32)), splat(16, n, I32))
    return b.bitcast(b.or_(rebased, sign), floats)


def splat(value: float, lanes: int = 32, kind: ir.Type = I8) -> ir.Constant:
    """The same value in every lane."""
    return ir.Constant(V(kind, lanes), [value] * lanes)


_bfloat16 = intrinsic_of(types.float32(types.intp))(
    lambda b, at: b.bitcast(b.shl(b.zext(load(b, at[0], 0, I16), I32), I32(16)), F32)
)
_float16 = intrinsic_of(types.float32(types.intp))(
    lambda b, at: b.extract_element(from_half(b, load(b, at[0], 0, V(I16, 1))), I32(0))
)


@kernel
def half_value(bfloat: bool, address: int) -> Any:
    """One 16-bit weight."""
    return _bfloat16(address) if bfloat else _float16(address)


def permute(b: Builder, value: Any, lanes: list[int]) -> ir.Value:
    """Some lanes of a vector, in this order."""
    return b.shuffle_vector(value, value, ir.Constant(V(I32, len(lanes)), lanes))


def call(b: Builder, name: str, result: ir.Type, *args: Any) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def products(b: Builder, codes: Any, x: ir.Value, *, signed: bool) -> ir.Value:
    """Codes times activations in twice their width, neighbours added: 2n lanes become n."""
    lanes, kind = codes.type.count, I32 if signed else I16
    if AVX2:
        name = "llvm.x86.avx2.pmadd.wd" if signed else "llvm.x86.avx2.pmadd.ub.sw"
        return call(b, name, V(kind, lanes // 2), codes, x)
    wide = V(kind, lanes)
    products = b.mul((b.sext if signed else b.zext)(codes, wide), b.sext(x, wide))
    even, odd = (permute(b, products, list(range(first, lanes, 2))) for first in (0, 1))
    return b.add(even, odd)


def high_products(b: Builder, words: Any, factor: int) -> ir.Value:
    """The upper halves of words <16 x i16>, unsigned, times a factor."""
    if AVX2:
        return call(b, "llvm.x86.avx2.pmulhu.w", words.type, words, splat(factor, 16, I16))
    products = b.mul(b.zext(words, V(I32, 16)), splat(factor, 16, I32))
    return b.trunc(b.lshr(products, splat(16, 16, I32)), words.type)


def looked_up(b: Builder, codes: Any, table: ir.Value) -> ir.Value:
    """What a table of 16 bytes, twice in <32 x i8>, has at the places of <32 x i8> codes."""
    if AVX2:
        return call(b, "llvm.x86.avx2.pshuf.b", codes.type, table, codes)
    found = splat(0)
    for code in range(16):
        value = permute(b, table, [code] * 32)
        found = b.select(b.icmp_unsigned("==", codes, splat(code)), value, found)
    return found


def shift_right(b: Builder, value: Any, count: int) -> ir.Value:
    """Shift bytes, two at a time: the neighbour's bits that come in are for the caller to mask."""
    lanes = value.type.count // 2
    words = b.bitcast(value, V(I16, lanes))
    return b.bitcast(b.lshr(words, splat(count, lanes, I16)), value.type)


def fma(b: Builder, total: ir.Value, x: ir.Value, y: ir.Value) -> None:
    """Add x * y to a total of eight lanes."""
    b.store(call(b, "llvm.fmuladd.v8f32", V(F32, 8), x, y, b.load(total)), total)


def add_lanes(b: Builder, totals: list[ir.Value]) -> ir.Value:
    """The sum of all lanes of all accumulators."""
    vectors = [b.load(total) for total in totals]
    while len(vectors) > 1:
        vectors = [b.fadd(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    result = vectors[0]
    for lanes in (4, 2, 1):
        low = permute(b, result, list(range(lanes)))
        result = b.fadd(low, permute(b, result, list(range(lanes, 2 * lanes))))
    return b.extract_element(result, I32(0))
