"""Quality against full precision: KL divergence, same-top-1, perplexity, on real logits.

`score_ids` decodes every position through the engine, beside the full-precision model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tqdm import tqdm

    from moelab.engine.engine import Engine

CHUNK = 64
"""Positions whose full-precision logits are held at a time."""


def kl_divergence(full: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
    """KL(full || degraded) in nats from logits ``[..., V]``; shape ``[...]``, float64, >= 0."""
    p = torch.log_softmax(full.double(), -1)
    q = torch.log_softmax(degraded.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


@dataclass(frozen=True, slots=True)
class Score:
    """Teacher-forced quality over a text.

    KL in nats per token (full against degraded), ``same_top1`` the share of tokens whose likeliest
    next token is the same, perplexities over the text, ``perplexity_ratio`` = degraded / full.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    same_top1: float
    perplexity: float
    perplexity_full: float
    perplexity_ratio: float


class Scorer:
    """Collects (full logits, degraded logits, true next token) and sums them up."""

    def __init__(self) -> None:
        self._kl: list[float] = []
        self._same: list[bool] = []
        self._nll: list[tuple[float, float]] = []

    def add(self, full: torch.Tensor, degraded: torch.Tensor, target: int) -> float:
        """One position: logits ``[V]`` of both and the token that follows; returns its KL."""
        kl = float(kl_divergence(full, degraded))
        self._kl.append(kl)
        self._same.append(bool(full.argmax() == degraded.argmax()))
        nll = [-float(torch.log_softmax(x.double(), -1)[target]) for x in (full, degraded)]
        self._nll.append((nll[0], nll[1]))
        return kl

    def score(self) -> Score:
        """The sum."""
        full, degraded = (math.exp(float(np.mean(x))) for x in zip(*self._nll, strict=True))
        return Score(
            tokens=len(self._kl),
            kl_mean=float(np.mean(self._kl)),
            kl_median=float(np.median(self._kl)),
            kl_p99=float(np.quantile(self._kl, 0.99)),
            same_top1=float(np.mean(self._same)),
            perplexity=degraded,
            perplexity_full=full,
            perplexity_ratio=degraded / full,
        )


def score_ids(engine: Engine, texts: Sequence[Sequence[int]], *, progress: bool = True) -> Score:
    """Score token ids ``[text][position]`` teacher-forced, two or more of each text.

    An emulated device is not waited for, unless the strategy goes by what has landed.
    """
    from tqdm.auto import tqdm

    scorer = Scorer()
    if "in_flight" not in engine.scheduler.strategy.observes:
        engine.loader.use("disk")
    try:
        with tqdm(total=sum(map(len, texts)), disable=not progress, desc="score") as bar:
            for ids in texts:
                _score(engine, ids, scorer, bar)
    finally:
        engine.loader.use(engine.settings.device)
    return scorer.score()


def _score(engine: Engine, ids: Sequence[int], scorer: Scorer, bar: tqdm) -> None:
    from moelab.engine.generation import Decoder, Reference  # the kernels are heavy

    engine.new_sequence(record=False)
    engine.prefill = False  # one token at a time, under the rules of decoding
    decoder, reference = Decoder(engine), Reference(engine)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        full = reference.logits(ids[: start + len(chunk)], keep=len(chunk))
        for i, token in enumerate(chunk):
            logits = decoder.step([token])
            engine.end_of_token()
            if start + i + 1 < len(ids):
                scorer.add(full[i], logits, ids[start + i + 1])
            bar.update()
