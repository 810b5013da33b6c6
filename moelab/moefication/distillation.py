"""Distillation: the student learns to predict what the dense teacher predicts.

Only routers, norms and low-rank corrections train, so a step needs no gradient of a large matrix.
In each batch the sequences use different numbers of active experts: one mixture serves them all.
Everything can be stopped at any moment; the next call with the same folder goes on from the last
checkpoint. Where torch.distributed is set up, gradients are averaged over its processes.

Letters: N windows, T tokens of a window.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm.auto import tqdm

from moelab.moefication.grouping import Grouping
from moelab.moefication.student import Shape, Student, set_top_k
from moelab.moefication.targets import Targets, divergence

__all__ = ["Course", "averaged", "distil"]


@dataclass(frozen=True)
class Course:
    """How to train.

    Parameters
    ----------
    tokens
        To train on in all, over every call.
    batch, accumulate
        Windows of one backward pass, and backward passes of one step.
    learning_rate, router_rate
        Of the corrections and norms, and of routers; both warm up and fall to a tenth in the end.
    warm_up, decay
        Shares of the tokens for which the rate rises, and falls.
    top_ks
        Numbers of active experts, taken in turn by the sequences of a batch.
    every_s
        Seconds between checkpoints.
    seed
        Of the order of the windows.
    """

    tokens: int = 1_000_000
    batch: int = 2
    accumulate: int = 2
    learning_rate: float = 6e-4
    router_rate: float = 2e-4
    warm_up: float = 0.01
    decay: float = 0.3
    top_ks: tuple[int, ...] = (4, 8)
    every_s: float = 240.0
    seed: int = 0

    def rate(self, seen: int) -> float:
        """The factor on the learning rates after so many tokens."""
        part = seen / self.tokens
        rise = min(1.0, (part + 1e-3) / max(self.warm_up, 1e-3))
        fall = max(0.0, (part - (1 - self.decay)) / max(self.decay, 1e-9))
        return rise * (1 - 0.9 * min(1.0, fall))


@dataclass
class _State:
    """What a checkpoint holds besides the parameters."""

    seen: int = 0
    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens seen, KL)


def distil(
    student: Student,
    teacher: Any,
    ids: torch.Tensor,
    folder: str | os.PathLike[str],
    *,
    course: Course | None = None,
    seconds: float = math.inf,
    progress: bool = True,
) -> list[tuple[int, float]]:
    """Train a student towards its teacher; go on from the folder's checkpoint if there is one.

    Parameters
    ----------
    student
        Changed in place.
    teacher
        The dense model it was made from.
    ids
        int64 ``[N, T]``, the training text, in windows.
    folder
        For checkpoints and the teacher's targets.
    course
        How to train.
    seconds
        Stop, with a checkpoint, after this time.
    progress
        Show a progress bar.

    Returns
    -------
    list of (int, float)
        Tokens seen, and the mean divergence since the line before, over all calls.
    """
    course, folder = course or Course(), Path(folder)
    names, parameters = zip(*student.trained(), strict=True)
    optimizer = _optimizer(names, parameters, course)
    state = _resume(folder / "checkpoint.pt", student, optimizer)
    targets = Targets(teacher, ids, folder / "targets")
    rank, ranks = _ranks()
    started = saved = time.monotonic()
    order = _order(len(ids), course.batch, course.seed, state.steps * course.accumulate * ranks)
    bar = tqdm(
        total=course.tokens, initial=state.seen, unit="token", desc="distilling",
        disable=not progress or rank > 0,
    )  # fmt: skip
    recent: list[float] = []
    student.train()
    while state.seen < course.tokens and not _out_of_time(started + seconds, ranks):
        optimizer.zero_grad(set_to_none=True)
        for turn in range(course.accumulate * ranks):
            rows = next(order)
            if turn % ranks == rank:
                recent.append(_backward(student, ids, targets, rows, course))
        _average(parameters, ranks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * course.rate(state.seen)
        optimizer.step()
        tokens = course.accumulate * ranks * course.batch * ids.shape[1]
        state.seen, state.steps = state.seen + tokens, state.steps + 1
        bar.update(tokens)
        if state.steps % 10 == 0 or state.seen >= course.tokens:
            state.losses.append((state.seen, sum(recent) / len(recent)))
            bar.set_postfix(kl=f"{state.losses[-1][1]:.3f}")
            recent = []
        if time.monotonic() - saved > course.every_s and rank == 0:
            _save(folder / "checkpoint.pt", student, optimizer, state)
            saved = time.monotonic()
    bar.close()
    student.eval()
    if rank == 0:
        _save(folder / "checkpoint.pt", student, optimizer, state)
    return state.losses


def averaged(
    dense: Any, checkpoints: Sequence[str | os.PathLike[str]], shape: Shape
) -> tuple[Student, int]:
    """A student with the mean of some checkpoints' parameters, and the tokens the last has seen.

    Steps that are still long end up around a minimum; the mean of the last few is nearer to it.
    """
    saved = [torch.load(path, weights_only=True) for path in checkpoints]
    deltas = [one["delta"] for one in saved]
    orders = [deltas[-1][f"model.layers.{i}.mlp.order"] for i in range(len(dense.model.layers))]
    groupings = [Grouping(order.long(), shape.shared, shape.experts) for order in orders]
    student = Student(dense, groupings, shape).eval()
    student.load_delta(
        {name: torch.stack([d[name] for d in deltas]).mean(0) for name, _ in student.trained()}
    )
    return student, max(one["state"]["seen"] for one in saved)


def _backward(
    student: Student, ids: torch.Tensor, targets: Targets, rows: np.ndarray, course: Course
) -> float:
    """One batch's gradient, added; its mean divergence."""
    kinds = len(course.top_ks)
    active = torch.tensor([course.top_ks[i % kinds] for i in range(len(rows))])
    set_top_k(student, active)
    tokens, logs = targets[rows]
    loss = divergence(student(ids[rows]), student.head, tokens, logs)
    (loss / course.accumulate).backward()
    return float(loss.detach())


def _optimizer(
    names: Sequence[str], parameters: Sequence[torch.nn.Parameter], course: Course
) -> torch.optim.Optimizer:
    def is_router(name: str) -> bool:
        return name.endswith(("mlp.router", "mlp.bias"))

    pairs = list(zip(names, parameters, strict=True))
    routers = [p for n, p in pairs if is_router(n)]
    others = [p for n, p in pairs if not is_router(n)]
    groups = [
        {"params": others, "lr": 0.0, "full": course.learning_rate},
        {"params": routers, "lr": 0.0, "full": course.router_rate},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def _order(windows: int, batch: int, seed: int, done: int) -> Iterator[np.ndarray]:
    """Batches of windows, a new permutation each epoch, without the first ``done`` batches."""
    if windows < batch:
        raise ValueError(f"{windows} windows are less than one batch of {batch}; give more text")
    per_epoch = windows // batch
    epoch, skip = divmod(done, per_epoch)
    while True:
        rows = np.random.default_rng((seed, epoch)).permutation(windows)
        for at in range(skip, per_epoch):
            yield np.sort(rows[at * batch : (at + 1) * batch])
        epoch, skip = epoch + 1, 0


def _ranks() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _out_of_time(end: float, ranks: int) -> bool:
    """Whether the time is over for any of the processes: they stop together."""
    over = torch.tensor(float(time.monotonic() > end))
    if ranks > 1:
        distributed.all_reduce(over)
    return bool(over)


def _average(parameters: Sequence[torch.nn.Parameter], ranks: int) -> None:
    """Average gradients over processes, in one piece."""
    if ranks == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    distributed.all_reduce(flat)
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad.copy_(flat[at : at + p.numel()].view_as(p) / ranks)
            at += p.numel()


def _save(path: Path, student: Student, optimizer: torch.optim.Optimizer, state: _State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(
        {"delta": student.delta(), "optimizer": optimizer.state_dict(), "state": vars(state)},
        partial,
    )
    partial.replace(path)


def _resume(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> _State:
    if not path.is_file():
        return _State()
    saved = torch.load(path, weights_only=True)
    student.load_delta(saved["delta"])
    optimizer.load_state_dict(saved["optimizer"])
    return _State(**saved["state"])
