"""Memory for resident experts: page-aligned slots, one free list per tier, given back in time.

All experts of a tier have one size, so there is no fragmentation. A slot that is free but still
mapped counts against the limit too: what the arena holds is what the process really has. What it
does not know: which expert is in a slot. The engine gives a slot back once, after its load is done
or withdrawn and its last computation has ended; one thread at a time calls the arena.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import defaultdict

import numpy as np


def pages(nbytes: int) -> np.ndarray:
    """Page-aligned memory uint8 ``[nbytes]``; returned to the system with its last view."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def give_back() -> None:
    """Let the C library return what it holds freed: after an opening some hundred MB, a run ten."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class Slot:
    """One expert's bytes: ``view`` uint8 ``[nbytes]`` at address ``addr``."""

    __slots__ = ("addr", "bits", "nbytes", "view")

    def __init__(self, bits: int, view: np.ndarray) -> None:
        self.bits, self.view, self.nbytes = bits, view, len(view)
        self.addr = view.ctypes.data


class Arena:
    """Hands out slots and never holds more than ``limit_bytes``, free slots included.

    Parameters
    ----------
    nbytes
        Slot size of each tier.
    limit_bytes
        The budget.
    """

    def __init__(self, nbytes: dict[int, int], limit_bytes: int) -> None:
        self._nbytes = nbytes
        self._free: dict[int, list[Slot]] = defaultdict(list)
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.peak_bytes = 0

    def take(self, bits: int) -> Slot:
        """A slot for one expert at ``bits``; its content is undefined.

        Raises
        ------
        AssertionError
            It would break the budget: a fault in the caller, who must give slots back first.
        """
        if self._free[bits]:  # mapped, and counted, already
            return self._free[bits].pop()
        nbytes = self._nbytes[bits]
        # Free slots of other tiers make way first: after a change of bits they would stay for good.
        self._unmap(self.limit_bytes - nbytes)
        if self.held_bytes + nbytes > self.limit_bytes:
            raise AssertionError(
                f"{nbytes} more bytes would exceed the budget of {self.limit_bytes} "
                f"({self.held_bytes} held)"
            )
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return Slot(bits, pages(nbytes))

    def give(self, slot: Slot) -> None:
        """Take a slot back into its tier's free list; it stays mapped, its next load is sooner."""
        self._free[slot.bits].append(slot)

    def set_limit(self, limit_bytes: int) -> None:
        """A new budget; free slots above it return to the system first: never above, even then."""
        self._unmap(limit_bytes)
        self.limit_bytes = limit_bytes

    def trim(self) -> None:
        """Return every free slot to the system."""
        self._unmap(0)

    def _unmap(self, down_to: int) -> None:
        for free in self._free.values():
            while free and self.held_bytes > down_to:
                self.held_bytes -= free.pop().nbytes
