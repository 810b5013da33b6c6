"""What if: a run made once more, from where it began, under other settings.

A run leaves behind all that its decisions hung on: what was resident and learnt when it began, the
settings from token to token, prompt, sampling and seed. A second lab on the same store goes the
same way with a few settings changed, so that what differs is due to those. What it cannot know is
what a clock decided: a strategy that goes by what has landed may decide otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moelab.runs.compare import Comparison
from moelab.runs.rounds import REPEATS, Again, Rounds, check
from moelab.scheduling.strategy import ROLES, Strategy
from moelab.scheduling.stream import Shape
from moelab.settings import MakeStrategy, Settings

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.runs.run import Run

AS_IT_WAS = "as it was"
_SETTINGS = {"budget", "pin", "keep", *Settings.__dataclass_fields__, *ROLES}


class WhatIf(Rounds):
    """One counterfactual: `go` makes the second run, from any thread; `stop` ends it.

    Parameters
    ----------
    lab
        Whose store is used, see `Rounds`.
    was
        A run of it that has ended.
    changes
        As in ``lab.update``.
    repeats
        How often each of the two is made; ``was`` itself is the first of its own.

    Attributes
    ----------
    name
        The changes in words.

    Raises
    ------
    ValueError
        A change is refused, or the run is of another model or made no token.
    RuntimeError
        The run is still going on.
    """

    def __init__(
        self, lab: Lab, was: Run, changes: Mapping[str, Any], repeats: int = REPEATS
    ) -> None:
        check(lab, was, repeats)
        self.was, plan = was, overlaid(was.history, changes, lab._shape, lab._strategies)
        self.settings = plan[-1][1]  # what the second run ends with
        self.name = ", ".join(f"{k}={_word(v)}" for k, v in changes.items()) or "once more"
        then = Again(was, plan, seed=changes.get("seed"))
        super().__init__(lab, (then, Again(was, was.history, [was])), repeats)

    def compare(self) -> Comparison:
        """Make the second run and put it beside the first."""
        again = self.go()
        return Comparison({AS_IT_WAS: self.was.recording(), self.name: again.recording()})


def overlaid(
    history: Sequence[tuple[int, Settings]],
    changes: Mapping[str, Any],
    shape: Shape,
    strategies: MakeStrategy,
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
            made[name, role] = strategies(name, using, role)
        return made[name, role]

    fixed = {k: v for k, v in changes.items() if k in _SETTINGS}
    tuned = {k: v for k, v in changes.items() if k not in _SETTINGS}
    plan: list[tuple[int, Settings]] = []
    heard: set[str] = set()
    for token, settings in history:
        try:
            now = settings.change(shape, make=make, **fixed)
            own = {k: v for k, v in tuned.items() if k in now.strategy.parameters}
            now = settings.change(shape, make=make, **fixed, **own)
        except ValueError as error:
            if not token:
                raise
            raise type(error)(f"from token {token} on: {error}") from error
        heard |= own.keys()
        plan.append((token, now if fixed or own else settings))
    if tuned.keys() - heard:
        plan[0][1].change(shape, make=make, **tuned)  # says what there is
    return plan


def repeated(lab: Lab, names: Sequence[str], repeats: int) -> Comparison:
    """Saved runs made again, see `moelab.Lab.repeat`."""
    runs = {name: lab.saved.run(name) for name in names}
    loaded = [name for name, run in runs.items() if run is None]
    if loaded or not runs:
        which = f"{loaded[0]!r} came from a file" if loaded else "no run is saved yet"
        raise ValueError(f"{which}: only runs made in this session can be made again")
    made = [run for run in runs.values() if run is not None]
    for run in made:
        check(lab, run, repeats)
    Rounds(lab, [Again(run, run.history, [run]) for run in made], repeats).go()
    return Comparison({lab.saved.add(run): run.recording() for run in made})


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


def _word(value: Any) -> str:
    if isinstance(value, Strategy):
        return value.name
    plain = isinstance(value, (str, int, float, dict)) or value is None
    return str(value) if plain else type(value).__name__
