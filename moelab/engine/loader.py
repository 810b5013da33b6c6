"""Background loads: O_DIRECT reads by a few threads, on demand before prefetch.

One load reads one expert's blob from the store straight into its slot; no conversion, no copy.
Where O_DIRECT is not to be had (another system, tmpfs) the same `preadv` goes through the page
cache. What it does not know: experts, tiers and the budget; it fills the memory it is given.

A ticket is queued, then active, then done; only a queued one can be cancelled. From `submit` until
it is done its slot belongs to the loader: a slot given away earlier would be written over.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from moelab.engine.process import Process
from moelab.store.blobs import BlobFile
from moelab.store.devices import Device, Throttle, device, sleep_until

NOTHING = np.empty(0, np.uint8)


class LoadError(OSError):
    """An expert could not be read."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One load: where from, where to, and when it happened (seconds of `time.perf_counter`)."""

    file: BlobFile
    offset: int
    into: np.ndarray
    urgent: bool
    started: float = 0.0
    finished: float = 0.0
    done: bool = False
    cancelled: bool = False
    error: Exception | None = None

    def end(self, *, cancelled: bool = False) -> None:
        """Done, or never to be read; let go of the memory, because the event log keeps tickets."""
        self.cancelled = cancelled
        # `done` last: it is read without the lock, and says that all else holds.
        self.into, self.done = NOTHING, True


class Loader:
    """Reads blobs in the background.

    Parameters
    ----------
    readers
        Loads at once, a thread each.
    profile
        Name of the device, see `moelab.store.devices`.
    """

    def __init__(self, readers: int, profile: str = "disk") -> None:
        # Guards everything below; notified whenever a load is queued, done, or the device changes.
        self._cond = threading.Condition()
        self._queues: tuple[deque[Ticket], deque[Ticket]] = (deque(), deque())  # urgent, prefetch
        self._files: set[BlobFile] = set()  # read so far
        self._throttle = Throttle()
        self._profile: Device = device(profile)
        self._active = 0  # loads begun and not done: never more than the device's queue
        self._closed = False
        self._process = Process("this loader works")
        self._threads = [
            threading.Thread(target=self._work, name=f"moelab-load-{i}", daemon=True)
            for i in range(readers)
        ]
        for t in self._threads:
            t.start()

    @property
    def readers(self) -> int:
        """Loads at once."""
        return len(self._threads)

    @property
    def profile(self) -> Device:
        """The device in force."""
        return self._profile

    @property
    def outpaced(self) -> bool:
        """Whether this disk is too slow for the emulated device, by the last loads."""
        return self._throttle.outpaced

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache; without that, times are not the disk's."""
        return all(file.direct for file in list(self._files))

    def use(self, profile: str | Device) -> None:
        """Loads begun from now on come from another device."""
        with self._cond:
            self._profile = device(profile) if isinstance(profile, str) else profile
            self._throttle.reset()
            self._cond.notify_all()

    def submit(self, file: BlobFile, offset: int, into: np.ndarray, *, urgent: bool) -> Ticket:
        """Queue a read of ``len(into)`` bytes; ``into`` must stay alive until it is done."""
        ticket = Ticket(file, offset, into, urgent)
        with self._cond:
            if self._closed:
                raise LoadError(errno.ESHUTDOWN, "the loader is closed; open the lab again")
            self._queues[0 if urgent else 1].append(ticket)
            self._cond.notify_all()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Return when ``ticket`` is done; a prefetch not yet begun becomes urgent.

        Raises
        ------
        LoadError
            The read failed; the message names the file.
        """
        if not ticket.done:
            with self._cond:
                if not ticket.urgent and ticket in self._queues[1]:  # else it has begun
                    self._queues[1].remove(ticket)
                    self._queues[0].append(ticket)
                    ticket.urgent = True
                while not ticket.done:
                    self._cond.wait()
        if ticket.error is not None:
            raise LoadError(
                errno.EIO, f"cannot read {ticket.file.path.name} at {ticket.offset}: {ticket.error}"
            ) from ticket.error

    def cancel(self, ticket: Ticket) -> bool:
        """Withdraw a load that has not begun; False where it has, and then its slot is not free."""
        with self._cond:
            for queue in self._queues:
                if ticket in queue:
                    queue.remove(ticket)
                    ticket.end(cancelled=True)
                    return True
        return False

    def close(self) -> None:
        """Finish what was begun, withdraw the rest, stop the threads."""
        if not self._process.here:  # at the end of a fork: threads and locks are the parent's
            return
        with self._cond:
            self._closed = True
            for queue in self._queues:
                for ticket in queue:
                    ticket.end(cancelled=True)
                queue.clear()
            self._cond.notify_all()
        for t in self._threads:
            t.join()
        self._files.clear()

    # -- the threads ------------------------------------------------------------------------

    def _next(self) -> Ticket | None:
        with self._cond:
            while True:
                ready = self._queues[0] or self._queues[1]  # on demand before prefetch
                if ready and self._active < self._profile.queue:
                    self._active += 1
                    return ready.popleft()
                if self._closed and not ready:
                    return None
                self._cond.wait()

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            ticket.started = time.perf_counter()
            profile = self._profile
            due = self._throttle.due(profile, len(ticket.into), ticket.started)
            try:
                self._files.add(ticket.file)
                ticket.file.read_into(ticket.into, ticket.offset, direct=True)
                if profile.emulated:
                    self._throttle.came(ticket.started, due, time.perf_counter())
                    sleep_until(due)
            except Exception as e:  # noqa: BLE001, handed to whoever waits for the ticket
                ticket.error = e
            # An emulated device holds its place in the queue until its load is due, not only read.
            with self._cond:
                ticket.finished = time.perf_counter()
                ticket.end()
                self._active -= 1
                self._cond.notify_all()
