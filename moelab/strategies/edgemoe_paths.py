"""EdgeMoE's path table: which experts come after those of the last two layers; and one by pairs.

They count, and know nothing of time, bits or room: `edgemoe` preloads by it, and
``lab.calibrate("edgemoe")`` fills one offline. The paper's key is the exact set of experts. With
top-k above 2 it hardly ever recurs on models with many experts: on recorded routing of
Qwen3-30B-A3B even the set of one layer was known in 8 % of the cases (recall .34), and pairs, ours,
found .52 (`moelab.predictors`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import numpy as np

Experts = tuple[int, ...]
"""The experts activated in one layer by one token, sorted."""
Before = tuple[Experts, ...]
"""The experts activated in the MoE layers before this one, oldest first, at most two."""
LONGEST = 2
_BITS = 20  # of an expert's number


@dataclass(slots=True)
class Row:
    """Sightings of one key, and how many of them activated each expert."""

    times: int = 0
    counts: dict[int, int] = field(default_factory=dict)


class PathTable:
    """Key: the experts activated in the two previous MoE layers. Value: P(expert) in the next.

    A probability is counted: of the sightings of this key, the share that activated the expert
    (so a layer's add up to top-k, not to 1). Where a key was never seen, the one previous layer
    alone is the key, then the layer's own frequencies: this backing off is ours, the paper does
    not say what happens then.

    Examples
    --------
    >>> table = PathTable()
    >>> table.count(2, ((0, 1), (3, 4)), (5, 6))
    >>> table.count(2, ((0, 1), (3, 4)), (5, 7))
    >>> list(table.probabilities(2, ((0, 1), (3, 4))))
    [(5, 1.0), (6, 0.5), (7, 0.5)]
    """

    def __init__(self) -> None:
        self._counted: dict[tuple[int, Before], Row] = {}
        self._rows: dict[tuple[int, Before], Row] = {}  # and under every shorter key
        self._by_pairs: PairTable | None = None
        self.frozen = False

    def count(self, layer: int, before: Before, experts: Experts) -> None:
        """One more sighting: ``experts`` of ``layer`` activated after ``before``."""
        if self.frozen:
            raise ValueError("this table is part of a profile; count into one of your own")
        self._add(layer, before, 1, [(expert, 1) for expert in experts])

    def known(self, layer: int, before: Before) -> int | None:
        """Previous layers in the longest key that was seen (2, 1, 0); None: nothing is known."""
        for n in range(len(before), -1, -1):
            if (layer, before[len(before) - n :]) in self._rows:
                return n
        return None

    def probabilities(self, layer: int, before: Before) -> Iterator[tuple[int, float]]:
        """Experts of ``layer``, the likeliest first; those never seen are left out."""
        n = self.known(layer, before)
        if n is None:
            return
        row = self._rows[layer, before[len(before) - n :]]
        # Count and expert as one number: sorted in half the time that pairs take.
        for n in sorted([expert - (count << _BITS) for expert, count in row.counts.items()]):
            yield n & ((1 << _BITS) - 1), -(n >> _BITS) / row.times

    def pairs(self, experts: tuple[int, ...], encoder_layers: int = 0) -> PairTable:
        """What it has counted, by pairs, of a model with so many experts a layer; frozen if it is.

        A frozen table is counted over once.
        """
        if self._by_pairs is None or not self.frozen:
            found = self._by_pairs = PairTable(experts, encoder_layers)
            for (layer, before), row in self._counted.items():
                found.add(layer, before, row.times, row.counts)
            found.frozen = self.frozen
        return self._by_pairs

    def to_json(self) -> dict[str, list[int]]:
        """``{"layer:experts before:experts": [times, expert, count, ...]}``, keys as counted."""
        out = {}
        for (layer, before), row in self._counted.items():
            key = ":".join([str(layer), *(".".join(map(str, e)) for e in before)])
            out[key] = [row.times, *(n for pair in row.counts.items() for n in pair)]
        return out

    @classmethod
    def of(cls, doc: Mapping[str, Sequence[int]]) -> Self:
        """A table out of `to_json`, frozen: it is shared, never copied, and counts no more."""
        return cls._of(json.dumps(doc))

    @classmethod
    @lru_cache(maxsize=1)  # of one model's profile; it is asked for at every change of strategy
    def _of(cls, doc: str) -> Self:
        table = cls()
        for key, (times, *pairs) in json.loads(doc).items():
            layer, *before = key.split(":")
            seen = tuple(tuple(int(e) for e in word.split(".") if e) for word in before)
            counts = zip(pairs[::2], pairs[1::2], strict=True)
            table._add(int(layer), seen, times, list(counts))
        table.frozen = True
        return table

    def _add(
        self, layer: int, before: Before, times: int, counts: Sequence[tuple[int, int]]
    ) -> None:
        where = [(self._rows, before[n:]) for n in range(len(before) + 1)]
        if len(before) < LONGEST:  # a longer key counts under it too
            where.append((self._counted, before))
        for rows, key in where:
            row = rows.get((layer, key))
            if row is None:
                row = rows[layer, key] = Row()
            row.times += times
            for expert, count in counts:  # Counter.update takes four times as long
                row.counts[expert] = row.counts.get(expert, 0) + count
        if len(before) == LONGEST:
            self._counted[layer, before] = self._rows[layer, before]

    def __deepcopy__(self, memo: dict[int, Any]) -> PathTable:
        if self.frozen:
            return self
        copied = type(self)()
        for (layer, before), row in self._counted.items():
            copied._add(layer, before, row.times, list(row.counts.items()))
        return copied


class PairTable:
    """P(expert | expert of the layer before), the mean over the experts of that layer (ours).

    Where none of them was seen before, the layer's own frequencies count.

    Parameters
    ----------
    experts
        Number of experts of each layer.
    encoder_layers
        Before the first layer behind these comes the last of the token before.

    Examples
    --------
    >>> table = PairTable((8, 8))
    >>> table.count(1, ((3, 4),), (5, 6))
    >>> table.count(1, ((3, 7),), (5, 2))
    >>> [(expert, round(p, 2)) for expert, p in table.probabilities(1, ((3, 4),))]
    [(5, 1.0), (6, 0.75), (2, 0.25)]
    """

    def __init__(self, experts: tuple[int, ...], encoder_layers: int = 0) -> None:
        own, last = experts[:encoder_layers], experts[-1:]
        before = (*last, *own[:-1], *(last if own else ()), *experts[encoder_layers:])
        shapes = list(zip(before, experts, strict=False))
        self._counts = [np.zeros(shape, np.float32) for shape in shapes]  # of layer [E before, E]
        self._times = [np.zeros(shape[0], np.float32) for shape in shapes]
        self._alone = [np.zeros(shape[1], np.float32) for shape in shapes]
        self._seen = [0] * len(experts)
        self.frozen = False

    def count(self, layer: int, before: Before, experts: Experts) -> None:
        """One more sighting: ``experts`` of ``layer`` activated after ``before``."""
        if self.frozen:
            raise ValueError("this table is part of a profile; count into one of your own")
        self.add(layer, before, 1, dict.fromkeys(experts, 1))

    def add(self, layer: int, before: Before, times: int, counts: Mapping[int, int]) -> None:
        """Sightings with one and the same ``before``, and how many had each expert."""
        experts, number = np.array([*counts], int), np.array([*counts.values()], np.float32)
        self._seen[layer] += times
        self._alone[layer][experts] += number
        if before:
            last = np.array(before[-1], int)
            self._times[layer][last] += times
            self._counts[layer][last[:, None], experts] += number

    def probabilities(self, layer: int, before: Before) -> Iterator[tuple[int, float]]:
        """Experts of ``layer``, the likeliest first; those never seen are left out."""
        last = [one for one in before[-1] if self._times[layer][one]] if before else []
        if last:
            rows = self._counts[layer][last]
            rows /= self._times[layer][last][:, None]
            found = np.add.reduce(rows, 0)
            found /= len(last)
        else:
            found = self._alone[layer] / max(1, self._seen[layer])
        order = np.argsort(-found, kind="stable")[: np.count_nonzero(found)]
        return zip(order.tolist(), found[order].tolist(), strict=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> PairTable:
        if self.frozen:
            return self
        copied = type(self)(())
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied
