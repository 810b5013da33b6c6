"""Recorded activations: what a scheduler was told, so that it can be told again.

A trace holds one `LayerInput` for every (step, layer) and the changes of settings between them.
Fed the same trace, the same strategy decides the same (see `replay`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, Knobs, LookAhead, Request, Shape, ranked

FORMAT = 4
OLDEST = 3
"""In traces of version 0.3 a key was (layer, expert); T1, T2, low bits and depth were settings."""


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What one MoE layer tells the scheduler in one step.

    Parameters
    ----------
    layer
        Index among the MoE layers.
    experts, weights
        The router's choice and its gate weights, ``[T][K]`` as tuples; experts that count for
        nothing (out of range, weight 0) are left out, so a token may have fewer than K.
    prefill
        A prompt (T >= 1 tokens at once) rather than one decoded token.
    look_ahead
        Coming layers' routers asked with this layer's input, where the strategy wants it.
    wanted, wanted_weights
        The router's own choice and gate weights ``[T][K]`` where a mask or a bias applied; None
        otherwise. See `router_experts`.
    norms
        Euclidean norm of the layer's input, one a token, where a part observes ``"norms"``.
    in_flight
        Keys of resident experts whose bytes had not landed when the router had spoken, where a part
        observes ``"in_flight"``.
    unread
        Keys of prefetches of this layer whose reading had not begun when the router had spoken,
        where a part observes ``"unread"``: they are withdrawn.
    """

    layer: int
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    prefill: bool = False
    look_ahead: tuple[LookAhead, ...] = ()
    wanted: tuple[tuple[int, ...], ...] | None = None
    wanted_weights: tuple[tuple[float, ...], ...] | None = None
    norms: tuple[float, ...] | None = None
    in_flight: tuple[Key, ...] = ()
    unread: tuple[Key, ...] = ()
    asked: list[Request] | None = field(default=None, init=False, repr=False, compare=False)

    def requests(self) -> list[Request]:
        """The layer's unique experts: a token's by falling weight, a prompt's by falling use.

        Worked out once: a stream that is replayed many times is ranked once.
        """
        if self.asked is None:
            object.__setattr__(self, "asked", _requests(self))
        assert self.asked is not None
        return self.asked

    @property
    def router_experts(self) -> tuple[tuple[int, ...], ...]:
        """What the router chose by itself, without mask or bias; ``[T][K]``."""
        return self.experts if self.wanted is None else self.wanted

    @property
    def router_weights(self) -> tuple[tuple[float, ...], ...]:
        """Gate weights of `router_experts`."""
        return self.weights if self.wanted_weights is None else self.wanted_weights


def _requests(given: LayerInput) -> list[Request]:
    if not given.prefill and len(given.experts) == 1:
        return ranked(given.experts[0], given.weights[0], given.layer)
    seen: dict[int, list[float]] = {}
    for row, weights in zip(given.experts, given.weights, strict=True):
        for expert, weight in zip(row, weights, strict=True):
            seen.setdefault(expert, []).append(weight)
    order = sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Request(e, max(w), tokens=len(w), layer=given.layer) for e, w in order]


class Change(NamedTuple):
    """Settings in force from a step on.

    Parameters
    ----------
    at
        Index into the steps.
    knobs
        The settings.
    name, parameters
        Of the strategy.
    fresh
        Whether the strategy begins here, with nothing learnt.
    strategy
        The strategy itself, with what it had learnt by then; kept in memory only.
    pinned
        Experts kept for good, of a trace from a file; else the strategy has them.
    """

    at: int
    knobs: Knobs
    name: str
    fresh: bool = True
    parameters: Mapping[str, Any] | None = None
    strategy: Strategy | None = None
    pinned: Mapping[tuple[int, int], int] | None = None


@dataclass(slots=True)
class Trace:
    """A recorded run: its inputs in order, with settings changes before the step they act on.

    ``resident`` is what was in the cache at the start, least recently used first.
    """

    shape: Shape
    steps: list[LayerInput] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    resident: list[tuple[Key, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def tokens(self) -> int:
        """Steps of the whole model in this trace (the prefill counts as one)."""
        return sum(1 for s in self.steps if s.layer == 0)

    def save(self, path: str | Path) -> Path:
        """Write the trace as JSON."""
        path, shape = Path(path), self.shape
        doc = {
            "format": FORMAT,
            "shape": {"experts": shape.experts, "top_k": shape.top_k, "nbytes": dict(shape.nbytes)},
            "steps": [[_plain(getattr(s, name)) for name in _SAVED] for s in self.steps],
            "changes": [
                (
                    *(c.at, dataclasses.asdict(c.knobs), c.name, c.fresh, dict(c.parameters or {})),
                    list((c.strategy.pinned if c.strategy else c.pinned or {}).items()),
                )
                for c in self.changes
            ],
            "resident": self.resident,
        }
        path.write_text(json.dumps(doc))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace written by `save`.

        Raises
        ------
        ValueError
            The file is not a moelab trace of this format.
        """
        try:
            doc = json.loads(Path(path).read_text())
            return cls(*_parts(doc))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(
                f"{path} is not a moelab trace of format {FORMAT} ({e}); record one with "
                "run.trace.save(path)"
            ) from e


_SAVED = tuple(f.name for f in dataclasses.fields(LayerInput) if f.init)


def _plain(value: Any) -> Any:
    """A field of a step as JSON has it."""
    if value and isinstance(value, tuple) and isinstance(value[0], LookAhead):
        return [(a.layer, a.experts, a.weights) for a in value]
    return value


def _parts(doc: dict) -> tuple:
    if not OLDEST <= doc["format"] <= FORMAT:
        raise ValueError(f"format {doc['format']}")
    nbytes = {int(b): n for b, n in doc["shape"]["nbytes"].items()}
    shape = Shape(tuple(doc["shape"]["experts"]), doc["shape"]["top_k"], nbytes)

    def key(of: Any) -> Key:
        return shape.key(*of) if isinstance(of, list) else of

    return (
        shape,
        [_step(dict(zip(_SAVED, row, strict=True)), key) for row in doc["steps"]],
        [_change(*row) for row in doc["changes"]],
        [(key(of), bits) for of, bits in doc["resident"]],
    )


def _change(at: int, knobs: dict, name: str, fresh: bool, parameters: dict, pins: list) -> Change:
    pinned = {(layer, expert): bits for (layer, expert), bits in pins}
    if "prefetch" in knobs:
        knobs["depth"] = knobs.pop("prefetch")
    old = {n: knobs.pop(n) for n in ("low_bits", "t1", "t2", "depth") if n in knobs}
    return Change(at, Knobs(**knobs), name, fresh, old | parameters, pinned=pinned or None)


def _nested(rows: list[list] | None) -> tuple[tuple, ...] | None:
    return None if rows is None else tuple(map(tuple, rows))


def _step(row: dict[str, Any], key: Callable[[Any], Key]) -> LayerInput:
    for name in ("experts", "weights"):
        row[name] = _nested(row[name]) or ()
    for name in ("wanted", "wanted_weights"):
        row[name] = _nested(row[name])
    for name in ("in_flight", "unread"):
        row[name] = tuple(map(key, row[name]))
    row["look_ahead"] = tuple(LookAhead(at, tuple(e), tuple(w)) for at, e, w in row["look_ahead"])
    row["norms"] = None if row["norms"] is None else tuple(row["norms"])
    return LayerInput(**row)
