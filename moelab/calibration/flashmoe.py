"""FlashMoE's calibration: a small net per layer, trained on recorded routing to imitate Belady.

At every token of a text, after its routing, a net is shown each expert's recency and frequency and
is to say how many tokens will pass until its next use: clipped to ¾ of the layer's experts, which
also stands for never, and scaled to 0 … 1. Mean squared error, AdamW. Learning rate and label are
those of CECAR's implementation of the paper (ML_FlashMoE). That one trains for 200 epochs with 64
hidden units, and the paper has 128, a rate of 1e-3 and 260,000 tokens; on the thousand of the demo
20 epochs and 32 units do better on unseen text than more of either.

One half of every text trains, the other tells what it is worth: the hit ratio of a cache of each
layer's own, of several sizes, by replay, beside LRU, LFU and Belady. What it does not know: routing
unlike that of its texts. The nets know experts by their number, and on another mix of favourites
they may do worse than LRU.

T tokens, L layers, E experts of a layer, H hidden units, N examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from moelab.calibration.probes import Text, parted, record
from moelab.calibration.profile import Kept, once
from moelab.engine.generation import threads
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.stream import Knobs
from moelab.scheduling.trace import Trace
from moelab.strategies.basics import LFU, layer_lru
from moelab.strategies.flashmoe import flashmoe

if TYPE_CHECKING:
    from moelab.lab import Lab

CAP = 0.75
"""Of E: tokens above which a time to the next use is told apart no longer."""
LEARNING_RATE, BATCH = 2e-3, 64
SIZES = (1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Caches on which it is judged, as shares of E."""


def uses(trace: Trace) -> list[list[np.ndarray]]:
    """Who is used at each token, by text and layer: bool ``[T, E]``."""
    texts: list[list[list[np.ndarray]]] = []
    for given in trace.steps:
        experts = trace.shape.experts[given.layer]
        if given.prefill and given.layer == 0:
            texts.append([[] for _ in trace.shape.experts])
        for row in given.experts:
            texts[-1][given.layer].append(np.isin(np.arange(experts), row))
    return [[np.array(rows) for rows in text] for text in texts]


def features(used: np.ndarray) -> np.ndarray:
    """Recency and frequency of all experts after each token ``[T, 2E]``, of uses ``[T, E]``."""
    at = np.arange(len(used))[:, None]
    last = np.maximum.accumulate(np.where(used, at, -1))
    recency = (last >= 0) / (at - last + 1)
    count = used.cumsum(0)
    return np.hstack((recency, count / np.maximum(count.max(1, keepdims=True), 1)))


def labels(used: np.ndarray) -> np.ndarray:
    """Tokens to each expert's next use ``[T, E]``, clipped to ¾ E and scaled to 0 … 1."""
    at, cap = np.arange(len(used))[:, None], max(1.0, CAP * used.shape[1])
    coming = np.minimum.accumulate(np.where(used, at, np.inf)[::-1])[::-1]
    after = np.vstack((coming[1:], np.full((1, used.shape[1]), np.inf)))
    return np.minimum(after - at, cap) / cap


def trained(
    seen: np.ndarray, wanted: np.ndarray, *, hidden: int, epochs: int, seed: int
) -> list[list[Any]]:
    """A net that gives ``wanted`` ``[N, E]`` from ``seen`` ``[N, 2E]``: matrices and biases."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (seen.shape[1], hidden, hidden, wanted.shape[1])
    weights = []
    for inputs, outputs in itertools.pairwise(sizes):
        weights.append(torch.randn((outputs, inputs), generator=generator) * inputs**-0.5)
        weights.append(torch.zeros(outputs))
    x, y = (torch.tensor(part, dtype=torch.float32) for part in (seen, wanted))
    with torch.enable_grad(), threads(1):  # so small that a second one is in the way
        adam = torch.optim.AdamW([w.requires_grad_() for w in weights], lr=LEARNING_RATE)
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(BATCH):
                adam.zero_grad()
                (_forward(weights, x[batch]) - y[batch]).square().mean().backward()
                adam.step()
    tables = [np.round(w.detach().double().numpy(), 4).tolist() for w in weights]
    return [list(pair) for pair in zip(tables[::2], tables[1::2], strict=True)]


def _forward(weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    first, a, second, b, out, c = weights
    x = torch.nn.functional.silu(x @ first.T + a)
    x = torch.nn.functional.silu(x @ second.T + b)
    return (x @ out.T + c).abs()


def hit_ratios(trace: Trace, data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Hit ratio by experts a layer caches, of the nets, LRU, LFU and Belady, each within a layer.

    Only for sizes that hold a token's experts of every layer.
    """
    shape, found = trace.shape, {}
    size, most = max(shape.nbytes.items()), max(shape.experts)
    contenders = {
        "flashmoe": flashmoe(data),
        "lru": layer_lru(),
        "lfu": layer_lru().replace(evict=LFU()),
    }
    for room in sorted({round(share * most) for share in SIZES}):
        if shape.top_k <= room:
            knobs = Knobs(room * size[1] * shape.layers, size[0])
            row = {name: replay(trace, s, knobs).hit_ratio for name, s in contenders.items()}
            hits, asked = belady_hits(trace, room, per_layer=True)
            found[str(room)] = {**row, "belady": hits / max(asked, 1)}
    return found


def made_from(
    lab: Lab,  # noqa: ARG001
    *,
    max_tokens: int = 512,
    hidden: int = 32,
    epochs: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """What the profile depends on besides the texts.

    Parameters
    ----------
    max_tokens
        Tokens taken of each half of a text.
    hidden
        Units of each of a net's two hidden layers, 1 to 512.
    epochs
        Passes over the examples.
    seed
        Of the first weights and of the order of the examples.

    Raises
    ------
    ValueError
        ``hidden`` or ``epochs`` is out of range.
    """
    for name, value, most in (("hidden", hidden, 512), ("epochs", epochs, 10_000)):
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name}={value!r}: a whole number from 1 to {most}")
    return {"max_tokens": max_tokens, "hidden": hidden, "epochs": epochs, "seed": seed}


def make(
    lab: Lab, texts: Sequence[Text], made: dict[str, Any], kept: Kept, *, progress: bool
) -> dict[str, Any]:
    """The nets, and what they are worth on text they were not trained on.

    Returns
    -------
    dict
        ``nets`` ``[L]``: three pairs of matrix ``[out][in]`` and bias ``[out]``; ``held_out``, see
        `hit_ratios`; ``tokens`` of the two halves.
    """
    trace, held_out = (record(lab, h, tokens=made["max_tokens"]) for h in parted(texts, 0.5))
    by_text, nets = uses(trace), []
    how = {name: made[name] for name in ("hidden", "epochs", "seed")}
    for layer in tqdm(range(trace.shape.layers), disable=not progress, desc="flashmoe"):
        seen, wanted = (
            np.concatenate([of(text[layer]) for text in by_text]) for of in (features, labels)
        )
        nets.append(once(kept, f"net {layer}", partial(trained, seen, wanted, **how)))
    data = {"nets": nets, "tokens": [trace.tokens, held_out.tokens]}
    return data | {"held_out": hit_ratios(held_out, data)}
