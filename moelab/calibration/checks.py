"""What a profile has to look like to be used: sizes and ranges of each calibration's numbers.

A profile may come from anybody. It is held against the model once, when it is read, so that nothing
of it can fail in the middle of a run.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import fastjsonschema

from moelab.calibration.figures import FIGURES
from moelab.scheduling.stream import Shape
from moelab.store.manifest import digest
from moelab.store.mixed import BITS, FORMS
from moelab.strategies import CALIBRATED, make
from moelab.strategies.edgemoe_paths import PathTable
from moelab.strategies.swapmoe_planner import HIDDEN

MOST_BYTES = 256 * 2**20
"""A file larger than this is not read."""
_MOST = 1e15
_LARGEST_WEIGHT = 1e4
"""Of a net: what it computes in single precision stays finite."""
_NUMBER = {"type": "number", "minimum": -_MOST, "maximum": _MOST}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_PASSED: set[str] = set()
"""Digests of what has passed, with its model: a profile is read at every change of strategy."""
_WHOLE = {"type": "integer", "minimum": 0, "maximum": 2**31}


def _row(of: Any, length: int) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": length, "maxItems": length}


def _named(pattern: str, of: Any) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {pattern: of}, "additionalProperties": False}


def _fields(name: str, shape: Shape, data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a calibration's data, as a JSON schema; L layers, E experts of each."""
    layers = shape.layers

    def table(more: int = 0) -> dict[str, Any]:  # [L][E + more]
        rows = [_row(_NUMBER, count + more) for count in shape.experts]
        return {"type": "array", "items": rows, "minItems": layers, "maxItems": layers}

    quality = {"enum": list(FIGURES)}
    if name == "adapmoe":
        return {"h": _row(_NUMBER, layers), "hits": table(1), "tau": _NUMBER | {"minimum": 0}}
    if name == "hobbit":
        return {"t1": _SHARE, "t2": _SHARE, "weights": _row(_SHARE, 4)}
    if name == "mixed":
        costs = _row(_row(_NUMBER | {"minimum": 0}, len(BITS)), len(data["projections"]))
        errors = [_row(costs, count) for count in shape.experts]
        return {
            "forms": _row({"enum": list(FORMS)}, shape.n),
            "projections": {"enum": [[[0], [1], [2]], [[0, 1], [2]]]},
            "kl": _row(costs, layers),
            "errors": {"type": "array", "items": errors, "minItems": layers, "maxItems": layers},
            "held_out": _named(r"^\w{1,5}$", _NUMBER),
        }
    if name == "flashmoe":
        hidden = len(data["nets"][0][0][1])
        nets = [_net(hidden, count) for count in shape.experts]
        return {"nets": {"type": "array", "items": nets, "minItems": layers, "maxItems": layers}}
    if name == "edgemoe":
        place = r"\d{1,6}(\.\d{1,6})*"
        return {
            "importance": table(),
            "levels": _named(r"^\d{1,2}$", _NUMBER),
            "curves": _named(r"^\d{1,2}/\d{1,2}$", {"items": _row(_NUMBER, 2), "type": "array"}),
            "tolerated": _NUMBER | {"minimum": 0},
            "quality": quality,
            "paths": _named(rf"^\d{{1,6}}(:({place})?)*$", {"type": "array", "items": _WHOLE}),
        }
    counts = {"type": "array", "items": _WHOLE | {"minimum": 1}, "minItems": 1, "maxItems": 64}
    every, kept = (data.get(key) for key in ("every", "kept"))
    sizes = [len(known) if isinstance(known, list) else 0 for known in (every, kept)]
    measured = _row(_row(_row(_NUMBER, sizes[1]), layers), sizes[0])
    return dict.fromkeys(("norms", "counts", "soft", "importance"), table()) | {
        **dict.fromkeys(("every", "kept"), counts),
        **dict.fromkeys(("loss", "swaps"), measured),
        "plans": _named(r"^\d{1,6}$", _plan(shape)),
        "base_ms": _NUMBER | {"exclusiveMinimum": 0},
        "swap_ms": _NUMBER | {"minimum": 0},
        "network": _network(layers),
        "quality": quality,
        "planned_by": {"enum": ["network", "added"]},
    }


def _plan(shape: Shape) -> dict[str, Any]:
    """One of SwapMoE's plans: inputs between two updates, and experts of each layer."""
    held = [_WHOLE | {"maximum": count} for count in shape.experts]
    rows = {"type": "array", "items": held, "minItems": shape.layers, "maxItems": shape.layers}
    fields = {"f": _WHOLE | {"minimum": 1}, "experts": rows}
    return {"type": "object", "properties": fields, "required": list(fields)}


def _network(layers: int) -> dict[str, Any]:
    """SwapMoE's estimator of quality: one hidden layer over f and the parts of L layers."""
    units = _row(_NUMBER, HIDDEN)
    fields = {"hidden": _row(_row(_NUMBER, 1 + layers), HIDDEN), "hidden_bias": units, "out": units}
    fields |= {"out_bias": _NUMBER, "experts": _row(_WHOLE | {"minimum": 1}, layers)}
    names = list(fields)
    return {
        "type": "object", "properties": fields, "required": names, "additionalProperties": False
    }  # fmt: skip


def _net(hidden: int, experts: int) -> dict[str, Any]:
    """FlashMoE's net of one layer: 2E -> H -> H -> E."""
    weight = _NUMBER | {"minimum": -_LARGEST_WEIGHT, "maximum": _LARGEST_WEIGHT}
    sizes = itertools.pairwise((2 * experts, hidden, hidden, experts))
    pairs = [[_row(_row(weight, inputs), out), _row(weight, out)] for inputs, out in sizes]
    exactly = {"type": "array", "minItems": 2, "maxItems": 2}
    rows = [{**exactly, "items": pair} for pair in pairs]
    return {"type": "array", "items": rows, "minItems": 3, "maxItems": 3}


def check(name: str, data: Any, shape: Shape) -> None:
    """Refuse data that a strategy could not use on this model.

    Raises
    ------
    ValueError
        A field is missing, of another size, or out of range; the message names it.
    """
    if not isinstance(data, dict):
        raise ValueError("its data are no object")  # noqa: TRY004, one kind of error for a file
    try:
        about = digest(json.dumps([name, data, repr(shape)]).encode())
        if about not in _PASSED:
            _try(name, data, shape)
            _PASSED.add(about)
    except fastjsonschema.JsonSchemaValueException as error:
        raise ValueError(error.message.removeprefix("data.")[:200]) from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}"[:200]) from None


def _try(name: str, data: dict[str, Any], shape: Shape) -> None:
    fields = _fields(name, shape, data)
    needed = [f for f in fields if f in data or name == "mixed"]
    known = {"type": "object", "properties": fields, "required": needed}
    fastjsonschema.validate(known, data)
    if name == "edgemoe":
        PathTable.of(data["paths"]).pairs(shape.experts)  # refuses experts that there are not
    for strategy, calibration in CALIBRATED.items():
        if calibration == name:
            make(strategy, data)
