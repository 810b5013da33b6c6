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
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
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
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, Shape
from moelab.scheduling.trace import Trace
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
    losses,
    render,
)
from moelab.training.routing import chosen, reuse, rounded, skew

SHARES = (0.25, 0.5)  # of all experts that fit
SAMPLE_TOKENS = 70


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Perplexity of windows [B, T + 1], teacher-forced from their first token."""
    losses = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:]) for row in rows]
    return round(math.exp(torch.stack(losses).mean()), 3)


class Routing(NamedTuple):
    """What the routers saw and chose on one domain's windows."""

    inputs: Tensor  # [L, B, T, D]
    weights: Tensor  # [L, B, T, K]
    experts: Tensor  # [L, B, T, K], best first


@torch.no_grad()
def routing_of(model: Any, rows: Tensor) -> Routing:
    """Run the windows and keep each router's input and choice."""
    seen: list[tuple[Tensor, ...]] = []

    def keep(_module: Any, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> None:
        shape = (len(rows), rows.shape[1] - 1, -1)
        seen.append(tuple(values.reshape(shape) for values in (args[0], *result[1:])))

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]
    try:
        model.model(rows[:, :-1])
    finally:
        for handle in handles:
            handle.remove()
    return Routing(*map(torch.stack, zip(*seen, strict=True)))


@torch.no_grad()
def look_ahead_recall(model: Any, routings: dict[str, Routing], width: int) -> list[float]:
    """Recall of each layer's router asked one layer early, from the second layer on.

    It is given the layer before's router input, and names `width` experts.
    """
    gates = torch.stack([layer.mlp.gate.weight for layer in model.model.layers[1:]])  # [L-1, E, D]
    recalls = []
    for routing in routings.values():
        early = torch.einsum("lbtd,led->lbte", routing.inputs[:-1], gates).topk(width, -1).indices
        named = chosen(early, gates.shape[1])
        recalls.append(named.gather(-1, routing.experts[1:]).mean((1, 2, 3)))
    return rounded(torch.stack(recalls).mean(0))


def trace_of(routing: Routing, shape: Shape) -> Trace:
    """The windows one after the other, a step a token, as the scheduler sees them."""
    trace = Trace(shape)
    index, weight = (part.flatten(1, 2) for part in (routing.experts, routing.weights))
    for token in range(index.shape[1]):
        for layer in range(len(index)):
            row, weights = (tuple(part[layer, token].tolist()) for part in (index, weight))
            trace.steps.append(LayerInput(layer, (row,), (weights,)))
    return trace


def hit_ratios(traces: list[Trace], share: float) -> dict[str, float]:
    """Mean over domains, with room for `share` of all experts in one pool; c/N is `share`."""
    capacity = round(share * sum(traces[0].shape.experts))
    knobs = Knobs(capacity * traces[0].shape.nbytes[16])  # bytes
    found = {
        name: [replay(trace, getattr(strategies, name)(), knobs).hit_ratio for trace in traces]
        for name in POLICIES
    }
    best = [belady_hits(trace, capacity) for trace in traces]
    found["belady"] = [hits / asked for hits, asked in best]
    return {name: round(fmean(ratios), 4) for name, ratios in found.items()}


def bits_cost(folder: Path, texts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Perplexity, mean KL and same-top-1 with all experts at one bitwidth, for each tier."""
    out = {}
    with moelab.open(folder, strategy="lru", budget="100%", progress=False) as lab:
        for bits in tqdm(codecs.TIERS, "bits"):
            lab.update(bits=bits)
            each: Any = pd.DataFrame(
                {
                    "domain": domain,
                    "log": math.log(s.perplexity),
                    "kl": s.kl_mean,
                    "same": s.same_top1,
                }
                for domain, parts in texts.items()
                for s in (lab.score(t, max_tokens=LENGTH + 1, progress=False) for t in parts)
            )
            logs = each.groupby("domain", sort=False)["log"].mean()
            out[str(bits)] = {
                "perplexity": {d: round(math.exp(log), 3) for d, log in logs.items()},
                "perplexity_geometric_mean": round(math.exp(logs.mean()), 3),
                "kl_mean": round(float(each["kl"].mean()), 5),
                "same_top1": round(float(each["same"].mean()), 4),
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


def take(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Measure a checkpoint; what `card.json` holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    experts, active = config.num_experts, config.num_experts_per_tok
    shape = Shape((experts,) * config.num_hidden_layers, active, {16: 1})
    rows = {d: evenly_spaced(corpus.validation[d], ROUTING_WINDOWS, LENGTH) for d in DOMAINS}
    print("routing", flush=True)
    routings = {d: routing_of(model, r) for d, r in rows.items()}
    traces = [trace_of(routing, shape) for routing in routings.values()]
    return {
        "model": {
            "architecture": type(model).__name__,
            "layers": config.num_hidden_layers,
            "experts": experts,
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
            **skew({d: chosen(r.experts, experts).sum((1, 2)) for d, r in routings.items()}),
            "reuse": rounded(
                reuse((x for r in routings.values() for x in r.experts.unbind(1)), experts)
            ),
            "look_ahead": {
                str(k): look_ahead_recall(model, routings, k) for k in (active, 2 * active)
            },
            "hit_ratio": {str(s): hit_ratios(traces, s) for s in SHARES},
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
    (out / "curve.svg").write_text(curve_svg(losses(card["training"]["curve"])), encoding="utf-8")
    print(f"wrote {out / 'CARD.md'}")


if __name__ == "__main__":
    typer.run(main)
