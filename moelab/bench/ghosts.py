"""Ghosts: any Mixture-of-Experts architecture as a lab, without its weights.

>>> import moelab
>>> lab = moelab.ghost("qwen3-30b-a3b", bits=4, dense_bits=4, budget="2GB")  # doctest: +SKIP

Loads, stalls, deciding and computing are *measured* on this machine; the routing is a recorded
run's, or *modelled*. What it does not know: text and quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from moelab import opening
from moelab.catalogue import find_store, offered
from moelab.lab import Lab
from moelab.replays.files import Trace
from moelab.replays.routing import PROFILES, nearest
from moelab.replays.routing import routing as drawn
from moelab.settings import parse_budget, refuse_unknown
from moelab.store import ghost as store
from moelab.store.architecture import Architecture
from moelab.store.codecs import TIERS

TOKENS = 256


def ghost(
    model: str | Path | Mapping[str, Any],
    *,
    routing: str | Path | Trace | None = None,
    disk: int | str = "4GB",
    tiers: Sequence[int] = TIERS,
    progress: bool | Callable[[str], None] = True,
    **options: Any,
) -> Lab:
    """Open an architecture at its real sizes, with random weights, as a lab.

    Parameters
    ----------
    model
        A name of ``moelab.store.architecture.KNOWN`` (``"mixtral-8x7b"``, ``"gpt-oss-20b"``, ...),
        a folder with a config.json, a store, a GGUF file, a hub id (only its config.json is
        fetched), or the keys of a config.json.
    routing
        A trace (``run.trace``, or a file of one), or whose routing it is modelled after, see
        `moelab.routing`. Default: its own where one was fitted, else the nearest one's.
    disk
        Of random experts to read, at most; where all experts are more, several share their bytes.
    tiers
        Bits that experts are to be had at.
    progress
        Call this with what is being done.
    options
        As in `moelab.open`. ``budget`` is at most a quarter of the free memory by default.

    Returns
    -------
    Lab
        With everything but text, KL and scores. ``moelab.ghost.remove()`` frees the disk.

    Raises
    ------
    ValueError
        There is no such architecture, the trace is of another, or memory is short: says of what.
    StoreError
        The disk is short: says of how much.
    """
    refuse_unknown("moelab.ghost()", options, opening.open, besides=("routing", "disk"))
    if isinstance(model, str) and model in offered():
        found = Architecture(find_store(model, progress=progress), tiers=tiers)
        found.name = model
    else:
        found = Architecture(model, tiers=tiers)
    shape, free = found.shape, psutil.virtual_memory().available
    if options.get("budget") is None:
        options["budget"] = min(shape.all_bytes(max(shape.nbytes)), free) // 4
    _check_memory(found, options, free)
    trace = routing if isinstance(routing, Trace) else _trace(found, routing)
    tell = progress if callable(progress) else lambda _: None
    folder = store.make(found, trace, parse_budget(disk, shape), tell)
    return opening.open(folder, progress=progress, **options)


def remove(which: str | Path | Lab | None = None) -> None:
    """Remove a ghost from the disk, by its lab or folder, or all of them.

    Examples
    --------
    >>> moelab.ghost.remove()  # doctest: +SKIP
    """
    if isinstance(which, Lab):
        which.close()
    path = which._store.path if isinstance(which, Lab) else which
    store.remove(store.home() if path is None else Path(path))


ghost.remove = remove  # pyright: ignore[reportFunctionMemberAccess]


def _trace(found: Architecture, routing: str | Path | None) -> Trace:
    """A trace from a file, or one modelled at this architecture's shape."""
    if routing is not None and routing not in PROFILES:
        if not Path(routing).is_file():
            raise ValueError(
                f"routing={str(routing)!r} is no file of a trace, and none is modelled after it; "
                f"there are {', '.join(PROFILES)}"
            )
        return Trace.load(routing)
    shape = found.shape
    if len(set(shape.experts)) > 1:
        raise ValueError(f"layers of {found.name} differ in experts; give a trace of its own")
    like, profile = nearest(str(routing or found.name), shape)
    trace = drawn(profile, tokens=TOKENS)
    trace.lacks = (f"a real run: modelled after {like}", *trace.lacks[1:])
    return trace


def _check_memory(found: Architecture, options: Mapping[str, Any], free: int) -> None:
    """Refuse what cannot be held: dense weights and budget."""
    bits = options.get("dense_bits", 16)
    dense, budget = found.dense_bytes(bits), 0
    if options["budget"] != "auto":
        budget = parse_budget(options["budget"], found.shape)
    if dense + budget > free:
        less = f"dense_bits=4 takes {found.dense_bytes(4) / 1e9:.3g} GB, " if bits > 4 else ""
        raise ValueError(
            f"a ghost of {found.name} needs {dense / 1e9:.3g} GB for dense weights at {bits} bit "
            f"and {budget / 1e9:.3g} GB of budget; {free / 1e9:.3g} GB of memory are free: {less}"
            "or give a smaller budget"
        )
