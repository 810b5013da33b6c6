"""Many settings over one recorded stream: every combination decided by replay, on all cores.

What was decided is kept in the cache folder by the content of the trace and of the settings, so a
sweep that was interrupted goes on where it was, and one that is made wider asks only what is new.
Past one machine the same tasks go to a Dask cluster; the trace travels once a worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from moelab.replays.replay import replay
from moelab.runs.prediction import approximate, trace_of
from moelab.scheduling.trace import Trace, unrecorded
from moelab.settings import Settings, is_whole
from moelab.spelling import in_words, short
from moelab.store.paths import cache_dir
from moelab.strategies import CALIBRATED, NAMES, make

if TYPE_CHECKING:
    from moelab.runs.run import Run

BATCH = 16
"""Settings that one task decides: a task costs some milliseconds of its own."""
WORTH_IT = 8
"""Tasks from which on processes are begun: each of them takes seconds to begin."""
COUNTED = {kind: f"{kind}s" for kind in ("hit", "load", "skip", "substitute")}
COUNTED |= {"prefetch": "prefetches", "evict": "evictions"}
Row = dict[str, Any]


def sweep(
    of: Run | Trace,
    grid: Mapping[str, Sequence[Any]],
    *,
    client: Any = None,
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Decide a recorded stream under every combination of settings.

    Parameters
    ----------
    of
        A run, or a trace.
    grid
        Setting -> values, as `moelab.Lab.update` takes them: ``{"strategy": ["lru", "lfu"],
        "budget": ["10%", "25%"], "bits": [16, 4]}``. What is not in it is as the run began.
    client
        A `dask.distributed.Client` (``pip install 'moelab[cluster]'``); without it, processes of
        this machine.
    workers
        How many processes (default: the cores); 0: in this one.

    Returns
    -------
    DataFrame
        A row for each combination, in the grid's order: its settings; ``hit_ratio`` and
        ``bytes_per_token`` of decoded tokens; how many of each decision; ``approximate``, whether
        these settings compute something else than was recorded (other bits, a skipped expert, a
        steered router), so that another stream would have come of them; ``lacks``, what their parts
        ask for that was not recorded; ``error`` where they are refused.

    Raises
    ------
    ValueError
        The grid is empty or a value has no form in JSON (a part of your own: sweep its parameters).

    Examples
    --------
    >>> found = moelab.sweep(run, {"strategy": ["lru", "lfu"], "bits": [16, 4]})  # doctest: +SKIP
    >>> found.pivot(index="bits", columns="strategy", values="hit_ratio")  # doctest: +SKIP
    """
    trace = trace_of(of)
    listed = isinstance(grid, Mapping) and all(isinstance(v, list | tuple) for v in grid.values())
    if not listed or not grid or not all(grid.values()):
        raise ValueError(f"grid={grid!r}: a dict, with at least one value of each in a list")
    if workers is not None and not is_whole(workers, 0):
        raise ValueError(f"workers={workers!r}: a whole number, 0 for this process alone")
    if client is not None and not hasattr(client, "scatter"):
        raise ValueError(f"client={client!r}: a dask.distributed.Client")
    asked = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    # What a strategy had learnt stays here: every settings begin anew.
    changes = [c._replace(strategy=None) for c in trace.changes]
    bare = dataclasses.replace(trace, changes=changes)
    kept = Kept(bare)
    missing = [i for i, one in enumerate(asked) if kept.get(one) is None]
    batches = [[asked[i] for i in missing[at : at + BATCH]] for at in range(0, len(missing), BATCH)]
    done = len(asked) - len(missing)
    with tqdm(total=len(asked), initial=done, unit="setting", disable=not progress) as bar:
        for rows in _decided(bare, batches, client, workers):
            kept.add(rows)
            bar.update(len(rows))
    found = [{**one, **(kept.get(one) or {})} for one in asked]
    return pd.DataFrame(found)


def _decided(
    trace: Trace, batches: list[list[Row]], client: Any, workers: int | None
) -> Iterator[list[tuple[Row, Row]]]:
    """What each batch gives, as it comes."""
    if client is not None:
        from distributed import as_completed as as_they_come  # pyright: ignore[reportMissingImports]

        (there,) = client.scatter([trace], broadcast=True)
        # A worker that is lost costs its tasks only: they are pure, and asked of another.
        tasks = [client.submit(decide, there, batch, retries=3) for batch in batches]
        for task in as_they_come(tasks):
            yield task.result()
        return
    few = workers is None and len(batches) < WORTH_IT
    workers = (os.cpu_count() or 1) if workers is None else workers
    if few or workers < 2 or len(batches) < 2:
        yield from (decide(trace, batch) for batch in batches)
        return
    # A fork would be without the threads of torch and the loader, and might wait for one for ever.
    anew = get_context("spawn")
    with ProcessPoolExecutor(workers, anew, initializer=_hold, initargs=(trace,)) as pool:
        tasks = [pool.submit(_of_held, batch) for batch in batches]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:  # Ctrl-C: what nobody began is not begun
            pool.shutdown(cancel_futures=True)


_held: list[Trace] = []


def _hold(trace: Trace) -> None:
    _held[:] = [trace]


def _of_held(batch: list[Row]) -> list[tuple[Row, Row]]:
    return decide(_held[0], batch)


def decide(trace: Trace, batch: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Each of these settings with what it decides."""
    return [(one, _decide(trace, one)) for one in batch]


def _decide(trace: Trace, asked: Row) -> Row:
    shape, most = trace.shape, max(trace.shape.nbytes)
    try:
        settings = Settings(shape.all_bytes(most), most, make("lru"))
        if trace.changes:  # what is not in the grid stays as it was when the run began
            first = trace.changes[0]
            named = make(first.name) if first.name in NAMES else settings.strategy
            settings = Settings(first.knobs.budget_bytes, first.knobs.bits, named)
        settings = settings.change(shape, **asked)
        found = replay(trace, settings.strategy, settings.knobs())
    except (ValueError, TypeError) as error:
        return {"error": in_words(error)}
    counts = {column: found.counts[kind] for kind, column in COUNTED.items()}
    lacks = {
        "look-ahead": settings.strategy.asks_ahead
        and settings.prefetch
        and not any(step.look_ahead for step in trace.steps),
        "calibration": settings.strategy.name in CALIBRATED,  # of the model: defaults are used
        **dict.fromkeys(unrecorded(trace, settings.strategy), True),
    }
    return {
        "settings": short(settings, shape),
        "hit_ratio": found.hit_ratio,
        "bytes_per_token": found.bytes / max(1, trace.decoded),
        **counts,
        "approximate": bool(approximate(trace, settings, found)),
        "lacks": ", ".join(name for name, so in lacks.items() if so),
        "error": "",
    }


class Kept:
    """What was decided of a trace, one line of JSON for each settings, in the cache folder."""

    def __init__(self, trace: Trace) -> None:
        from moelab import __version__

        settings = [(c.at, c.name, c.knobs) for c in trace.changes]
        steps = repr((__version__, trace.shape, settings, trace.steps, trace.resident)).encode()
        name = hashlib.blake2b(steps, digest_size=12).hexdigest()
        self.path = cache_dir() / "sweeps" / f"{name}.jsonl"
        self._found: dict[str, Row] = {}
        if self.path.is_file():
            for line in self.path.read_text("utf-8").splitlines():
                try:
                    self._found.update([json.loads(line)])
                except ValueError:  # cut off while it was written: decided again
                    continue

    def get(self, asked: Row) -> Row | None:
        """What these settings decide, where it is known."""
        return self._found.get(_name(asked))

    def add(self, rows: Sequence[tuple[Row, Row]]) -> None:
        """Remember, and write down where the folder can be written."""
        new = [(_name(asked), found) for asked, found in rows]
        self._found.update(new)
        lines = "".join(json.dumps(one) + "\n" for one in new)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)


def _name(asked: Row) -> str:
    try:
        return json.dumps(asked, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"{asked!r} has no form in JSON: name strategies by words") from error
