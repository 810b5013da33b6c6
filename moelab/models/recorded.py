"""The routing of a recorded run, in place of what a model's own routers choose.

The first token of a run is routed as the recorded prompt was, each that follows as the next decoded
one; after the last of these the first comes again. What it does not know: what a router would have
chosen under a mask or a bias, and what routers would have said that were not asked ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moelab.models.undecorated import Choice
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.trace import Trace

Step = Callable[[int], LayerInput]
"""From a layer to what was recorded of it for the token at work."""


class Recorded:
    """The first sequence of a trace, token by token.

    Attributes
    ----------
    prompt
        Tokens of its prompt.
    decoded
        Tokens after which the routing repeats.
    """

    def __init__(self, trace: Trace) -> None:
        ends = [*trace.passes[1:], len(trace)]
        tokens = [trace.steps[a:b] for a, b in zip(trace.passes, ends, strict=True)]
        if not tokens or tokens[-1][-1].layer < trace.shape.layers - 1:
            raise ValueError(f"this trace ends within a token, or has none: {len(trace)} steps")
        if any(len(given.experts) > 1 for given in trace.steps if not given.prefill):
            raise ValueError("this trace has drafted passes of several tokens; record one without")
        self._prompt = tokens[0]
        later = [token for token in tokens[1:] if not token[0].prefill]
        self._decoded = later or [self._prompt]
        self.prompt, self.decoded = len(self._prompt[0].experts), len(self._decoded)

    def of(self, token: Callable[[], int]) -> Step:
        """What a layer was given for the token that a run is at; 0 is the prompt."""

        def step(layer: int) -> LayerInput:
            at = token()
            whole = self._decoded[(at - 1) % self.decoded] if at else self._prompt
            return whole[layer - whole[0].layer]

        return step


def choice(given: LayerInput, tokens: int) -> Choice:
    """(experts, weights) of so many tokens, ``[tokens, K]``; the recorded rows in turn."""
    rows = [at % len(given.experts) for at in range(tokens)]
    experts, weights = given.experts, given.weights
    if given.free:
        experts = [own + free for own, free in zip(experts, given.free, strict=True)]
        weights = [own + free for own, free in zip(weights, given.free_weights, strict=True)]
    return _tensors([experts[at] for at in rows], [weights[at] for at in rows])


def ahead(given: LayerInput, last: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """What routers up to layer ``last`` answered when they were asked in this layer."""
    found = [a for a in given.look_ahead if a.layer <= last]
    return [(a.layer, *_tensors([a.experts], [a.weights])) for a in found]


def _tensors(experts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Choice:
    """Where a row is shorter, expert -1: none."""
    most = max(map(len, experts))
    idx = [[*row, *[-1] * (most - len(row))] for row in experts]
    gates = [[*row, *[0.0] * (most - len(row))] for row in weights]
    return torch.tensor(idx, dtype=torch.int64), torch.tensor(gates, dtype=torch.float32)
