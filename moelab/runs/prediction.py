"""What a recorded stream would have cost under other settings: decided anew, timed by a clock.

Decisions are exact where the settings compute what was recorded; times are *modelled*. Whoever asks
with a run is told how far the same model is from that run itself, and `Prediction.check` makes the
predicted run and says how far it was from that. What it does not know: prompts (only decoded tokens
have times), and what else the machine is doing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moelab.replays import replay as replays
from moelab.replays.bounds import belady_hits
from moelab.replays.clock import Bus, Clock
from moelab.replays.replay import Replay
from moelab.runs.fitting import as_measured, disk_as_measured, passes_of, token_ms, typical
from moelab.runs.rounds import begun
from moelab.runs.tokens import REQUESTS
from moelab.runs.what_if import WhatIf, overlaid
from moelab.scheduling.events import HIT, LOAD, SUBSTITUTE
from moelab.scheduling.steps import Change
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Knobs
from moelab.scheduling.trace import Trace, unrecorded
from moelab.settings import Settings
from moelab.store.devices import device as find_device
from moelab.store.machine import Machine
from moelab.strategies import NEEDS_CALIBRATION, make

if TYPE_CHECKING:
    import pandas as pd

    from moelab.lab import Lab
    from moelab.runs.run import Run

Plan = Sequence[tuple[int, Settings]]


def replay(
    of: Run | Trace,
    strategy: Strategy | str | None = None,
    knobs: Knobs | None = None,
    *,
    strategies: Mapping[str, Strategy] | None = None,
    **changes: Any,
) -> Replay:
    """Decide a recorded stream again, without the model.

    Parameters
    ----------
    of
        A run, or a trace.
    strategy
        Other than the recorded one, a name (with its own defaults) or an object.
    knobs
        Budget and bits for the whole stream, instead of those recorded.
    strategies
        Name -> strategy, for a trace from a file, which knows its strategies by name only.
    changes
        As in ``lab.update``: ``budget="10%"``, ``bits=4``, ``evict="lfu"``.

    Raises
    ------
    ValueError
        A change is refused, or the trace records no settings and none are given.

    Examples
    --------
    >>> run = lab.generate("The", max_new_tokens=4)
    >>> moelab.replay(run, budget="100%").bytes <= moelab.replay(run).bytes
    True
    """
    if "device" in changes:
        raise ValueError("a replay knows no time: moelab.predict(run, lab, device=...) does")
    if not changes and not isinstance(strategy, str):
        return replays.replay(trace_of(of), strategy, knobs, strategies=strategies)
    changes |= {"strategy": strategy} if strategy is not None else {}
    changes |= dataclasses.asdict(knobs) if knobs is not None else {}
    trace, history = _recorded(of, changes, strategies or {})
    return decided(trace, history, overlaid(history, changes, trace.shape, _by_name))


def predict(of: Run | Trace, on: Lab | Machine, **changes: Any) -> Prediction:
    """Say what a recorded run would take under other settings, without making it.

    Parameters
    ----------
    of
        A run, or a trace.
    on
        The lab that it was recorded in, whose machine is timed once (about a second), or a
        `Machine`.
    changes
        As in ``lab.update``: ``strategy``, ``budget``, ``bits``, ``device`` ...

    Raises
    ------
    ValueError
        A change is refused, or not one token was decoded.
    RuntimeError
        The lab is at work.

    Examples
    --------
    >>> run = lab.generate("The", max_new_tokens=8)
    >>> slow, fast = (moelab.predict(run, lab, device=name) for name in ("sd_card", "nvme"))
    >>> slow.token_ms >= fast.token_ms
    True
    """
    return Predictor(of, on)(**changes)


class Predictor:
    """What is learnt of one run once, to predict many settings; see `predict`."""

    def __init__(self, of: Run | Trace, on: Lab | Machine) -> None:
        if not isinstance(on, Machine) and not hasattr(on, "_session"):
            raise TypeError(f"this is a {type(on).__name__}; give the lab, or a Machine")
        self._of, self._trace = of, trace_of(of)
        self._lab, machine = (None, on) if isinstance(on, Machine) else (on, on._session.machine())
        if not self._trace.decoded:
            raise ValueError("no token was decoded: there is nothing to predict")
        self._machine, self._error = fitted(of, machine), None
        if not isinstance(of, Trace):
            again = typical(decided(self._trace, of.history, of.history, self._machine).tokens)
            self._error = again.total_ms / typical(passes_of(of)).total_ms - 1

    def __call__(self, **changes: Any) -> Prediction:
        """Under these settings; raises what `predict` raises."""
        lab, machine = self._lab, self._machine
        trace, history = _recorded(self._of, changes, {})
        plan = overlaid(history, changes, trace.shape, lab._strategies if lab else _by_name)
        found = decided(trace, history, plan, machine)
        why = approximate(trace, plan[-1][1], found)
        if any(old.bits != new.bits for (_, old), (_, new) in zip(history, plan, strict=True)):
            why = why or "experts are computed at other bits"
        basis = trace, plan[-1][1], machine
        return Prediction(found, self._error, why, self._of, lab, changes, basis)


def fitted(run: Run | Trace, machine: Machine) -> Machine:
    """The machine as this run found it; a trace has no times, and leaves it as it was measured."""
    if isinstance(run, Trace):
        return machine
    passes_of(run)  # says what is missing
    machine = dataclasses.replace(machine, disk=disk_as_measured(run, machine.disk))
    found = decided(run.trace, run.history, run.history, machine).tokens
    return dataclasses.replace(machine, computing=as_measured(machine.computing, run, found))


def _by_name(name: str, _using: Strategy | None, role: str) -> Strategy:
    if name in NEEDS_CALIBRATION and role in ("", NEEDS_CALIBRATION[name]):
        raise ValueError(
            f"{name!r} needs what was measured of the model, which the lab has: "
            f"moelab.predict(run, lab, strategy={name!r}).replay"
        )
    return make(name)


def trace_of(of: Any) -> Trace:
    """The trace of a run, or a trace itself.

    Raises
    ------
    TypeError
        It is something else.
    """
    found = of if isinstance(of, Trace) else getattr(of, "trace", None)
    if not isinstance(found, Trace):
        raise TypeError(
            f"this is a {type(of).__name__}; give a run or a trace, as in run.trace (a recording "
            "from a file has none: run.trace.save keeps it)"
        )
    return found


def _recorded(
    of: Run | Trace, changes: Mapping[str, Any], strategies: Mapping[str, Strategy]
) -> tuple[Trace, Plan]:
    """A stream and the settings that it was recorded under; where it has none, what is given."""
    if not isinstance(of, Trace):
        return trace_of(of), of.history
    if not of.changes:
        if "strategy" not in changes or not {"budget", "memory", "budget_bytes"} & changes.keys():
            raise ValueError("this trace records no settings; give strategy= and budget=")
        most = max(of.shape.nbytes)
        begun_with = Settings(of.shape.all_bytes(most), most, make("lru"))
        first = Change(0, begun_with.knobs(), "lru", strategy=begun_with.strategy)
        return dataclasses.replace(of, changes=[first]), [(0, begun_with)]
    found: list[tuple[int, Settings]] = []
    for change in of.changes:
        strategy = change.strategy or strategies.get(change.name) or make(change.name)
        own = {n: v for n, v in (change.parameters or {}).items() if n in strategy.parameters}
        if change.strategy is None:
            strategy = strategy.tuned(**own) if own else strategy
            strategy = dataclasses.replace(strategy, pinned=change.pinned or {})
        found.append((change.at, Settings(change.knobs.budget_bytes, change.knobs.bits, strategy)))
    return of, found


def decided(trace: Trace, history: Plan, plan: Plan, machine: Machine | None = None) -> Replay:
    """A trace under a plan of settings, one for each of those that it was recorded under.

    It begins where the recorded run began, put under the first settings as `WhatIf` does it; a
    strategy that stays goes on with what it had learnt when it was recorded.
    """
    scheduler = begun(trace, history[0][1], plan[0][1])
    changes, buses, device = [], dict[int, Bus](), ""
    for recorded, (_, old), (_, new) in zip(trace.changes, history, plan, strict=True):
        stays = recorded.strategy is not None and new.strategy is old.strategy
        strategy = recorded.strategy if stays else new.strategy
        if not changes:
            strategy = scheduler.strategy
        assert strategy is not None
        changes.append(Change(recorded.at, new.knobs(), strategy.name, strategy=strategy))
        if machine and new.device != device:
            device = new.device
            buses[recorded.at] = machine.bus(find_device(device))
    of = dataclasses.replace(trace, changes=changes, resident=scheduler.cache.items())
    clock = Clock(trace.shape, machine.computing, buses) if machine else None
    return replays.replay(of, clock=clock)


def approximate(trace: Trace, settings: Settings, found: Replay) -> str:
    """Why these settings would have come with another stream than the recorded; empty: no reason.

    They compute at other bits, leave experts out, steer the router, go by routers that were not
    asked, or by what has landed, where the virtual clock decides instead of the disk.
    """
    if settings.strategy.observes & {"in_flight", "unread"}:
        return "its rule goes by what has landed, which the clock decides"
    if lacks := unrecorded(trace, settings.strategy):
        return f"its rule goes by what is not recorded: {', '.join(lacks)}"
    both = (False, True) if getattr(settings.strategy.prefetch, "in_prefill", False) else (False,)
    for prefill in both:
        steps = [s for s in trace.steps if s.prefill == prefill]
        depth = max((a.layer - s.layer for s in steps for a in s.look_ahead), default=0)
        if steps and settings.strategy.asks_ahead and settings.prefetch > depth:
            where = " in the prompt" if prefill else ""
            return f"no router was asked so far ahead{where}: {depth} layers are recorded"
    if settings.strategy.steers:
        return "the router is steered"
    if found.counts["skip"] or found.counts["substitute"]:
        return "experts are skipped or substituted, or served at fewer bits"
    served = {row[4] for row in found.rows if row[0] in (HIT, LOAD, SUBSTITUTE)} - {0}
    recorded = {change.knobs.bits for change in trace.changes}
    return "" if served <= recorded else "experts are computed at other bits"


def _found(run: Run) -> float:
    """Hits and late hits per request, of the decoded tokens."""
    decoded = run.token_reports[1:]
    asked = sum(getattr(report, name) for report in decoded for name in REQUESTS)
    return sum(report.hits + report.late for report in decoded) / asked


@dataclass(repr=False)
class Prediction:
    """What a run would have been under other settings: modelled, and what the model is worth.

    Attributes
    ----------
    replay
        What would have been decided: ``hit_ratio``, ``counts``, ``bytes``; ``tokens`` with times.
    error
        The same model's prediction of the recorded run over what that took, minus 1; None of a
        trace, which has no times.
    approximate
        Why the stream itself would have been another one; empty where decisions are exact.
    """

    replay: Replay
    error: float | None
    approximate: str
    _of: Run | Trace = field(repr=False)
    _lab: Lab | None = field(repr=False)
    _changes: dict[str, Any] = field(repr=False)
    _basis: tuple[Trace, Settings, Machine] = field(repr=False)

    @property
    def settings(self) -> Settings:
        """Those it is predicted under, at the end."""
        return self._basis[1]

    @property
    def token_ms(self) -> float:
        """Median of the decoded tokens, the engine's own time.

        Of a drafted run the mean over the tokens kept, with drafting, which is as measured.
        """
        times = [spent.total_ms for spent in self.replay.tokens]
        if self.draft_ms is None:
            return statistics.median(times)
        return sum(times) / self._basis[0].decoded + self.draft_ms

    @property
    def bytes_per_token(self) -> float:
        """Bytes read for each decoded token, of a drafted run for each that was kept."""
        return self.replay.bytes / self._basis[0].decoded

    @property
    def draft_ms(self) -> float | None:
        """What drafting took for each token kept, measured; None where nothing was drafted."""
        found = None if isinstance(self._of, Trace) else self._of.speculation
        return None if found is None else found.draft_ms

    @property
    def per_token(self) -> pd.DataFrame:
        """A row for each decoded token: ``compute_ms``, ``deciding_ms``, ``stall_ms``.

        Of a drafted run for each pass, which decodes several; drafting is in none.
        """
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(spent) for spent in self.replay.tokens])

    def bounds(self) -> dict[str, float]:
        """What bounds the speed and the hits of these settings on this stream, modelled.

        Returns
        -------
        dict
            In ms a token: ``io_ms``, the bytes that these decisions read over the bandwidth;
            ``hidden_ms``, with every wait hidden by perfect guesses, the larger of computing and
            ``io_ms``; ``belady_io_ms``, the bytes that the best eviction would read. As hit ratios:
            ``belady``, and ``belady_bypass`` where what is computed need not be kept. Belady's hold
            for one size of expert (the smallest of "mixed"), a cache that all layers share, and
            loads on demand; a strategy that serves at fewer bits, steers the router or fetches
            ahead is not bound by them.
        """
        trace, settings, machine = self._basis
        shape, spent = trace.shape, typical(self.replay.tokens)
        size = min(shape.own.get(settings.bits, (shape.nbytes[settings.bits],)))
        own = spent.compute_ms + spent.deciding_ms
        device = find_device(settings.device)
        pace = device.bandwidth_bytes_s or machine.disk.bandwidth_bytes_s or float("inf")
        tokens, room = trace.decoded, settings.budget_bytes // size
        best, asked = belady_hits(trace, room)
        io = 1e3 * self.replay.bytes / tokens / pace
        return {
            "io_ms": io,
            "hidden_ms": max(io, own * len(self.replay.tokens) / tokens + (self.draft_ms or 0.0)),
            "belady_io_ms": 1e3 * (asked - best) * size / tokens / pace,
            "belady": best / asked,
            "belady_bypass": belady_hits(trace, room, bypass=True)[0] / asked,
        }

    def check(self, repeats: int = 3) -> dict[str, Any]:
        """Make the predicted run, as ``lab.what_if`` does: predicted against measured.

        Returns
        -------
        dict
            ``predicted_ms`` and ``measured_ms`` a token (medians), ``error`` of the prediction,
            ``predicted_hits`` and ``measured_hits`` (ratios; late ones are hits here, as a replay
            has them), and ``shared``: the share of the
            recorded tokens that both texts have in common before they part.

        Raises
        ------
        ValueError
            This is the prediction of a trace; a run can be made again.
        """
        if isinstance(self._of, Trace) or self._lab is None:
            raise ValueError("only what was predicted of a run and its lab can be made")
        rounds = WhatIf(self._lab, self._of, self._changes, repeats)
        rounds.go()
        runs, was = rounds.contenders[0].runs, self._of.tokens
        ms = statistics.median(token_ms(run) for run in runs)
        same = [a == b for a, b in zip(was, runs[0].tokens, strict=False)]
        return {
            "predicted_ms": self.token_ms,
            "measured_ms": ms,
            "error": self.token_ms / ms - 1,
            "predicted_hits": self.replay.hit_ratio,
            "measured_hits": statistics.median(_found(run) for run in runs),
            "shared": ([*same, False].index(False)) / len(was),
        }

    def __repr__(self) -> str:
        parts = dataclasses.asdict(typical(self.replay.tokens))
        words = " + ".join(f"{ms:.1f} {name.removesuffix('_ms')}" for name, ms in parts.items())
        said = f"{self.token_ms:.1f} ms a token ({words}), hit ratio {self.replay.hit_ratio:.3f}"
        if self.error is not None:
            said += f"; of the recorded run this model is {self.error:+.0%} off"
        if self.approximate:
            said += f"; approximate: {self.approximate}"
        return f"<Prediction, modelled: {said}>"
