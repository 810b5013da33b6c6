"""Distillation: the student learns to predict what the dense teacher predicts.

Only routers, norms and low-rank corrections train, so a step needs no gradient of a large matrix.
In each batch the sequences use different numbers of active experts: one mixture serves them all.
Everything can be stopped at any moment; the next call with the same folder goes on from the last
checkpoint.

Letters: N windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moelab.training import loop
from moelab.training.moefy.student import ROUTER, Student, set_top_k

LIKELIEST = 64
_LEAST = 1e-5  # probability of all other tokens together, for the logarithm


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
        for name in ("tokens", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.top_ks or min(self.top_ks) < 1:
            raise ValueError(f"top_ks={self.top_ks} must name numbers of active experts, from 1")

    def rate(self, seen: int) -> float:
        """The factor on the learning rates after so many tokens."""
        part = seen / self.tokens
        rise = min(1.0, (part + 1e-3) / max(self.warm_up, 1e-3))
        fall = max(0.0, (part - (1 - self.decay)) / max(self.decay, 1e-9))
        return rise * (1 - 0.9 * min(1.0, fall))


# -- what the teacher says


class Targets:
    """The teacher's 64 likeliest next tokens for each window, asked for once and kept in a file.

    The file takes 384 bytes a token, and must belong to these very windows, int64 ``[N, T]``.
    """

    def __init__(self, teacher: Any, ids: torch.Tensor, file: Path) -> None:
        self._teacher, self._ids = teacher, ids
        answer = [("tokens", np.int32, LIKELIEST), ("logs", np.float16, LIKELIEST)]
        window = np.dtype([("known", np.uint8), ("answers", answer, ids.shape[1])])
        size = len(ids) * window.itemsize
        if not file.is_file() or file.stat().st_size != size:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
            os.truncate(file, size)
        self._kept = np.memmap(file, window, mode="r+")

    @torch.no_grad()
    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and log-probabilities float32 of some windows, ``[n, T, 64]``."""
        new = rows[self._kept["known"][rows] == 0]
        if len(new):
            logits = self._teacher(self._ids[new], use_cache=False).logits
            top = logits.log_softmax(-1).topk(LIKELIEST, -1)
            self._kept["answers"]["tokens"][new] = top.indices.numpy()
            self._kept["answers"]["logs"][new] = top.values.numpy()
            self._kept["known"][new] = 1
        answers = self._kept["answers"][rows]
        tokens = torch.from_numpy(answers["tokens"].astype(np.int64))
        return tokens, torch.from_numpy(answers["logs"].astype(np.float32))


def divergence(logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence from the teacher per token, all but its likeliest tokens counted as one.

    ``logits``, ``[..., V]``, are the student's; ``tokens`` and ``logs``, ``[..., 64]``, what the
    teacher finds likeliest, and the log-probabilities.
    """
    ours = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    p, q = logs.exp(), ours.exp()
    rest_p, rest_q = ((1 - part.sum(-1)).clamp(min=_LEAST) for part in (p, q))
    return ((p * (logs - ours)).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()


# -- training


def distil(
    student: Student,
    teacher: Any,
    ids: torch.Tensor,
    folder: Path,
    course: Course,
    *,
    seconds: float,
    progress: bool,
) -> None:
    """Train a student, in place, towards the dense model it was made from; see `moefy`.

    It goes on from the folder's checkpoint if there is one.
    """
    checkpoint, trained = folder / "checkpoint.safetensors", dict(student.trained())
    adam = _optimizer(student, course)
    state = loop.resume(checkpoint, trained, adam)
    targets = Targets(teacher, ids, folder / "targets.bin")
    order = _order(len(ids), course.batch, course.seed, state.drawn)
    recent: list[float] = []

    def step() -> dict[str, str]:
        adam.zero_grad()
        for _ in range(course.accumulate):
            recent.append(_backward(student, ids, targets, next(order), course, state.drawn))
            state.drawn += 1
        if not torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).isfinite():
            raise FloatingPointError(
                f"the gradient is not finite after {state.seen} tokens; the checkpoint of before "
                f"is whole: go on from it at a lower rate than {course.learning_rate}"
            )
        for group in adam.param_groups:
            group["lr"] = group["full"] * course.rate(state.seen)
        adam.step()
        state.seen += course.accumulate * course.batch * ids.shape[1]
        state.steps += 1
        if state.steps % 10 == 0 or state.seen >= course.tokens:
            state.losses.append((state.seen, sum(recent) / len(recent)))
            recent.clear()
        return {"kl": f"{state.losses[-1][1]:.3f}"} if state.losses else {}

    student.train()
    finished = loop.run(
        state, step, lambda: loop.save(checkpoint, trained, state, adam),
        tokens=course.tokens, every_s=course.every_s, seconds=seconds, progress=progress,
    )  # fmt: skip
    student.eval()
    if not finished:
        raise KeyboardInterrupt(f"stopped after {state.seen} tokens; the same call goes on there")


def _backward(
    student: Student,
    ids: torch.Tensor,
    targets: Targets,
    rows: np.ndarray,
    course: Course,
    batches: int,
) -> float:
    """One batch's gradient, added; its mean divergence. So many batches came before it."""
    turns = range(batches * course.batch, (batches + 1) * course.batch)
    set_top_k(student, torch.tensor([course.top_ks[i % len(course.top_ks)] for i in turns]))
    loss = divergence(student.logits(student(ids[rows])), *targets[rows])
    (loss / course.accumulate).backward()
    return float(loss.detach())


def _optimizer(student: Student, course: Course) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [p for n, p in student.trained() if n.endswith(ROUTER) == routers],
            "full": course.router_rate if routers else course.learning_rate,
        }
        for routers in (False, True)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def _order(windows: int, batch: int, seed: int, done: int) -> Iterator[np.ndarray]:
    """Batches of windows, a new permutation each epoch, without the first ``done`` batches."""
    per_epoch = windows // batch
    epoch, skip = divmod(done, per_epoch)
    while True:
        rows = np.random.default_rng((seed, epoch)).permutation(windows)
        for at in range(skip, per_epoch):
            yield np.sort(rows[at * batch : (at + 1) * batch])
        epoch, skip = epoch + 1, 0
