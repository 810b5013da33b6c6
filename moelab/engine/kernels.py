"""Experts and dense weights straight from their bytes: one call a layer, shared among cores.

At 16 bit weights are widened to float32 and activations stay float32; at 12 bit a row first becomes
the 16-bit one in a core's own cache, so both give the same bits. Below, activations become
integers with one scale per group of 64, int16 at 8 bit and int8 under it, and a group's dot
product is ``scale * xs * sum(code * xq) + offset * xs * sum(xq)``; a file's own blocks meet groups
of 32. Nothing is unpacked to memory, so reading the weights is the cost. Rows are shared in chunks
(`cores`): which core computes an output changes nothing of it. Kernels compile at first use,
release the GIL and are cached on disk. What they do not know: experts whose activation is none of
`moelab.models.gating`'s rules, and devices other than the CPU.

Letters: T tokens, n experts, H model width, I inner width, K a row's length, N rows.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from moelab.engine.chunks import (
    ACTIVATIONS,
    DOWN,
    HIDDEN,
    LINEAR,
    POOL,
    ROWS,
    activations_of,
    forms_of,
    group_of,
    job_of,
    quantise,
    run,
    used,
)
from moelab.engine.row_dots import FORMS
from moelab.engine.vectors import AVX2, kernel
from moelab.models.gating import SWIGLU, Rule
from moelab.store.blocks import BLOCK
from moelab.store.codecs import (
    GROUP,
    KNOWN_TIERS,
    TIERS,
    ZIPPED,
    Layout,
    decode,
    matrices,
    nbytes,
)
from moelab.store.manifest import Manifest
from moelab.store.mixed import FORMS as MIXED_FORMS
from moelab.store.mixed import check_blob

__all__ = [
    "AVX2",
    "KERNEL_TOKENS",
    "POOL",
    "compute_experts",
    "compute_prefill",
    "linear",
    "supports",
    "warm_up",
]

KERNEL_TOKENS = 32
"""Up to so many tokens the kernels beat widening an expert of 16 bit (measured with AVX2)."""
BLOCK_BYTES = 1 << 20
"""Of float32 rows that are widened at a time: they stay in a core's cache."""
_FORMS = (*KNOWN_TIERS, *FORMS)
_KNOWN = np.zeros(1 + max(MIXED_FORMS), np.bool_)
_KNOWN[[*_FORMS, *MIXED_FORMS]] = True
_UINTP, _INT64, _FLOAT32 = np.dtype(np.uintp), np.dtype(np.int64), np.dtype(np.float32)


@kernel
def _linear(
    board: int,
    address: int,
    tier: int,
    bfloat: bool,
    x: np.ndarray,
    out: np.ndarray,
) -> None:
    tokens, width = x.shape
    codes = np.empty((tokens, width), np.int16)
    pairs = np.empty((tokens, width // GROUP + 1, 2), np.float32)
    if tier < 16:
        flat = pairs.reshape(-1)[: tokens * (width // GROUP) * 2]
        pairs = flat.reshape((tokens, width // GROUP, 2))
        for t in range(tokens):
            quantise(x[t], 0, width // GROUP, tier, codes[t], pairs[t])
    job = job_of(board)
    job[0], job[1], job[2], job[3] = LINEAR, out.shape[1], tokens, width
    job[4], job[5], job[6] = tier, np.int64(bfloat), address
    job[8], job[10] = x.ctypes.data, out.ctypes.data
    job[11], job[13] = codes.ctypes.data, pairs.ctypes.data
    run(board, -(-out.shape[1] // ROWS))
    used(codes, pairs)


@kernel
def _experts(
    board: int,
    addresses: np.ndarray,
    bits: np.ndarray,
    x: np.ndarray,
    gate: np.ndarray,
    out: np.ndarray,
    inner: int,
    bfloat: bool,
    rule: np.ndarray,
) -> int:
    """Serve every expert to the tokens whose gate weight for it is not zero; `out` [n, T, H].

    ``rule`` float32 [8] is the six numbers of a `Rule`, and whether there are biases.
    Returns -1, or the index of an expert that cannot be, in which case nothing was done.
    """
    n, (tokens, width) = len(addresses), x.shape
    wanted = np.zeros(ACTIVATIONS, np.int64)  # a form that meets them so
    for e in range(n):
        if addresses[e] == 0 or not 0 <= bits[e] < len(_KNOWN) or not _KNOWN[bits[e]]:
            return e
        gate_form, up_form, _ = forms_of(bits[e])
        if gate_form != up_form and (rule[4] != 0 or rule[5] != 0):  # no gate, or rows in turn
            return e
        for form in (gate_form, up_form):
            if form not in (16, ZIPPED):
                wanted[activations_of(form)] = form
    # Only rows of tokens that are served are ever filled, and only those are read.
    xq = np.empty((ACTIVATIONS, tokens, width), np.int16)
    x_pairs = np.empty((ACTIVATIONS, tokens * (width // BLOCK), 2), np.float32)
    for kind in range(ACTIVATIONS):
        form = wanted[kind]
        if form:
            groups = width // group_of(form)[0]
            pairs = x_pairs[kind, : tokens * groups].reshape((tokens, groups, 2))
            for t in range(tokens):
                quantise(x[t], 0, groups, form, xq[kind, t], pairs[t])
    act, codes = np.empty((n, tokens, inner), np.float32), np.empty((n, tokens, inner), np.int16)
    a_pairs = np.empty((n, tokens * (inner // BLOCK), 2), np.float32)
    job = job_of(board)
    job[0], job[1], job[2], job[3] = HIDDEN, n, tokens, width
    job[4], job[5] = inner, np.int64(bfloat)
    job[6], job[7] = addresses.ctypes.data, bits.ctypes.data
    job[8], job[9], job[10] = x.ctypes.data, gate.ctypes.data, out.ctypes.data
    job[11], job[13] = xq.ctypes.data, x_pairs.ctypes.data
    job[15], job[16], job[17] = act.ctypes.data, codes.ctypes.data, a_pairs.ctypes.data
    job[18], job[19], job[20] = 1 if rule[4] != 0 else 2, np.int64(rule[5]), np.int64(rule[6])
    job[21] = rule.ctypes.data
    run(board, n * -(-inner // ROWS))
    job[0] = DOWN
    run(board, n * -(-width // ROWS))
    used(xq, x_pairs, act, codes, a_pairs, rule)
    return -1


def _check(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.carray:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}; pass a writeable C-contiguous "
            f"{dtype.name} array of shape {shape}"
        )


def supports(layout: Layout, experts: Manifest, rule: Rule | None) -> bool:
    """Say whether the kernels serve experts of this kind.

    They serve ``down_proj @ rule(first @ x + bias) + bias``, ``first`` being ``gate_up_proj
    [2I, H]`` or, without a gate, ``up_proj [I, H]``; the biases may be missing. A family that has
    [in, out] is packed turned.
    """
    if rule is None or experts.has_post_norm or experts.transposed != layout.turned:
        return False
    first = "up_proj" if rule.power else "gate_up_proj"
    names = [first, "down_proj"]
    biases = [f"{name}_bias" for name in names] if experts.has_bias else []
    if [name for name, _ in layout.tensors] != names + biases:
        return False
    up, down, *ones = (layout.rows(shape) for _, shape in layout.tensors)
    if len(up) != 2 or len(down) != 2 or up != ((1 if rule.power else 2) * down[1], down[0]):
        return False
    if ones and tuple(ones) != (up[:1], down[:1]):
        return False
    return down[0] % GROUP == 0 and down[1] % GROUP == 0


def linear(
    address: int, bits: int, half: str, x: np.ndarray, rows: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Return ``x @ W.T`` for few tokens, W read where it lies.

    Parameters
    ----------
    address : int
        Where W starts: ``[N, K]`` at 16 bit; below, as `codecs.encode` writes one matrix.
    bits : {16, 8, 4, 3, 2}
        W's tier.
    half : {"bfloat16", "float16"}
        The dtype of the 16-bit tier.
    x : numpy.ndarray
        float32 ``[T, K]``; below 16 bit K is a multiple of 64.
    rows : int
        N.
    out : numpy.ndarray
        float32 ``[T, N]`` to write into.

    Raises
    ------
    ValueError
        On arrays of another dtype, shape or memory order, an unknown tier, or a K that is no
        multiple of 64 below 16 bit.
    """
    tokens, width = x.shape
    if out is None:
        out = np.empty((tokens, rows), np.float32)
    _check("x", x, _FLOAT32, (tokens, width))
    _check("out", out, _FLOAT32, (tokens, rows))
    if bits not in TIERS or address == 0 or (bits < 16 and width % GROUP):
        raise ValueError(
            f"W of rows of {width} at {bits} bit, address {address}: use tiers {TIERS}, rows of "
            f"whole groups of {GROUP} below 16 bit, and weights in memory"
        )
    POOL.call(_linear, address, bits, half == "bfloat16", x, out)
    return out


def compute_experts(
    addrs: np.ndarray,
    bits: np.ndarray,
    x: np.ndarray,
    gate: np.ndarray,
    out: np.ndarray,
    *,
    inner: int,
    half: str,
    rule: Rule = SWIGLU,
    biased: bool = False,
) -> None:
    """Compute the weighted outputs of a layer's experts, for few tokens (T up to about 8).

    ``out[e, t] = gate[e, t] * expert_e(x[t])``; adding them up is the caller's, in an order that
    does not hang on which of them came first. The GIL is released; the memory at `addrs` must
    stay valid until the call returns. A token whose gate weight is zero costs nothing, and its
    place in `out` is left as it was.

    Parameters
    ----------
    addrs, bits
        uintp and int64 ``[n]``: where each expert's blob starts (at any byte), and its tier's
        `Layout.form`, or its own (`moelab.store.mixed`).
    x, gate, out
        float32 ``[T, H]``, ``[n, T]``, and ``[n, T, H]``, which is written.
    inner : int
        I, the experts' inner width.
    half : {"bfloat16", "float16"}
        The dtype of the 16-bit tier, and of biases.
    rule : Rule
        What an expert does between its two products.
    biased : bool
        Whether the blobs end in two biases.

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
    numbers = np.array([*rule, biased, 0], np.float32)
    wrong = POOL.call(_experts, addrs, bits, x, gate, out, inner, half == "bfloat16", numbers)
    if wrong >= 0:
        raise ValueError(
            f"expert {wrong} of the call has {bits[wrong]} bit at address {addrs[wrong]}; use "
            f"tiers {KNOWN_TIERS} and addresses of blobs in memory"
        )


def compute_prefill(
    blob: np.ndarray, bits: int, layout: Layout, x: torch.Tensor, rule: Rule = SWIGLU
) -> torch.Tensor:
    """One expert's output float32 ``[T, H]`` for any number of tokens ``x`` float32 ``[T, H]``.

    ``blob`` is uint8 ``[nbytes(layout, bits)]``, of a layout that `supports` accepts. At 16 and
    12 bit and beyond 32 tokens weights are widened to float32 and torch multiplies them with its
    threads; without AVX512 it multiplies 16-bit matrices several times slower. Codes go through
    the kernels, however many tokens there are.
    """
    check_blob(blob, layout, bits)
    shapes = [layout.rows(shape) for _, shape in layout.tensors]
    if len(x) <= KERNEL_TOKENS or bits not in (16, ZIPPED):
        blob = np.ascontiguousarray(blob)
        x, out = x.contiguous(), x.new_empty((1, *x.shape))
        compute_experts(
            np.array([blob.ctypes.data], np.uintp),
            np.array([layout.form(bits)], np.int64),
            x.numpy(),
            np.ones((1, len(x)), np.float32),
            out.numpy(),
            inner=shapes[1][1],
            half=layout.dtype,
            rule=rule,
            biased=len(shapes) > 2,
        )
        return out[0]
    first, down, *biases = matrices(blob, layout, bits)
    inner = in_blocks(x, first)
    y = in_blocks(rule(inner + biases[0] if biases else inner), down)
    return y + biases[1] if biases else y


class Rows(Protocol):
    """A matrix ``[N, K]`` whose rows can be had some at a time: a tensor, or less than one."""

    shape: torch.Size

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


def in_blocks(x: torch.Tensor, weight: Rows) -> torch.Tensor:
    """``x @ W.T`` for many tokens by torch, float32 ``[T, N]``; W is widened block by block.

    x is float32 ``[T, K]``.
    """
    count, width = weight.shape
    step = max(1, BLOCK_BYTES // 4 // width)
    blocks = (weight[at : at + step].float() for at in range(0, count, step))
    return torch.cat([F.linear(x, block) for block in blocks], dim=-1)


def warm_up() -> None:
    """Compile the kernels and decoders, or load them from numba's cache on disk."""
    layout = Layout((("gate_up_proj", (128, 64)), ("down_proj", (64, 64))), "bfloat16")
    blobs = [np.zeros(nbytes(layout, bits), np.uint8) for bits in TIERS]
    decode(blobs[-1], layout, TIERS[-1])
    compute_experts(
        np.array([blob.ctypes.data for blob in blobs], np.uintp),
        np.array(TIERS, np.int64),
        np.ones((1, 64), np.float32),
        np.ones((len(TIERS), 1), np.float32),
        np.empty((len(TIERS), 1, 64), np.float32),
        inner=64,
        half=layout.dtype,
    )
