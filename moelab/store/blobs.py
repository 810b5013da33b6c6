"""A tier's file, held open: what is read is the file that was checked when the store was opened.

A name may come to mean another file while a lab is open: somebody packs over the store, cuts a file
short, or copies another one into its place. A descriptor goes on meaning the old file, and says
when that was written to. Reads are bounded: a file that ends early is an error, never a fault of a
memory map. What it does not know: experts, and whose memory it fills.
"""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

import numpy as np


class BlobFile:
    """A file of blobs, opened once; any number of threads may read.

    Attributes
    ----------
    path
        Its name when it was opened.
    direct
        Whether reads can bypass the page cache, as far as is known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self._opened = [self._fd]
        weakref.finalize(self, _close, self._opened)
        self._written = self._state()
        self._direct = self._open_direct()

    @property
    def direct(self) -> bool:
        """Whether reads can bypass the page cache, as far as is known."""
        return self._direct is not None

    @property
    def nbytes(self) -> int:
        """Its size when it was opened."""
        return self._written[0]

    def read_into(self, into: np.ndarray, offset: int, *, direct: bool = False) -> None:
        """Fill uint8 ``into`` from ``offset`` on; ``direct``: past the page cache where it can.

        Raises
        ------
        OSError
            The file ends early, or was written to since it was opened.
        """
        view, done = memoryview(into), 0  # pyright: ignore[reportArgumentType]
        while done < len(view):
            fd = self._direct if direct and self._direct is not None else self._fd
            try:  # O_DIRECT wants all three aligned: slots and blobs are whole pages
                got = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                if fd == self._fd or error.errno != errno.EINVAL:
                    raise
                self._direct = None  # not on this file system
                continue
            if got <= 0:
                raise OSError(errno.EIO, f"the file ends at {offset + done}, not behind its expert")
            done += got
        if self._state() != self._written:
            raise OSError(errno.ESTALE, "the file was written to since it was opened")

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def _open_direct(self) -> int | None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except (AttributeError, OSError):  # another system, or not on this file system
            return None
        self._opened.append(fd)
        same = os.path.sameopenfile(fd, self._fd)  # not where the name has changed its meaning
        return fd if same else None


def _close(opened: list[int]) -> None:
    for fd in opened:
        os.close(fd)
