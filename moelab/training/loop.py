"""A training that can be stopped at any moment and goes on where it was: what both trainings share.

A checkpoint is one safetensors file: what trains (`delta/…`), AdamW's two moments of it, and the
state as json.  It takes the place of the one before as a whole; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

MOMENTS = ("exp_avg", "exp_avg_sq")
Trained = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass
class State:
    """How far a training is."""

    seen: int = 0  # tokens
    steps: int = 0
    batches: int = 0  # drawn
    seconds: float = 0.0
    losses: list[Any] = field(default_factory=list)


def run(
    state: State,
    step: Callable[[], Mapping[str, str]],
    save: Callable[[], None],
    *,
    tokens: int,
    every_s: float = 240.0,
    seconds: float = math.inf,
    progress: bool = True,
) -> bool:
    """Step until all tokens are seen or the time is over; False after Ctrl-C or `kill`.

    `step` counts what it did in `state` and returns what the bar shows. A checkpoint is saved every
    so many seconds and at the end, also at a premature one; not if a step fails.
    """
    stopped: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        if stopped:  # asked twice: not even to the end of the step
            raise KeyboardInterrupt
        stopped.append(number)

    heard = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if heard else ()
    handlers = {number: signal.signal(number, stop) for number in signals}
    begun = saved = time.monotonic()
    try:
        with tqdm(total=tokens, initial=state.seen, unit="token", disable=not progress) as bar:
            while state.seen < tokens and not stopped and time.monotonic() - begun < seconds:
                at = time.monotonic()
                bar.set_postfix(step())
                bar.update(state.seen - bar.n)
                state.seconds += time.monotonic() - at
                if time.monotonic() - saved > every_s:
                    save()
                    saved = time.monotonic()
        save()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return not stopped


def save(
    path: Path,
    delta: Mapping[str, torch.Tensor],
    trained: Trained,
    adam: torch.optim.Optimizer,
    state: State,
) -> None:
    """Write a checkpoint under another name, then in place of the one before it."""
    tensors = {f"delta/{name}": value.detach() for name, value in delta.items()}
    for name, parameter in trained:
        moments = adam.state[parameter]
        tensors |= {f"{key}/{name}": moments[key] for key in MOMENTS if key in moments}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"state": json.dumps(asdict(state))})
    partial.replace(path)


def read(path: Path, kind: type[State] = State) -> tuple[dict[str, torch.Tensor], Any]:
    """A checkpoint's tensors and state; a ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, kind(**json.loads(file.metadata()["state"]))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint, or damaged ({error}); delete it to begin this training again"
        ) from error


def part(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, without that beginning."""
    found = (name for name in tensors if name.startswith(f"{prefix}/"))
    return {name.removeprefix(f"{prefix}/"): tensors[name] for name in found}


def put_moments(
    tensors: Mapping[str, torch.Tensor], trained: Trained, adam: torch.optim.Optimizer, steps: int
) -> None:
    """Give the optimiser a checkpoint's moments back."""
    for name, parameter in trained:
        if f"{MOMENTS[0]}/{name}" in tensors:
            entry: dict[str, Any] = {key: tensors[f"{key}/{name}"] for key in MOMENTS}
            adam.state[parameter] = {**entry, "step": torch.tensor(float(steps))}
