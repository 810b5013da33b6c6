"""What a scheduler is told: the input of one layer in one pass, and a change of settings."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, Knobs, LookAhead, Request, ranked


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What one MoE layer tells the scheduler in one step.

    Parameters
    ----------
    layer
        Index among the MoE layers.
    experts, weights
        The router's choice and its gate weights, ``[T][K]`` as tuples; experts that count for
        nothing (out of range, weight 0) are left out, so a token may have fewer than K.
    prefill
        A prompt (T >= 1 tokens at once) rather than a decoded token; T > 1 decoded ones are a
        drafted chain, verified in one pass.
    look_ahead
        Coming layers' routers asked with this layer's input, where the strategy wants it.
    wanted, wanted_weights
        The router's own choice and gate weights ``[T][K]`` where a mask or a bias applied; None
        otherwise. See `router_experts`.
    norms
        Euclidean norm of the layer's input, one a token, where a part observes ``"norms"``.
    in_flight
        Keys of resident experts whose bytes had not landed when the router had spoken, where a part
        observes ``"in_flight"``.
    unread
        Keys of prefetches of this layer whose reading had not begun when the router had spoken,
        where a part observes ``"unread"``: they are withdrawn.
    probabilities
        The gate's probabilities of all the layer's experts ``[E]``, without mask or bias, mean over
        the tokens, where a part observes ``"probabilities"`` and there is a router to be asked.
    embedding
        What the embedding layer gave ``[D]``, mean over the tokens, told with the first layer that
        a decoded token runs through where a part observes ``"embedding"``.
    free, free_weights
        Chosen experts without weights (see `Shape.free`) and their gate weights, as ``experts``.
    """

    layer: int
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    prefill: bool = False
    look_ahead: tuple[LookAhead, ...] = ()
    wanted: tuple[tuple[int, ...], ...] | None = None
    wanted_weights: tuple[tuple[float, ...], ...] | None = None
    norms: tuple[float, ...] | None = None
    in_flight: tuple[Key, ...] = ()
    unread: tuple[Key, ...] = ()
    probabilities: array[float] | None = None
    embedding: array[float] | None = None
    free: tuple[tuple[int, ...], ...] = ()
    free_weights: tuple[tuple[float, ...], ...] = ()
    asked: list[Request] | None = field(default=None, init=False, repr=False, compare=False)

    def requests(self) -> list[Request]:
        """The layer's unique experts: one token's by falling weight, of more by use; kept."""
        if self.asked is None:
            object.__setattr__(self, "asked", _requests(self))
        assert self.asked is not None
        return self.asked

    def told(self, in_flight: Sequence[Key], unread: Sequence[Key]) -> LayerInput:
        """The same where these have not landed, and those were withdrawn."""
        if not in_flight and not unread and not self.in_flight and not self.unread:
            return self
        same = (self.layer, self.experts, self.weights, self.prefill, self.look_ahead)
        router = (self.wanted, self.wanted_weights, self.norms)  # dataclasses.replace takes longer
        whole = (self.probabilities, self.embedding, self.free, self.free_weights)
        new = LayerInput(*same, *router, tuple(in_flight), tuple(unread), *whole)
        object.__setattr__(new, "asked", self.requests())
        return new

    def verified(self, kept: int) -> LayerInput:
        """Its first ``kept`` rows; means over all of them and guesses from all are left out."""
        names = ("experts", "weights", "wanted", "wanted_weights", "norms", "free", "free_weights")
        rows = {name: value[:kept] for name in names if (value := getattr(self, name))}
        return dataclasses.replace(self, **rows, look_ahead=(), probabilities=None, embedding=None)

    @property
    def router_experts(self) -> tuple[tuple[int, ...], ...]:
        """What the router chose by itself, without mask or bias; ``[T][K]``."""
        return self.experts if self.wanted is None else self.wanted

    @property
    def router_weights(self) -> tuple[tuple[float, ...], ...]:
        """Gate weights of `router_experts`."""
        return self.weights if self.wanted_weights is None else self.wanted_weights


def _requests(given: LayerInput) -> list[Request]:
    if not given.prefill and len(given.experts) == 1:
        return ranked(given.experts[0], given.weights[0], given.layer)
    seen: dict[int, list[float]] = {}
    for row, weights in zip(given.experts, given.weights, strict=True):
        for expert, weight in zip(row, weights, strict=True):
            seen.setdefault(expert, []).append(weight)
    order = sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Request(e, max(w), tokens=len(w), layer=given.layer) for e, w in order]


class Change(NamedTuple):
    """Settings in force from a step on.

    Parameters
    ----------
    at
        Index into the steps.
    knobs
        The settings.
    name, parameters
        Of the strategy.
    fresh
        Whether the strategy begins here, with nothing learnt.
    strategy
        The strategy itself, with what it had learnt by then; kept in memory only.
    pinned
        Experts kept for good, of a trace from a file; else the strategy has them.
    """

    at: int
    knobs: Knobs
    name: str
    fresh: bool = True
    parameters: Mapping[str, Any] | None = None
    strategy: Strategy | None = None
    pinned: Mapping[tuple[int, int], int] | None = None
