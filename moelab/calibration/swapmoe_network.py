"""SwapMoE's estimator of quality: a small ReLU network fitted on configurations that were run.

The paper's appendix A.2. How far it is off is told by configurations that it was not fitted on.
What it does not know: configurations unlike those that were run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from moelab.strategies.swapmoe_planner import HIDDEN, Network, Plan, inputs

STEPS, DECAY, FOLDS = 600, 0.01, 6
LEAST = 1e-5
"""Losses below are noise, and count as so much; of a KL in nats a token."""


def configurations(
    experts: Sequence[int], top_k: int, every: Sequence[int], count: int, seed: int
) -> list[Plan]:
    """Random configurations: a share of the memory first, then layers around it."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        share = rng.random()
        parts = (min(1.0, max(0.0, rng.gauss(share, 0.2))) for _ in experts)
        kept = tuple(top_k + round(p * (n - top_k)) for p, n in zip(parts, experts, strict=True))
        found.append(Plan(rng.choice(list(every)), kept))
    return found


def fitted(
    plans: Sequence[Plan], losses: Sequence[float], experts: Sequence[int], least: float = LEAST
) -> Network:
    """The network that gives these losses, as near as it can."""
    seen = torch.tensor(np.array([inputs(p, experts) for p in plans]), dtype=torch.float32)
    wanted = torch.tensor([math.log(max(loss, least)) for loss in losses])
    generator = torch.Generator().manual_seed(0)
    spread = seen.shape[1] ** -0.5
    hidden, out = (
        torch.randn(shape, generator=generator) * scale
        for shape, scale in (((HIDDEN, seen.shape[1]), spread), ((HIDDEN,), HIDDEN**-0.5))
    )
    given = [hidden, torch.zeros(HIDDEN), out, wanted.mean()]
    weights = [weight.clone().requires_grad_() for weight in given]
    with torch.enable_grad():
        adam = torch.optim.AdamW(weights, lr=0.02, weight_decay=DECAY)
        for _ in range(STEPS):
            adam.zero_grad()
            found = (seen @ weights[0].T + weights[1]).relu() @ weights[2] + weights[3]
            (found - wanted).square().mean().backward()
            adam.step()
    hidden, hidden_bias, out, out_bias = (weight.tolist() for weight in weights)
    return Network(hidden, hidden_bias, out, out_bias, list(experts))


def unseen(
    plans: Sequence[Plan], losses: Sequence[float], experts: Sequence[int], least: float = LEAST
) -> list[float]:
    """What the network says of each configuration when it was fitted on the other folds."""
    out = [0.0] * len(plans)
    for fold in range(FOLDS):
        others = [at for at in range(len(plans)) if at % FOLDS != fold]
        given = [plans[at] for at in others], [losses[at] for at in others]
        network = fitted(*given, experts, least)
        for at in range(fold, len(plans), FOLDS):
            out[at] = network.kl(plans[at])
    return out


def off(said: Sequence[float], losses: Sequence[float], least: float = LEAST) -> float:
    """Median factor between estimates and measurements, above 1: 1.5 is half too much or too few.

    >>> off([1.0, 4.0, 3.0], [2.0, 2.0, 3.0])
    2.0
    """
    logs = np.log(np.maximum([said, losses], least))
    return float(np.exp(np.median(np.abs(logs[0] - logs[1]))))
