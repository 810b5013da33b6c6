"""A folder that appears whole or not at all.

A store is written beside its destination under a name of its own, and takes the destination's name
at the very end. Meanwhile its writer holds a lock beside it that the system releases when a process
ends, however it ends: the number of a process says nothing where two containers share a disk. What
nobody holds the lock of was left by somebody killed, and is removed by the next.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from moelab.store.manifest import StoreError
from moelab.store.store import Store

LOCK, OLD = ".lock", ".old"
"""Beside a folder that is being written: its writer's lock, and the store it takes the place of."""


def partial_path(destination: Path, key: str) -> Path:
    """Where a destination is written until it is whole."""
    return destination.with_name(f"{destination.name}.partial-{key}")


def remove_stale(destination: Path, *, but: str = "") -> None:
    """Remove what a killed process left beside the destination, but for what has this key."""
    left = destination.parent.glob(f"{glob.escape(destination.name)}.partial-*")
    stale = {path.with_suffix("") if path.suffix in (OLD, LOCK) else path for path in left}
    for partial in stale - {partial_path(destination, but)}:
        lock = _beside(partial, LOCK)
        with suppress(Timeout, OSError), FileLock(lock, timeout=0):
            for folder in (partial, _beside(partial, OLD)):
                shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _beside(partial: Path, suffix: str) -> Path:
    return partial.with_name(partial.name + suffix)


def _unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the folder {folder} cannot be made or written ({error.strerror}); choose one that can "
        "be, for moelab's cache by setting MOELAB_CACHE"
    )


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
        raise _unwritable(folder, error) from error


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
def partial_folder(destination: Path, *, key: str = "") -> Iterator[Path]:
    """A folder to write into, locked meanwhile and gone at the end whatever happens.

    With a ``key`` it stays where its writer was stopped, and the next with this key goes on in it.
    """
    partial = partial_path(destination, key or uuid.uuid4().hex)
    make_folder(destination.parent)
    lock, left = FileLock(_beside(partial, LOCK), timeout=0), "Nothing is left behind, pack again"
    try:
        lock.acquire()
        partial.mkdir(exist_ok=bool(key))
    except Timeout as error:
        raise StoreError(
            f"{destination} is being made by another process; wait for it and open it then"
        ) from error
    except OSError as error:
        raise _unwritable(destination.parent, error) from error
    whole = False
    try:
        yield partial
        whole = True
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"the disk of {destination.parent} is full; make room or store fewer tiers. "
            f"{'What is packed is kept, go on with the same call' if key else left}"
        ) from error
    finally:
        if whole or not key:
            shutil.rmtree(partial, ignore_errors=True)
        _beside(partial, LOCK).unlink(missing_ok=True)
        lock.release()


def move(partial: Path, destination: Path, *, overwrite: bool) -> None:
    """Give the finished store its name; an old store steps aside and comes back on failure.

    Where the same store is there already, that one stays: it may be in use.

    Raises
    ------
    StoreError
        Something else is in the way, or what has the name afterwards is not what was written.
    """
    old, written = None, partial.stat().st_ino
    if destination.exists() and any(destination.iterdir()):
        if _is_same_store(partial, destination):
            return
        if not overwrite:
            raise StoreError(f"{destination} appeared while packing; choose another destination")
        old = _beside(partial, OLD)
        destination.rename(old)
    try:
        partial.rename(destination)
    except BaseException as error:
        if not isinstance(error, OSError) or not _is_same_store(partial, destination):
            if old is not None:
                old.rename(destination)
            raise
    else:
        if destination.stat().st_ino != written:
            raise StoreError(f"{destination} was replaced by somebody else meanwhile; pack again")
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


def grown(file: Path) -> BinaryIO:
    """A file to write into at any place, made if it is not there."""
    file.touch()
    return file.open("r+b")
