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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm.auto import tqdm

from moelab.training.moefy.checkpoints import resume, save
from moelab.training.moefy.student import ROUTER, Student, set_top_k
from moelab.training.moefy.targets import Targets, divergence

__all__ = ["Course", "distil"]


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

    def __post_init__(self) -> None:
        least = {"tokens": self.tokens, "batch": self.batch, "accumulate": self.accumulate}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not self.top_ks or min(self.top_ks) < 1:
            raise ValueError(f"top_ks={self.top_ks} must name numbers of active experts, from 1")

    def rate(self, seen: int) -> float:
        """The factor on the learning rates after so many tokens."""
        part = seen / self.tokens
        rise = min(1.0, (part + 1e-3) / max(self.warm_up, 1e-3))
        fall = max(0.0, (part - (1 - self.decay)) / max(self.decay, 1e-9))
        return rise * (1 - 0.9 * min(1.0, fall))


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
    state = resume(folder / "checkpoint.safetensors", student, optimizer)
    rank, ranks = _ranks()
    targets = _targets(teacher, ids, folder / "targets", rank, ranks)
    started = saved = time.monotonic()
    order = _order(len(ids), course.batch, course.seed, state.batches)
    bar = tqdm(
        total=course.tokens, initial=state.seen, unit="token", desc="distilling",
        disable=not progress or rank > 0,
    )  # fmt: skip
    recent: list[float] = []
    student.train()
    while state.seen < course.tokens and not _out_of_time(started + seconds, ranks):
        optimizer.zero_grad(set_to_none=True)
        for turn in range(course.accumulate * ranks):
            rows, first = next(order), state.batches * course.batch
            if turn % ranks == rank:
                recent.append(_backward(student, ids, targets, rows, course, first))
            state.batches += 1
        _average(parameters, ranks)
        _clip(parameters, state.seen, course)
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
            save(folder / "checkpoint.safetensors", student, optimizer, state)
            saved = time.monotonic()
    bar.close()
    student.eval()
    if rank == 0:
        save(folder / "checkpoint.safetensors", student, optimizer, state)
    return state.losses


def _targets(teacher: Any, ids: torch.Tensor, folder: Path, rank: int, ranks: int) -> Targets:
    """The teacher's; the first process makes their files, the others find them."""
    if rank > 0:
        distributed.barrier()
    targets = Targets(teacher, ids, folder)
    if rank == 0 and ranks > 1:
        distributed.barrier()
    return targets


def _clip(parameters: Sequence[torch.nn.Parameter], seen: int, course: Course) -> None:
    if not torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
        raise FloatingPointError(
            f"the gradient is not finite after {seen} tokens; the checkpoint of before is whole: "
            f"go on from it at a lower rate than {course.learning_rate}"
        )


def _backward(
    student: Student,
    ids: torch.Tensor,
    targets: Targets,
    rows: np.ndarray,
    course: Course,
    first: int,
) -> float:
    """One batch's gradient, added; its mean divergence. ``first`` sequences came before it."""
    kinds = len(course.top_ks)
    active = torch.tensor([course.top_ks[(first + i) % kinds] for i in range(len(rows))])
    set_top_k(student, active)
    tokens, logs = targets[rows]
    loss = divergence(student(ids[rows]), student.head, tokens, logs)
    (loss / course.accumulate).backward()
    return float(loss.detach())


def _optimizer(
    names: Sequence[str], parameters: Sequence[torch.nn.Parameter], course: Course
) -> torch.optim.Optimizer:
    def is_router(name: str) -> bool:
        return name.endswith(ROUTER)

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
