"""FlashMoE: a small net per layer has learnt from recorded routing who will be needed last.

Source: "FlashMoE", arXiv 2601.17063. At token t an expert has a recency 1/r (r tokens since its
last use, so 1 just after it, 0 for never) and a frequency f / max f, over this sequence. A
feed-forward net of three layers imitates Belady's rule: from these of all E experts of its layer it
says how long each will not be used, and the expert with the longest time leaves. Every layer has
the same share of the budget. Routing and output stay as they are.

`moelab.calibration.flashmoe` trains the nets (one a layer, 2E inputs, SiLU, the absolute value of
E outputs; so in a later paper's own implementation of it, CECAR's ML_FlashMoE, of which the sizes
and labels are). Here they run in numpy, one call a layer and token, after its routing is known.

Not as there: the paper's net has 128 hidden units, these have what the calibration was asked for.
Without nets the time is taken as 1 - f / max f, which is LFU within each layer; by name in a lab it
is refused until there are some. The paper's loading of a prompt's experts once is how every prompt
is served here.

E experts of a layer, H hidden units, n experts of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Evict, Strategy, View
from moelab.strategies.basics import EqualShares

Weights = Sequence[Sequence[Any]]
"""Of each layer of a net: matrix ``[out, in]`` and bias ``[out]``."""


class Net:
    """2E -> H -> H -> E, SiLU between them; never changed, so shared and not copied."""

    def __init__(self, weights: Weights) -> None:
        *self._hidden, self._out = (
            (np.array(matrix, np.float32), np.array(bias, np.float32)) for matrix, bias in weights
        )
        self.experts = len(self._out[1])

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Time to the next use ``[E]``, 1: as long as told apart, of features ``[2E]``."""
        x = features.astype(np.float32)
        for matrix, bias in self._hidden:
            x = matrix @ x + bias
            x *= 0.5 + 0.5 * np.tanh(0.5 * x)  # SiLU; its exp(-x) could overflow
        matrix, bias = self._out
        return np.abs(matrix @ x + bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class LearnedReuse(Evict):
    """Who is predicted to be used last leaves.

    Parameters
    ----------
    nets
        One of each layer; empty: frequency alone.
    """

    title = "learnt time to the next use (FlashMoE)"
    explained: ClassVar = {
        "time to next use": "predicted, 1: long or never; the highest leaves",
        "recency": "1 / tokens since its last use in this sequence",
        "frequency": "uses in this sequence, of the most used of its layer's",
    }

    def __init__(self, nets: Sequence[Net] = ()) -> None:
        self.nets = tuple(nets)
        self._tokens: list[int] = []  # of this sequence, by layer
        self._last = self._uses = np.zeros(0)  # token of the last use, from 1; uses [n]
        self._told = np.zeros((0, 0))  # time to next use, recency, frequency [3, n]

    def new_sequence(self) -> None:
        self._tokens, self._told = [], np.zeros((0, 0))

    def observe(self, given: LayerInput, view: View) -> None:
        """Count a layer's uses, and ask its net."""
        shape, layer = view.shape, given.layer
        if not self._tokens:
            self._begin(shape.experts)
        at = shape.keys(layer)
        last, uses = self._last[at], self._uses[at]
        for experts in given.experts:
            self._tokens[layer] += 1
            for expert in experts:
                last[expert] = self._tokens[layer]
                uses[expert] += 1
        time, recency, frequency = self._told[:, at]
        np.divide(last > 0, self._tokens[layer] + 1 - last, out=recency)
        np.divide(uses, uses.max() or 1.0, out=frequency)
        told = np.concatenate((recency, frequency))
        time[:] = self.nets[layer](told) if self.nets else 1 - frequency

    def _begin(self, experts: tuple[int, ...]) -> None:
        """A sequence of a model with so many experts a layer."""
        known = tuple(net.experts for net in self.nets)
        if known and known != experts:
            raise ValueError(
                f"nets for {len(known)} layers of {sorted(set(known))} experts, the model has "
                f"{len(experts)} of {sorted(set(experts))}: run lab.calibrate('flashmoe')"
            )
        n = sum(experts)
        self._tokens, self._told = [0] * len(experts), np.zeros((3, n))
        self._told[0] = 1.0
        self._last, self._uses = np.zeros((2, n))

    def score(self, view: View) -> np.ndarray:
        return -self._told[0] if self._told.size else np.zeros(view.shape.n)

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        told = self._told if self._told.size else np.zeros((3, view.shape.n))
        return dict(zip(self.explained, told, strict=True))


def flashmoe(profile: Mapping[str, Any] | None = None) -> Strategy:
    """Within a layer's equal share the expert leaves that a small net expects to be used last.

    Parameters
    ----------
    profile
        ``{"nets": [L]}`` of ``lab.calibrate("flashmoe")``, each net three pairs of matrix and bias.
    """
    nets = [Net(weights) for weights in (profile or {}).get("nets", ())]
    return Strategy("flashmoe", LearnedReuse(nets), allocate=EqualShares())
