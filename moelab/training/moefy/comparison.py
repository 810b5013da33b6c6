"""How good a mixture is beside its dense model: perplexity, agreement, routing, and text.

Everything is measured on windows of held-out text, domain by domain, at each number of active
experts. Agreement is the share of positions where both models hold the same next token likeliest;
the divergence is of the whole distributions.

Letters: N windows, T tokens of a window, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from moelab.training.moefy.student import Student, set_top_k


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
    parts = []  # of each window, means per token
    for domain, windows in texts.items():
        for ids in windows.split(batch):
            theirs = dense(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            following = ids[:, 1:, None]
            for k in top_ks:
                set_top_k(student, k)
                ours = student.logits(student(ids))[:, :-1].log_softmax(-1)
                figures = {
                    "dense": -theirs.gather(-1, following)[..., 0],
                    "perplexity": -ours.gather(-1, following)[..., 0],
                    "kl": (theirs.exp() * (theirs - ours)).sum(-1),
                    "same_top1": (theirs.argmax(-1) == ours.argmax(-1)).float(),
                }
                means = {name: x.mean(1).double().numpy() for name, x in figures.items()}
                parts.append(pd.DataFrame({"domain": domain, "top_k": k, **means}))
    each: Any = pd.concat(parts).assign(ratio=lambda t: t.perplexity - t.dense)
    groups = each.groupby(["domain", "top_k"], sort=False)
    table = groups.mean()
    logs = ["dense", "perplexity", "ratio"]
    table[logs] = np.exp(table[logs])
    table["windows"] = groups.size()
    table["error"] = table.ratio * groups.ratio.std() / table.windows**0.5
    table = table.reset_index()
    neurons = dense.config.intermediate_size
    table["active"] = [student.shape.active(neurons, k) for k in table.top_k]
    return table[["domain", "top_k", "active", *logs, "error", "kl", "same_top1", "windows"]]


@torch.no_grad()
def routing(student: Student, windows: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """The share of tokens that choose each expert, ``[L, E]``; each row sums to ``top_k``."""
    set_top_k(student, top_k)
    shares: list[torch.Tensor] = []

    def count(mixture: Any, args: tuple[torch.Tensor, ...]) -> None:
        shares.append((mixture.gates(args[0]) > 0).float().mean((0, 1)))

    hooks = [mixture.register_forward_pre_hook(count) for mixture in student.mixtures]
    student(windows)
    for hook in hooks:
        hook.remove()
    return torch.stack(shares)


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
    options = {"return_tensors": "pt", "return_dict": True}
    rows = []
    for prompt in prompts:
        if progress is not None:
            progress(prompt)
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        row = {"prompt": prompt}
        for name, model in models.items():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            row[name] = tokenizer.decode(new, skip_special_tokens=True).strip()
        rows.append(row)
    return pd.DataFrame(rows)
