"""MoE-Infinity: an earlier sequence like this one tells which experts are coming.

Source: L. Xue et al., "MoE-Infinity: Efficient MoE Inference on Personal Machines with
Sparsity-Aware Expert Cache", arXiv 2401.14361. Its words:

EAM
    expert activation matrix [L, E]: how often each expert was activated, in one sequence (rEAM) or
    in one pass through the layers (iEAM).
EAMC
    collection of the rEAMs of earlier sequences, of bounded size.

After every layer l the rEAM nearest to the iEAM by cosine, over the layers passed so far, is looked
up, and the experts of the coming layers i are fetched by falling (p + ε)·(1 - (i - l)/L): p is the
expert's share of its layer's activations in the nearest rEAM, the second factor the layer
proximity. Out of the cache goes the lowest (p + ε)·(1 - i/L): the first layers stay, because
prefetching has no time to help them. A full EAMC gives up the rEAM nearest to the new one, so that
it stays diverse.

Not as there: the paper queues every expert of all coming layers and lets the bandwidth decide how
far it gets; since here a prefetch takes its room when it is issued, only the ``guesses`` likeliest
experts of the next ``depth`` layers are fetched. Eviction takes p from this sequence's own
activations (LFU) instead of the nearest rEAM's. The cosine is taken layer by layer and averaged, as
in the authors' code, where the paper flattens the matrices. The collection starts empty and learns
from the runs.

L layers, E experts, S sequences in the collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moelab.scheduling.strategy import (
    Evict,
    LookAhead,
    Parameter,
    Prediction,
    Prefetch,
    Strategy,
    View,
)
from moelab.scheduling.stream import ranked
from moelab.strategies.basics import DEPTH, expected

if TYPE_CHECKING:
    from moelab.scheduling.steps import LayerInput

EPSILON = 1e-6
"""Keeps the order of layers among experts that were never activated."""


class LeastActivated(Evict):
    """LFU of this sequence with a layer decay: the lowest (p + ε)·(1 - i/L) leaves."""

    title = "frequency by layer (MoE-Infinity)"
    explained: ClassVar = {
        "activation ratio": "its part of its layer's activations in this sequence",
        "layer decay": "1 at the first layer, less further up",
        "priority": "their product; the lowest leaves",
    }

    def __init__(self) -> None:
        self._uses = np.zeros(0)  # activations in this sequence [n]
        self._of_layer = np.zeros(0)  # and of each layer [L]

    def observe(self, given: LayerInput, view: View) -> None:
        if not len(self._uses):
            self._uses, self._of_layer = np.zeros(view.shape.n), np.zeros(view.shape.layers)
        first = view.shape.offset[given.layer]
        uses = self._uses.data
        for experts in given.experts:
            for expert in experts:
                uses[first + expert] += 1
            self._of_layer[given.layer] += len(experts)

    def new_sequence(self) -> None:
        self._uses = self._of_layer = np.zeros(0)

    def score(self, view: View) -> np.ndarray:
        terms = self._factors(view)
        return (terms["activation ratio"] + EPSILON) * terms["layer decay"]

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        return {**self._factors(view), "priority": self.score(view)}

    def _factors(self, view: View) -> dict[str, np.ndarray]:
        """P and 1 - i/L of every expert ``[n]``."""
        path, layer_of = view.shape.path(prefill=view.prefill), view.layer_of
        decay = 1 - (np.arange(path.stop) - path.start) / len(path)
        decay[: path.start] = 0  # of an encoder, which no more tokens run through
        decay = decay[layer_of]
        if not len(self._uses):
            return {"activation ratio": np.zeros(view.shape.n), "layer decay": decay}
        p = self._uses / np.maximum(self._of_layer, 1)[layer_of]
        return {"activation ratio": p, "layer decay": decay}


class NearestSequence(Prefetch):
    """The experts that the most similar earlier sequence used most in the coming layers."""

    title = "most similar earlier sequence (MoE-Infinity)"
    parameters: ClassVar = (
        DEPTH,
        Parameter("guesses", "experts fetched for each coming layer", 1, 8, 1),
        Parameter("collection", "earlier sequences to compare with", 1, 256, 1),
        Parameter(
            "match",
            "what is compared with them: this token's layers so far, or this whole sequence",
            choices=("token", "sequence"),
        ),
    )

    def __init__(
        self, guesses: int = 2, collection: int = 32, match: str = "token", depth: int = 1
    ) -> None:
        given = (depth, guesses, collection, match)
        self.depth, self.guesses, self.collection, self.match = (
            p.checked(value) for p, value in zip(self.parameters, given, strict=True)
        )
        self.eam = np.zeros((0, 0))  # rEAM of the sequence at hand [L, E]
        self.pass_eam = np.zeros((0, 0))  # iEAM of the pass at hand [L, E]
        self.eamc: list[np.ndarray] = []  # S of [L, E]
        self._units = np.zeros((0, 0, 0))  # [L, E, S], rows of length 1 along E
        self._cosines: dict[str, np.ndarray] = {}  # of each layer with each sequence [L, S]

    def observe(self, given: LayerInput, view: View) -> None:
        """Count this layer's activations, one for each token and expert."""
        size, layer = (view.shape.layers, max(view.shape.experts)), given.layer
        if not self.eam.size:
            self.eam = np.zeros(size)
            self._cosines = {"token": self._none(), "sequence": self._none()}
        if view.shape.begins(layer, prefill=given.prefill) or not self.pass_eam.size:
            self.pass_eam = np.zeros(size)
            self._cosines["token"] = self._none()
        sequence, this_pass = self.eam[layer].data, self.pass_eam[layer].data
        for experts in given.experts:
            for expert in experts:
                sequence[expert] += 1
                this_pass[expert] += 1
        if self.eamc:  # only this layer's row has changed
            for name, eam in (("token", self.pass_eam), ("sequence", self.eam)):
                self._cosines[name][layer] = _unit_rows(eam[layer]) @ self._units[layer]

    def new_sequence(self) -> None:
        """Put the EAM of the sequence that has ended into the collection."""
        if self.eam.any():
            while len(self.eamc) >= self.collection:
                self._forget(int(np.argmax(self.similarity(self.eam))))
            self.eamc.append(self.eam)
            self._units = np.stack([_unit_rows(eam) for eam in self.eamc], axis=-1)
        self.eam = self.pass_eam = np.zeros((0, 0))

    def similarity(self, eam: np.ndarray) -> np.ndarray:
        """Mean cosine over the layers seen in ``eam`` with each of the collection ``[S]``."""
        seen = int(eam.any(axis=1).sum())
        return np.einsum("le,les->s", _unit_rows(eam), self._units) / max(seen, 1)

    def _none(self) -> np.ndarray:
        return np.zeros((len(self._units), len(self.eamc)))

    def _forget(self, which: int) -> None:
        del self.eamc[which]
        self._units = np.delete(self._units, which, axis=-1)

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        layers = view.shape.layers
        coming = range(layer + 1, min(layer + self.depth, layers - 1) + 1)
        if not self.eamc or not coming or not self.eam.size:
            return []
        # The layers seen are the same for all of them: the sum's largest is the mean's.
        nearest = self.eamc[int(np.argmax(self._cosines[self.match].sum(axis=0)))]
        found: list[tuple[float, Prediction]] = []
        for i in coming:
            p = nearest[i] / (nearest[i].sum() or 1.0)
            likeliest = [int(e) for e in np.argsort(-p, kind="stable")[: self.guesses] if p[e]]
            proximity = 1 - (i - layer) / layers
            guesses = ranked(likeliest, [float(p[e]) for e in likeliest], i)
            found += [((p[r.expert] + EPSILON) * proximity, expected(r)) for r in guesses]
        return [guess for _, guess in sorted(found, key=lambda pair: -pair[0])]


def _unit_rows(eam: np.ndarray) -> np.ndarray:
    """Each layer's row at length 1; a row of zeros stays one."""
    return eam / np.maximum(np.linalg.norm(eam, axis=-1, keepdims=True), EPSILON)


def moe_infinity(*, guesses: int = 2, collection: int = 32, match: str = "token") -> Strategy:
    """The most similar earlier sequence says what to prefetch; least activated experts leave."""
    return Strategy(
        "moe_infinity", LeastActivated(), prefetch=NearestSequence(guesses, collection, match)
    )
