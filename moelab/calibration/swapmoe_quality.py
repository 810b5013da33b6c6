"""SwapMoE's quality where layers are short of experts: by any figure (`figures`), and its swaps.

Texts that are given go through under masks which follow the importance of the unmasked model. A
summary that is written has masks which follow what the routers would have chosen as it was written,
as in a run. Either way a swap takes no time, and a prompt swaps nothing: an encoder reads a source
with what the other texts called for, and its one renewal a text counts as swaps.

T tokens, L layers, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from moelab.calibration.figures import Figure
from moelab.engine.compute import Routed
from moelab.engine.generation import Stream

if TYPE_CHECKING:
    from moelab.engine.engine import Engine


def renewed(scores: np.ndarray, start: np.ndarray, f: int, n: int) -> Iterator[list[int]]:
    """One layer's n virtual experts for each f tokens, as `VirtualExperts` ranks them.

    From the importance of each token, ``[T, E]``, and that to begin with, ``[E]``.
    """
    order = ranked(start)
    for begin in range(0, len(scores), f):
        yield order[:n]
        order = ranked(scores[begin : begin + f].sum(0), order, n)


def ranked(scores: np.ndarray, order: Sequence[int] = (), n: int = 0) -> list[int]:
    """Experts by importance ``[E]``; equals keep their order, of which the first n come first."""
    order, chosen = order or range(len(scores)), set(order[:n])
    return sorted(order, key=lambda e: (-scores[e], e not in chosen))


class ShortLayers:
    """Measures a model, at full precision, of which some layers keep only a few experts.

    By a figure, from the `importances` of each of its texts and the ``norms`` ``[L][E]``.
    """

    def __init__(
        self,
        engine: Engine,
        figure: Figure,
        scores: Sequence[np.ndarray],
        norms: Sequence[Sequence[float]],
    ) -> None:
        self._engine, self._figure, self._scores, self._norms = engine, figure, scores, norms
        self._sum = np.sum([s.sum(1) for s in scores], axis=0)  # [L, E]
        with engine.full_precision():
            self._full = figure.as_it_is()

    def __call__(self, kept: Mapping[int, int], f: int) -> tuple[float, float, float | None]:
        """(loss, swaps a token, standard error) with so many experts ``kept`` of some layers."""
        experts = self._engine.shape.experts
        encoder = self._engine.shape.encoder_layers
        short = {layer: n for layer, n in kept.items() if n < experts[layer]}
        if not short:  # all are whole
            return 0.0, 0.0, None
        whole = not any(layer < encoder for layer in short)
        self._figure.write.keep("whole" if whole else None)
        chosen, swaps = [], 0
        for at, scores in enumerate(self._scores):
            sets: dict[int, list[list[int]]] = {}
            for layer, start in self._starts(at, short).items():
                every = f if layer >= encoder else 1  # a source's importance is all with token 0
                each = renewed(scores[layer, :, : experts[layer]], start, every, short[layer])
                sets[layer] = list(each)
            pairs = (pair for each in sets.values() for pair in itertools.pairwise(each))
            swaps += sum(len(set(b) - set(a)) for a, b in pairs)
            chosen.append(sets)
        parts = self._figure.measure(
            lambda at: self._logits(at, chosen[at], f), partial(self._write, short, f)
        )
        loss, tokens = self._figure.loss(parts, self._full), sum(map(len, self._figure.ids))
        return loss, swaps / tokens, self._figure.error(parts, self._full)

    def _starts(self, at: int, layers: Mapping[int, int]) -> dict[int, np.ndarray]:
        """Importance that each of these layers begins a text with: all other texts' ``[E]``."""
        experts = self._engine.shape.experts
        others = self._sum - self._scores[at].sum(1)
        return {layer: others[layer, : experts[layer]] for layer in layers}

    def _mask(self, layer: int, chosen: Sequence[int]) -> None:
        mask = np.zeros(self._engine.shape.experts[layer], bool)
        mask[list(chosen)] = True
        self._engine.adapter.steer(layer, mask)

    def _logits(
        self, at: int, chosen: Mapping[int, Sequence[Sequence[int]]], f: int
    ) -> torch.Tensor:
        """Logits ``[T, V]``: a chunk of f tokens for each layer's next set of experts."""
        ids, out = self._figure.ids[at], []
        with self._engine.full_precision():
            stream = Stream(self._engine, ids.source)
            try:
                for place, begin in enumerate(range(0, len(ids), f)):
                    for layer, sets in chosen.items():
                        self._mask(layer, sets[place])
                    chunk = ids[begin : begin + f]
                    out.append(stream.forward(chunk, keep=len(chunk)))
            finally:
                self._engine.adapter.release()
        return torch.cat(out)

    def _write(self, short: Mapping[int, int], f: int, at: int) -> str:
        """A summary, its masks renewed every f tokens."""
        adapter, written = self._engine.adapter, itertools.count(1)
        orders = {layer: ranked(start) for layer, start in self._starts(at, short).items()}
        seen = {layer: np.zeros(len(order)) for layer, order in orders.items()}

        def hear(layer: int, x: torch.Tensor, routed: Routed) -> None:
            if layer in seen:
                wanted = adapter.wanted(layer)
                asked = Routed(*wanted, len(seen[layer])) if wanted else routed
                rows = zip(
                    x.float().norm(dim=-1).tolist(), asked.experts, asked.weights, strict=True
                )
                for norm, experts, gates in rows:
                    for expert, gate in zip(experts, gates, strict=True):
                        seen[layer][expert] += norm * abs(gate) * self._norms[layer][expert]

        def renew() -> None:
            if next(written) % f == 0:
                for layer, n in short.items():
                    orders[layer] = ranked(seen[layer], orders[layer], n)
                    seen[layer][:] = 0
                    self._mask(layer, orders[layer][:n])

        with self._engine.full_precision(heard=hear):
            try:
                for layer, n in short.items():
                    self._mask(layer, orders[layer][:n])
                return self._figure.write(self._figure.ids[at].source, renew)
            finally:
                adapter.release()


def numbers_kept(top_k: int, experts: int) -> tuple[int, ...]:
    """Where quality is measured: denser where few are kept, because it bends there."""
    parts = (round(experts * part) for part in (1 / 4, 3 / 8, 1 / 2, 3 / 4))
    more = (n for n in parts if n > top_k)
    return tuple(sorted({top_k, min(top_k + 1, experts), experts, *more}))
