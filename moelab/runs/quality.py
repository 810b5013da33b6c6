"""Quality against full precision: KL divergence, same-top-1, perplexity, on real logits.

`score_ids` decodes every position through the engine, beside the full-precision model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moelab.engine.generation import Ids, Reference, likeliest, threads
from moelab.runs.rouge import Rouge
from moelab.runs.run import Likeliest

if TYPE_CHECKING:
    from tqdm import tqdm

    from moelab.engine.engine import Engine

CHUNK = 64
"""Positions whose full-precision logits are held at a time."""


def kl_divergence(full: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
    """KL(full || degraded) in nats from logits ``[..., V]``; shape ``[...]``, float64, >= 0."""
    p = torch.log_softmax(full.double(), -1)
    q = torch.log_softmax(degraded.double(), -1)
    # What has no probability at full precision counts for nothing, also where neither has any.
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0.0)


@dataclass(frozen=True, slots=True)
class Score:
    """Teacher-forced quality over a text.

    KL in nats per token (full against degraded), ``same_top1`` the share of tokens whose likeliest
    next token is the same, perplexities over the text, ``perplexity_ratio`` = degraded / full. Of
    an encoder-decoder ``rouge`` of its greedy summaries, ``rouge_full`` at full precision.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    same_top1: float
    perplexity: float
    perplexity_full: float
    perplexity_ratio: float
    rouge: Rouge | None = None
    rouge_full: Rouge | None = None


@contextlib.contextmanager
def unhurried(engine: Engine) -> Iterator[None]:
    """Inside, an emulated device is not waited for, unless the strategy goes by what has landed."""
    if "in_flight" not in engine.scheduler.strategy.observes:
        engine.loader.use("disk")
    try:
        yield
    finally:
        engine.loader.use(engine.settings.device)


def score_ids(engine: Engine, texts: Sequence[Ids], *, progress: bool = True) -> Score:
    """Score token ids ``[text][position]`` teacher-forced, two or more of each text."""
    from tqdm.auto import tqdm

    engine.store.require_weights("a score")
    kl, same, nll = [], [], []
    total = sum(map(len, texts))
    with unhurried(engine), tqdm(total=total, disable=not progress, desc="score") as bar:
        for ids in texts:
            for full, served, target in _decoded(engine, ids, bar):
                kl.append(float(kl_divergence(full, served)))
                same.append(bool(full.argmax() == served.argmax()))
                logs = [torch.log_softmax(x.double(), -1) for x in (full, served)]
                nll.append([-float(log[target]) for log in logs])
    full, degraded = np.exp(np.mean(nll, axis=0)).tolist()
    return Score(
        tokens=len(kl),
        kl_mean=float(np.mean(kl)),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        same_top1=float(np.mean(same)),
        perplexity=degraded,
        perplexity_full=full,
        perplexity_ratio=degraded / full,
    )


def _decoded(
    engine: Engine, ids: Ids, bar: tqdm
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """At each position: full logits ``[V]``, those served, and the token that follows."""
    from moelab.engine.generation import Decoder, Reference  # the kernels are heavy

    engine.new_sequence(record=False)
    engine.prefill = False  # one token at a time, under the rules of decoding
    decoder, reference = Decoder(engine, ids.source), Reference(engine, ids.source)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        full = reference.logits(ids[: start + len(chunk)], keep=len(chunk))
        for i, token in enumerate(chunk):
            logits = decoder.step([token])
            engine.end_of_token()
            if start + i + 1 < len(ids):
                yield full[i], logits, ids[start + i + 1]
            bar.update()


class Measure:
    """What a run's tokens are held against: the likeliest tokens, and the KL where it is asked for.

    ``seconds`` is what the last one took, ``kl`` what it found.
    """

    def __init__(self, engine: Engine, source: Sequence[int] = ()) -> None:
        self._engine, self._source = engine, source
        self._reference: Reference | None = None
        self.kl: float | None = None
        self.seconds = 0.0

    def __call__(
        self, context: list[int], logits: torch.Tensor, token: int, drawn: int
    ) -> Likeliest:
        """The likeliest tokens after ``context``; at full precision too where KL is measured."""
        begun, every, full = time.perf_counter(), int(self._engine.settings.measure_kl), None
        if every and token % every == 0:
            self._reference = self._reference or Reference(self._engine, self._source)
            full = self._reference.logits(context)[-1]
        # One thread: to wake another one beside the loader's takes longer than these sums.
        with threads(1):
            self.kl = None if full is None else float(kl_divergence(full, logits))
            best = None if full is None else likeliest(full, drawn)
            said = likeliest(logits, drawn) if self._engine.store.routing is None else ()
            found = Likeliest(said, best)
        self.seconds = time.perf_counter() - begun
        return found
