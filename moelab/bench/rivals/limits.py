"""Honest caps: a memory cgroup with the page cache in it, and a disk as most have it.

Needs root on Linux. What it does not know: what runs inside.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
READ_AHEAD = 128
"""KiB that Linux reads ahead of a page fault on most disks."""


class Cap:
    """A memory cgroup (v1 or v2) of so many bytes, page cache included, no swap.

    Raises
    ------
    OSError
        Making one is not allowed here.
    """

    def __init__(self, limit: int) -> None:
        self._v1 = (ROOT / "memory").is_dir()
        self._group = (ROOT / "memory" if self._v1 else ROOT) / f"moelab-{os.getpid()}"
        self._group.mkdir()
        most = "memory.limit_in_bytes" if self._v1 else "memory.max"
        swap = "memory.memsw.limit_in_bytes" if self._v1 else "memory.swap.max"
        try:
            (self._group / most).write_text(str(limit))
        except OSError:
            self.close()
            raise
        with contextlib.suppress(OSError):  # a kernel without accounting of swap
            (self._group / swap).write_text(str(limit) if self._v1 else "0")

    @property
    def entrance(self) -> str:
        """The file that a process writes its number to, to be inside."""
        return str(self._group / "cgroup.procs")

    @property
    def limit_file(self) -> str:
        """The file with the limit, which a process may lower by what it held before it entered."""
        return str(self._group / ("memory.limit_in_bytes" if self._v1 else "memory.max"))

    @property
    def peak(self) -> int | None:
        """Most bytes held so far; None where the kernel does not say."""
        name = "memory.max_usage_in_bytes" if self._v1 else "memory.peak"
        with contextlib.suppress(OSError):
            return int((self._group / name).read_text())
        return None

    def close(self) -> None:
        """Remove it, as soon as nobody is inside."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                self._group.rmdir()
                return
            time.sleep(0.1)


def refusal() -> str:
    """Why no cap can be made here; empty where it can."""
    try:
        Cap(1 << 30).close()
    except OSError as error:
        return f"no memory cgroup can be made here ({error}); be root, in a container privileged"
    return ""


@contextlib.contextmanager
def usual_disk(image: Path, nbytes: int) -> Iterator[Path]:
    """An empty ext4 file system on this disk whose read-ahead is `READ_AHEAD`; its folder.

    Raises
    ------
    RuntimeError
        It cannot be made here; the message is the system's.
    """
    mount = image.with_suffix("")
    mount.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(nbytes)
    device = ""
    try:
        _system("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        device = _system("losetup", "-f", "--show", "--direct-io=on", str(image))
        _system("mount", "-o", "noatime", device, str(mount))
        Path(f"/sys/block/{Path(device).name}/queue/read_ahead_kb").write_text(str(READ_AHEAD))
        yield mount
    finally:
        with contextlib.suppress(RuntimeError):
            _system("umount", str(mount))
        if device:
            _system("losetup", "-d", device)
        image.unlink(missing_ok=True)


def read_ahead(path: Path) -> int | None:
    """KiB that are read ahead on the disk of a path; None where the system does not say."""
    number = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for folder in (block, block.parent):  # of a partition the disk's
        with contextlib.suppress(OSError):
            return int((folder / "queue/read_ahead_kb").read_text())
    return None


def _system(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
