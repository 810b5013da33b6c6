"""The synopsis model's card and its training curve, from what `card` measured.

The words are those of `card_template.md`; no figure is typed by hand.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from textwrap import shorten
from typing import Any

import pandas as pd

from moelab.runs.rouge import Rouge
from moelab.training.markdown import percent, table
from moelab.training.page import skew_rows, thinned
from moelab.training.synopsis.corpus import HELD_OUT, LONGEST, PER_GROUP

METRICS = Rouge._fields
MODELS = ("this model", "dense")
OTHERS = "others"
LEAST = 20  # test pairs of a section that is told by itself
DRAWS, SEED = 10_000, 0  # of the bootstrap
SHOWN = 320
"""Characters of a sample's description."""


def curves(card: dict[str, Any]) -> dict[str, pd.Series]:
    """Validation cross-entropy of both models, and this one's of the batches, over tokens."""
    ours, dense = (card["training"][name]["curve"] for name in MODELS)

    def line(points: list[dict[str, Any]], figure: str) -> pd.Series:
        return pd.Series({p["tokens"] / 1e6: p[figure] for p in points if figure in p})

    return {
        "this model": line(ours, "validation"),
        "dense": line(dense, "validation"),
        "this model, a batch of training": line(ours, "train_loss"),
    }


def above(card: dict[str, Any]) -> dict[str, str]:
    """By what this model's Rouge-2 is set against: above, below, or neither shown."""
    return {
        name: "above" if d["low"] > 0 else "below" if d["high"] < 0 else "not shown to differ from"
        for name, d in card["against"].items()
    }


def render(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    model, corpus = card["models"][MODELS[0]], card["corpus"]
    routing, tokens, best = card["routing"], card["tokens"], card["best_baseline"]
    template = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    return template.format(
        model=model,
        parameters=model["parameters"] / 1e6,
        active=model["active_parameters"] / 1e6,
        expert_share=percent(model["expert_parameters"] / model["parameters"]),
        megabytes=model["file_bytes"] / 1e6,
        pairs=corpus["pairs"],
        sources=corpus["sources"],
        bundled=corpus["bundled"],
        longest=LONGEST,
        per_group=PER_GROUP,
        held_out=", ".join(f"{percent(share)} for {name}" for name, share in HELD_OUT.items()),
        tokens=tokens,
        runs="\n".join(f"- {_run(name, card)}" for name in MODELS),
        curve=_curve(card["training"][MODELS[0]]["curve"]),
        limit=card["limit"],
        rouge=_rouge(card),
        verdict=_verdict(card),
        groups=card["groups"],
        draws=DRAWS,
        seed=SEED,
        identical=f"{100 * card['identical']:.1f} %",
        least=LEAST,
        sections=_sections(card),
        uniform=100 / model["experts"],
        load=_load(routing),
        reuse=percent(mean(routing["reuse"])),
        reuse_chance=percent(mean(routing["reuse_by_chance"])),
        routing=_routing(routing),
        samples_count=len(card["samples"]),
        samples="\n\n".join(map(_sample, card["samples"])),
        best_baseline=best,
        best_rouge2=f"{card['rouge'][best]['rouge2']:.3f}",
        encoder_share=percent(tokens["source"] / (tokens["source"] + tokens["written"])),
    )


def _run(name: str, card: dict[str, Any]) -> str:
    """One training in a line; of the dense one, the settings that are not this model's."""
    run, model = card["training"][name], card["models"][name]
    ours = card["training"][MODELS[0]]["recipe"] if name != MODELS[0] else {}
    settings = [f"{k}={v}" for k, v in run["recipe"].items() if ours.get(k) != v]
    least, threads = min(point["validation"] for point in run["curve"]), run["threads"]
    last = run["curve"][-1]["validation"]
    return (
        f"**{name}**: {model['parameters'] / 1e6:.2f} M parameters, "
        f"{model['active_parameters'] / 1e6:.2f} M active. {run['tokens'] / 1e6:.2f} M tokens of "
        f"descriptions in {run['steps']} steps, {run['seconds'] / 60:.0f} minutes with "
        f"{threads} thread{'s' * (threads > 1)}; validation loss {least:.3f} at its lowest, "
        f"{last:.3f} at the end. "
        f"{'Otherwise than this model' if ours else 'Settings'}: `{', '.join(settings)}`"
        f"{run.get('note', '')}"
    )


def _curve(curve: list[dict[str, Any]]) -> str:
    rows = [
        [f"{p['tokens'] / 1e6:.2f} M", f"{p['seconds'] / 60:.0f}", f"{p['validation']:.2f}",
         *(f"{p[kind]:.2f}" if kind in p else "" for kind in ("train_loss", "worth"))]
        for p in thinned(curve)
    ]  # fmt: skip
    return table(["tokens", "minutes", "validation", "a batch of training", "its worth"], rows)


def _rouge(card: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{f[metric]:.3f}" for metric in METRICS), f"{f['words']:.1f}",
         percent(f["copied"])]
        for name, f in card["rouge"].items()
    ]  # fmt: skip
    debian = card["reference"]
    rows.append(["Debian's own", "", "", "", f"{debian['words']:.1f}", percent(debian["copied"])])
    return table(["", "Rouge-1", "Rouge-2", "Rouge-L", "words", "copied"], rows)


def _verdict(card: dict[str, Any]) -> str:
    """What the intervals allow to say."""
    best, dense = card["best_baseline"], MODELS[1]
    names = {best: f"the best baseline ({best}), and so all of them", dense: "the dense model"}
    if above(card)[best] != "above":
        names[best] = f"the best baseline ({best})"
    said = [
        f"{word} {names[name]}: {d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
        for (name, d), word in zip(card["against"].items(), above(card).values(), strict=True)
    ]
    return f"In Rouge-2 this model is {'; '.join(said)}."


def _sections(card: dict[str, Any]) -> str:
    rows = [
        [name, f["pairs"], *(f"{f[metric]:.3f}" for metric in METRICS),
         *(f"{value:.3f}" for value in f["others"].values())]
        for name, f in card["by_section"].items()
    ]  # fmt: skip
    others = next(iter(card["by_section"].values()))["others"]
    return table(["section", "pairs", "Rouge-1", "Rouge-2", "Rouge-L", *others], rows)


def _load(routing: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{100 * share:.0f} %" for share in sorted(load, reverse=True)), f"{bits:.2f}"]
        for name, load, bits in zip(
            routing["layers"], routing["load"], routing["entropy_bits"], strict=True
        )
    ]
    ranks = range(1, len(routing["load"][0]) + 1)
    return table(["layer", *map(str, ranks), "entropy (bits)"], rows)


def _routing(routing: dict[str, Any]) -> str:
    *rows, information, reuse = skew_rows(routing, "section")
    chance = routing["between_domains_bits_by_chance"]
    rows += [
        information,
        ["information by chance", *(f"{bits:.2f}" for bits in chance)],
        reuse,
        ["reuse by chance", *map(percent, routing["reuse_by_chance"])],
    ]
    return table(["layer", *routing["layers"]], rows)


def _sample(sample: dict[str, Any]) -> str:
    text = shorten(sample["text"], SHOWN, placeholder=" …")
    shown = f"{text}\n\nDebian:  {sample['synopsis']}\nwritten: {sample['written']}"
    shown = shown.replace("```", "'''")
    head = f"**{sample['section']}**, `{sample['package']}`, Rouge-2 {sample['rouge2']:.2f}"
    return f"{head}\n\n```text\n{shown}\n```"
