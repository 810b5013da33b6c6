"""Devices: the real disk, and emulated ones that slow real loads down in real time.

An emulated device still reads every byte from the store; a load is then held back until the
profile's bus would have delivered it. A profile faster than the machine's disk cannot be honoured:
a load's duration is what it took, and the throttle says that it is outpaced.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """Where experts come from.

    Attributes
    ----------
    title
        For people.
    bandwidth_bytes_s
        Of the bus that all loads share; None for the real disk.
    latency_ms
        Before the first byte of a load; latencies of queued loads overlap.
    queue
        Loads the device works on at a time, at most; the loader's readers, 1 to 8, are the
        other limit.
    """

    title: str
    bandwidth_bytes_s: float | None = None
    latency_ms: float = 0.0
    queue: int = 1

    @property
    def emulated(self) -> bool:
        """Whether times on this device are emulated rather than measured on hardware."""
        return self.bandwidth_bytes_s is not None


DEVICES = {
    "disk": Device("this machine's disk", queue=8),
    "sd_card": Device("SD card (UHS-I), 40 MB/s", 40e6, 1.0, 1),
    "hdd": Device("HDD, 50 MB/s", 50e6, 1.0, 1),
    "emmc": Device("eMMC 5.1, 250 MB/s", 250e6, 0.2, 1),
    "tx2_ssd": Device("Jetson TX2 SSD, 550 MB/s", 550e6, 0.1, 4),
    "nvme": Device("NVMe SSD, 3 GB/s", 3e9, 0.08, 8),
    "pcie4": Device("PCIe 4.0 x16 to a GPU, 25 GB/s", 25e9, 0.01, 16),
}
"""Bandwidths of HDD, TX2 SSD and NVMe are those of the EdgeMoE and HOBBIT papers' devices; the
others are typical data-sheet values. Latencies assume experts laid out in sequence."""


def device(name: str) -> Device:
    """A device by name.

    Raises
    ------
    ValueError
        The name is not known; the message lists those that are.
    """
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


class Throttle:
    """Says when an emulated device would have delivered a load. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bus_free = 0.0
        self._recent: deque[float] = deque()
        self._late: deque[bool] = deque(maxlen=32)

    @property
    def outpaced(self) -> bool:
        """Whether most of the last loads came later than the emulated device delivers them."""
        late = list(self._late)
        return len(late) >= 8 and 2 * sum(late) > len(late)

    def came(self, begun: float, due: float, now: float) -> None:
        """A load begun and due at these times has been read from the real disk."""
        self._late.append(now - due > 1e-4 + 0.1 * (due - begun))

    def due(self, profile: Device, nbytes: int, now: float) -> float:
        """Clock time (seconds) at which a load begun at ``now`` is complete."""
        if profile.bandwidth_bytes_s is None:
            return now
        with self._lock:
            while self._recent and self._recent[0] <= now:
                self._recent.popleft()
            busy = len(self._recent) >= profile.queue
            start = self._recent[-profile.queue] if busy else now
            ready = start + profile.latency_ms / 1e3
            self._bus_free = max(self._bus_free, ready) + nbytes / profile.bandwidth_bytes_s
            self._recent.append(self._bus_free)
            return self._bus_free

    def reset(self) -> None:
        """Forget what is queued (the device changed)."""
        with self._lock:
            self._bus_free = 0.0
            self._recent.clear()
            self._late.clear()


def sleep_until(when: float) -> None:
    """Sleep to a `time.perf_counter` reading, to about 0.05 ms."""
    while (left := when - time.perf_counter()) > 0:
        time.sleep(left - 1e-4 if left > 3e-4 else 0)


def devices() -> dict[str, Device]:
    """The devices by name: ``"disk"`` is real, the others are emulated."""
    return dict(DEVICES)
