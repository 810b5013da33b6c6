"""Quality against full precision: KL divergence, same-top-1, perplexity, on real logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


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
        """The sum.

        Raises
        ------
        ValueError
            Nothing was added: the text is shorter than two tokens.
        """
        if not self._kl:
            raise ValueError("nothing to score: the text needs at least two tokens")
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
