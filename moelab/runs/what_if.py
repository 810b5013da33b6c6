"""What if: a run made once more, from where it began, under other settings.

A run leaves behind all that its decisions hung on: what was resident and learnt when it began, the
settings from token to token, prompt, sampling and seed. A second lab on the same store goes the
same way with a few settings changed, so that what differs is due to those. What it cannot know is
what a clock decided: a strategy that goes by what has landed may decide otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moelab.runs.compare import Comparison
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import ROLES, Strategy
from moelab.settings import Settings

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.runs.run import Run

AS_IT_WAS = "as it was"
_SETTINGS = {"budget", "pin", "keep", *Settings.__dataclass_fields__, *ROLES}


class WhatIf:
    """One counterfactual: `go` makes the second run, from any thread; `stop` ends it.

    Parameters
    ----------
    lab
        Whose store is used, and which stays claimed meanwhile, so that nothing disturbs the times.
    was
        A run of it that has ended.
    changes
        As in ``lab.update``.

    Attributes
    ----------
    run
        The second run once it has begun.
    name
        The changes in words.

    Raises
    ------
    ValueError
        A change is refused, or the run is of another model or made no token.
    RuntimeError
        The run is still going on.
    """

    def __init__(self, lab: Lab, was: Run, changes: Mapping[str, Any]) -> None:
        if was.running:
            raise RuntimeError("this run is still going on; run.stop() it or run.join() first")
        if was.model != lab.name:
            raise ValueError(f"this run is of {was.model!r}; the lab has {lab.name!r} open")
        if not was.tokens:
            raise ValueError("this run made no token; there is nothing to begin from")
        self.lab, self.was, self.run = lab, was, None
        self.changes = dict(changes)
        self.name = ", ".join(f"{k}={_word(v)}" for k, v in changes.items()) or "once more"
        self._plan = overlaid(was.history, changes, lab)
        self._stopped = False

    @property
    def settings(self) -> Settings:
        """What the second run ends with: the run's last settings with the changes on top."""
        return self._plan[-1][1]

    def stop(self) -> None:
        """End the second run after the token it is at; returns at once."""
        self._stopped = True
        if self.run is not None:
            self.run.stop()

    def compare(self) -> Comparison:
        """Make the second run and put it beside the first."""
        again = self.go()
        return Comparison({AS_IT_WAS: self.was.recording(), self.name: again.recording()})

    def go(self) -> Run:
        """Make the second run and wait for it; Ctrl-C stops it."""
        lab, asked = self.lab, self.was.request
        sampling = asked.sampling
        with lab._session.claimed(), self._second() as second:
            self.run = run = second.start(
                asked.messages or asked.prompt,
                max_new_tokens=len(self.was.tokens),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=self.changes.get("seed", sampling.seed),
                ignore_eos=asked.ignore_eos,
                chat=bool(asked.messages),
                changes=dict(self._plan[1:]),
            )
            if self._stopped:
                run.stop()
            return run.join()

    def _second(self) -> Lab:
        """A lab that stands where the first stood when the run began, as far as it fits."""
        settings = self._plan[0][1]
        second = self.lab._beside(settings)
        try:
            second._engine.begin_with(begun(self.was, settings))
        except BaseException:
            second.close()
            raise
        return second


def overlaid(
    history: list[tuple[int, Settings]], changes: Mapping[str, Any], lab: Lab
) -> list[tuple[int, Settings]]:
    """The settings from token to token with ``changes`` on top of each.

    A parameter applies wherever the strategy of the time has it.

    Raises
    ------
    ValueError
        A change is refused from some token on, or no strategy of the run has that parameter.
    """
    made: dict[tuple[str, str], Strategy] = {}

    def make(name: str, using: Strategy | None, role: str) -> Strategy:
        if (name, role) not in made:  # once: it goes on with what it learns
            made[name, role] = lab._strategies(name, using, role)
        return made[name, role]

    fixed = {k: v for k, v in changes.items() if k in _SETTINGS}
    tuned = {k: v for k, v in changes.items() if k not in _SETTINGS}
    plan: list[tuple[int, Settings]] = []
    heard: set[str] = set()
    for token, settings in history:
        try:
            now = settings.change(lab._shape, make=make, **fixed)
            own = {k: v for k, v in tuned.items() if k in now.strategy.parameters}
            now = settings.change(lab._shape, make=make, **fixed, **own)
        except ValueError as error:
            if not token:
                raise
            raise type(error)(f"from token {token} on: {error}") from error
        heard |= own.keys()
        plan.append((token, now if fixed or own else settings))
    if tuned.keys() - heard:
        plan[0][1].change(lab._shape, make=make, **tuned)  # says what there is
    return plan


def since(run: Run, settings: Settings) -> dict[str, Any]:
    """What ``settings`` change of those that the run ended with, as keywords of ``lab.what_if``."""
    old = run.history[-1][1]
    mine, theirs = settings.strategy, old.strategy
    names = [f for f in Settings.__dataclass_fields__ if f != "strategy"]
    changes = {n: v for n in names if (v := getattr(settings, n)) != getattr(old, n)}
    if mine.name != theirs.name or kinds(mine) != kinds(theirs):
        changes |= {"strategy": mine, "bits": settings.bits}  # a strategy may bring its own
    else:
        had = theirs.parameters
        changes |= {n: v for n, (_, _, v) in mine.parameters.items() if v != had[n][2]}
    if mine.pinned != theirs.pinned:
        changes["pin"] = dict(mine.pinned)
    return changes


def kinds(strategy: Strategy) -> list[type]:
    """The classes of a strategy's five parts."""
    return [type(part) for part in strategy.parts.values()]


def begun(run: Run, settings: Settings) -> Scheduler:
    """The scheduler of a run as it was when the run began, put under ``settings``."""
    first, trace = run.history[0][1], run.trace
    begin = trace.changes[0]
    assert begin.strategy is not None
    scheduler = Scheduler(trace.shape, begin.strategy, begin.knobs)
    scheduler.warm(trace.resident)
    if settings is not first:
        other = settings.strategy if settings.strategy is not first.strategy else None
        scheduler.change(settings.knobs(), other)
    return scheduler


def _word(value: Any) -> str:
    if isinstance(value, Strategy):
        return value.name
    plain = isinstance(value, (str, int, float, dict)) or value is None
    return str(value) if plain else type(value).__name__
