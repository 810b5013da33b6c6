"""Which strategies a recorded stream can stand for: by a rule, so that a new one is tried as well.

Left in are those that leave the router's choice as it is, neither steering it nor sending
stand-ins; whose inputs are recorded (FineMoE's are in runs that were made with it); that need no
profile which is not there; and that fit the budget at some tier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moelab.scheduling.parts import Route
from moelab.scheduling.trace import unrecorded
from moelab.spelling import in_words
from moelab.strategies import NAMES

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.runs.run import Run
    from moelab.scheduling.strategy import Strategy


def eligible(lab: Lab, run: Run, fixed: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Their names, in the order of `moelab.strategies.GROUPS`, and why each other is left out.

    Parameters
    ----------
    lab, run
        Whose settings hold, and the stream.
    fixed
        Settings that are to hold as well, of which bits are none.

    Raises
    ------
    ValueError
        Not one is left.
    """
    found: list[str] = []
    left_out: dict[str, str] = {}
    for name in NAMES:
        try:
            of = _fitting(lab, {**fixed, "strategy": name})
        except ValueError as error:  # it lacks a profile, or the budget is too little
            left_out[name] = in_words(error)
            continue
        if of.steers:
            left_out[name] = "it steers the router"
        elif type(of.route).stand_in is not Route.stand_in:
            left_out[name] = "it sends other experts in place of missing ones"
        elif lacks := unrecorded(run.trace, of):
            left_out[name] = f"it goes by what is not recorded: {', '.join(lacks)}"
        else:
            found.append(name)
    if not found:
        raise ValueError(left_out["lru"])
    return found, left_out


def _fitting(lab: Lab, changes: Mapping[str, Any]) -> Strategy:
    """The strategy as these settings have it, at the first tier of the fewest bytes that fits."""
    sizes, refused = lab._shape.nbytes, None
    for bits in sorted(sizes, key=sizes.__getitem__):
        try:
            asked = {**changes, "bits": bits}
            return lab.settings.change(lab._shape, make=lab._strategies, **asked).strategy
        except ValueError as error:
            refused = refused or error
    raise refused or ValueError("there is no tier to choose from")


def aheads(strategy: Strategy, most: int) -> range:
    """The layers ahead that make a difference to it, up to ``most``."""
    return range(most + 1 if strategy.asks_ahead else 1)
