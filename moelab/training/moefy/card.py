"""How good a mixture is beside its dense model: perplexity, agreement, routing, text; and its card.

Everything is measured on windows of held-out text, domain by domain, at each number of active
experts. Agreement is the share of positions where both models hold the same next token likeliest;
the divergence is of the whole distributions. The card says nothing that was not measured.

Letters: N windows, T tokens of a window, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from moelab.demo.mixture import Shape
from moelab.training.markdown import percent, table
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
    found = groups.mean()
    logs = ["dense", "perplexity", "ratio"]
    found[logs] = np.exp(found[logs])
    found["windows"] = groups.size()
    found["error"] = found.ratio * groups.ratio.std() / found.windows**0.5
    found = found.reset_index()
    neurons = dense.config.intermediate_size
    found["active"] = [student.shape.active(neurons, k) for k in found.top_k]
    return found[["domain", "top_k", "active", *logs, "error", "kl", "same_top1", "windows"]]


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
    """
    options = {"return_tensors": "pt", "return_dict": True}
    rows = []
    for prompt in prompts:
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


def card(
    name: str,
    shape: Shape,
    compared: pd.DataFrame,
    *,
    shares: Mapping[int, torch.Tensor] | None = None,
    samples: pd.DataFrame | None = None,
    offloading: pd.DataFrame | None = None,
    notes: str = "",
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Write a card in Markdown.

    Parameters
    ----------
    name
        Its heading.
    shape
        The mixture's.
    compared
        From `compare`.
    shares
        From `routing`, by number of active experts.
    samples
        From `continuations`.
    offloading
        One row per setting of the lab: setting (its name), kl, same_top1, ratio, and by prompt the
        answer.
    notes
        Markdown for the end.
    facts
        Lines such as what it was made from, its licence, and the tokens it was distilled on.
    """
    experts = f"{shape.experts} per layer, and a shared expert of {shape.shared} neurons"
    lines = [
        f"- **{key}**: {value}" for key, value in {**(facts or {}), "experts": experts}.items()
    ]
    parts = [f"# {name}", "\n".join(lines), _quality(compared)]
    if shares:
        parts.append(_routing(shares))
    if offloading is not None:
        parts.append(_offloading(offloading))
    if samples is not None:
        parts.append("## Answers, greedy, at full precision")
        for row in samples.to_dict("records"):
            parts += [f"**{row.pop('prompt')}**", _answers(row)]
    return "\n\n".join([*parts, notes]).rstrip() + "\n"


def _quality(compared: pd.DataFrame) -> str:
    ordered: Any = compared.sort_values(["top_k", "domain"], ascending=[False, True])
    rows = [
        [r.domain, r.windows, r.top_k, percent(r.active), f"{r.dense:.1f}", f"{r.perplexity:.1f}",
         f"{r.ratio:.3f} ± {r.error:.3f}", percent(r.same_top1), f"{r.kl:.3f}"]
        for r in ordered.itertuples()
    ]  # fmt: skip
    means: Any = ordered.groupby("top_k", sort=False).mean(numeric_only=True)
    rows += [
        ["**mean**", "", m.Index, percent(m.active), "", "", f"**{m.ratio:.3f}**",
         percent(m.same_top1), f"{m.kl:.3f}"]
        for m in means.itertuples()
    ]  # fmt: skip
    head = ["text", "windows", "experts", "active", "dense", "mixture", "ratio", "same top-1", "KL"]
    return f"""## Beside the dense model

Held-out text. Ratio is perplexity over the dense model's, with its standard error over
the windows of text; same top-1 is how often both have the same likeliest next token, KL
the divergence in nats per token.

{table(head, rows)}"""


def _routing(shares: Mapping[int, torch.Tensor]) -> str:
    rows = []
    for top_k, share in sorted(shares.items(), reverse=True):
        entropy = torch.special.entr(share / top_k).sum(1).mean() / np.log(2)
        least, most = share.aminmax()
        rows.append(
            [top_k, *map(percent, (top_k / share.shape[1], float(most), float(least))),
             f"{entropy:.2f} bits, of {np.log2(share.shape[1]):.2f}"]
        )  # fmt: skip
    head = "active experts, even share, busiest expert, idlest expert, entropy of the shares"
    return "## Routing\n\n" + table(head.split(", "), rows)


def _offloading(measured: pd.DataFrame) -> str:
    figures = [
        [r["setting"], f"{r['kl']:.4f}", percent(r["same_top1"]), f"{r['ratio']:.3f}"]
        for r in measured.to_dict("records")
    ]
    parts = [
        f"""## In the lab

Against the same mixture at 16 bit with all experts in memory; held-out text, teacher-
forced. What the strategies need to know they take from their defaults, not from a
calibration.

{table(["setting", "KL", "same top-1", "perplexity ratio"], figures)}"""
    ]
    families = [s.partition(",")[0] if "," in s else "Fewer bits" for s in measured["setting"]]
    for family, part in measured.groupby(families, sort=False):
        rising = "rises" if part.kl.is_monotonic_increasing else "does not rise"
        parts.append(f"{family}: the divergence {rising} from row to row.")
    answers = measured.set_index("setting").drop(columns=["kl", "same_top1", "ratio"])
    for prompt in answers:
        parts += [f"**{prompt}**", _answers(answers[prompt])]
    return "\n\n".join(parts)


def _answers(answers: Any) -> str:
    return "\n".join(f"- *{name}*: {' '.join(str(text).split())}" for name, text in answers.items())
