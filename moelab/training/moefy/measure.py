"""How good a mixture is beside its dense model: perplexity, agreement, routing, and text.

Everything is measured on windows of held-out text, domain by domain, at each number of active
experts. Agreement is the share of positions where both models hold the same next token likeliest;
the divergence is of the whole distributions.

Letters: N windows, T tokens of a window, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from moelab.training.moefy.student import Student, set_top_k

__all__ = ["compare", "continuations", "routing"]


@torch.no_grad()
def compare(
    dense: Any,
    student: Student,
    texts: Mapping[str, torch.Tensor],
    *,
    top_ks: Sequence[int],
    batch: int = 4,
) -> pd.DataFrame:
    """Perplexity of both models and their agreement, by domain and active experts.

    Parameters
    ----------
    dense, student
        The teacher and its mixture.
    texts
        Held-out windows of each domain, int64 ``[N, T]``.
    top_ks
        Numbers of active experts.
    batch
        Windows computed at once.

    Returns
    -------
    pandas.DataFrame
        Columns domain, top_k, active (share of the feed-forward neurons), dense and perplexity,
        ratio, its standard error over the windows, kl, same_top1 and windows (how many).
    """
    neurons = dense.config.intermediate_size
    rows = []
    for domain, windows in texts.items():
        base, found = [], {k: [] for k in top_ks}  # of each window, means per token
        for ids in windows.split(batch):
            theirs = dense(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            following = ids[:, 1:, None]
            base.append(-theirs.gather(-1, following)[..., 0].mean(1))
            for k in top_ks:
                set_top_k(student, k)
                ours = student.logits(student(ids))[:, :-1].log_softmax(-1)
                loss = -ours.gather(-1, following)[..., 0].mean(1)
                kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
                same = (theirs.argmax(-1) == ours.argmax(-1)).float().mean(1)
                found[k].append(torch.stack([loss, kl, same]))
        reference = torch.cat(base)
        for k in top_ks:
            loss, kl, same = torch.cat(found[k], 1)
            ratio = math.exp((loss - reference).mean())
            spread = float((loss - reference).std()) if len(loss) > 1 else math.nan
            rows.append(
                {
                    "domain": domain,
                    "top_k": k,
                    "active": student.shape.active(neurons, k),
                    "dense": math.exp(reference.mean()),
                    "perplexity": math.exp(loss.mean()),
                    "ratio": ratio,
                    "error": ratio * spread / len(loss) ** 0.5,
                    "kl": float(kl.mean()),
                    "same_top1": float(same.mean()),
                    "windows": len(loss),
                }
            )
    return pd.DataFrame(rows)


@torch.no_grad()
def routing(student: Student, windows: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """The share of tokens that choose each expert, ``[L, E]``; each row sums to ``top_k``."""
    set_top_k(student, top_k)
    counts = torch.zeros(len(student.mixtures), student.shape.experts)
    for mixture, row in zip(student.mixtures, counts, strict=True):
        mixture.counts = row
    student(windows)
    for mixture in student.mixtures:
        mixture.counts = None
    return counts / windows.numel()


def continuations(
    models: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Greedy answers of several models to the same prompts, side by side.

    Parameters
    ----------
    models
        Models of transformers, by the name of their column.
    tokenizer
        With a chat template if the prompts are questions; otherwise they are continued.
    prompts
        Texts.
    max_new_tokens
        Per answer.
    progress
        Called with each prompt before it is answered.
    """
    rows = []
    for prompt in prompts:
        if progress is not None:
            progress(prompt)
        if getattr(tokenizer, "chat_template", None):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        row = {"prompt": prompt}
        for name, model in models.items():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            row[name] = tokenizer.decode(new, skip_special_tokens=True).strip()
        rows.append(row)
    return pd.DataFrame(rows)
