"""Memory for resident experts: slots end to end on huge pages, given back in time.

Experts have few sizes, one of each tier and some more of the tier "mixed", and a free slot goes to
the next expert of its size. Where one of another size needs the room, the memory of free slots is
returned to the system: what fragmentation takes is address space. A slot that is free but still
mapped counts against the limit: what the arena holds is what the process really has, but for the
last huge page of each piece of address space (2 MB at most), and while a forked child lives, which
keeps a copy of what is written over. What it does not know: which expert is in a slot. The engine
gives a slot back once, after its load is done or withdrawn and its last computation has ended; one
thread at a time calls the arena.

A direct read names every piece of memory that is not contiguous, and a request to a disk holds a
limited number (254 here). On pages of 4 KB the disk of a virtual machine (virtio) gave 0.5 to 0.8
GB/s at any size of a load, on huge pages 1.6 at 0.2 MB, 2.4 at 1 MB and 2.8 at 26 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import defaultdict

import numpy as np

from moelab.store.codecs import PAGE

HUGE = 1 << 21
"""Bytes of a huge page."""
SLAB, SLOTS = 1 << 26, 8
"""Address space taken at a time: so many bytes, or so many slots where those are more."""
_HUGE, _SMALL, _EMPTY = (
    getattr(mmap, f"MADV_{name}", 0) for name in ("HUGEPAGE", "NOHUGEPAGE", "DONTNEED")
)
END_TO_END = bool(_HUGE and _SMALL and _EMPTY) and mmap.PAGESIZE == PAGE
"""Whether slots share address space: on Linux, where a slot is whole pages. Elsewhere each has its
own, whose memory goes with it."""


def pages(nbytes: int, *, huge: bool = True) -> np.ndarray:
    """Page-aligned memory uint8 ``[nbytes]``, on huge pages where the system has them.

    It is returned to the system with its last view. Of a huge page all 2 MB are taken: ``huge`` is
    for loads, not for many small pieces that nothing is read into directly.
    """
    return _space(nbytes, huge=huge)[1][:nbytes]


def _space(nbytes: int, *, huge: bool = True) -> tuple[mmap.mmap, np.ndarray]:
    """Address space, and as uint8 what lies in it from a huge page's border on."""
    if not (huge and END_TO_END):
        space = mmap.mmap(-1, nbytes)
        return space, np.frombuffer(space, np.uint8)
    space = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        space.madvise(_HUGE)
    whole = np.frombuffer(space, np.uint8)
    return space, whole[-whole.ctypes.data % HUGE :]


def give_back() -> None:
    """Let the C library return what it holds freed: after an opening some hundred MB, a run ten."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class Slot:
    """One expert's bytes: ``view`` uint8 ``[nbytes]`` at address ``addr``."""

    __slots__ = ("addr", "bits", "nbytes", "space", "view")

    def __init__(self, bits: int, view: np.ndarray, space: mmap.mmap | None = None) -> None:
        self.bits, self.view, self.nbytes, self.space = bits, view, len(view), space
        self.addr = view.ctypes.data

    def advise(self, *advice: int) -> None:
        """Tell the system about its pages; an error only where it does not take them back."""
        assert self.space is not None
        first = self.addr - np.frombuffer(self.space, np.uint8).ctypes.data
        for one in advice:
            hints = () if one == _EMPTY else (OSError,)
            with contextlib.suppress(*hints):
                self.space.madvise(one, first, self.nbytes)


class Arena:
    """Hands out slots and never holds more than ``limit_bytes``, free slots included.

    Parameters
    ----------
    nbytes
        Slot size of each tier, where `take` is not told another.
    limit_bytes
        The budget.
    """

    def __init__(self, nbytes: dict[int, int], limit_bytes: int) -> None:
        self._nbytes = nbytes
        self._free: dict[int, list[Slot]] = defaultdict(list)
        self._bare: dict[int, list[Slot]] = defaultdict(list)  # address space without memory
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.peak_bytes = 0

    def take(self, bits: int, nbytes: int = 0) -> Slot:
        """A slot for one expert at ``bits``, or of these bytes; its content is undefined.

        Raises
        ------
        AssertionError
            It would break the budget: a fault in the caller, who must give slots back first.
        """
        nbytes = nbytes or self._nbytes[bits]
        if self._free[nbytes]:  # mapped, and counted, already
            slot = self._free[nbytes].pop()
            slot.bits = bits
            return slot
        # Free slots of other sizes make way first: after a change of bits they would stay for good.
        self._unmap(self.limit_bytes - nbytes)
        if self.held_bytes + nbytes > self.limit_bytes:
            raise AssertionError(
                f"{nbytes} more bytes would exceed the budget of {self.limit_bytes} "
                f"({self.held_bytes} held)"
            )
        self.held_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return self._map(bits, nbytes)

    def give(self, slot: Slot) -> None:
        """Take a slot back into its size's free list; it stays mapped, its next load is sooner."""
        self._free[slot.nbytes].append(slot)

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
                slot = free.pop()
                self.held_bytes -= slot.nbytes
                if END_TO_END:  # no huge page may grow back over what has been given away
                    slot.advise(_EMPTY, _SMALL)
                    self._bare[slot.nbytes].append(slot)

    def _map(self, bits: int, nbytes: int) -> Slot:
        """A slot out of address space that has no memory yet: it comes with the first touch."""
        bare = self._bare[nbytes]
        if not bare:
            count = min(max(SLOTS, SLAB // nbytes), self.limit_bytes // nbytes)
            count = max(1, count) if END_TO_END else 1
            space, room = _space(count * nbytes)
            slots = (Slot(bits, room[at * nbytes :][:nbytes], space) for at in range(count))
            bare += reversed([*slots])  # the first of them first
            return bare.pop()
        slot = bare.pop()
        slot.bits = bits
        slot.advise(_HUGE)
        return slot
