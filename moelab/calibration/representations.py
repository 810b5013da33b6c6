"""What forms of the experts cost in quality, tiers or none: KL on texts, outside any run.

Each text goes through the model twice in one pass, with the store's 16-bit experts and with every
matrix of them sent through a form and back; the result is rounded to the 16-bit type, which adds
0.2 % of a weight to what the form itself loses. What it does not know: time and memory.

T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moelab.calibration.probes import Text, read, texts_of
from moelab.engine.generation import Ids, Stream
from moelab.runs.quality import kl_divergence
from moelab.scheduling.budget import bits_in_words
from moelab.scheduling.stream import MIXED
from moelab.store.codecs import decode, encode, payload_bytes
from moelab.store.representations import REPRESENTATIONS, Representation
from moelab.store.store import Store

if TYPE_CHECKING:
    from moelab.lab import Lab

FULL = 16


class Loss(NamedTuple):
    """Of one form: bits a weight, KL in nats a token against 16 bit, share of equal likeliest."""

    name: str
    bits: float
    kl_mean: float
    same_top1: float


def losses(
    lab: Lab,
    names: Iterable[str | int] = tuple(REPRESENTATIONS),
    texts: Sequence[Text] | None = None,
    *,
    max_tokens: int = 64,
) -> list[Loss]:
    """Measure forms of `moelab.store.representations` on texts, by default the model's own probes.

    A number among ``names`` is a tier of the lab's store, as it was packed; not "mixed".

    Raises
    ------
    ValueError
        The store has no 16 bit, there is no such form or tier, or no text.
    RuntimeError
        The lab is at work.

    Examples
    --------
    >>> losses(moelab.open("demo"), ["ternary, rows"])  # doctest: +SKIP
    """
    if FULL not in lab._store.tiers:
        raise ValueError(f"forms are made from {FULL} bit; this store has {lab._store.tiers}")
    asked, tiers = list(names), [bits for bits in lab._store.tiers if bits != MIXED]
    if wrong := [n for n in asked if n not in REPRESENTATIONS and n not in tiers]:
        raise ValueError(
            f"{wrong[0]!r} is no form; choose of {', '.join(REPRESENTATIONS)} and the store's "
            f'tiers {tiers} (moelab.calibration.mixed.compared measures "mixed")'
        )
    ids = [read(lab, text, max_tokens) for text in texts_of(lab, texts)]
    found = []
    with lab._session.claimed():
        full = logits(lab, ids)
        for name in asked:
            form, tier = (None, name) if isinstance(name, int) else (REPRESENTATIONS[name], FULL)
            other = None if form is None else _Through(lab._store, form)
            lossy = logits(lab, ids, tier, other)
            same = (full.argmax(-1) == lossy.argmax(-1)).double().mean()
            kl = kl_divergence(full, lossy).mean()
            words = name if isinstance(name, str) else bits_in_words(tier)
            found.append(Loss(words, _bits(lab._store, form, tier), float(kl), float(same)))
    return found


def _bits(store: Store, form: Representation | None, tier: int) -> float:
    """Bits a weight over the matrices of an expert."""
    shapes = [store.layout.rows(shape) for _, shape in store.layout.tensors if len(shape) > 1]
    counts = [rows * width for rows, width in shapes]
    if form is None:
        ones = sum(math.prod(shape) for _, shape in store.layout.tensors if len(shape) == 1)
        return 8 * (payload_bytes(store.layout, tier) - 2 * ones) / sum(counts)
    bits = (form.bits(width) * n for (_, width), n in zip(shapes, counts, strict=True))
    return sum(bits) / sum(counts)


def logits(
    lab: Lab,
    texts: Sequence[Ids],
    bits: Callable[[tuple[int, int]], int] | int = FULL,
    store: Store | None = None,
) -> torch.Tensor:
    """Logits ``[T, V]`` of all texts with every expert at its ``bits``, out of another store."""
    engine = lab._engine
    with ExitStack() as stack:
        stack.enter_context(engine.full_precision(bits if callable(bits) else lambda _: bits))
        if store is not None:
            engine.compute.store = store
            stack.callback(setattr, engine.compute, "store", lab._store)
        return torch.cat([Stream(engine, ids.source).forward(ids, keep=len(ids)) for ids in texts])


class _Through(Store):
    """A store whose 16-bit experts have been through a form."""

    def __init__(self, store: Store, form: Representation) -> None:
        self.__dict__ |= store.__dict__
        self._form = form

    def read(
        self, layer: int, expert: int, bits: int, *, into: np.ndarray | None = None
    ) -> np.ndarray:
        blob = super().read(layer, expert, bits, into=into)
        tensors = decode(blob, self.layout, bits)
        for name, tensor in tensors.items():
            if tensor.ndim > 1:
                rows = tensor.t() if self.layout.turned else tensor
                lossy = self._form.through(rows.contiguous())
                tensors[name] = lossy.t() if self.layout.turned else lossy
        blob[:] = encode(tensors, self.layout, bits)
        return blob
