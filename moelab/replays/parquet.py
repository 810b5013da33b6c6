"""Traces as Parquet: one row for each choice of a router, with a header in JSON.

`Trace.save("x.parquet")` and `Trace.load` use it. Any tool that reads Parquet reads the routing;
what is loaded back is the same trace, checked like one from JSON. The header (metadata key
``moelab``) has the shape, the settings, where prompts begin and how far routers were asked ahead.

A row: ``step`` of the trace, ``what`` (`WHATS`), ``token`` within the step, ``layer``, ``expert``,
``weight`` (the gate's). ``wanted`` is the router's own choice where it was steered, ``ahead`` a
coming layer's router; of a ``norm`` only the weight counts, ``in flight`` and ``unread`` name keys.
A ``probability`` is an expert's, of an ``embedding`` each number has the place of an expert;
``free`` are chosen experts without weights.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from moelab.replays.foreign import table_document
from moelab.scheduling.trace import FILES, SAVED

WHATS = ("chosen", "wanted", "ahead", "norm", "in flight", "unread", "step")
WHATS += ("probability", "embedding", "free")
CHOSEN, WANTED, AHEAD, NORM, IN_FLIGHT, UNREAD, STEP, PROBABILITY, EMBEDDING, FREE = range(10)
COLUMNS = ("step", "what", "token", "layer", "expert", "weight")
Row = tuple[int, int, int, int, int, float]
MOST_ROWS = 1 << 25
NOBODY = -1
"""An expert that stands for an empty choice."""


def written(document: dict[str, Any]) -> bytes:
    """A trace's document as a Parquet file."""
    pa, parquet = _pyarrow()
    rows = [row for at, step in enumerate(document["steps"]) for row in _rows(at, step)]
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    types = (pa.int32(), pa.uint8(), pa.int32(), pa.int16(), pa.int32(), pa.float64())
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    arrays[1] = pa.DictionaryArray.from_arrays(arrays[1], list(WHATS))
    steps = [dict(zip(SAVED, step, strict=False)) for step in document["steps"]]
    header = {name: value for name, value in document.items() if name != "steps"}
    header["prompts"] = [i for i, s in enumerate(steps) if s["prefill"] and s["layer"] == 0]
    header["depth"] = max(
        (coming - s["layer"] for s in steps for coming, *_ in s["look_ahead"]), default=0
    )
    table = pa.table(dict(zip(COLUMNS, arrays, strict=True)))
    table = table.replace_schema_metadata({"moelab": json.dumps(header)})
    out = io.BytesIO()
    parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def read(data: bytes) -> dict[str, Any]:
    """The document of a Parquet file, ours or another tool's; `Trace.load` checks what is in it."""
    pa, parquet = _pyarrow()
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        size = max(file.metadata.num_rows, sum(group.total_byte_size for group in groups) // 8)
        if size > MOST_ROWS:  # before it is unpacked: a small file may hold very much
            raise ValueError(f"it has {size} rows or more; {MOST_ROWS} at most")
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    if b"moelab" not in (table.schema.metadata or {}):
        if tuple(table.column_names) == COLUMNS:
            raise ValueError("it has our columns and no header")
        return table_document(table.to_pydict())
    document = json.loads(table.schema.metadata[b"moelab"])
    if tuple(table.column_names) != COLUMNS:
        raise ValueError(f"its columns are {table.column_names}")
    kinds = {word: what for what, word in enumerate(WHATS)}
    columns = [table.column(name).to_pylist() for name in COLUMNS]
    rows = zip(columns[0], (kinds[word] for word in columns[1]), *columns[2:], strict=True)
    return document | {"steps": list(_steps(rows))}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "a trace in Parquet needs pyarrow: pip install 'moelab[export]', or save it as .json"
        ) from error
    return pa, parquet


def _rows(at: int, step: list[Any]) -> Iterator[Row]:
    given = dict(zip(SAVED, step, strict=False))  # without free experts it lacks the last
    layer = given["layer"]
    yield at, STEP, len(given["experts"]), layer, int(given["prefill"]), 0.0
    for what, experts, weights in (
        (CHOSEN, given["experts"], given["weights"]),
        (WANTED, given["wanted"] or (), given["wanted_weights"] or ()),
        (FREE, given.get("free", ()), given.get("free_weights", ())),
    ):
        for token, (some, gates) in enumerate(zip(experts, weights, strict=True)):
            yield from _choice(at, what, token, layer, some, gates)
    for token, (coming, some, gates) in enumerate(given["look_ahead"]):
        yield from _choice(at, AHEAD, token, coming, some, gates)
    for token, norm in enumerate(given["norms"] or ()):
        yield at, NORM, token, layer, NOBODY, norm
    for what, name in ((IN_FLIGHT, "in_flight"), (UNREAD, "unread")):
        for token, key in enumerate(given[name]):
            yield at, what, token, layer, key, 0.0
    for what, name in ((PROBABILITY, "probabilities"), (EMBEDDING, "embedding")):
        for place, value in enumerate(given[name] or ()):
            yield at, what, 0, layer, place, value


def _choice(at: int, what: int, token: int, layer: int, experts: Any, gates: Any) -> Iterator[Row]:
    if not experts:
        yield at, what, token, layer, NOBODY, 0.0
    for expert, gate in zip(experts, gates, strict=True):
        yield at, what, token, layer, expert, gate


def _steps(rows: Iterator[Row]) -> Iterator[list[Any]]:
    held: list[Row] = []
    for row in rows:
        if row[1] == STEP and held:
            yield _step(held)
            held = []
        held.append(row)
    if held:
        yield _step(held)


def _step(rows: list[Row]) -> list[Any]:
    (_, what, tokens, layer, prefill, _), *rest = rows
    if what != STEP or tokens < 1 or prefill not in (0, 1):
        raise ValueError(f"step {rows[0][0]} has no beginning")
    chosen, gates = _choices(rest, CHOSEN)
    wanted, wanted_gates = _choices(rest, WANTED)
    ahead, ahead_gates = _choices(rest, AHEAD)
    coming = {token: at for _, what, token, at, *_ in rest if what == AHEAD}
    look_ahead = zip(coming.values(), ahead, ahead_gates, strict=True)
    norms, probabilities, embedding = (
        [weight for _, what, *_, weight in rest if what == kind] or None
        for kind in (NORM, PROBABILITY, EMBEDDING)
    )
    flying, unread = ([r[4] for r in rest if r[1] == kind] for kind in (IN_FLIGHT, UNREAD))
    own = (wanted, wanted_gates) if wanted else (None, None)
    told = [list(one) for one in look_ahead]
    if len(chosen) != tokens:
        raise ValueError(f"step {rows[0][0]} has {len(chosen)} tokens of {tokens}")
    whole = (probabilities, embedding, *_choices(rest, FREE))
    return [layer, chosen, gates, bool(prefill), told, *own, norms, flying, unread, *whole]


def _choices(rows: list[Row], kind: int) -> tuple[list[list[int]], list[list[float]]]:
    """The experts and the weights of each token of one kind, in order."""
    experts: dict[int, list[int]] = {}
    gates: dict[int, list[float]] = {}
    for _, what, token, _, expert, weight in rows:
        if what == kind:
            experts.setdefault(token, []).extend([expert] if expert != NOBODY else [])
            gates.setdefault(token, []).extend([weight] if expert != NOBODY else [])
    return list(experts.values()), list(gates.values())


FILES[".parquet"] = (written, read)
