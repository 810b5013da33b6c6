"""What one core computes without asking: chunks of rows of a layer's experts, or of one matrix.

A job stands on a board (`cores`) as numbers and addresses; `run` publishes its chunks and helps.
Activations are quantised by groups as `kernels` describes. A form is a tier's bits or, above 32,
that of a file's own blocks (`moelab.store.blocks`). What an output is computed from, and in which
order, is the same whichever core takes its chunk.

What an expert does between its two products is a `moelab.models.gating.Rule` of numbers.

Letters: T tokens, n experts, H model width, I inner width, K a row's length, N rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.np.numpy_support import carray

from moelab.engine.cores import JOB, Pool, done, finish, idle, publish, take
from moelab.engine.row_dots import MXFP4, Q4_1, TILE, block_dot, block_dots, dot, dots, widen
from moelab.engine.vectors import half_value, intrinsic_of, kernel
from moelab.store.blocks import BLOCK
from moelab.store.groups import GROUP, TERNARY, code_bytes
from moelab.store.mixed import LEAST
from moelab.store.zipped import ZIPPED, amend, table_bytes

ROWS = 64
"""Rows of a chunk; of the inner width they are whole groups, quantised where they were made."""

FEW_TOKENS = 8
"""Tokens that meet a row one by one; of more, `TILE` at a time."""

HIDDEN, DOWN, LINEAR = 0, 1, 2  # kinds of jobs

TERNARY_BYTES = code_bytes(TERNARY)

ACTIVATIONS = 4  # ways to quantise them: int8 or int16, by groups of 64 or of 32


def _pointer(kind: Any, llvm: ir.Type) -> Any:
    """An intrinsic that turns an address into a pointer for `carray`."""
    return intrinsic_of(types.CPointer(kind)(types.intp))(
        lambda b, args: b.inttoptr(args[0], ir.PointerType(llvm))
    )


_u8 = _pointer(types.uint8, ir.IntType(8))
_i16 = _pointer(types.int16, ir.IntType(16))
float32_at = _pointer(types.float32, ir.FloatType())
_i64 = _pointer(types.int64, ir.IntType(64))


@kernel
def used(*arrays: np.ndarray) -> None:
    """Numba frees an array after its last use, and an address is none: this is."""


@kernel
def job_of(board: int) -> np.ndarray:
    """The numbers of the job on a board, int64 [32]."""
    return carray(_i64(board + JOB), 32)


@kernel
def group_of(form: int) -> tuple[int, int]:
    """Weights of a group of codes, and bytes of what scales them."""
    if form < 32:
        return GROUP, (2 if form == TERNARY else 4)
    return BLOCK, (4 if form == Q4_1 else 1 if form == MXFP4 else 2)


@kernel
def forms_of(form: int) -> tuple[int, int, int]:
    """Forms of gate, up and down: the digits of a mixed one (`moelab.store.mixed`)."""
    if form < LEAST:
        return form, form, form
    return form // 100, form // 10 % 10, form % 10


@kernel
def activations_of(form: int) -> int:
    """Which of the `ACTIVATIONS` weights of this form meet."""
    return (2 if form > 32 else 0) + (form & 31 == 8)


@partial(kernel, any_order=True)
def _largest(x: np.ndarray, first: int, last: int) -> tuple[np.float32, np.float32]:
    """The largest magnitude, and 0, or NaN as soon as one value is not finite."""
    largest, poison = np.float32(0), np.float32(0)
    for j in range(first, last):
        largest = max(largest, abs(x[j]))
        poison += x[j] * np.float32(0)
    return largest, poison


@kernel
def _quantise_groups(
    x: np.ndarray, first: int, last: int, size: int, levels: int, xq: np.ndarray, pairs: np.ndarray
) -> None:
    """float32 [K] -> integer codes, and per group scale and scale * sum(codes)."""
    for g in range(first, last):
        largest, poison = _largest(x, g * size, (g + 1) * size)
        scale = max(largest, np.float32(1e-30)) / np.float32(levels)
        inverse, total = np.float32(1) / scale, np.int32(0)
        for j in range(g * size, (g + 1) * size):
            code = np.int32(0) if poison != 0 else np.int32(np.rint(x[j] * inverse))
            xq[j] = code
            total += code
        pairs[g, 0] = scale + poison
        pairs[g, 1] = np.float32(total) * scale + poison


@kernel
def quantise(
    x: np.ndarray, first: int, last: int, form: int, codes: np.ndarray, pairs: np.ndarray
) -> None:
    """The same into int16 (for 8-bit weights) or int8 codes, which share one buffer."""
    size = group_of(form)[0]
    if form & 31 == 8:
        _quantise_groups(x, first, last, size, 32767, codes, pairs)
    else:
        _quantise_groups(x, first, last, size, 127, codes.view(np.int8), pairs)


# ---- chunks: what one core computes without asking --------------------------------------------


@kernel
def _dots(
    form: int,
    bfloat: bool,
    row: int,
    pairs: int,
    x: int,
    xq: int,
    x_pairs: int,
    groups: int,
    count: int,
    found: np.ndarray,
) -> None:
    """One row of whole groups times ``count`` tokens, 1 or `TILE`, into ``found``."""
    if form < 32 and count == 1:
        found[0] = dot(form, bfloat, row, pairs, x, xq, x_pairs, groups)
    elif form < 32:
        dots(form, bfloat, row, pairs, x, xq, x_pairs, groups, found.ctypes.data)
    elif count == 1:
        found[0] = block_dot(form, row, pairs, xq, x_pairs, groups)
    else:
        block_dots(form, row, pairs, xq, x_pairs, groups, found.ctypes.data)


@kernel
def _at_once(tokens: int, t: int) -> int:
    """Tokens from ``t`` on that meet a row together."""
    return TILE if tokens > FEW_TOKENS and t + TILE <= tokens else 1


@kernel
def _row_bytes(form: int, width: int) -> int:
    """Bytes of a row's codes."""
    return width // GROUP * TERNARY_BYTES if form == TERNARY else width * (form & 31) // 8


@kernel
def _bytes(form: int, rows: int, width: int) -> int:
    """Bytes of a matrix: codes, and what scales them."""
    codes = rows * _row_bytes(form, width)
    if form == 16:
        return codes
    if form == ZIPPED:
        return codes + table_bytes(rows * width)
    size, scales = group_of(form)
    return codes + rows * (width // size * scales)


@kernel
def _first_bytes(form: int, up_form: int, rows: int, width: int) -> int:
    """Bytes of the first matrix, whose halves may be at bits of their own."""
    if form == up_form:
        return _bytes(form, rows, width)
    return _bytes(form, rows // 2, width) + _bytes(up_form, rows // 2, width)


@kernel
def _row(form: int, matrix: int, rows: int, r: int, row_bytes: int, words: np.ndarray) -> int:
    """The address of row ``r`` of a matrix; of 12 bit that of ``words``, where it now is 16."""
    if form != ZIPPED:
        return matrix + r * row_bytes
    table = matrix + rows * row_bytes
    if widen(matrix + r * row_bytes, table, len(words) // GROUP, words.ctypes.data):
        amend(carray(_u8(table), table_bytes(rows * len(words))), r * len(words), words)
    return words.ctypes.data


@kernel
def _activated(rule: np.ndarray, h: np.float32, up: np.float32) -> np.float32:
    """The formula of `moelab.models.gating`; comparisons let NaN through."""
    if rule[4] != 0:
        h = np.float32(0) if h < 0 else h
        return h if rule[4] == 1 else h * h
    limit = rule[2]
    h = min(h, limit)
    if up > limit:
        up = limit
    elif up < -limit:
        up = -limit
    slope = h if rule[1] == 0 else h + rule[1] * h * h * h
    return h / (np.float32(1) + np.exp(-rule[0] * slope)) * (up + rule[3])


@kernel
def _hidden_chunk(job: np.ndarray, index: int) -> None:
    """Act = rule(first product) for some rows of one expert, quantised for what follows."""
    n, tokens, width, inner, bfloat = job[1], job[2], job[3], job[4], job[5] != 0
    blocks = -(-inner // ROWS)
    e, first = index // blocks, index % blocks * ROWS
    last = min(first + ROWS, inner)
    form, up_form, down_form = forms_of(carray(_i64(job[7]), n)[e])
    size, scales = group_of(form)
    groups = width // size
    row_bytes, up_bytes = _row_bytes(form, width), _row_bytes(up_form, width)
    start, kind = carray(_i64(job[6]), n)[e], activations_of(form)
    rule, two, interleaved, biased = carray(float32_at(job[21]), 5), job[18], job[19], job[20]
    step, lift = (2, 1) if interleaved != 0 else (1, inner)
    # Gate and up are one matrix of two * inner rows or, where their bits differ, two of inner.
    apart, rows = form != up_form, inner if form != up_form else two * inner
    above, up_start = (0, start + _bytes(form, rows, width)) if apart else (lift, start)
    pairs, up_pairs = start + rows * row_bytes, up_start + rows * up_bytes
    bias = start + _first_bytes(form, up_form, two * inner, width) + _bytes(down_form, width, inner)
    all_xq = job[11] + kind * tokens * width * 2
    all_xp = job[13] + kind * tokens * (width // BLOCK) * 8
    other_kind = (activations_of(up_form) - kind) * tokens
    up_xq, up_xp = other_kind * width * 2, other_kind * (width // BLOCK) * 8
    gate = carray(float32_at(job[9]), (n, tokens))
    act = carray(float32_at(job[15]), (n, tokens, inner))
    hidden, scaled = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    words = np.empty((2, width if form == ZIPPED else 0), np.uint16)
    meets, up_meets = (16, 16) if form == ZIPPED else (form, up_form)
    for r in range(first, last):  # outside: a row comes from memory once, for all tokens
        w, at = _row(form, start, rows, r * step, row_bytes, words[0]), r * step + above
        up = w if two == 1 else _row(up_form, up_start, rows, at, up_bytes, words[1])
        p, up_p = pairs + r * step * groups * scales, up_pairs + at * groups * scales
        own, other, t = np.float32(0), np.float32(0), 0
        if biased != 0:
            own = half_value(bfloat, bias + 2 * r * step)
            other = half_value(bfloat, bias + 2 * (r * step + lift)) if two == 2 else other
        while t < tokens:
            count = _at_once(tokens, t)
            if count > 1 or gate[e, t] != 0:
                x, xq, xp = job[8] + 4 * t * width, all_xq + 2 * t * width, all_xp + 8 * t * groups
                _dots(meets, bfloat, w, p, x, xq, xp, groups, count, hidden)
                if two == 2:
                    xq, xp = xq + up_xq, xp + up_xp
                    _dots(up_meets, bfloat, up, up_p, x, xq, xp, groups, count, scaled)
                for i in range(count):
                    act[e, t + i, r] = _activated(rule, hidden[i] + own, scaled[i] + other)
            t += count
    if down_form not in (16, ZIPPED):
        size = group_of(down_form)[0]
        codes = carray(_i16(job[16]), (n, tokens, inner))
        at = job[17] + 8 * e * tokens * (inner // BLOCK)
        a_pairs = carray(float32_at(at), (tokens, inner // size, 2))
        for t in range(tokens):
            if gate[e, t] != 0 or tokens > FEW_TOKENS:
                quantise(act[e, t], first // size, last // size, down_form, codes[e, t], a_pairs[t])
    used(words)


@kernel
def _down_chunk(job: np.ndarray, index: int) -> None:
    """Out = gate weight * (down @ act) for some rows of one expert."""
    n, tokens, width, inner, bfloat = job[1], job[2], job[3], job[4], job[5] != 0
    blocks = -(-width // ROWS)
    e, first = index // blocks, index % blocks * ROWS
    gate_form, up_form, form = forms_of(carray(_i64(job[7]), n)[e])
    size, scales = group_of(form)
    groups, row_bytes = inner // size, _row_bytes(form, inner)
    first_rows = job[18] * inner
    start = carray(_i64(job[6]), n)[e] + _first_bytes(gate_form, up_form, first_rows, width)
    pairs, bias = start + width * row_bytes, start + _bytes(form, width, inner) + 2 * first_rows
    gate = carray(float32_at(job[9]), (n, tokens))
    out = carray(float32_at(job[10]), (n, tokens, width))
    found = np.empty(TILE, np.float32)
    words = np.empty(inner if form == ZIPPED else 0, np.uint16)
    meets = 16 if form == ZIPPED else form
    for r in range(first, min(first + ROWS, width)):
        w = _row(form, start, width, r, row_bytes, words)
        p = pairs + r * groups * scales
        own, t = np.float32(0), 0
        if job[20] != 0:
            own = half_value(bfloat, bias + 2 * r)
        while t < tokens:
            count = _at_once(tokens, t)
            if count > 1 or gate[e, t] != 0:
                row = e * tokens + t
                a, aq = job[15] + 4 * row * inner, job[16] + 2 * row * inner
                ap = job[17] + 8 * (e * tokens * (inner // BLOCK) + t * groups)
                _dots(meets, bfloat, w, p, a, aq, ap, groups, count, found)
                for i in range(count):
                    if gate[e, t + i] != 0:
                        out[e, t + i, r] = gate[e, t + i] * (found[i] + own)
            t += count
    used(words)


@partial(kernel, any_order=True)
def _rest(bfloat: bool, row: int, x: np.ndarray, first: int) -> np.float32:
    """What a 16-bit row's weights behind its last group add."""
    total = np.float32(0)
    for j in range(first, len(x)):
        total += half_value(bfloat, row + 2 * j) * x[j]
    return total


@kernel
def _linear_chunk(job: np.ndarray, index: int) -> None:
    """X @ W.T for some rows of W; a 16-bit row may end in less than a group."""
    rows, tokens, width, tier, bfloat = job[1], job[2], job[3], job[4], job[5] != 0
    groups = width // GROUP
    row_bytes = width * tier // 8
    pairs = job[6] + rows * row_bytes
    out = carray(float32_at(job[10]), (tokens, rows))
    x = carray(float32_at(job[8]), (tokens, width))
    found = np.empty(TILE, np.float32)
    for r in range(index * ROWS, min((index + 1) * ROWS, rows)):
        w, p = job[6] + r * row_bytes, pairs + r * groups * 4
        t = 0
        while t < tokens:
            count = _at_once(tokens, t)
            xq, xp = job[11] + 2 * t * width, job[13] + 8 * t * groups
            _dots(tier, bfloat, w, p, job[8] + 4 * t * width, xq, xp, groups, count, found)
            for i in range(count):
                out[t + i, r] = found[i] + _rest(bfloat, w, x[t + i], groups * GROUP)
            t += count


@kernel
def _chunk(board: int, index: int) -> None:
    job = job_of(board)
    if job[0] == HIDDEN:
        _hidden_chunk(job, index)
    elif job[0] == DOWN:
        _down_chunk(job, index)
    else:
        _linear_chunk(job, index)


@kernel
def _work(board: int, patience: int) -> None:
    """Take chunks of whatever is published, until none came for so many looks."""
    looks = 0
    while looks < patience:
        index = take(board)
        if index < 0:
            looks = idle(looks)
            continue
        _chunk(board, index)
        done(board)
        looks = 0


@kernel
def run(board: int, chunks: int) -> None:
    """Publish the job that stands on the board, help, and return when it is done."""
    publish(board, chunks)
    index = take(board)
    while index >= 0:
        _chunk(board, index)
        done(board)
        index = take(board)
    finish(board, chunks)


POOL = Pool(_work)
"""The cores that compute; ``POOL.threads`` sets how many."""
