"""Recorded activations: what a scheduler was told, so that it can be told again.

A trace holds one `LayerInput` for every (step, layer) and the changes of settings between them.
Fed the same trace, the same strategy decides the same (see `replay`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from moelab.scheduling.strategy import Key, Knobs, LookAhead, Shape

FORMAT = 1


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
    wanted
        The router's own choice ``[T][K]`` where a mask applied; None otherwise.
    """

    layer: int
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    prefill: bool = False
    look_ahead: tuple[LookAhead, ...] = ()
    wanted: tuple[tuple[int, ...], ...] | None = None


@dataclass(slots=True)
class Trace:
    """A recorded run: its inputs in order, with settings changes before the step they act on.

    ``changes`` holds (index into ``steps``, knobs, strategy name, whether the strategy starts
    afresh there); ``resident`` what was in the cache at the start, least recently used first.
    """

    shape: Shape
    steps: list[LayerInput] = field(default_factory=list)
    changes: list[tuple[int, Knobs, str, bool]] = field(default_factory=list)
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
            "changes": [(i, dataclasses.asdict(k), *rest) for i, k, *rest in self.changes],
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
        [_step(*row) for row in doc["steps"]],
        [(i, Knobs(**k), name, fresh) for i, k, name, fresh in doc["changes"]],
        [((layer, expert), bits) for (layer, expert), bits in doc["resident"]],
    )


def _nested(rows: list[list[int]]) -> tuple[tuple, ...]:
    return tuple(tuple(r) for r in rows)


def _step(layer, experts, weights, prefill, look_ahead, wanted) -> LayerInput:  # noqa: ANN001
    ahead = tuple(LookAhead(lay, tuple(e), tuple(w)) for lay, e, w in look_ahead)
    want = None if wanted is None else _nested(wanted)
    return LayerInput(layer, _nested(experts), _nested(weights), prefill, ahead, want)
