"""Recorded activations: what a scheduler was told, so that it can be told again.

A trace holds one `LayerInput` for every (step, layer) and the changes of settings between them.
Fed the same trace, the same strategy decides the same (see `replay`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, Knobs, LookAhead, Shape

FORMAT = 3


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
        Resident experts whose bytes had not landed when the router had spoken, where a part
        observes ``"in_flight"``.
    unread
        Prefetches of this layer whose reading had not begun when the router had spoken, where a
        part observes ``"unread"``: they are withdrawn.
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

    @property
    def router_experts(self) -> tuple[tuple[int, ...], ...]:
        """What the router chose by itself, without mask or bias; ``[T][K]``."""
        return self.experts if self.wanted is None else self.wanted

    @property
    def router_weights(self) -> tuple[tuple[float, ...], ...]:
        """Gate weights of `router_experts`."""
        return self.weights if self.wanted_weights is None else self.wanted_weights


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
    keep
        Experts kept for good, of a trace from a file; else the strategy has them.
    """

    at: int
    knobs: Knobs
    name: str
    fresh: bool = True
    parameters: Mapping[str, Any] | None = None
    strategy: Strategy | None = None
    keep: Mapping[Key, int] | None = None


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
        path = Path(path)
        doc = {
            "format": FORMAT,
            "shape": dataclasses.asdict(self.shape),
            "steps": [dataclasses.astuple(s) for s in self.steps],
            "changes": [
                (
                    *(c.at, dataclasses.asdict(c.knobs), c.name, c.fresh, dict(c.parameters or {})),
                    list((c.strategy.keep if c.strategy else c.keep or {}).items()),
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


def _parts(doc: dict) -> tuple:
    if doc["format"] != FORMAT:
        raise ValueError(f"format {doc['format']}")
    shape = doc["shape"]
    nbytes = {int(b): n for b, n in shape["nbytes"].items()}
    return (
        Shape(tuple(shape["experts"]), shape["top_k"], nbytes),
        [_step(row) for row in doc["steps"]],
        [_change(*row) for row in doc["changes"]],
        [((layer, expert), bits) for (layer, expert), bits in doc["resident"]],
    )


def _change(at: int, knobs: dict, name: str, fresh: bool, parameters: dict, keep: list) -> Change:
    kept = {(layer, expert): bits for (layer, expert), bits in keep}
    return Change(at, Knobs(**knobs), name, fresh, parameters, keep=kept or None)


def _nested(rows: list[list] | None) -> tuple[tuple, ...] | None:
    return None if rows is None else tuple(tuple(r) for r in rows)


def _step(row: list) -> LayerInput:
    layer, experts, weights, prefill, ahead, wanted, wanted_weights, norms, in_flight, unread = row
    return LayerInput(
        layer,
        _nested(experts) or (),
        _nested(weights) or (),
        prefill,
        tuple(LookAhead(lay, tuple(e), tuple(w)) for lay, e, w in ahead),
        _nested(wanted),
        _nested(wanted_weights),
        None if norms is None else tuple(norms),
        _nested(in_flight) or (),
        _nested(unread) or (),
    )
