"""A folder that appears whole or not at all.

A store is written beside its destination and takes the destination's name at the very end. What a
killed process leaves behind has that process's number in its name and is removed by the next.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moelab.store.manifest import StoreError
from moelab.store.store import Store


def remove_stale(destination: Path) -> None:
    """Remove what a killed process left beside the destination."""
    for folder in destination.parent.glob(f"{destination.name}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder that is not there yet.

    Raises
    ------
    StoreError
        It cannot be made; the message says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the folder {folder} cannot be made ({error.strerror}); choose one that can be "
            "written, for moelab's cache by setting MOELAB_CACHE"
        ) from error


def check_room(folder: Path, nbytes: int, what: str, otherwise: str = "") -> None:
    """Refuse to begin what does not fit beside this folder.

    Raises
    ------
    StoreError
        Fewer than ``nbytes`` bytes are free; it says so of ``what``, and what to do ``otherwise``.
    """
    parent = folder.parent
    make_folder(parent)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise StoreError(
            f"{what} needs {nbytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; make "
            f"room{otherwise}"
        )


@contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into, gone at the end whatever happens."""
    partial = destination.with_name(f"{destination.name}.partial-{os.getpid()}")
    make_folder(partial)
    try:
        yield partial
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"the disk of {destination.parent} is full; make room or store fewer tiers. "
            "Nothing is left behind, pack again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move(partial: Path, destination: Path, *, overwrite: bool) -> None:
    """Give the finished store its name; an old store steps aside and comes back on failure.

    Where another process has put the same store there meanwhile, that one stays: it may be in use.
    """
    old = None
    if destination.exists() and any(destination.iterdir()):
        if _is_same_store(partial, destination):
            return
        if not overwrite:
            raise StoreError(f"{destination} appeared while packing; choose another destination")
        old = destination.with_name(f"{destination.name}.partial-old-{os.getpid()}")
        destination.rename(old)
    try:
        partial.rename(destination)
    except BaseException as error:
        if not isinstance(error, OSError) or not _is_same_store(partial, destination):
            if old is not None:
                old.rename(destination)
            raise
    sync(destination.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _is_same_store(partial: Path, destination: Path) -> bool:
    try:
        return Store.open(partial).manifest.id == Store.open(destination).manifest.id
    except StoreError:
        return False


def sync(path: Path) -> None:
    """Have a file or folder on the disk before the store gets its name."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
