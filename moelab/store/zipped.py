"""bfloat16 weights in 12 bits, exactly: the low byte as it is, the high one by a code of 4 bits.

A weight's high byte is its sign and all but the last bit of its exponent. In a matrix of trained
weights 15 of them cover all but a few weights in ten thousand; code 15 stands for any other. 64
weights are their 64 low bytes, then 32 bytes of codes: code j low and code 32 + j high in byte j.
Behind the codes of a matrix comes its table: 16 words uint16 whose high bytes are what the codes
mean (the last means nothing), positions uint32 of the exceptions, rising, and their values uint16.
It has room for one weight in 512 and eight more, whatever is in it: sizes are known before a weight
is read. ZipMoE (arXiv 2601.21198) codes the same redundancy at a variable rate; this one is ours.

In the experts of the bundled model exponents have 2.57 bit of entropy and the rest 7.97 (see
`entropy_bits`), so a coder of exponents comes to 10.6 bit a weight where this takes 12.15 with
table and page; at most one weight in 2,000 of a matrix is an exception.

The kernels widen a row where it is used: an expert of 2048 x 1024 takes 0.51 ms, at 16 bit 0.41,
one of 192 x 192 32 us and 29 (one token, one core of an AMD EPYC that reads 31 GB/s; a slower
memory favours fewer bytes). Widened as a whole to a 16-bit slot before, it took 1.2 ms and more.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from moelab.scheduling.stream import ZIPPED
from moelab.store.groups import GROUP, compiled

COMMON = 15
"""High bytes that have a code of their own."""
GROUP_BYTES = GROUP * ZIPPED // 8
HEAD = 32  # bytes of a table before its positions
_NOWHERE = np.uint32(2**32 - 1)


@compiled()
def capacity(weights: int) -> int:
    """Exceptions that a matrix of so many weights has room for."""
    return weights // 512 + 8


@compiled()
def table_bytes(weights: int) -> int:
    """Bytes of the table behind the codes of so many weights."""
    return HEAD + 6 * capacity(weights)


def code_bytes(weights: int) -> int:
    """Bytes of the codes of so many weights, in whole groups."""
    return -(-weights // GROUP) * GROUP_BYTES


def zip_words(name: str, words: np.ndarray) -> list[np.ndarray]:
    """Codes and table, uint8, of a matrix of bfloat16 given as uint16 ``[N]``, any bits whatever.

    Raises
    ------
    ValueError
        More exceptions than the table has room for; ``name`` is the matrix in the message.
    """
    count, room = len(words), capacity(len(words))
    counts = np.bincount(words >> 8, minlength=256)
    common = np.sort(np.argsort(-counts, kind="stable")[:COMMON])
    code_of = np.full(256, COMMON, np.uint8)
    code_of[common] = np.arange(COMMON)
    groups = -(-count // GROUP)
    padded = np.zeros((2, groups * GROUP), np.uint8)
    padded[0, :count], padded[1, :count] = words, code_of[words >> 8]
    strange = np.flatnonzero(padded[1] == COMMON)
    if len(strange) > room:
        raise ValueError(
            f"{name} has {len(strange)} of {count} weights whose high byte is not among its "
            f"{COMMON} commonest, {ZIPPED} bit has room for {room}; leave out tier {ZIPPED}"
        )
    lows, codes = padded.reshape(2, groups, GROUP)
    pairs = codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4
    positions, values = np.full(room, _NOWHERE), np.zeros(room, np.uint16)
    positions[: len(strange)], values[: len(strange)] = strange, words[strange]
    table = [np.append(common, 0).astype(np.uint16) << 8, positions, values]
    return [
        np.concatenate([lows, pairs], axis=1),
        np.concatenate([part.view(np.uint8) for part in table]),
    ]


def unzip_words(raw: np.ndarray, count: int) -> np.ndarray:
    """The uint16 ``[N]`` that became codes and table ``raw``, uint8, one behind the other."""
    size = code_bytes(count)
    words = np.empty(size // GROUP_BYTES * GROUP, np.uint16)
    unzip(raw[:size], raw[size : size + table_bytes(count)], 0, words)
    return words[:count]


@compiled()
def _widen(codes: np.ndarray, table: np.ndarray, words: np.ndarray) -> bool:
    """All words as if there were no exceptions; whether there are some."""
    highs, strange = np.empty(16, np.uint16), False
    for code in range(16):
        highs[code] = np.uint16(table[2 * code + 1]) << np.uint16(8)
    for g in range(len(words) // GROUP):
        own, its = codes[g * GROUP_BYTES : (g + 1) * GROUP_BYTES], words[g * GROUP :]
        for j in range(GROUP // 2):
            low, high = own[GROUP + j] & np.uint8(15), own[GROUP + j] >> np.uint8(4)
            strange |= COMMON in (low, high)
            its[j] = highs[low] | np.uint16(own[j])
            its[GROUP // 2 + j] = highs[high] | np.uint16(own[GROUP // 2 + j])
    return strange


@compiled()
def _position(table: np.ndarray, index: int) -> int:
    """A position of the table, which may lie at any address."""
    at, found = HEAD + 4 * index, np.int64(0)
    for k in range(4):
        found |= np.int64(table[at + k]) << (8 * k)
    return int(found)


@compiled()
def unzip(codes: np.ndarray, table: np.ndarray, first: int, words: np.ndarray) -> None:
    """Some whole groups of a matrix to uint16 ``words``; ``first`` is the position of the first."""
    if _widen(codes, table, words):
        amend(table, first, words)


@compiled()
def amend(table: np.ndarray, first: int, words: np.ndarray) -> None:
    """Put the exceptions among ``words``; ``first`` is the position of the first word.

    A table of rubbish gives rubbish, but never writes outside.
    """
    room = (len(table) - HEAD) // 6
    at, behind = 0, room
    while at < behind:
        middle = (at + behind) // 2
        if _position(table, middle) < first:
            at = middle + 1
        else:
            behind = middle
    while at < room:
        place, value = _position(table, at) - first, HEAD + 4 * room + 2 * at
        if place >= len(words):
            return
        if place >= 0:
            words[place] = np.int64(table[value]) | np.int64(table[value + 1]) << 8
        at += 1


def entropy_bits(weights: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Shannon entropy in bits a weight: of bfloat16 exponents, and of sign and mantissa.

    Their sum is what a coder of single weights needs at least; ZipMoE codes exponents alone.

    Examples
    --------
    >>> entropy_bits([torch.tensor([1.0, -1.0, 2.0, 2.0], dtype=torch.bfloat16)])
    (1.0, 0.8112781244591328)
    """
    counts = np.zeros((2, 256))
    for tensor in weights:
        words = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
        exponents, rest = words >> 7 & 0xFF, (words >> 8 & 0x80) | (words & 0x7F)
        for k, byte in enumerate((exponents, rest)):
            counts[k] += np.bincount(byte.reshape(-1), minlength=256)
    shares = [count[count > 0] / count.sum() for count in counts]
    of_exponents, of_rest = (float(-(share * np.log2(share)).sum()) for share in shares)
    return of_exponents, of_rest
