"""What fewer bits and smaller budgets do to a mixture in the lab: divergence and text.

Divergence is of the distributions of every next token of held-out text, against the same mixture
with all experts at the store's best tier. The texts are greedy answers of the same settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moelab.lab import Lab

__all__ = ["BITS", "BUDGETS", "degraded"]

BITS: dict[str, dict[str, Any]] = {
    f"{bits} bit": {"strategy": "lru", "budget": "100%", "bits": bits} for bits in (16, 8, 4, 3, 2)
}
"""All experts fit, at fewer and fewer bits."""

BUDGETS: dict[str, dict[str, Any]] = {
    f"{title}, {budget} %": {"strategy": strategy, "budget": f"{budget}%", "bits": 16}
    for title, strategy, budgets in (
        ("HOBBIT", "hobbit", (75, 50, 25)),
        ("SwapMoE", "swapmoe", (90, 75, 50)),  # never less than the experts of one token, half
    )
    for budget in budgets
}
"""Two strategies that give up precision, or experts, where memory is short."""


def degraded(
    lab: Lab,
    changes: Mapping[str, Any],
    texts: Sequence[str],
    prompts: Sequence[str],
    *,
    tokens: int = 96,
    max_new_tokens: int = 40,
) -> dict[str, Any]:
    """Score and let answer under some settings.

    Parameters
    ----------
    lab
        Its settings are changed.
    changes
        As in `Lab.update`.
    texts
        Held-out text to score; the means are over the texts.
    prompts
        To answer.
    tokens
        Scored of each text.
    max_new_tokens
        Per answer.

    Returns
    -------
    dict
        kl (nats per token), same_top1, ratio (of perplexities), and by prompt the answer.
    """
    lab.update(**changes, measure_kl=False)
    scores = [lab.score(text, max_tokens=tokens, progress=False) for text in texts]
    count = len(scores)
    return {
        "kl": sum(score.kl_mean for score in scores) / count,
        "same_top1": sum(score.same_top1 for score in scores) / count,
        "ratio": math.exp(sum(math.log(score.perplexity_ratio) for score in scores) / count),
        **{
            prompt: lab.generate(prompt, max_new_tokens=max_new_tokens, temperature=0).text.strip()
            for prompt in prompts
        },
    }
