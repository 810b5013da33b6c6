"""Checkpoints of a distillation: parameters, the optimizer's moments, and what was seen.

A file is written under a temporary name and renamed, so that there is always a whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moelab.training.moefy.grouping import Grouping
from moelab.training.moefy.student import Shape, Student

__all__ = ["State", "averaged", "resume", "save"]

_DELTA = "delta/"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """How far a distillation is."""

    seen: int = 0  # tokens
    steps: int = 0
    batches: int = 0  # drawn, by all processes together
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens seen, KL)


def save(path: Path, student: Student, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write a checkpoint, in place of the one before it."""
    tensors = {_DELTA + name: value for name, value in student.delta().items()}
    for name, parameter in student.trained():
        moments = optimizer.state[parameter]
        tensors |= {f"{key}/{name}": moments[key] for key in _MOMENTS if key in moments}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"state": json.dumps(asdict(state))})
    partial.replace(path)


def resume(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> State:
    """Put a checkpoint's values in place; without a file a state of nothing seen.

    Raises
    ------
    ValueError
        The file is damaged, or of another student.
    """
    if not path.is_file():
        return State()
    tensors, state = _read(path)
    student.load_delta(_of(_DELTA, tensors))
    for name, parameter in student.trained():
        moments = {key: tensors[f"{key}/{name}"] for key in _MOMENTS if f"{key}/{name}" in tensors}
        if moments:
            optimizer.state[parameter] = {"step": torch.tensor(float(state.steps)), **moments}
    return state


def averaged(
    dense: Any, checkpoints: Sequence[str | os.PathLike[str]], shape: Shape
) -> tuple[Student, int]:
    """A student with the mean of some checkpoints' parameters, and the tokens the last has seen.

    Steps that are still long end up around a minimum; the mean of the last few is nearer to it.
    """
    read = [_read(Path(path)) for path in checkpoints]
    deltas = [_of(_DELTA, tensors) for tensors, _ in read]
    orders = [deltas[-1][f"model.layers.{i}.mlp.order"] for i in range(len(dense.model.layers))]
    groupings = [Grouping(order.long(), shape.shared, shape.experts) for order in orders]
    student = Student(dense, groupings, shape).eval()
    student.load_delta(
        {name: torch.stack([d[name] for d in deltas]).mean(0) for name, _ in student.trained()}
    )
    return student, max(state.seen for _, state in read)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], State]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, State(**json.loads(file.metadata()["state"]))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint, or damaged ({error}); delete it to begin again from the "
            "calibration beside it"
        ) from error


def _of(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
