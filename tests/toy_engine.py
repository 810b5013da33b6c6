"""An engine without a model: it routes at random and holds a scheduler to its promises."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections.abc import Iterable
from typing import Any

from moelab.scheduling.budget import minimum_budget
from moelab.scheduling.events import Decision, LayerPlan
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.strategy import Knobs, LookAhead, Shape, Strategy
from moelab.scheduling.trace import Trace

NBYTES = {16: 1600, 8: 800, 4: 400, 2: 200}
SHAPE = Shape((6, 6, 6, 6), 2, NBYTES)


def decided(plan: LayerPlan, *kinds: str) -> list[Decision]:
    """A plan's decisions in words, all or those of these kinds."""
    return [d for d in plan.decisions(SHAPE) if not kinds or d.kind in kinds]


def places(decisions: Iterable[Any]) -> list[tuple[int, int]]:
    """(layer, expert) of decisions or predictions."""
    return [(d.layer, d.expert) for d in decisions]


def resident(scheduler: Scheduler) -> dict[tuple[int, int], int]:
    """(layer, expert) -> bits of what is in memory, least recently used first."""
    return {scheduler.shape.place(key): bits for key, bits in scheduler.cache.items()}


def enough(strategy: Strategy, knobs: Knobs, shape: Shape = SHAPE) -> Knobs:
    """The settings with a budget that the strategy takes."""
    need = minimum_budget(shape, strategy, knobs)
    return dataclasses.replace(knobs, budget_bytes=max(knobs.budget_bytes, need))


class Toy:
    """An engine without a model: activations with favourites, loads that land some layers later."""

    def __init__(self, strategy: Strategy, knobs: Knobs, seed: int) -> None:
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(SHAPE, strategy, knobs)
        self.template = strategy
        self.held: dict[int, int] = {}
        self.flying: set[int] = set()
        self.decided: list[Decision] = []
        self.trace = Trace(SHAPE)
        self.favour = [[self.rng.random() for _ in range(n)] for n in SHAPE.experts]

    def sequence(self, tokens: int, *, changes=None) -> Trace:
        s = self.scheduler
        self.trace = Trace(SHAPE, resident=s.cache.items())
        self._record(s.strategy.fresh())
        self.decided = []
        s.new_sequence()
        self._obey(s.begin(), waits=True)
        for token in range(tokens):
            if changes and token in changes:
                self.change(**changes[token])
            for layer in range(SHAPE.layers):
                given = self._route(layer, 5 if token == 0 else 1, prefill=token == 0)
                self.trace.steps.append(given)
                self._obey(s.step(given))
            s.end_of_token()
        return self.trace

    def change(self, knobs: Knobs | None = None, strategy: Strategy | None = None, **tune) -> None:
        """Other settings, another strategy, or other parameters of this one."""
        s, old = self.scheduler, self.template
        self.template = (strategy or old).tuned(**tune)
        self._obey(s.change(enough(self.template, knobs or s.view.knobs), self.template))
        self._record(self.template, fresh=not self.template.shares(old))
        self._obey(s.begin(), waits=True)

    def _record(self, strategy: Strategy, *, fresh: bool = True) -> None:
        knobs, at = self.scheduler.view.knobs, len(self.trace.steps)
        values = strategy.values
        self.trace.changes.append(Change(at, knobs, strategy.name, fresh, values, strategy))

    def _route(self, layer: int, tokens: int, *, prefill: bool) -> LayerInput:
        s, rng, count = self.scheduler, self.rng, SHAPE.experts[layer]
        observes, mask, bias = s.strategy.observes, s.mask(layer), s.bias(layer)
        assert mask is None or (len(mask) == count and sum(mask) >= SHAPE.top_k)
        assert bias is None or len(bias) == count
        free, chosen = [], []
        for _ in range(tokens):
            scores = [f + rng.random() for f in self.favour[layer]]
            spread = max(scores) - min(scores)
            free.append(self._top(scores, scores))
            lead = [0.0] * count if bias is None else bias
            place = [x + spread * b for x, b in zip(scores, lead, strict=True)]
            place = [x if mask is None or mask[e] else -1e9 for e, x in enumerate(place)]
            chosen.append(self._top(place, scores))
            assert mask is None or all(mask[e] for e, _ in chosen[-1])
        ahead = ()
        for coming in range(layer + 1, layer + 1 + s.look_ahead(layer, prefill=prefill)):
            guess = [f + rng.random() for f in self.favour[coming]]
            experts, weights = zip(*self._top(guess, guess), strict=True)
            ahead += (LookAhead(coming, experts, weights),)
        told = (mask is not None or bias is not None) and "wanted" in observes
        flying = tuple(k for k in sorted(self.flying) if rng.random() < 0.5)
        self.flying.intersection_update(flying)  # the others have landed
        late = tuple(k for k in flying if SHAPE.place(k)[0] == layer and rng.random() < 0.5)
        return LayerInput(
            layer,
            tuple(tuple(e for e, _ in row) for row in chosen),
            tuple(tuple(w for _, w in row) for row in chosen),
            prefill,
            ahead,
            tuple(tuple(e for e, _ in row) for row in free) if told else None,
            tuple(tuple(w for _, w in row) for row in free) if told else None,
            norms=tuple(rng.uniform(1, 2) for _ in chosen) if "norms" in observes else None,
            in_flight=flying if "in_flight" in observes else (),
            unread=late if "unread" in observes else (),
            **self._whole(layer, observes),
        )

    def _whole(self, layer: int, observes: frozenset[str]) -> dict[str, array]:
        """All experts' probabilities, and with layer 0 an embedding."""
        favour, rng = self.favour[layer], self.rng
        scores = [f + rng.random() for f in favour] if "probabilities" in observes else []
        told = {"probabilities": array("d", [x / sum(scores) for x in scores])}
        told["embedding"] = array("d", [rng.uniform(-1, 1) for _ in range(5)] if not layer else [])
        return {name: values for name, values in told.items() if name in observes and values}

    @staticmethod
    def _top(place: list[float], scores: list[float]) -> list[tuple[int, float]]:
        best = sorted(range(len(place)), key=lambda e: -place[e])[: SHAPE.top_k]
        total = sum(scores[e] for e in best)
        return [(e, scores[e] / total) for e in best]

    def _obey(self, plan: LayerPlan, *, waits: bool = False) -> None:
        """Do what an engine does; the budget holds after every single decision."""
        s = self.scheduler
        for d in decided(plan):
            key = SHAPE.key(d.layer, d.expert)
            if d.kind in ("load", "prefetch"):
                assert key not in self.held
                self.held[key] = d.bits
                assert sum(NBYTES[b] for b in self.held.values()) <= s.cache.budget_bytes
                self.flying |= set() if waits or d.kind == "load" else {key}
            elif d.kind == "evict":
                assert self.held.pop(key) == d.bits
                self.flying.discard(key)
            elif d.kind in ("hit", "substitute"):
                assert self.held[key] == d.bits
                self.flying.discard(key)  # it was waited for
            self.decided.append(d)
        assert self.held == dict(s.cache.items())
        assert sum(NBYTES[b] for b in self.held.values()) <= s.cache.budget_bytes
        for layer in range(SHAPE.layers):
            share = s.strategy.allocate.layer_bytes(layer, s.view)
            assert share is None or s.cache.layer_bytes[layer] <= share
        for bits in NBYTES:
            pool = s.strategy.allocate.tier_bytes(bits, s.view)
            assert pool is None or s.cache.tier_bytes[bits] <= pool
