"""The card of a mixture: what it was made from and how good it is, in Markdown.

Only what was measured is written down; `compare`, `routing` and `continuations` do the measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from moelab.demo.mixture import Shape
from moelab.training.markdown import percent, table


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
    lines = [f"- **{key}**: {value}" for key, value in (facts or {}).items()]
    lines.append(
        f"- **experts**: {shape.experts} per layer, and a shared expert of {shape.shared} neurons"
    )
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
    rows += [
        ["**mean**", "", top_k, percent(part.active.iloc[0]), "", "",
         f"**{part.ratio.mean():.3f}**", percent(part.same_top1.mean()), f"{part.kl.mean():.3f}"]
        for top_k, part in sorted(compared.groupby("top_k"), reverse=True)
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
        p = share / share.sum(1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-9).log2()).sum(1).mean()
        most = torch.tensor(float(share.shape[1])).log2()
        rows.append(
            [top_k, percent(top_k / share.shape[1]), percent(float(share.max())),
             percent(float(share.min())), f"{entropy:.2f} bits, of {most:.2f}"]
        )  # fmt: skip
    head = "active experts, even share, busiest expert, idlest expert, entropy of the shares"
    return "## Routing\n\n" + table(head.split(", "), rows)


def _offloading(measured: pd.DataFrame) -> str:
    rows = measured.to_dict("records")
    figures = [
        [r["setting"], f"{r['kl']:.4f}", percent(r["same_top1"]), f"{r['ratio']:.3f}"] for r in rows
    ]
    head = ["setting", "KL", "same top-1", "perplexity ratio"]
    parts = [
        f"""## In the lab

Against the same mixture at 16 bit with all experts in memory; held-out text, teacher-
forced. What the strategies need to know they take from their defaults, not from a
calibration.

{table(head, figures)}"""
    ]
    families = [s.partition(",")[0] if "," in s else "Fewer bits" for s in measured["setting"]]
    for family, part in measured.groupby(families, sort=False):
        rising = "rises" if part.kl.is_monotonic_increasing else "does not rise"
        parts.append(f"{family}: the divergence {rising} from row to row.")
    for prompt in measured.columns.drop(["setting", "kl", "same_top1", "ratio"]):
        answers = dict(zip(measured["setting"], measured[prompt], strict=True))
        parts += [f"**{prompt}**", _answers(answers)]
    return "\n\n".join(parts)


def _answers(answers: Mapping[str, Any]) -> str:
    return "\n".join(f"- *{name}*: {' '.join(str(text).split())}" for name, text in answers.items())
