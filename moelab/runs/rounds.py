"""Runs made again, several times and in turn, so that what is noise shows as a range.

A run begins again from where it began: what was resident, what the strategy had learnt, the
settings from token to token, prompt, sampling and seed. All are made one after the other and then
again, each time beginning with another, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.trace import Trace
from moelab.settings import Settings, is_whole

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.runs.run import Run

REPEATS, MOST_REPEATS = 3, 100
History = Sequence[tuple[int, Settings]]
"""(token, settings): in force from that token on."""
TIMED = (
    *("tokens_per_s", "engine_tokens_per_s", "setup_ms", "ttft_ms", "tpot_ms_median"),
    *("tpot_ms_p99", "stall_share"),
)
"""Figures that hang on the device and on the moment."""
T = TypeVar("T")


def rotated(contenders: Sequence[T], repeats: int) -> Iterator[T]:
    """All of them ``repeats`` times, each time beginning elsewhere."""
    for repeat in range(repeats):
        start = repeat * len(contenders) // repeats
        yield from (*contenders[start:], *contenders[:start])


@dataclass(eq=False)
class Again:
    """A run to be made again: ``was`` says from where and with what, ``plan`` under which settings.

    ``runs`` are those made by now; where nothing is changed, the run itself is the first of them.
    """

    was: Run
    plan: History
    runs: list[Run] = field(default_factory=list)
    seed: int | None = None


def check(lab: Lab, run: Run, repeats: int) -> None:
    """Refuse what cannot be made again in this lab.

    Raises
    ------
    TypeError
        It is no run.
    ValueError
        ``repeats`` is out of range, or the run is of another model or made no token.
    RuntimeError
        The run is still going on.
    """
    if not isinstance(getattr(run, "trace", None), Trace):
        raise TypeError(
            f"this is a {type(run).__name__}; give a run of this session, which knows how it "
            "began: what lab.generate returned, or lab.saved.run(name)"
        )
    if not is_whole(repeats, 1, MOST_REPEATS):
        raise ValueError(f"repeats={repeats!r}: a whole number from 1 to {MOST_REPEATS}")
    if run.running:
        raise RuntimeError("this run is still going on; run.stop() it or run.join() first")
    if run.model != lab.name:
        raise ValueError(f"this run is of {run.model!r}; the lab has {lab.name!r} open")
    if not run.tokens:
        raise ValueError("this run made no token; there is nothing to begin from")


class Rounds:
    """Makes runs again: `go` in any thread; `stop` ends the one at work and begins no other.

    Parameters
    ----------
    lab
        Whose store is used, and which stays claimed meanwhile, so that nothing disturbs the times.
    contenders
        What is to be made; each may be `check`ed first.
    repeats
        How often each is to be there in the end.

    Attributes
    ----------
    run
        The run at work, once the first has begun.
    total
        Tokens of all that is made, at most.
    """

    def __init__(self, lab: Lab, contenders: Sequence[Again], repeats: int) -> None:
        self.lab, self.contenders, self.repeats = lab, contenders, repeats
        self.run: Run | None = None
        missing = [(repeats - len(one.runs)) * len(one.was.tokens) for one in contenders]
        self.total = sum(missing)
        self._stopped = False

    @property
    def done(self) -> int:
        """Tokens of `total` by now."""
        made = (run for one in self.contenders for run in one.runs if run is not one.was)
        return sum(len(run.tokens) for run in made)

    def stop(self) -> None:
        """End after the token it is at; returns at once."""
        self._stopped = True
        if self.run is not None:
            self.run.stop()

    def go(self) -> Run:
        """Make them and wait; Ctrl-C stops it. Returns the first run of the first contender.

        Then ``run.repeats`` of each contender's first run has the times of all its whole ones.
        """
        first = self.contenders[0].plan[0][1]
        with self.lab._session.claimed(), self.lab._beside(first) as second:
            for one in rotated(self.contenders, self.repeats):
                if len(one.runs) < self.repeats and not (self._stopped and self.run):
                    self._make(one, second)
        for one in self.contenders:
            whole = [run for run in one.runs if run is one.was or run.ended != "stopped"]
            if one.runs:
                one.runs[0].repeats = [timed(run.summary()) for run in whole]
        return self.contenders[0].runs[0]

    def _make(self, one: Again, second: Lab) -> None:
        asked, settings = one.was.request, one.plan[0][1]
        seed = {} if one.seed is None else {"seed": one.seed}
        second._session.stand(settings, begun(one.was.trace, one.was.history[0][1], settings))
        self.run = run = second.start(
            asked.messages or asked.prompt,
            max_new_tokens=len(one.was.tokens),
            **dataclasses.asdict(asked.sampling) | seed,
            ignore_eos=asked.ignore_eos,
            chat=bool(asked.messages),
            draft_bits=asked.draft_bits,
            draft_length=dict(one.was.draft_lengths),
            changes=dict(one.plan[1:]),
        )
        one.runs.append(run)
        if self._stopped:
            run.stop()
        run.join()


def timed(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a summary that differ from one time to the next."""
    return {name: summary[name] for name in TIMED}


def begun(trace: Trace, first: Settings, settings: Settings) -> Scheduler:
    """The scheduler of a run as it was when the run began, put under ``settings``.

    ``first`` are those that it began with; a trace from a file has what had been learnt no more.
    """
    begin = trace.changes[0]
    scheduler = Scheduler(trace.shape, begin.strategy or first.strategy, begin.knobs)
    scheduler.warm(trace.resident)
    if settings is not first:
        other = settings.strategy if settings.strategy is not first.strategy else None
        scheduler.change(settings.knobs(), other)
    return scheduler
