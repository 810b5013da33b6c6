"""Recorded activations: what a scheduler was told, so that it can be told again.

A trace holds one `LayerInput` for every (step, layer) and the changes of settings between them.
Fed the same trace, the same strategy decides the same (see `replay`).
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, Knobs, LookAhead, Shape
from moelab.scheduling.writing import write_atomically

FORMAT = 6
OLDEST = 3
"""In traces of version 0.3 a key was (layer, expert); T1, T2, low bits and depth were settings."""
NEW_IN_5 = NEW_IN_6 = 2  # fields of a step that earlier formats lack: the last ones
MOST_BYTES = 512 * 2**20  # a larger file is refused before it is read
MOST_EXPERTS, MOST_LAYERS = 2**20, 2**12
LONGEST = 100  # characters of a parameter that is a word
MOST = 2**60  # of bytes; no weight, norm or parameter is larger either


@dataclass(slots=True)
class Trace:
    """A recorded run: its inputs in order, with settings changes before the step they act on.

    ``resident`` is what was in the cache at the start, least recently used first; ``lacks``, what
    whoever recorded it did not say (see `moelab.replays.foreign`). ``kept``: pass -> its rows that
    stand, of drafted passes some of whose tokens were rejected.
    """

    shape: Shape
    steps: list[LayerInput] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    resident: list[tuple[Key, int]] = field(default_factory=list)
    lacks: tuple[str, ...] = ()
    kept: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def tokens(self) -> int:
        """Steps of the whole model in this trace (the prefill counts as one)."""
        return len(self.passes)

    @property
    def decoded(self) -> int:
        """Tokens that were decoded, those kept of a drafted pass each."""
        first = self.shape.path().start
        return sum(len(s.experts) for s in self.learnt() if s.layer == first and not s.prefill)

    @property
    def passes(self) -> list[int]:
        """Indices of the steps with which the whole model begins."""
        begins = self.shape.begins
        return [i for i, s in enumerate(self.steps) if begins(s.layer, prefill=s.prefill)]

    def learnt(self) -> Iterator[LayerInput]:
        """The steps without what was rolled back: what may be learnt from."""
        for i, given in enumerate(self.steps):
            kept = self.kept.get(self.shape.passes_of(i))
            yield given if kept is None else given.verified(kept)

    def end_of_pass(self, kept: int) -> None:
        """Of the pass that has just ended, ``kept`` rows stand."""
        if self.steps and not self.steps[-1].prefill and kept < len(self.steps[-1].experts):
            self.kept[self.shape.passes_of(len(self.steps)) - 1] = kept

    def document(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        shape, own = self.shape, {}
        for name in ("encoder_layers", "free", "own"):
            own |= {name: getattr(shape, name)} if getattr(shape, name) else {}
        model = {"experts": shape.experts, "top_k": shape.top_k, "nbytes": dict(shape.nbytes)}
        names = SAVED if shape.free else SAVED[:-NEW_IN_6]
        return {
            "format": FORMAT if own or self.kept else FORMAT - 1,
            "shape": model | own,
            "steps": [[_plain(getattr(s, name)) for name in names] for s in self.steps],
            "changes": [
                (
                    *(c.at, dataclasses.asdict(c.knobs), c.name, c.fresh, dict(c.parameters or {})),
                    list((c.strategy.pinned if c.strategy else c.pinned or {}).items()),
                )
                for c in self.changes
            ],
            "resident": self.resident,
            "lacks": self.lacks,
            "kept": sorted(self.kept.items()),
        }

    def save(self, path: str | Path) -> Path:
        """Write the trace as JSON, or as Parquet where the path ends in ``.parquet``."""
        path = Path(path)
        write, _ = FILES.get(path.suffix, FILES[""])
        write_atomically(path, write(self.document()))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace written by `save`.

        Raises
        ------
        ValueError
            It is not a moelab trace of this format, or one of its numbers is out of range: what is
            loaded can be decided. The message names the file.
        OSError
            The file cannot be read.
        """
        path = Path(path)
        try:
            _whole(path.stat().st_size, 2, MOST_BYTES, "its size")
            _, read = FILES.get(path.suffix, FILES[""])
            return cls(*_parts(read(path.read_bytes())))
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise ValueError(
                f"{path} is not a moelab trace of format {FORMAT} ({e}); record one with "
                "run.trace.save(path)"
            ) from e


def unrecorded(trace: Trace, strategy: Strategy) -> list[str]:
    """What a strategy goes by, and no step of a trace has: it goes by less then."""
    wants = sorted(strategy.observes & {"probabilities", "embedding"})
    return [name for name in wants if all(getattr(s, name) is None for s in trace.steps)]


SAVED = tuple(f.name for f in dataclasses.fields(LayerInput) if f.init)
FILES: dict[str, tuple[Callable[[dict[str, Any]], bytes], Callable[[bytes], Any]]] = {
    "": (lambda doc: json.dumps(doc).encode(), json.loads)
}
"""How a document is written and read, by the suffix of the file; ``""``: any other."""


def _plain(value: Any) -> Any:
    """A field of a step as JSON has it."""
    if value and isinstance(value, tuple) and isinstance(value[0], LookAhead):
        return [(a.layer, a.experts, a.weights) for a in value]
    return list(value) if isinstance(value, array) else value


def _parts(doc: dict) -> tuple:
    """Shape, steps, changes and residents of a document, each number held against its range."""
    _whole(doc["format"], OLDEST, FORMAT, "format")
    shape = _shape(**doc["shape"])

    def key(of: Any) -> Key:
        if isinstance(of, list):
            layer = _whole(of[0], 0, shape.layers - 1, "layer of an expert")
            return shape.key(layer, _whole(of[1], 0, shape.experts[layer] - 1, "expert"))
        return _whole(of, 0, shape.n - 1, "key of an expert")

    steps = []
    for i, row in enumerate(doc["steps"]):
        lacks = len(SAVED) - len(row)
        known = lacks in (0, NEW_IN_6, NEW_IN_5 + NEW_IN_6)
        given = dict(zip(SAVED, (*row, *[None] * (lacks * known)), strict=True))
        behind = steps[-1].layer if steps else shape.layers - 1
        prompt = given["prefill"] is True and behind == shape.layers - 1
        due = 0 if prompt else shape.following(behind)
        _whole(given["layer"], due, due, f"layer of step {i}")
        steps.append(_step(given, shape, key))
    changes = [_change(shape, *row) for row in doc["changes"]]
    ats = [change.at for change in changes]
    if ats != sorted(ats) or (ats and ats[-1] > len(steps)):
        raise ValueError(f"changes at {ats[:8]} of {len(steps)} steps are not in order")
    resident = [(key(of), _bits(shape, bits)) for of, bits in doc["resident"]]
    if len({of for of, _ in resident}) < len(resident):
        raise ValueError("an expert is resident twice")
    lacks = tuple(map(_word, doc.get("lacks", ())))
    _whole(sum(map(len, lacks)), 0, LONGEST * 10, "length of what it lacks")
    kept: dict[int, int] = {}
    for at, rows in doc.get("kept", ()):
        _whole(at, 0, len(steps) // shape.layers - 1, "drafted pass")
        kept[at] = _whole(rows, 1, len(steps[at * shape.layers].experts), "rows kept of a pass")
    return shape, steps, changes, resident, lacks, kept


def _whole(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {str(value)[:40]}; a whole number from {low} to {high}")
    return value


def _real(value: Any, what: str, low: float = 0, high: float = MOST) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # NaN neither
        raise ValueError(f"{what} is {str(value)[:40]}; a number from {low} to {high:.2g}")
    return float(value)


def _array(values: Any, low: float, high: float, what: str) -> array[float]:
    return array("d", [_real(value, what, low, high) for value in values])


def _word(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{str(value)[:40]} is neither a number nor a word")
    return value


def _bits(shape: Shape, bits: Any) -> int:
    if type(bits) is not int or bits not in shape.nbytes:
        raise ValueError(f"{str(bits)[:40]} bit is none of the tiers {sorted(shape.nbytes)}")
    return bits


def _shape(
    experts: list, top_k: Any, nbytes: dict, encoder_layers: Any = 0, free: Any = 0, own: Any = ()
) -> Shape:
    _whole(len(experts), 1, MOST_LAYERS, "number of layers")
    for count in experts:
        _whole(count, 1, MOST_EXPERTS, "number of experts")
    _whole(sum(experts), 1, MOST_EXPERTS, "number of experts")
    _whole(top_k, 1, min(experts), "top_k")
    tiers = {_whole(int(b), 1, 32, "bits"): _whole(n, 1, MOST, "bytes") for b, n in nbytes.items()}
    _whole(len(tiers), 1, 32, "number of tiers")
    _whole(encoder_layers, 0, len(experts) - 1, "number of encoder layers")
    _whole(free, 0, MOST_EXPERTS, "free")
    of_each = {}
    for bits, sizes in dict(own).items():
        _whole(len(sizes), sum(experts), sum(experts), "number of sizes")
        most = tiers[int(bits)]
        of_each[int(bits)] = tuple(_whole(n, 1, most, "bytes of an expert") for n in sizes)
    return Shape(tuple(experts), top_k, tiers, encoder_layers, free, of_each)


def _change(
    shape: Shape, at: int, knobs: dict, name: str, fresh: bool, parameters: dict, pins: list
) -> Change:
    known = {"budget_bytes", "bits", "prefetch", "low_bits", "t1", "t2", "depth"}
    if type(name) is not str or type(fresh) is not bool or knobs.keys() - known:
        raise ValueError(f"a change of settings to {str(name)[:40]!r} is not one")
    pinned = {}
    for (layer, expert), bits in pins:
        _whole(layer, 0, shape.layers - 1, "layer of a pin")
        _whole(expert, 0, shape.experts[layer] - 1, "expert of a pin")
        pinned[layer, expert] = _bits(shape, bits)
    if "prefetch" in knobs:
        knobs["depth"] = knobs.pop("prefetch")
    own = {n: knobs.pop(n) for n in ("low_bits", "t1", "t2", "depth") if n in knobs} | parameters
    for what, value in own.items():
        if type(value) in (int, float):
            _real(value, what, low=-MOST)
        elif value is not None and type(value) is not bool and len(_word(value)) > LONGEST:
            raise ValueError(f"{what} has {len(value)} characters; {LONGEST} at most")
    if own.get("low_bits") is not None:
        _bits(shape, own["low_bits"])
    budget = _whole(knobs["budget_bytes"], 0, MOST, "budget_bytes")
    now = Knobs(budget, _bits(shape, knobs["bits"]))
    return Change(_whole(at, 0, MOST, "at"), now, name, fresh, own, pinned=pinned or None)


def _chosen(
    experts: list, weights: list, most: int, what: str, low: int = 0
) -> tuple[tuple, tuple]:
    """One token's experts and their weights."""
    for expert in experts:
        _whole(expert, low, most - 1, f"expert of {what}")
    if len(set(experts)) < len(experts) or len(experts) != len(weights):
        raise ValueError(f"{what} has {len(experts)} experts and {len(weights)} weights")
    return tuple(experts), tuple(_real(w, f"weight of {what}") for w in weights)


def _step(row: dict[str, Any], shape: Shape, key: Callable[[Any], Key]) -> LayerInput:
    most = shape.experts[row["layer"]]
    tokens = len(row["experts"])
    if type(row["prefill"]) is not bool or not tokens:
        raise ValueError(f"a step of {tokens} tokens with prefill {str(row['prefill'])[:40]}")
    for experts, weights in (("experts", "weights"), ("wanted", "wanted_weights")):
        if row[experts] is None and row[weights] is None and experts == "wanted":
            continue
        each = zip(row[experts], row[weights], strict=True)
        rows = [_chosen(es, ws, most, "a token") for es, ws in each]
        row[experts], row[weights] = tuple(zip(*rows, strict=True))
        _whole(len(rows), tokens, tokens, "tokens of a step")
    free = zip(row["free"] or (), row["free_weights"] or (), strict=True)
    found = [_chosen(es, ws, most + shape.free, "a free choice", most) for es, ws in free]
    _whole(len(found) or tokens, tokens, tokens, "tokens of a step")
    row["free"], row["free_weights"] = tuple(zip(*found, strict=True)) or ((), ())
    ahead = []
    for layer, es, ws in row["look_ahead"]:
        _whole(layer, 0, shape.layers - 1, "layer ahead")
        ahead.append(LookAhead(layer, *_chosen(es, ws, shape.experts[layer], "a layer ahead")))
    norms = row["norms"]
    if norms is not None:
        norms = tuple(_real(norm, "norm") for norm in norms)
        _whole(len(norms), tokens, tokens, "norms of a step")
    row |= {name: tuple(map(key, row[name])) for name in ("in_flight", "unread")}
    row |= {"look_ahead": tuple(ahead), "norms": norms}
    if row["probabilities"] is not None:
        row["probabilities"] = _array(row["probabilities"], 0, 1, "probability")
        _whole(len(row["probabilities"]), most, most, "probabilities of a step")
    if row["embedding"] is not None:
        row["embedding"] = _array(row["embedding"], -MOST, MOST, "embedding")
    return LayerInput(**row)
