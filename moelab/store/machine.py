"""A machine as a virtual clock needs it: what it computes, and the disk below a device."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.replays.clock import Computing
from moelab.store.devices import Device, Throttle


@dataclass(frozen=True)
class Machine:
    """A machine: see `Computing`; its disk as a device, and how many loads it reads at once."""

    computing: Computing
    disk: Device
    readers: int

    def bus(self, device: Device) -> EmulatedBus:
        """Loads from that device, through this machine's disk and loader."""
        return EmulatedBus(self, device)


class EmulatedBus:
    """A device as the loader emulates it: every byte is read from the disk as well."""

    def __init__(self, machine: Machine, device: Device) -> None:
        self.queue = min(machine.readers, device.queue)
        self._devices = (device, machine.disk) if device.emulated else (machine.disk,)
        self._throttles = [Throttle() for _ in self._devices]

    def due(self, nbytes: int, now: float) -> float:
        """See `moelab.replays.clock.Bus`."""
        pairs = zip(self._throttles, self._devices, strict=True)
        return max(throttle.due(device, nbytes, now) for throttle, device in pairs)
