"""How many loads at once a disk likes best: measured when a store first needs it, and kept.

One reader saturates some disks, others give several times as much to a deep queue. Each reader is
a thread that takes its turn from computing, so a deeper queue has to bring a tenth more. The size
of a read is the expert's: the kernel cuts a large direct read into a queue of requests by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moelab.engine.memory import pages
from moelab.scheduling.writing import write_atomically
from moelab.store.blobs import BlobFile
from moelab.store.paths import cache_dir
from moelab.store.store import Store

DEPTHS = (1, 2, 4, 8)
SECONDS = 0.04
"""Of reading at one depth; twice each, and at least one load a reader."""
WORTH = 1.1
CACHED = 3
"""Readers where direct reads are not to be had: what was measured would be the page cache."""
MEMORY_BYTES = 1 << 26
"""At most held by the readers that measure; beyond it, fewer of them are tried."""


def at_once(store: Store) -> int:
    """Loads at once for a store's largest experts on the disk it lies on, measured at most once.

    What was measured lies in the cache folder, by file system and size of a load (as a power of
    two); deleting `disks.json` there measures anew.
    """
    bits = max(store.tiers)
    file, nbytes = store.files[bits], store.slot_bytes[bits]
    if not file.direct or file.nbytes < nbytes:
        return CACHED
    kept, disk = cache_dir() / "disks.json", f"{os.statvfs(file.path).f_fsid:x}"
    known, name = _read(kept), f"{disk} 2^{nbytes.bit_length()} huge pages"
    if name not in known:
        known[name] = best(paces(file, nbytes))
        with contextlib.suppress(OSError):  # a cache that cannot be written: once more next time
            write_atomically(kept, json.dumps(known, indent=1).encode())
    return known[name]


def _read(kept: Path) -> dict[str, int]:
    try:
        found = json.loads(kept.read_bytes())
        return {str(k): v for k, v in found.items() if v in DEPTHS}
    except (OSError, ValueError, AttributeError):  # none yet, or a damaged one: measured anew
        return {}


def best(found: dict[int, float]) -> int:
    """The fewest readers within `WORTH` of the fastest.

    Examples
    --------
    >>> best({1: 5e8, 2: 9e8, 4: 9.2e8, 8: 8e8})
    2
    """
    return min(depth for depth, pace in found.items() if pace * WORTH >= max(found.values()))


def paces(file: BlobFile, nbytes: int) -> dict[int, float]:
    """Bytes a second by number of readers: loads of ``nbytes`` at random places, in turn."""
    depths = [d for d in DEPTHS if d == 1 or d * nbytes <= MEMORY_BYTES]
    return {d: max(pace(file, nbytes, d) for _ in range(2)) for d in depths}


def pace(file: BlobFile, nbytes: int, depth: int) -> float:
    """Bytes a second of so many readers at random places, for `SECONDS`."""
    begun = time.perf_counter()

    def read(seed: int) -> int:
        rng, into, loads = random.Random(seed), pages(nbytes), 0
        while not loads or time.perf_counter() < begun + SECONDS:
            place = nbytes * rng.randrange(file.nbytes // nbytes)
            file.read_into(into, place, direct=True)
            loads += 1
        return loads

    with ThreadPoolExecutor(depth) as pool:
        loads = sum(pool.map(read, range(depth)))
    return loads * nbytes / (time.perf_counter() - begun)
