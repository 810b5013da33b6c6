"""Hermes (PIPELOAD): whole layers are loaded ahead and dropped after use; the gate has no say.

Source: Hermes, arXiv 2409.04249, for dense transformers, by others' notes on it: m loading agents
read the coming layers in parallel, an inference agent computes them in order, and a daemon frees
each as soon as it was computed.

Here the next ``depth`` layers are m's. On a mixture of experts it is the baseline that shows what
loading by the expert saves: a token reads every expert of every layer, and deciding grows with all
of them. The dense weights stay in memory, where the paper streams them too; ``depth`` is a person's
choice, where its planner measures. Into a budget below ``depth`` + 1 layers goes what there is room
for, the nearest layer first, each by the index of its experts; the rest is loaded on demand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from moelab.scheduling.strategy import LookAhead, Parameter, Prediction, Prefetch, Strategy, View
from moelab.strategies.basics import KeepNothing, turns


class DropLayers(KeepNothing):
    """A layer leaves as soon as it is computed; before that, the one whose turn is farthest."""

    title = "drop a layer after it (Hermes)"
    explained: ClassVar = {"layers to its turn": "the highest leaves"}

    def score(self, view: View) -> np.ndarray:
        return -turns(view)

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        return {"layers to its turn": turns(view)}


class WholeLayers(Prefetch):
    """All experts of the next layers, across the end of a token."""

    title = "whole layers (Hermes)"
    parameters: ClassVar = (Parameter("depth", "whole layers to load ahead, 0: off", 0, 8, 1),)
    in_prefill = True

    def __init__(self, depth: int = 1) -> None:
        self.depth = self.parameters[0].checked(depth)

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        at, seen = layer, {layer}
        while len(seen) <= self.depth and (at := view.shape.following(at)) not in seen:
            seen.add(at)
            for expert in range(view.shape.experts[at]):
                yield Prediction(at, expert)


def hermes(*, depth: int = 1) -> Strategy:
    """Whole layers are loaded ahead, every expert of them, and dropped after use.

    Parameters
    ----------
    depth
        Layers to load ahead, 0 to 8.
    """
    return Strategy("hermes", DropLayers(), prefetch=WholeLayers(depth))
