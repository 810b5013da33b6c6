"""A budget that follows the machine: ``lab.update(budget="auto")``.

A thread looks at the free memory four times a second and changes the budget as a person would:
what can no longer be spared is given back whole, before the token after that look; what can is
taken little by little. Every change is in ``run.changes`` with its cause. What it does not know:
how much a larger budget would help.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

from moelab.engine.spare import Machine
from moelab.scheduling.budget import minimum_budget
from moelab.spelling import size

LOOK_S = 0.25
STEPS = 16
"""A budget grows by one part of so many at a time, four times a second."""

RESERVE = 0.05
"""Share of the machine's memory that is left to others."""

PRESSURE = 0.01
"""Share of time that waits for memory from which an eighth of the budget is given back."""


def wanted(
    budget: int,
    held: int,
    *,
    spare: int,
    pressure: float,
    reserve: int,
    most: int,
    least: int,
) -> int:
    """The next budget in bytes, for memory as it is now.

    Parameters
    ----------
    budget, held
        The budget now, and the bytes that resident experts hold of it.
    spare, pressure, reserve
        What can be taken without swapping, the share of time that waits for memory (`Machine`),
        and what is to be left free.
    most, least
        Bytes of all experts, and the least budget that works.

    Examples
    --------
    >>> wanted(400, 400, spare=300, pressure=0, reserve=50, most=1000, least=100)
    425
    >>> wanted(400, 400, spare=10, pressure=0, reserve=50, most=1000, least=100)
    360
    >>> wanted(400, 100, spare=300, pressure=0.2, reserve=50, most=1000, least=100)
    350
    """
    room = held + spare - reserve
    if pressure > PRESSURE:
        room = min(room, budget - budget // 8)
    return min(most, max(least, min(room, budget + budget // STEPS)))


class Auto:
    """Changes a session's budget for as long as the session is open and has it as its ``auto``."""

    def __init__(self, session: Any, *, machine: Machine | None = None) -> None:
        self._session, self._machine = weakref.ref(session), machine or Machine()
        session.auto = self  # before the thread looks whether it still is
        threading.Thread(target=self._follow, name="moelab-budget", daemon=True).start()

    def _follow(self) -> None:
        while True:
            time.sleep(LOOK_S)
            session = self._session()
            if session is None or session.closed or session.auto is not self:
                return
            try:
                self._look(session)
            except Exception:  # a policy of somebody's own failed: nothing follows any more
                session.auto = None
                raise
            del session

    def _look(self, session: Any) -> None:
        settings, shape = session.settings, session.engine.shape
        spare, pressure = self._machine.spare_bytes(), self._machine.pressure()
        budget = settings.budget_bytes
        asked = wanted(
            budget,
            session.engine.arena.held_bytes,
            spare=spare,
            pressure=pressure,
            reserve=int(RESERVE * self._machine.total_bytes()),
            most=shape.all_bytes(max(shape.nbytes)),
            least=minimum_budget(shape, settings.strategy, settings.knobs()),
        )
        if abs(asked - budget) > budget // 50:
            waits = f", {pressure:.0%} of the time something waits for it" * (pressure > PRESSURE)
            session.follow(self, asked, f"auto: {size(spare)} of memory to spare{waits}")
