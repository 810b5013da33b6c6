"""A recording as a file: its fields, how it is packed, and how a broken file is refused.

It is plain JSON but for long columns of numbers, which are little-endian arrays in base64. Packed
it is JSON in gzip: never pickle, so a file from a stranger can be read. `unpack` believes nothing:
every field is checked before anybody draws it, and an error names file and field.

T tokens, L layers, K active experts.
"""

from __future__ import annotations

import base64
import binascii
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import fastjsonschema
import numpy as np

from moelab.runs import passes
from moelab.runs.account import ENDINGS
from moelab.runs.rounds import MOST_REPEATS, TIMED
from moelab.runs.tokens import COLUMNS, STALLS, Noted, fold, summary, table
from moelab.scheduling.events import CAUSE, DTYPE, EVICT, KINDS, LOAD, NONE, PREFETCH
from moelab.spelling import reread

FORMAT = 1
MOVES = {LOAD: 1, PREFETCH: 1, EVICT: -1}
"""Kinds of events that bring a copy into memory, or take it out."""
EVENTS = {
    "token": "<i4",
    "at": "<i2",
    "layer": "<i2",
    "expert": "<i2",
    "kind": "<u1",
    "bits_asked": "<u1",
    "bits": "<u1",
    "bytes": "<i4",
    "start_ms": "<f4",
    "dur_ms": "<f4",
    "cause": "<u1",
}
"""The event columns; ``kind`` and ``cause`` are indices of words."""

SAMPLED = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
GATES = {"expert": "<i2", "weight": "<f4", "wanted": "<i2"}
"""[T, L, K] each; ``wanted`` (the router's own choice) only where it was steered."""

MOST_BYTES = 512 * 2**20
"""A document larger than this is refused before it is unpacked whole."""

MOST_EXPERTS = 2**20
_NOTED = ("total_ms", "deciding_ms", "measuring_ms", "setup_ms", "kl", "budget_bytes")
"""Columns of a token that its events do not give. All others are folded from the events again."""
LATER_COLUMNS = ("deciding_ms", "measuring_ms", "setup_ms")
"""Columns of a token that older files lack; they are 0 there."""
_MOST = 1e15
"""No figure of a run is larger, whatever its unit."""

RECORDING = '<script id="moelab-recording" type="application/gzip;base64">'
"""What an exported page holds its recording in, base64 of the packed one."""

_AGAIN = "record it again with run.save(path)"

# -- the fields, as a JSON schema -----------------------------------------------------------------

_TEXT, _FLAG = {"type": "string"}, {"type": "boolean"}
_NUMBER = {"type": "number", "minimum": -_MOST, "maximum": _MOST}
_FIGURE = _NUMBER | {"type": ["number", "null"]}
_INDEX = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_SIZE = {"type": "integer", "minimum": 1, "maximum": 2**15 - 1}
_WORDS = {"type": "object", "additionalProperties": _TEXT}
_BYTES = {"type": "integer", "minimum": 1, "maximum": 2**50}
_MEASURED = _NUMBER | {"minimum": 0}


def _list(of: Any, **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": of, **limits}


def _object(optional: tuple[str, ...] = (), /, **fields: Any) -> dict[str, Any]:
    needed = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": needed}


_PAIR = _list([_TEXT, _NUMBER], minItems=2, maxItems=2)
_WHO = _list([_INDEX, _INDEX, _INDEX], additionalItems=_FIGURE, minItems=3)
_EVICTION = _object(
    ("tie",),
    **dict.fromkeys(("policy", "error"), _TEXT),
    **dict.fromkeys(("terms", "texts"), _list(_TEXT)),
    victim=_WHO,
    survivors=_list(_WHO, maxItems=8),
    tie=_INDEX,
)
_CHANGE = _list([_INDEX, _WORDS], minItems=2, maxItems=2)
_SHOWN = _WORDS | {"required": ["bits"]}
_SETTING = _object(token=_INDEX, shown=_SHOWN, code=_TEXT, update=_TEXT, short=_TEXT, about=_TEXT)
_LENGTH = _list([_INDEX, {"enum": ["auto", *range(64)]}], minItems=2, maxItems=2)
_DRAFT = _object(bits=_SIZE, lengths=_list(_LENGTH))
_PASS = _object(**dict.fromkeys(passes.COUNTED, _INDEX), rejected=_list(_TEXT))
SCHEMA = _object(
    ("evictions", "ended", "repeats", "sentence", "draft", "passes"),
    format={"const": FORMAT},
    moelab=_TEXT,
    model=_object(
        ("dense_bits", "dense_bytes", "encoder_layers", "free_experts", "own_bytes"),
        **dict.fromkeys(("name", "architecture"), _TEXT),
        **dict.fromkeys(("layers", "experts", "top_k"), _SIZE),
        **dict.fromkeys(("encoder_layers", "free_experts"), _INDEX),
        tiers=_list(_SIZE, minItems=1),
        causes={"const": list(STALLS)},
        expert_bytes={"type": "object", "additionalProperties": _BYTES},
        all_experts_bytes=_BYTES,
        dense_bits=_SIZE,
        dense_bytes=_BYTES,
        own_bytes={"type": "object", "additionalProperties": _list(_BYTES | {"minimum": 0})},
    ),
    prompt=_TEXT,
    messages=_list(_WORDS),
    max_new_tokens=_INDEX,
    ignore_eos=_FLAG,
    sampling=_object(**dict.fromkeys(SAMPLED, _NUMBER)),
    draft=_DRAFT | {"type": ["object", "null"]},
    passes=_list(_PASS),
    pieces=_list(_TEXT),
    ids=_list(_INDEX),
    error=_TEXT,
    ended={"enum": list(ENDINGS)},
    sentence=_TEXT,
    repeats=_list(_object(**dict.fromkeys(TIMED, _FIGURE)), maxItems=MOST_REPEATS),
    columns=_list(_TEXT, uniqueItems=True),
    values=_TEXT,
    changes=_list(_CHANGE),
    marks=_list(_object(first=_INDEX, last=_INDEX, keys=_list(_TEXT), label=_TEXT)),
    origins=_list(_object(token=_INDEX, device=_TEXT, title=_TEXT, emulated=_FLAG), minItems=1),
    settings=_list(_SETTING, minItems=1),
    start=_object(layer=_list(_INDEX), expert=_list(_INDEX), bits=_list(_SIZE)),
    events=_object(count=_INDEX, causes=_list(_TEXT), **dict.fromkeys(EVENTS, _TEXT)),
    gates=_object(K=_SIZE, expert=_TEXT, weight=_TEXT, wanted={"type": ["string", "null"]}),
    top=_object(
        served=_list(_list(_PAIR, maxItems=6)),
        full=_list(_list(_PAIR, maxItems=6) | {"type": ["array", "null"]}),
    ),
    evictions={"type": "object", "patternProperties": {"^[0-9]{1,9}$": _EVICTION}}
    | {"additionalProperties": False},
    summary=_object(
        timing={"enum": ["measured", "emulated", "page cache"]},
        **dict.fromkeys(("setup_ms", "peak_resident_bytes"), _MEASURED),
    ),
)


@functools.cache
def _schema() -> Callable[[Any], Any]:
    return fastjsonschema.compile(SCHEMA)  # pyright: ignore[reportReturnType]


# -- packing --------------------------------------------------------------------------------------


def encoded(values: np.ndarray, dtype: str) -> str:
    """A column as text."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def decoded(text: str, dtype: str, field: str = "it", length: int | None = None) -> np.ndarray:
    """A column from its text.

    Raises
    ------
    ValueError
        It is not base64, not a whole number of values, or not ``length`` of them.
    """
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype)
    except (binascii.Error, ValueError) as e:
        kind = np.dtype(dtype).name
        raise ValueError(f"{field} is not a column of {kind} in base64 ({e})") from None
    if length is not None:
        _long(field, values, length)
    return values


def pack(document: dict[str, Any]) -> bytes:
    """The document as a file's bytes; the same document gives the same bytes."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def unpack(data: bytes, name: str) -> dict[str, Any]:
    """The document in a file's bytes, checked.

    Parameters
    ----------
    data
        What `pack` made.
    name
        Of the file, for messages.

    Raises
    ------
    ValueError
        The bytes are not a recording, or one of its fields is wrong; the message names it.
    """
    try:
        document = json.loads(_text(data), parse_constant=_refused)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
        raise ValueError(f"{name} is cut off or no moelab recording ({e}); {_AGAIN}") from None
    try:
        json.dumps(document, ensure_ascii=False).encode()  # half a character is no text
        _schema()(document)
        _columns(document)
        _folded(document)
        _respelled(document)
    except (fastjsonschema.JsonSchemaValueException, ValueError) as e:
        raise ValueError(f"{name}: {str(e).removeprefix('data.')}; {_AGAIN}") from None
    return document


def embedded(page: str, name: str) -> bytes:
    """The packed recording inside an exported page, which is called ``name`` in messages.

    Raises
    ------
    ValueError
        There is none, or it is not base64: the file is damaged.
    """
    found = re.search(re.escape(RECORDING) + r"([^<]*)</script>", page)
    if found is None:
        raise ValueError(f"{name} is a page without a recording; run.report() writes one")
    try:
        return base64.b64decode(found[1], validate=True)
    except binascii.Error as e:
        raise ValueError(f"{name}: the recording inside the page is damaged: {e}") from None


def records(events: Mapping[str, Any]) -> np.ndarray:
    """The events of a document as records of `moelab.scheduling.events.DTYPE`."""
    out = np.empty(events["count"], DTYPE)
    for name, dtype in EVENTS.items():
        out[name] = decoded(events[name], dtype)
    known = np.array([CAUSE.get(word, NONE) for word in (*events["causes"], "")], "u1")
    out["cause"] = known[out["cause"]]
    return out


def _refused(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _text(data: bytes) -> bytes:
    text = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    return text


def _folded(d: dict[str, Any]) -> None:
    """Work figures and summary out of the events again: a file may say other ones, or older."""
    tokens, names, m = len(d["pieces"]), d["columns"], d["model"]
    rows = decoded(d["values"], "<f4", "values", len(names) * tokens).reshape(len(names), tokens)
    given = dict(zip(names, rows.astype(float), strict=True))
    given = dict.fromkeys(LATER_COLUMNS, np.zeros(tokens)) | given
    if missing := {*_NOTED} - given.keys():
        raise ValueError(f"columns must have {min(missing)}")
    for name in _NOTED:
        known = given[name][~np.isnan(given[name])] if name == "kl" else given[name]
        if not ((known >= 0) & (known <= _MOST)).all():  # NaN neither
            raise ValueError(f"values: {name} must be from 0 to {_MOST:g}")
    events, start = records(d["events"]), np.array(list(d["start"].values()), int)
    way = np.array([MOVES.get(kind, 0) for kind in range(len(KINDS))])[events["kind"]]
    moved = way * _sizes(m, *(events[name] for name in d["start"]))
    held = _sizes(m, *start).sum() + np.append(0, moved.cumsum())
    begins = np.array([origin["token"] for origin in d["origins"]])
    ends = np.searchsorted(events["token"], np.arange(tokens), side="right")
    reports = []
    for token, end in enumerate(ends):
        total, *parts, kl, budget = (float(given[name][token]) for name in _NOTED)
        deciding, measuring, setup = (part / 1e3 for part in parts)
        device = d["origins"][np.searchsorted(begins, token, side="right") - 1]["device"]
        noted = Noted(
            *(d["pieces"][token], total / 1e3 + measuring + setup, deciding),
            *(None if np.isnan(kl) else kl, int(held[end]), int(budget), device, int(end)),
            *(measuring, setup),
        )
        reports.append(fold(token, noted, events[ends[token - 1] if token else 0 : end]))
        if reports[-1].compute_ms < -1e-3 * (total + 1):
            raise ValueError(f"values: token {token} took less time than its parts")
    passes.refold(d, events, decoded(d["gates"]["expert"], GATES["expert"]))
    told = d["summary"]
    sums = {"setup_ms": told["setup_ms"], "peak_bytes": told["peak_resident_bytes"]}
    d["summary"] = summary(reports, timing=told["timing"], **sums)
    d |= {"values": encoded(table(reports).T, "<f4"), "columns": list(COLUMNS)}


def _sizes(
    m: dict[str, Any], layer: np.ndarray, expert: np.ndarray, bits: np.ndarray
) -> np.ndarray:
    """Bytes of experts at these bits, [N]."""
    sizes, own = np.zeros(256), m.get("own_bytes", {})
    sizes[list(map(int, m["expert_bytes"]))] = list(m["expert_bytes"].values())
    found = sizes[bits]
    for tier, cells in own.items():
        at = bits == int(tier)
        found[at] = np.array(cells)[layer[at].astype(int) * m["experts"] + expert[at]]
    return found


def _respelled(d: dict[str, Any]) -> None:
    """Write the code of settings from their values: a file's own text is never passed on."""
    for i, entry in enumerate(d["settings"]):
        try:
            entry["code"] = reread(entry["code"])
            if entry["update"]:
                call = reread(f"lab.update({entry['update']})")
                entry["update"] = call.removeprefix("lab.update(").removesuffix(")")
        except ValueError as error:
            raise ValueError(f"settings[{i}] is not the code of settings: {error}") from None


def _columns(d: dict[str, Any]) -> None:
    """What a schema cannot say: lengths that must agree, numbers that must be in range."""
    m, tokens, start, gates = d["model"], len(d["pieces"]), d["start"], d["gates"]
    if sorted(m["expert_bytes"]) != sorted(map(str, m["tiers"])):
        raise ValueError("model.expert_bytes must name the tiers")
    own = m.get("own_bytes", {})
    _among("model.own_bytes", [*own], [*m["expert_bytes"]])
    lengths = {f"model.own_bytes of {b}": (own[b], m["layers"] * m["experts"]) for b in own}
    _within("model.experts", [m["layers"] * m["experts"]], 1, MOST_EXPERTS)
    _within("model.encoder_layers", [m.get("encoder_layers", 0)], 0, m["layers"])
    of_tokens = {"ids": d["ids"], "top.served": d["top"]["served"], "top.full": d["top"]["full"]}
    lengths |= {field: (values, tokens) for field, values in of_tokens.items()}
    for field, (values, length) in lengths.items():
        _long(field, values, length)
    for field in ("origins", "settings"):
        _ordered(field, [entry["token"] for entry in d[field]], tokens)
    _among("settings.shown.bits", [s["shown"]["bits"] for s in d["settings"]], [*m["expert_bytes"]])
    for field, most in (("layer", m["layers"]), ("expert", m["experts"])):
        _long(f"start.{field}", start[field], len(start["bits"]))
        _within(f"start.{field}", start[field], 0, most)
    _among("start.bits", start["bits"], m["tiers"])
    _events(d["events"], m, tokens)
    for name, dtype in GATES.items():
        if gates[name] is not None:
            size = tokens * m["layers"] * gates["K"]
            values = decoded(gates[name], dtype, f"gates.{name}", size)
            if name != "weight":
                _within(f"gates.{name}", values, -1, m["experts"])
    for row, entry in d.get("evictions", {}).items():
        _within(f"evictions.{row}", [int(row)], 0, d["events"]["count"])
        for who in (entry["victim"], *entry["survivors"], ["", "", "", *entry["texts"]]):
            _long(f"evictions.{row}", who, 3 + len(entry["terms"]))


def _events(e: dict[str, Any], m: dict[str, Any], tokens: int) -> None:
    rows = {n: decoded(e[n], dtype, f"events.{n}", e["count"]) for n, dtype in EVENTS.items()}
    limits = {"token": max(1, tokens), "layer": m["layers"], "expert": m["experts"]}
    limits |= {"bytes": 2**31, "kind": len(KINDS), "cause": len(e["causes"])}
    for field, most in limits.items():
        _within(f"events.{field}", rows[field], 0, most)
    _within("events.at", rows["at"], -1, m["layers"])
    for field in ("bits", "bits_asked"):
        _among(f"events.{field}", rows[field], [0, *m["tiers"]])
    for field in ("start_ms", "dur_ms"):
        if not np.isfinite(rows[field]).all():
            raise ValueError(f"events.{field} must be finite")
    if (np.diff(rows["token"].astype(np.int64) * (m["layers"] + 1) + rows["at"]) < 0).any():
        raise ValueError("events.token must be in the order of decisions")


def _ordered(field: str, begins: list[int], tokens: int) -> None:
    """Entries that each hold from a token on, the first from the beginning."""
    _within(f"{field}[0].token", begins[:1], 0, 1)
    _within(f"{field}.token", begins, 0, max(1, tokens))
    if begins != sorted(begins):
        raise ValueError(f"{field} must be in the order of tokens")


def _long(field: str, values: Any, length: int) -> None:
    if len(values) != length:
        raise ValueError(f"{field} has {len(values)} values, {length} are expected")


def _within(field: str, values: Any, low: int, most: int) -> None:
    if len(values) and not (low <= int(np.min(values)) and int(np.max(values)) < most):
        raise ValueError(f"{field} must be from {low} to {most - 1}")


def _among(field: str, values: Any, allowed: list[int]) -> None:
    if len(values) and not np.isin(values, allowed).all():
        raise ValueError(f"{field} must be among {allowed}")
