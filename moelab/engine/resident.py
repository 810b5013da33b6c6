"""What the engine notes of an expert: its memory and its load, when and how often it was used."""

from __future__ import annotations

import numpy as np

from moelab.engine.loader import Ticket
from moelab.engine.memory import Slot
from moelab.scheduling.stream import Shape


class Resident:
    """One expert in memory or on its way: its slot and its load's ticket."""

    __slots__ = ("slot", "ticket", "token")

    def __init__(self, slot: Slot, ticket: Ticket, token: int) -> None:
        self.slot, self.ticket, self.token = slot, ticket, token


class Usage:
    """When and how often each expert was loaded and used in this run; arrays ``[L, E]``."""

    def __init__(self, shape: Shape) -> None:
        size = (shape.layers, max(shape.experts))
        self.loaded = np.full(size, -1, np.int32)
        self.used = np.full(size, -1, np.int32)
        self.uses = np.zeros(size, np.int32)
