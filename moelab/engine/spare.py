"""What this machine can spare: free memory, the limits of control groups, and their pressure.

Linux tells all three; elsewhere the system's free memory is all that is known.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""By the controller's name, which is also its folder: where limit and use are read."""


@dataclass(frozen=True)
class Machine:
    """Where the figures are read: the control groups of this process (version 2 or 1), and /proc.

    Examples
    --------
    >>> Machine().spare_bytes() > 0
    True
    """

    groups: Path = Path("/proc/self/cgroup")
    root: Path = Path("/sys/fs/cgroup")
    pressure_file: Path = Path("/proc/pressure/memory")

    def limit_bytes(self) -> int | None:
        """The least limit of the control groups of this process, if any has one."""
        limits = [limit for _, files in self._folders() if (limit := files[0]) is not None]
        return min(limits, default=None)

    def total_bytes(self) -> int:
        """All memory that this process could ever have."""
        return min(psutil.virtual_memory().total, self.limit_bytes() or sys.maxsize)

    def spare_bytes(self) -> int:
        """What could be taken now without swapping: of the system, and within each limit."""
        found = [psutil.virtual_memory().available]
        for folder, (limit, used) in self._folders():
            if limit is not None and used is not None:
                # Pages of files that were read once go as soon as somebody wants the memory.
                stat = _text(folder / "memory.stat")
                pages = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
                found.append(limit - used + (int(pages[1]) if pages else 0))
        return max(0, min(found))

    def pressure(self) -> float:
        """Share of the last ten seconds in which something waited for memory, 0 to 1."""
        files = [folder / "memory.pressure" for folder, _ in self._folders()]
        told = [_text(file) for file in (*files, self.pressure_file)]
        found = [n for text in told for n in re.findall(r"some avg10=([\d.]+)", text)]
        return max(map(float, found), default=0.0) / 100

    def _folders(self) -> Iterator[tuple[Path, tuple[int | None, int | None]]]:
        for line in _text(self.groups).splitlines():
            _, controllers, path = line.split(":", 2)
            for name in (c for c in controllers.split(",") if c in FILES):
                top = self.root / name
                inner = top / path.lstrip("/")
                limit, used = FILES[name]
                for folder in (f for f in (inner, *inner.parents) if f.is_relative_to(top)):
                    yield folder, (_number(folder / limit), _number(folder / used))


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text("utf-8")
    return ""


def _number(file: Path) -> int | None:
    with contextlib.suppress(ValueError):  # not there, or "max"
        return int(_text(file))
    return None
