"""What the model card shows, measured on held-out text with the stock transformers model.

Perplexity by domain; how skewed, how local and how predictable the routing is; what low
bitwidths cost.  Hit ratios come from moelab's own scheduler in replay, bitwidths from its own
codecs.  Everything is deterministic: fixed windows, fixed seeds, one thread.

B windows, T tokens each, L layers, E experts, K active.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moelab import strategies
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.runs.quality import kl_divergence
from moelab.scheduling.strategy import Knobs, Shape
from moelab.scheduling.trace import LayerInput, Trace
from moelab.store import codecs
from moelab.training.corpus import Corpus

LENGTH = 256
POLICIES = ("lru", "layer_lru", "lfu")
SAMPLE_TOKENS, SAMPLE_SEED = 70, 0


def windows(ids: np.ndarray, count: int) -> Tensor:
    """`count` evenly spaced windows of LENGTH tokens and the one after: [B, T + 1]."""
    starts = np.linspace(0, len(ids) - LENGTH - 1, count).astype(int)
    return torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts]).astype(np.int64))


@torch.no_grad()
def logits_of(model: Any, rows: Tensor) -> Tensor:
    """Teacher-forced logits, a window at a time: [B, T, V]."""
    return torch.cat([model(row[None, :-1]).logits for row in rows])


def losses_of(logits: Tensor, rows: Tensor) -> Tensor:
    """Cross-entropy in nats of every token: [B · T]."""
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def text_perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Perplexity of one text, teacher-forced from its first token."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return math.exp(F.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:]))


def perplexities(model: Any, corpus: Corpus, count: int) -> dict[str, float]:
    """Validation perplexity by domain over `count` windows."""
    return {
        domain: math.exp(losses_of(logits_of(model, rows), rows).mean())
        for domain, rows in ((d, windows(ids, count)) for d, ids in corpus.validation.items())
    }


# ------------------------------------------------------------------------------- routing


@dataclass(frozen=True)
class Routing:
    """What the routers saw and chose on one domain's windows."""

    inputs: list[Tensor]  # L of [B, T, D]
    experts: list[Tensor]  # L of [B, T, K], best first
    weights: list[Tensor]  # L of [B, T, K]


def routers(model: Any) -> list[Any]:
    """The routers, by layer."""
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

    handles = [router.register_forward_hook(keep) for router in routers(model)]
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
    gates, recalls = routers(model), []
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
    knobs = Knobs(capacity * shape.nbytes[16])
    totals = dict.fromkeys((*POLICIES, "belady"), 0.0)
    for routing in routings.values():
        trace = trace_of(routing, shape)
        for name in POLICIES:
            totals[name] += replay(trace, getattr(strategies, name)(), knobs).hit_ratio
        hits, asked = belady_hits(trace, capacity)
        totals["belady"] += hits / asked
    return {name: round(total / len(routings), 4) for name, total in totals.items()}


# ------------------------------------------------------------------------------ bitwidths


def expert_layout(model: Any) -> codecs.Layout:
    """An expert of this model, as the codecs see it."""
    bank = model.model.layers[0].mlp.experts
    shapes = tuple((n, tuple(getattr(bank, n).shape[1:])) for n in ("gate_up_proj", "down_proj"))
    return codecs.Layout(shapes, "bfloat16")


@contextmanager
def all_experts_at(model: Any, bits: int) -> Iterator[None]:
    """Every expert encoded at `bits` and decoded again, for as long as the context lasts."""
    layout = expert_layout(model)
    names = [name for name, _ in layout.tensors]
    originals = []
    for layer in model.model.layers:
        bank = layer.mlp.experts
        originals.append({name: getattr(bank, name).data.clone() for name in names})
        for e in range(bank.gate_up_proj.shape[0]):
            tensors = {name: getattr(bank, name).data[e] for name in names}
            decoded = codecs.decode(codecs.encode(tensors, layout, bits), layout, bits)
            for name in names:
                tensors[name].copy_(decoded[name])
    try:
        yield
    finally:
        for layer, original in zip(model.model.layers, originals, strict=True):
            for name, tensor in original.items():
                getattr(layer.mlp.experts, name).data.copy_(tensor)


def damage(
    model: Any, rows: dict[str, Tensor], tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Perplexity, mean KL and same-top-1 against the full model, for each tier."""
    full = {domain: logits_of(model, r) for domain, r in rows.items()}
    out = {}
    for bits in codecs.TIERS:
        tell(f"all experts at {bits} bits")
        perplexity, kl, same = {}, {}, {}
        with all_experts_at(model, bits):
            for domain, r in rows.items():
                logits = logits_of(model, r)
                perplexity[domain] = round(math.exp(losses_of(logits, r).mean()), 3)
                kl[domain] = kl_divergence(full[domain], logits).mean()
                same[domain] = (logits.argmax(-1) == full[domain].argmax(-1)).float().mean()
        logs = [math.log(p) for p in perplexity.values()]
        out[str(bits)] = {
            "perplexity": perplexity,
            "perplexity_geometric_mean": round(math.exp(sum(logs) / len(logs)), 3),
            "kl_mean": round(float(torch.stack(list(kl.values())).mean()), 5),
            "same_top1": round(float(torch.stack(list(same.values())).mean()), 4),
            "expert_bytes": codecs.nbytes(expert_layout(model), bits),
        }
    return out


# ----------------------------------------------------------------------------------- text


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
