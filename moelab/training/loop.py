"""A training that can be stopped at any moment and goes on where it was: what both trainings share.

A checkpoint is one safetensors file: what trains (`delta/…`), AdamW's two moments of it or Muon's
one, and the state as json.  It takes the place of the one before as a whole; nothing is pickled.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
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

KEPT = ("delta", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""Of each parameter: its values, and its optimizer's moments once that has taken a step."""
Trained = Mapping[str, torch.nn.Parameter]


@dataclass
class State:
    """How far a training is."""

    seen: int = 0  # tokens
    steps: int = 0
    seconds: float = 0.0
    drawn: Any = 0  # what was taken of the text so far
    losses: list[Any] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)


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


def _owners(optimizers: Iterable[torch.optim.Optimizer]) -> dict[torch.Tensor, dict[str, Any]]:
    """By parameter, the state that its optimizer keeps of it."""
    return {
        parameter: optimizer.state[parameter]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def export(
    out: Path, model: Any, tokenizer: Path, settings: Mapping[str, Any], state: State, **story: Any
) -> Path:
    """Write the bf16 checkpoint, its tokenizer and `training.json` to ``out/model``.

    ``settings``: of its generation; ``story``: what `training.json` tells besides the state.
    """
    partial, final = out / "model.partial", out / "model"
    shutil.rmtree(partial, ignore_errors=True)
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config.update(**settings)
    model.save_pretrained(partial)
    shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
    told = {"recipe": state.recipe, "tokens": state.seen, "steps": state.steps}
    told |= {"seconds": round(state.seconds), "threads": torch.get_num_threads()}
    told |= {"curve": state.losses} | story
    (partial / "training.json").write_text(json.dumps(told, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def save(path: Path, trained: Trained, state: State, *optimizers: torch.optim.Optimizer) -> None:
    """Write a checkpoint under another name, then in place of the one before it."""
    tensors, kept = {}, _owners(optimizers)
    for name, parameter in trained.items():
        parts = {"delta": parameter.detach(), **kept[parameter]}
        tensors |= {f"{key}/{name}": parts[key].contiguous() for key in KEPT if key in parts}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"state": json.dumps(asdict(state))})
    partial.replace(path)


@torch.no_grad()
def resume(path: Path, trained: Trained, *optimizers: torch.optim.Optimizer) -> State:
    """Put a checkpoint's values and moments in place; a new `State` where there is no file.

    Raises
    ------
    ValueError
        The file is damaged, or is another training's.
    """
    if not path.is_file():
        return State()
    try:
        with safe_open(path, "pt") as file:
            state, known = State(**json.loads(file.metadata()["state"])), set(file.keys())
            kept = _owners(optimizers)
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(f"delta/{name}"))
                moments = {
                    key: file.get_tensor(f"{key}/{name}")
                    for key in KEPT[1:]
                    if f"{key}/{name}" in known
                }
                if moments:
                    kept[parameter].update(moments, step=torch.tensor(float(state.steps)))
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no checkpoint, or damaged ({error}); delete it to begin this training again"
        ) from error
    return state
