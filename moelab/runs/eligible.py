"""Which strategies a recorded stream can stand for: by a rule, so that a new one is tried as well.

Left in are those that leave the router's choice as it is, neither steering it nor sending
stand-ins; whose inputs are recorded (FineMoE's are in runs that were made with it); that need no
profile which is not there; and whose predictions do not take much longer than those of LRU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moelab.scheduling.parts import Route
from moelab.scheduling.trace import unrecorded
from moelab.strategies import NAMES

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.runs.run import Run
    from moelab.scheduling.strategy import Strategy

AS_LRU = 4
"""As many times as long as those of LRU, predictions of a strategy are too long."""


def eligible(
    lab: Lab, run: Run, predict: Callable[..., object], fixed: Mapping[str, Any], *, ahead: int
) -> list[str]:
    """Their names, in the order of `moelab.strategies.GROUPS`.

    Parameters
    ----------
    lab, run
        Whose settings hold, and the stream.
    predict
        A `Predictor` of that run.
    fixed
        Settings that are to hold as well.
    ahead
        Layers that are looked ahead at most: so many settings of a strategy are to be predicted.
    """

    def seconds(name: str) -> float:
        begun = time.perf_counter()
        predict(**fixed, strategy=name)
        return time.perf_counter() - begun

    seconds("lru")  # the first ranks the stream's requests for all that follow
    longest = AS_LRU * (ahead + 1) * seconds("lru")
    found: list[str] = []
    for name in NAMES:
        with contextlib.suppress(ValueError):  # it lacks a profile, or the budget is too little
            asked = lab.settings.change(lab._shape, make=lab._strategies, **fixed, strategy=name)
            of = asked.strategy
            alters = of.steers or type(of.route).stand_in is not Route.stand_in
            if alters or unrecorded(run.trace, of):
                continue
            if name == "lru" or seconds(name) * len(aheads(of, ahead)) < longest:
                found.append(name)
    return found


def aheads(strategy: Strategy, most: int) -> range:
    """The layers ahead that make a difference to it, up to ``most``."""
    return range(most + 1 if strategy.asks_ahead else 1)
