"""How uneven and how local routing is: what the cards of the trained models say of it.

L layers, E experts, T tokens of a sequence, K active.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def chosen(index: Tensor, experts: int) -> Tensor:
    """[..., K] indices as [..., E] zeros and ones."""
    return torch.zeros(*index.shape[:-1], experts).scatter_(-1, index, 1.0)


def entropy(shares: Tensor) -> Tensor:
    """Bits of distributions [..., E]."""
    return -(shares * shares.clamp_min(1e-12).log2()).sum(-1)


def information(counts: Tensor) -> Tensor:
    """Mutual information in bits [L] of domain and expert, of activations [domain, L, E]."""
    weights = counts.sum(-1) / counts.sum((0, -1))  # [domain, L]
    within = entropy(counts / counts.sum(-1, keepdim=True))
    return entropy(counts.sum(0) / counts.sum((0, -1))[:, None]) - (weights * within).sum(0)


def skew(counts: Mapping[str, Tensor]) -> dict[str, Any]:
    """How uneven the routing is within a domain and between domains, of activations [L, E]."""
    every = torch.stack(list(counts.values()))
    shares = every / every.sum(-1, keepdim=True)  # [domain, L, E]
    mean = every.sum(0) / every.sum((0, -1))[:, None]
    experts = mean.shape[-1]
    top = shares.topk(experts // 4, -1)[0].sum(-1)  # [domain, L]
    return {
        "top_quarter_share": {d: rounded(q) for d, q in zip(counts, top, strict=True)},
        "top_quarter_share_all_domains": rounded(mean.topk(experts // 4, -1)[0].sum(-1)),
        "busiest_over_mean": rounded(mean.amax(-1) * experts),
        "idlest_over_mean": rounded(mean.amin(-1) * experts),
        "between_domains_bits": rounded(information(every)),
    }


def reuse(sequences: Iterable[Tensor], experts: int) -> Tensor:
    """By layer [L]: the share of a token's experts that the token before used too.

    Of the choices [L, T, K] of each sequence.
    """
    kept, asked = torch.zeros(()), 0
    for sequence in sequences:
        used = chosen(sequence, experts)
        kept = kept + (used[:, 1:] * used[:, :-1]).sum((1, 2))
        asked += sequence[0, 1:].numel()
    return kept / asked


def rounded(values: Tensor) -> list[float]:
    """To four decimals."""
    return [round(v, 4) for v in values.tolist()]
