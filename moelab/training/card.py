"""Measure what the demo model's card says, on held-out text, and write the card.

`python -m moelab.training.card` writes `card.json` (the measurements), `CARD.md` and `curve.svg`
(made of them by `page`).  Perplexity by domain; how skewed, how local and how predictable the
routing is; what low bitwidths cost.  The routing is that of the stock transformers model; hit
ratios come from moelab's own scheduler in replay, bitwidths from the lab.  Everything is
deterministic: fixed windows, fixed seeds, one thread.

B windows, T tokens each, L layers, E experts, K active.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm.auto import tqdm

import moelab
from moelab import strategies
from moelab.demo import DOMAINS, HERE, checkpoint, probes, prompts
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.strategy import Knobs, Shape
from moelab.scheduling.trace import LayerInput, Trace
from moelab.store import codecs
from moelab.store.paths import cache_dir
from moelab.training.corpus import Corpus, evenly_spaced, prepare
from moelab.training.page import (
    LENGTH,
    PERPLEXITY_WINDOWS,
    POLICIES,
    ROUTING_WINDOWS,
    SAMPLE_SEED,
    curve_svg,
    render,
)

SHARES = (0.25, 0.5)  # of all experts that fit
SAMPLE_TOKENS = 70


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Perplexity of windows [B, T + 1], teacher-forced from their first token."""
    losses = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:]) for row in rows]
    return round(math.exp(torch.stack(losses).mean()), 3)


# ------------------------------------------------------------------------------- routing


@dataclass(frozen=True)
class Routing:
    """What the routers saw and chose on one domain's windows."""

    inputs: list[Tensor]  # L of [B, T, D]
    experts: list[Tensor]  # L of [B, T, K], best first
    weights: list[Tensor]  # L of [B, T, K]


def _routers(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers]


@torch.no_grad()
def routing_of(model: Any, rows: Tensor) -> Routing:
    """Run the windows and keep each router's input and choice."""
    out = Routing([], [], [])

    def keep(_module: Any, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> None:
        _, weight, index = result
        shape = (len(rows), rows.shape[1] - 1, -1)
        out.inputs.append(args[0].reshape(shape))
        out.experts.append(index.reshape(shape))
        out.weights.append(weight.reshape(shape))

    handles = [router.register_forward_hook(keep) for router in _routers(model)]
    try:
        model.model(rows[:, :-1])
    finally:
        for handle in handles:
            handle.remove()
    return out


def chosen(index: Tensor, experts: int) -> Tensor:
    """[..., K] indices as [..., E] zeros and ones."""
    return torch.zeros(*index.shape[:-1], experts).scatter_(-1, index, 1.0)


def popularity(routing: Routing, experts: int) -> Tensor:
    """Share of the activations each expert takes: [L, E]."""
    return torch.stack([chosen(i, experts).mean((0, 1)) / i.shape[-1] for i in routing.experts])


def skew(shares: dict[str, Tensor]) -> dict[str, Any]:
    """How uneven the routing is, within a domain and between domains."""
    stacked = torch.stack(list(shares.values()))  # [domain, L, E]
    experts = stacked.shape[-1]
    mean = stacked.mean(0)
    ranked = stacked.sort(-1, descending=True).values

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-12).log2()).sum(-1)

    quarter = ranked[..., : experts // 4].sum(-1)  # [domain, L]
    return {
        "top_quarter_share": {d: _round(q) for d, q in zip(shares, quarter, strict=True)},
        "top_quarter_share_all_domains": _round(
            mean.sort(-1, descending=True).values[:, : experts // 4].sum(-1)
        ),
        "busiest_over_mean": _round(mean.max(-1).values * experts),
        "idlest_over_mean": _round(mean.min(-1).values * experts),
        "between_domains_bits": _round(entropy(mean) - entropy(stacked).mean(0)),
    }


def reuse(routings: dict[str, Routing], experts: int) -> list[float]:
    """By layer: the share of a token's experts that the token before used too."""
    layers = []
    for i in range(len(next(iter(routings.values())).experts)):
        rates = []
        for routing in routings.values():
            used = chosen(routing.experts[i], experts)
            rates.append((used[:, 1:] * used[:, :-1]).sum() / used[:, 1:].sum())
        layers.append(torch.stack(rates).mean())
    return _round(torch.stack(layers))


@torch.no_grad()
def look_ahead_recall(model: Any, routings: dict[str, Routing], width: int) -> list[float]:
    """Recall of each layer's router asked one layer early, from the second layer on.

    It is given the layer before's router input, and names `width` experts.
    """
    gates, recalls = _routers(model), []
    for i in range(1, len(gates)):
        rates = []
        for routing in routings.values():
            early = F.linear(routing.inputs[i - 1], gates[i].weight).topk(width, -1).indices
            named = chosen(early, gates[i].weight.shape[0])
            rates.append(named.gather(-1, routing.experts[i]).mean())
        recalls.append(torch.stack(rates).mean())
    return _round(torch.stack(recalls))


def trace_of(routing: Routing, shape: Shape) -> Trace:
    """The windows one after the other, a step a token, as the scheduler sees them."""
    trace = Trace(shape)
    index = torch.stack(routing.experts, 2).flatten(0, 1).tolist()  # [B · T, L, K]
    weight = torch.stack(routing.weights, 2).flatten(0, 1).tolist()
    for experts, weights in zip(index, weight, strict=True):
        for layer, (e, w) in enumerate(zip(experts, weights, strict=True)):
            trace.steps.append(LayerInput(layer, (tuple(e),), (tuple(w),)))
    return trace


def hit_ratios(routings: dict[str, Routing], shape: Shape, share: float) -> dict[str, float]:
    """Mean over domains, with room for `share` of all experts in one pool; c/N is `share`."""
    capacity = round(share * sum(shape.experts))
    knobs = Knobs(capacity * shape.nbytes[16])  # bytes
    totals = dict.fromkeys((*POLICIES, "belady"), 0.0)
    for routing in routings.values():
        trace = trace_of(routing, shape)
        for name in POLICIES:
            totals[name] += replay(trace, getattr(strategies, name)(), knobs).hit_ratio
        hits, asked = belady_hits(trace, capacity)
        totals["belady"] += hits / asked
    return {name: round(total / len(routings), 4) for name, total in totals.items()}


def bits_cost(folder: Path, texts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Perplexity, mean KL and same-top-1 with all experts at one bitwidth, for each tier."""
    out = {}
    with moelab.open(folder, strategy="lru", budget="100%", progress=False) as lab:
        for bits in tqdm(codecs.TIERS, "bits"):
            lab.update(bits=bits)
            scores = {
                domain: [lab.score(text, max_tokens=LENGTH + 1, progress=False) for text in parts]
                for domain, parts in texts.items()
            }
            logs = {
                d: np.mean([math.log(s.perplexity) for s in part]) for d, part in scores.items()
            }
            every = [score for part in scores.values() for score in part]
            out[str(bits)] = {
                "perplexity": {d: round(math.exp(log), 3) for d, log in logs.items()},
                "perplexity_geometric_mean": round(math.exp(np.mean(list(logs.values()))), 3),
                "kl_mean": round(float(np.mean([s.kl_mean for s in every])), 5),
                "same_top1": round(float(np.mean([s.same_top1 for s in every])), 4),
                "expert_bytes": lab._shape.nbytes[bits],
            }
    return out


def leakage(train: np.ndarray, validation: np.ndarray, length: int = 24) -> float:
    """Share of the validation's `length`-grams that occur in the training tokens."""

    def hashes(ids: np.ndarray) -> np.ndarray:
        total = np.zeros(len(ids) - length + 1, dtype=np.uint64)
        for i in range(length):
            total = total * np.uint64(1_000_003) + ids[i : len(ids) - length + 1 + i]
        return total

    return float(np.isin(hashes(validation), np.unique(hashes(train))).mean())


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """A continuation of `prompt`, as the model's own generation settings say."""
    torch.manual_seed(SAMPLE_SEED)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=SAMPLE_TOKENS)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def _round(values: Tensor) -> list[float]:
    return [round(v, 4) for v in values.tolist()]


def take(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Measure a checkpoint; what `card.json` holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    shape = Shape(
        (config.num_experts,) * config.num_hidden_layers,
        config.num_experts_per_tok,
        {16: 1},
    )
    rows = {d: evenly_spaced(corpus.validation[d], ROUTING_WINDOWS, LENGTH) for d in DOMAINS}
    print("routing", flush=True)
    routings = {d: routing_of(model, r) for d, r in rows.items()}
    shares = {d: popularity(r, config.num_experts) for d, r in routings.items()}
    active = config.num_experts_per_tok
    return {
        "model": {
            "architecture": type(model).__name__,
            "layers": config.num_hidden_layers,
            "experts": config.num_experts,
            "active": active,
            "hidden": config.hidden_size,
            "ffn": config.moe_intermediate_size,
            "vocabulary": config.vocab_size,
            "parameters": model.num_parameters(),
            "expert_parameters": sum(
                p.numel() for n, p in model.named_parameters() if ".experts." in n
            ),
            "file_bytes": (folder / "model.safetensors").stat().st_size,
        },
        "corpus": {
            d: {
                "train_tokens": len(corpus.train[d]),
                "validation_tokens": len(corpus.validation[d]),
                "leakage": round(leakage(corpus.train[d], corpus.validation[d]), 4),
            }
            for d in DOMAINS
        },
        "packages": json.loads((corpus.folder / "sources.json").read_text()),
        "training": json.loads((folder / "training.json").read_text()),
        "perplexity": {
            d: perplexity(model, evenly_spaced(corpus.validation[d], PERPLEXITY_WINDOWS, LENGTH))
            for d in DOMAINS
        },
        "probe_perplexity": {
            d: perplexity(model, tokenizer(t, return_tensors="pt").input_ids)
            for d, t in probes().items()
        },
        "routing": {
            **skew(shares),
            "reuse": reuse(routings, config.num_experts),
            "look_ahead": {
                str(k): look_ahead_recall(model, routings, k) for k in (active, 2 * active)
            },
            "hit_ratio": {str(s): hit_ratios(routings, shape, s) for s in SHARES},
        },
        "bits": bits_cost(folder, {d: tokenizer.batch_decode(r) for d, r in rows.items()}),
        "sampling": {
            name: getattr(model.generation_config, name)
            for name in ("do_sample", "temperature", "top_p", "repetition_penalty")
        },
        "samples": {d: sample(model, tokenizer, prompts()[d][0]) for d in DOMAINS},
    }


def main(
    model: Annotated[Path | None, typer.Option(help="checkpoint folder (the bundled one)")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
    out: Annotated[Path, typer.Option(help="where to write")] = HERE,
) -> None:
    """Measure the model and write card.json, CARD.md and curve.svg."""
    torch.set_num_threads(1)
    card = take(model or checkpoint(), prepare(data or cache_dir() / "demo" / "corpus"))
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (out / "CARD.md").write_text(render(card), encoding="utf-8")
    (out / "curve.svg").write_text(curve_svg(card["training"]["curve"]), encoding="utf-8")
    print(f"wrote {out / 'CARD.md'}")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
