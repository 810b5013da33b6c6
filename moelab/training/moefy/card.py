"""The card of a mixture: what it was made from and how good it is, in Markdown.

Only what was measured is written down; `compare`, `routing` and `continuations` do the measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from moelab.training.moefy.student import Shape

__all__ = ["card"]


def card(
    name: str,
    shape: Shape,
    table: pd.DataFrame,
    *,
    shares: Mapping[int, torch.Tensor] | None = None,
    samples: pd.DataFrame | None = None,
    offloading: pd.DataFrame | None = None,
    notes: str = "",
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Write a card.

    Parameters
    ----------
    name
        Its heading.
    shape
        The mixture's.
    table
        From `compare`.
    shares
        From `routing`, by number of active experts.
    samples
        From `continuations`.
    offloading
        One row per setting, from `degraded`, and its name as ``setting``.
    notes
        Markdown for the end.
    facts
        Lines such as what it was made from, its licence, and the tokens it was distilled on.

    Returns
    -------
    str
        Markdown.
    """
    lines = [f"# {name}", ""]
    lines += [f"- **{key}**: {value}" for key, value in (facts or {}).items()]
    lines += [
        f"- **experts**: {shape.experts} per layer, and a shared expert of {shape.shared} neurons",
        "",
        "## Beside the dense model",
        "",
        "Held-out text. Ratio is perplexity over the dense model's, with its standard error over",
        "the windows of text; same top-1 is how often both have the same likeliest next token, KL",
        "the divergence in nats per token.",
        "",
        *_quality(table),
    ]
    if shares:
        lines += ["", "## Routing", "", *_routing(shares)]
    if offloading is not None:
        lines += ["", "## In the lab", "", *_offloading(offloading)]
    if samples is not None:
        lines += ["", "## Answers, greedy, at full precision", ""]
        for row in samples.to_dict("records"):
            lines.append(f"**{row.pop('prompt')}**")
            lines += ["", *(f"- *{model}*: {_line(text)}" for model, text in row.items()), ""]
    if notes:
        lines += ["", notes]
    return "\n".join(lines).rstrip() + "\n"


def _quality(table: pd.DataFrame) -> list[str]:
    lines = [
        "| text | windows | experts | active | dense | mixture | ratio | same top-1 | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = table.sort_values(["top_k", "domain"], ascending=[False, True])
    lines += [
        f"| {row['domain']} | {row['windows']} | {row['top_k']} | {row['active']:.0%} "
        f"| {row['dense']:.1f} | {row['perplexity']:.1f} "
        f"| {row['ratio']:.3f} ± {row['error']:.3f} | {row['same_top1']:.0%} "
        f"| {row['kl']:.3f} |"
        for row in ordered.to_dict("records")
    ]
    lines += [
        f"| **mean** | | {top_k} | {part.active.iloc[0]:.0%} | | | **{part.ratio.mean():.3f}** "
        f"| {part.same_top1.mean():.0%} | {part.kl.mean():.3f} |"
        for top_k, part in sorted(table.groupby("top_k"), reverse=True)
    ]
    return lines


def _routing(shares: Mapping[int, torch.Tensor]) -> list[str]:
    lines = [
        "| active experts | even share | busiest expert | idlest expert | entropy of the shares |",
        "|---|---|---|---|---|",
    ]
    for top_k, share in sorted(shares.items(), reverse=True):
        p = share / share.sum(1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-9).log2()).sum(1).mean()
        lines.append(
            f"| {top_k} | {top_k / share.shape[1]:.0%} | {float(share.max()):.0%} "
            f"| {float(share.min()):.1%} | {float(entropy):.2f} bits, "
            f"of {torch.tensor(float(share.shape[1])).log2():.2f} |"
        )
    return lines


def _offloading(table: pd.DataFrame) -> list[str]:
    lines = [
        "Against the same mixture at 16 bit with all experts in memory; held-out text, teacher-",
        "forced. What the strategies need to know they take from their defaults, not from a",
        "calibration.",
        "",
        "| setting | KL | same top-1 | perplexity ratio |",
        "|---|---|---|---|",
    ]
    figures = ("setting", "kl", "same_top1", "ratio")
    rows = table.to_dict("records")
    lines += [
        f"| {row['setting']} | {row['kl']:.4f} | {row['same_top1']:.0%} | {row['ratio']:.3f} |"
        for row in rows
    ]
    for family in dict.fromkeys(_family(row["setting"]) for row in rows):
        kls = [row["kl"] for row in rows if _family(row["setting"]) == family]
        rising = "rises" if kls == sorted(kls) else "does not rise"
        lines.append(f"\n{family}: the divergence {rising} from row to row.")
    for prompt in (name for name in table.columns if name not in figures):
        lines += ["", f"**{prompt}**", ""]
        lines += [f"- *{row['setting']}*: {_line(row[prompt])}" for row in rows]
    return lines


def _family(setting: str) -> str:
    """The strategy in a row's name, or what all rows without one have in common."""
    return setting.partition(",")[0] if "," in setting else "Fewer bits"


def _line(text: str) -> str:
    return " ".join(str(text).split())
