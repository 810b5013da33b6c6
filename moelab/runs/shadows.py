"""Shadows: what other strategies would have had in memory, while a run is still going on.

The run's own stream goes through a scheduler for each of them, the very objects that would decide
live. They take the time that they are given and no more: on a large model they lag behind, and say
by how much. They know no time: a load is there at once, so that a hit that came late is one here.
"""

from __future__ import annotations

import bisect
import time
from typing import Any

import numpy as np

from moelab.replays.bounds import belady_hits
from moelab.replays.replay import Player
from moelab.runs.run import Run
from moelab.runs.tokens import COLUMNS, REQUESTS
from moelab.scheduling.budget import BudgetError
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.trace import Trace
from moelab.settings import MakeStrategy, Settings

SHADOWS = ("lru", "lfu", "layer_lru", "hobbit", "edgemoe")
"""Strategies that decide over the stream as it came. SwapMoE steers the router: its stream would
have been another one."""
FOUND = REQUESTS[:2]
"""Hits, in time or late."""
RUN, BELADY = "run", "belady"
GROWN = 1.25
"""Belady is asked anew when the stream has grown by a quarter: he begins from its start."""


class Shadows:
    """The shadows of one run.

    Parameters
    ----------
    run
        Whose stream they follow.
    strategies
        Makes them by name, with what was measured of the model; who cannot be made is left out.
    """

    def __init__(self, run: Run, strategies: MakeStrategy) -> None:
        self._run, self._strategies = run, strategies
        self._players: dict[str, Player] | None = None
        self._begun: dict[str, Settings] = {}
        self._best: float | None = None
        self._asked = 0  # tokens that Belady was asked of, and what he hit
        self._credit = 0.0

    def advance(self, seconds: float) -> bool:
        """Follow the run for about so long; whether there is more to follow.

        What a piece took too long is taken from the times after it: in the long run no more is
        spent than was given.
        """
        self._credit = min(self._credit + seconds, 2 * seconds)
        while self._credit > 0:
            begun = time.perf_counter()
            if not self._piece():
                return False
            self._credit -= time.perf_counter() - begun
        return True

    def told(self, values: np.ndarray) -> list[dict[str, Any]]:
        """Of the run itself and of each its ``name`` and ``hit_ratio`` after ``tokens`` decoded.

        All are of the same tokens: as many as whoever is furthest behind has seen. ``values``: the
        figures of the run's tokens ``[T, C]``, columns as in `COLUMNS`.
        """
        players = dict(self._players or {})
        if not players or self._steered():
            return []
        passes = self._run.trace.shape.passes_of(min(player.at for player in players.values()))
        tokens = bisect.bisect_left(self._run._places, (passes,)) - 1  # the prompt's apart
        if tokens < 1:
            return []
        counts = values[1 : tokens + 1, [COLUMNS.index(name) for name in REQUESTS]].sum(0)
        mine = float(counts[: len(FOUND)].sum() / max(1.0, counts.sum()))
        found = {RUN: mine} | {name: player.out.hit_ratio for name, player in players.items()}
        if self._best is not None:
            found[BELADY] = self._best
        return [{"name": n, "hit_ratio": ratio, "tokens": tokens} for n, ratio in found.items()]

    def _steered(self) -> bool:
        """Whether the run's own router is: its stream is no other strategy's then."""
        return any(settings.strategy.steers for _, settings in self._run.history)

    def _piece(self) -> bool:
        """One token of whoever is furthest behind, or Belady; False where all is followed."""
        trace = self._run.trace
        shape = trace.shape
        whole = self._run.passes(len(self._run.tokens))  # one under way is not verified yet
        if not whole or not trace.changes:
            return False
        if (players := self._players) is None:
            self._players = self._made(trace)
            return True
        if not players:
            return False
        behind = min(players, key=lambda name: players[name].at)
        followed, end = shape.passes_of(players[behind].at), not self._run.running
        last = end and followed == whole > self._asked
        if followed > max(1, GROWN * self._asked) or last:
            self._asked, self._best = followed, _best(trace, shape.steps_of(followed))
            return True
        if followed < whole:
            self._follow(behind, trace)
            return True
        return False

    def _made(self, trace: Trace) -> dict[str, Player]:
        """A scheduler each, under the settings that the run began with."""
        first, players = self._run.history[0][1], dict[str, Player]()
        for name in SHADOWS:
            try:
                settings = first.change(trace.shape, make=self._strategies, strategy=name)
                scheduler = Scheduler(trace.shape, settings.strategy, settings.knobs())
            except (ValueError, BudgetError):  # needs a calibration, or more than the budget
                continue
            scheduler.warm(trace.resident)
            self._begun[name] = settings
            players[name] = Player(scheduler, keep=False)
        return players

    def _follow(self, name: str, trace: Trace) -> None:
        assert self._players is not None
        player = self._players[name]
        try:
            end = trace.shape.steps_of(trace.shape.passes_of(player.at) + 1)
            while player.at < end:
                at, changes = player.at, []
                pairs = zip(trace.changes[1:], self._run.history[1:], strict=False)
                for change, (_, settings) in pairs:
                    if change.at == at:
                        own = self._begun[name].strategy
                        now = settings.change(trace.shape, strategy=own)
                        changes.append((now.knobs(), None))
                player.step(trace.steps[at], changes, trace.kept.get(trace.shape.passes_of(at)))
        except BudgetError:  # what is set now is less than it needs
            self._players = {n: p for n, p in self._players.items() if n != name}


def _best(trace: Trace, steps: int) -> float | None:
    """Belady's hit ratio of so many steps; None where he would know more than one size."""
    knobs = {change.knobs for change in trace.changes if change.at < steps}
    if len(knobs) != 1 or {held.bits for held in knobs} & trace.shape.own.keys():
        return None  # budget or bits changed, or each expert has its own
    (held,) = knobs
    so_far = Trace(trace.shape, trace.steps[:steps], resident=list(trace.resident))
    hits, asked = belady_hits(so_far, held.budget_bytes // trace.shape.nbytes[held.bits])
    return hits / asked if asked else None
