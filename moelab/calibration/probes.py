"""Probe texts: what is measured on which; their routing through the whole model; experts' norms.

Everything here works outside budget, cache and clock: a text goes through the model in one pass,
each expert at the tier that is asked for, read through the page cache.

T tokens, L layers, E experts, K active, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moelab.engine.compute import Routed
from moelab.engine.generation import Ids, Stream, begun_with
from moelab.models.chat import Text, Texts, check_text, listed, takes_pairs
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import LookAhead
from moelab.scheduling.trace import Trace
from moelab.store.codecs import decode

if TYPE_CHECKING:
    from moelab.lab import Lab


def texts_of(lab: Lab, texts: Sequence[Text] | None) -> list[Text]:
    """The texts given, or the model's own probes.

    Raises
    ------
    ValueError
        There are none.
    """
    own = lab.probes().values() if texts is None else ()  # of each domain one text, or several
    found = [text for some in own for text in listed(some)] if texts is None else list(texts)
    if not found and texts is not None:
        raise ValueError("an empty list of texts: give one or more; None: the model's own probes")
    if not found:
        raise ValueError(
            "this model brings no probe texts; give texts=[...], a few hundred words will do"
        )
    return found


def read(lab: Lab, text: Text, most: int) -> Ids:
    """Token ids of a text, ``most`` of them.

    Raises
    ------
    ValueError
        A text for an encoder-decoder, which is told what to make of a source, or a pair for any
        other model.
    """
    text = check_text(text, two=takes_pairs(lab._engine.model))
    if isinstance(text, str):
        return Ids(lab._encode(text)[:most])
    source, target = text
    own = begun_with(lab._engine.model, lab._encode(source))
    return Ids([*own, *lab._encode(target)[:most]], own.source)


def to_score(lab: Lab, text: Texts | None, most: int) -> tuple[list[Ids], list[str]]:
    """Token ids of one text, of several or of the model's own; and of pairs the whole targets.

    Raises
    ------
    ValueError
        There is no text, fewer than two tokens of one, or one that this model does not take.
    """
    if most < 2:
        raise ValueError(f"max_tokens={most}: 2 or more")
    texts = texts_of(lab, None if text is None else listed(text))
    ids = [read(lab, one, most) for one in texts]
    if min(map(len, ids)) < 2:
        raise ValueError("nothing to score: the text needs at least two tokens")
    return ids, [one[1] for one in texts if not isinstance(one, str)]


def digest_of(texts: Sequence[Text]) -> str:
    """A fingerprint of texts, for `made_from`."""
    plain = (text if isinstance(text, str) else "\1".join(text) for text in texts)
    return hashlib.blake2b("\0".join(plain).encode(), digest_size=8).hexdigest()


def halves(text: Text) -> tuple[Text, Text]:
    """The text cut in two, between words; of a pair the target."""
    if not isinstance(text, str):
        source, (first, second) = text[0], halves(text[1])
        return (source, str(first)), (source, str(second))
    middle = text.find(" ", len(text) // 2)
    cut = len(text) // 2 if middle < 0 else middle
    return text[:cut], text[cut:]


def parted(
    texts: Sequence[Text], held_out: float, cut: Callable[[Text], tuple[Text, Text]] = halves
) -> tuple[list[Text], list[Text]]:
    """Texts to measure on, and those held out: each is ``cut``.

    Of several pairs whole ones are held out, this share spread evenly, at least one: the rest of
    a sentence is no text that a model would be asked for.
    """
    if len(texts) < 2 or any(isinstance(text, str) for text in texts):
        parts = [cut(text) for text in texts]
        return [first for first, _ in parts], [second for _, second in parts]
    out = {
        at for at in range(len(texts)) if math.ceil((at + 1) * held_out) > math.ceil(at * held_out)
    }
    return [t for at, t in enumerate(texts) if at not in out], [texts[at] for at in sorted(out)]


def record(
    lab: Lab, texts: Sequence[Text] | None = None, *, tokens: int = 64, look_ahead: int = 0
) -> Trace:
    """The routing of texts at full precision, as if decoded token by token; no settings in it.

    Parameters
    ----------
    texts
        Default: the model's own probe texts. The first token of each counts as its prompt.
    tokens
        Taken of each text.
    look_ahead
        Record what the routers of so many coming layers say, too.

    Returns
    -------
    Trace
        With the norms of the layers' inputs; give ``strategy`` and ``knobs`` to `replay`.
    """
    engine, trace = lab._engine, Trace(lab._shape)

    def heard(layer: int, x: torch.Tensor, routed: Routed) -> None:
        asked = engine.adapter.look_ahead(layer, look_ahead) if look_ahead else []
        coming = [(at, Routed(idx, w, trace.shape.experts[at])) for at, idx, w in asked]
        norms = x.float().norm(dim=-1).tolist()
        if layer < trace.shape.encoder_layers:  # a prompt, read whole
            told = LayerInput(layer, routed.experts, routed.weights, True, norms=tuple(norms))
            steps[0].append(told)
            return
        for t, own in enumerate(zip(routed.experts, routed.weights, strict=True)):
            ahead = (LookAhead(at, its.experts[t], its.weights[t]) for at, its in coming if t)
            experts, weights = ((part,) for part in own)
            told = LayerInput(layer, experts, weights, not t, tuple(ahead), norms=(norms[t],))
            steps[t].append(told)

    for text in texts_of(lab, texts):
        ids = read(lab, text, tokens)
        steps: list[list[LayerInput]] = [[] for _ in ids]  # [T][L]
        with engine.full_precision(heard=heard):
            Stream(engine, ids.source).forward(ids)
        trace.steps += itertools.chain(*steps)
    return trace


def expert_norms(lab: Lab) -> list[list[float]]:
    """Frobenius norm of every expert's weights at the best tier, ``[L][E]``."""
    store, best = lab._store, max(lab._store.tiers)

    def norm(layer: int, expert: int) -> float:
        tensors = decode(store.read(layer, expert, best), store.layout, best)
        return float(sum(t.square().sum() for t in tensors.values()) ** 0.5)

    counts = enumerate(store.experts_per_layer)
    return [[norm(layer, expert) for expert in range(count)] for layer, count in counts]


def soft_counts(
    lab: Lab, texts: Sequence[Text] | None = None, *, tokens: int = 64
) -> list[list[float]]:
    """SEER-MoE's soft counts: gate probabilities summed over all tokens of texts, ``[L][E]``.

    Softmax of the router's logits over all experts, whatever it makes of them afterwards. Empty
    where a layer's router gives no logits of every expert.
    """
    engine, sums = lab._engine, [torch.zeros(n) for n in lab._shape.experts]
    told: set[int] = set()

    def add(layer: int, output: Any) -> None:
        logits, count = engine.adapter.layers[layer].logits(output), len(sums[layer])
        if logits is not None:
            told.add(layer)
            rows = logits.float().reshape(-1, logits.shape[-1])
            sums[layer] += rows.softmax(-1).sum(0)[:count]

    def hear(layer: int) -> Callable[..., None]:
        return lambda _router, _inputs, output: add(layer, output)

    routers = ((at.index, at.router) for at in engine.adapter.layers if at.router is not None)
    hooks = [router.register_forward_hook(hear(layer)) for layer, router in routers]
    try:
        for text in texts_of(lab, texts):
            ids = read(lab, text, tokens)
            with engine.full_precision():
                Stream(engine, ids.source).forward(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [row.tolist() for row in sums] if len(told) == len(sums) else []
