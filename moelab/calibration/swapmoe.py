"""SwapMoE's profiling: what a layer loses when it is short of experts, and what a swap costs.

``lab.calibrate("swapmoe")`` measures, in this order,

1. ‖E_i‖ of every expert, and on sample texts how often each is used, its summed gate
   probabilities and its importance,
2. quality and swaps, for every layer, number of experts kept n and update interval f: the layer
   alone works under the mask that SwapMoE would give it, renewed every f tokens by the importance
   of the unmasked model, while all other layers are whole; loss is mean KL against the full model,
3. the same of random configurations, all layers short at once, and a small network fitted on them:
   the paper's estimator (its appendix A.2). Of the two estimators that one plans which is nearer on
   configurations it was not made from; both errors are told,
4. latency: tokens of the engine with many updates and with none,
5. with these estimates the planner's configuration for each budget (`swapmoe_planner`).

A swap takes no time in measurements 2 and 3: what is late in a run is a little worse than its
estimate.

T tokens, L layers, E experts, N numbers kept, F intervals.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from moelab.calibration.probes import Text, expert_norms, read, record, soft_counts, texts_of
from moelab.calibration.profile import Kept, once
from moelab.calibration.swapmoe_network import FOLDS, configurations, fitted, off, unseen
from moelab.engine.generation import Decoder, Ids, Stream
from moelab.runs.quality import kl_divergence
from moelab.runs.tokens import tally
from moelab.scheduling.budget import size
from moelab.settings import parse_budget
from moelab.strategies.swapmoe import swapmoe
from moelab.strategies.swapmoe_planner import (
    Estimates,
    Plan,
    plan_to_the_bend,
    plan_within,
    uniform,
)

if TYPE_CHECKING:
    from moelab.engine.engine import Engine
    from moelab.lab import Lab

EVERY = (4, 16, 64)
PERCENT = tuple(range(10, 101, 5))
TRIED = 48
"""Configurations that are run for the network."""
TIMED_TOKENS = 24


# -- 1: importance ----------------------------------------------------------------------------


def importances(lab: Lab, text: Text, tokens: int, norms: Sequence[Sequence[float]]) -> np.ndarray:
    """‖x‖ · ‖G(x)_i‖ · ‖E_i‖ of every token of a text, ``[L, T, E]``; 0 where not routed to.

    An encoder's are with the first token.
    """
    trace = record(lab, [text], tokens=tokens)
    shape = trace.shape
    out = np.zeros((shape.layers, trace.tokens, max(shape.experts)))
    token = -1
    for given in trace.steps:
        token += shape.begins(given.layer, prefill=given.prefill)
        told = given.norms or (1.0,) * len(given.experts)
        for x, experts, gates in zip(told, given.experts, given.weights, strict=True):
            for i, g in zip(experts, gates, strict=True):
                out[given.layer, token, i] += x * abs(g) * norms[given.layer][i]
    return out


def tables(lab: Lab, texts: Sequence[Text] | None = None, *, tokens: int = 64) -> dict[str, Any]:
    """What `static_pruning` ranks experts by, and nothing else of this calibration; not saved.

    On text of one task it makes task pruning: ``static_pruning(tables(lab, [text]), by="count")``.

    Parameters
    ----------
    lab
        Its model is measured, whatever its settings are.
    texts
        To measure on; default the model's own probes.
    tokens
        Taken of each text.

    Returns
    -------
    dict
        ``norms``, ``counts``, ``importance`` and, where routers give logits, ``soft``: ``[L][E]``.

    Raises
    ------
    RuntimeError
        The lab is at work.
    """
    used = texts_of(lab, texts)
    with lab._session.claimed():
        norms = expert_norms(lab)
        scores = [importances(lab, text, tokens, norms) for text in used]
        return _tables(lab, used, tokens, norms, scores)


def _tables(
    lab: Lab,
    texts: Sequence[Text],
    tokens: int,
    norms: list[list[float]],
    scores: Sequence[np.ndarray],
) -> dict[str, Any]:
    used = np.sum([(s > 0).sum(1) for s in scores], 0)  # [L, E], as the sum of importances
    total = np.sum([s.sum(1) for s in scores], 0)
    experts = lab._shape.experts
    found = {
        "norms": _short(norms),
        "counts": [row[:n].tolist() for row, n in zip(used, experts, strict=True)],
        "importance": _short([row[:n].tolist() for row, n in zip(total, experts, strict=True)]),
    }
    soft = soft_counts(lab, texts, tokens=tokens)
    return found | ({"soft": _short(soft)} if soft else {})


def renewed(scores: np.ndarray, start: np.ndarray, f: int, n: int) -> Iterator[list[int]]:
    """One layer's n virtual experts for each f tokens, as `VirtualExperts` ranks them.

    From the importance of each token, ``[T, E]``, and that to begin with, ``[E]``.
    """
    order = sorted(range(len(start)), key=lambda e: -start[e])
    for begin in range(0, len(scores), f):
        chosen = order[:n]
        yield chosen
        seen = scores[begin : begin + f].sum(0)
        order = sorted(order, key=lambda e: (-seen[e], e not in chosen))


# -- 2: quality -------------------------------------------------------------------------------


class ShortLayers:
    """Measures a model, at full precision, of which some layers keep only a few experts.

    From texts as token ids ``[text][position]`` and the `importances` of each.
    """

    def __init__(self, engine: Engine, texts: Sequence[Ids], scores: Sequence[np.ndarray]) -> None:
        self._engine, self._texts, self._scores = engine, texts, scores
        self._sum = np.sum([s.sum(1) for s in scores], axis=0)  # [L, E]
        with engine.full_precision():
            self._full = [Stream(engine, ids.source).forward(ids, keep=len(ids)) for ids in texts]

    def __call__(self, kept: Mapping[int, int], f: int) -> tuple[float, float]:
        """(KL in nats a token, swaps a token) with so many experts ``kept`` of some layers."""
        experts, tokens = self._engine.shape.experts, sum(map(len, self._texts))
        short = {layer: n for layer, n in kept.items() if n < experts[layer]}
        kl = swaps = 0.0
        if not short:  # all are whole
            return kl, swaps
        for ids, scores, full in zip(self._texts, self._scores, self._full, strict=True):
            chosen = {}
            for layer, n in short.items():
                own = scores[layer, :, : experts[layer]]
                start = self._sum[layer, : experts[layer]] - own.sum(0)  # other texts'
                chosen[layer] = list(renewed(own, start, f, n))
                pairs = itertools.pairwise(chosen[layer])
                swaps += sum(len(set(b) - set(a)) for a, b in pairs)
            kl += float(kl_divergence(full, self._logits(ids, chosen, f)).sum())
        return kl / tokens, swaps / tokens

    def _logits(
        self, ids: Ids, chosen: Mapping[int, Sequence[Sequence[int]]], f: int
    ) -> torch.Tensor:
        """Logits ``[T, V]``: a chunk of f tokens for each layer's next set of experts."""
        adapter, out = self._engine.adapter, []
        with self._engine.full_precision():
            stream = Stream(self._engine, ids.source)
            try:
                for at, begin in enumerate(range(0, len(ids), f)):
                    for layer, sets in chosen.items():
                        mask = np.zeros(self._engine.shape.experts[layer], bool)
                        mask[list(sets[at])] = True
                        adapter.steer(layer, mask)
                    chunk = ids[begin : begin + f]
                    out.append(stream.forward(chunk, keep=len(chunk)))
            finally:
                adapter.release()
        return torch.cat(out)


def numbers_kept(top_k: int, experts: int) -> tuple[int, ...]:
    """Where quality is measured: denser where few are kept, because it bends there."""
    parts = (round(experts * part) for part in (1 / 4, 3 / 8, 1 / 2, 3 / 4))
    more = (n for n in parts if n > top_k)
    return tuple(sorted({top_k, min(top_k + 1, experts), experts, *more}))


# -- 4: latency -------------------------------------------------------------------------------


def room_to_swap(lab: Lab) -> int:
    """Bytes in which swaps can be timed: one expert above top-k in each layer, at the best tier.

    Raises
    ------
    ValueError
        The lab's budget is smaller: it is kept here, too.
    """
    shape = lab._shape
    least = (shape.top_k + 1) * shape.layers * shape.nbytes[max(shape.nbytes)]
    if lab.settings.budget_bytes < least:
        raise ValueError(
            f"budget {size(lab.settings.budget_bytes)} leaves no room to swap at "
            f"{max(shape.nbytes)} bit, so that its time could be measured; for this calibration "
            f"raise it to {size(least)}: lab.update(budget={least})"
        )
    return least


def latency(lab: Lab, data: dict[str, Any], ids: Ids, device: str) -> tuple[float, float]:
    """(ms of a token without swaps, ms that each swap adds), medians over decoded tokens.

    Half of the experts are resident; every other token's virtual experts are renewed at once.
    """
    engine, shape = lab._engine, lab._shape
    best, least = max(shape.nbytes), room_to_swap(lab)
    many = lab.settings.change(
        shape,
        strategy=swapmoe(data, f=1, swaps=2),
        device=device,
        bits=best,
        budget=min(lab.settings.budget_bytes, max(least, shape.all_bytes(best) // 2)),
        measure_kl=False,
    )
    none = many.change(shape, f=256)
    seconds: dict[int, list[float]] = {}
    for settings in (none, many, none, many):
        engine.apply(settings)
        engine.new_sequence(record=False)
        engine.prefill = False
        decoder = Decoder(engine, ids.source)
        for at, token in enumerate(ids[:TIMED_TOKENS]):
            begun = len(engine.log)
            decoder.step([token])
            if at > 1:
                swaps = tally(engine.log.records(begun))["prefetches"]
                seconds.setdefault(swaps, []).append(decoder.seconds)
            engine.end_of_token()
    base = float(np.median(seconds.pop(0)))
    more = [(s - base) / swaps for swaps, times in seconds.items() for s in times]
    return 1e3 * base, 1e3 * max(0.0, float(np.median(more or [0.0])))


# -- 5: the plans -----------------------------------------------------------------------------


def plans(
    lab: Lab, estimates: Estimates, percent: Sequence[float], nats: float | None, seed: int
) -> dict:
    """The planner's configuration for each budget, by experts that fit, beside uniform's."""
    shape, made = lab._shape, dict[int, Plan]()
    for slots in sorted({int(part * sum(shape.experts) / 100) for part in percent}):
        if slots >= shape.layers * shape.top_k:
            own: dict[str, Any] = {"start": list(made.values()), "seed": seed}
            if nats is None:
                made[slots] = plan_to_the_bend(estimates, slots, shape, **own)
            else:
                made[slots] = plan_within(estimates, slots, shape, nats_per_slowdown=nats, **own)
    return {
        str(slots): {
            "f": plan.f,
            "experts": list(plan.experts),
            "kl": estimates.kl(plan),
            "added_kl": estimates.added(plan),
            "ms": estimates.ms(plan),
            "uniform_kl": estimates.kl(uniform(slots, shape, plan.f)),
        }
        for slots, plan in made.items()
    }


# -- the calibration --------------------------------------------------------------------------


def made_from(
    lab: Lab,
    *,
    max_tokens: int = 64,
    every: Sequence[int] = EVERY,
    percent: Sequence[float | str] = PERCENT,
    nats_per_slowdown: float | None = None,
    tried: int = TRIED,
    device: str = "disk",
    seed: int = 0,
) -> dict[str, Any]:
    """What the profile depends on besides the texts.

    Parameters
    ----------
    max_tokens
        Tokens taken of each text.
    every
        Update intervals f the planner may choose from, in tokens.
    percent
        Budgets to plan for: numbers are percent of all experts, texts as `moelab.open` takes them
        (``"25%"``, ``"2GB"``).
    nats_per_slowdown
        KL that twice the time of a token is worth to the planner (ours); None, as the paper has it:
        updates are as frequent as they may be before the time of a token bends up.
    tried
        Random configurations that the paper's estimator of quality is fitted on; 0: losses of one
        short layer at a time are added up instead (ours).
    device
        Where the latency is measured.
    seed
        Of the genetic search.
    """
    if tried and tried < 2 * FOLDS:
        raise ValueError(f"tried={tried}: at least {2 * FOLDS} configurations, or 0 for none")
    whole = lab._shape.all_bytes(max(lab._shape.nbytes))
    parts = [
        round(100 * parse_budget(part, lab._shape) / whole, 3) if isinstance(part, str) else part
        for part in percent
    ]
    made = {"max_tokens": max_tokens, "every": sorted(every), "percent": sorted(parts)}
    made |= {"nats_per_slowdown": nats_per_slowdown, "device": device, "seed": seed}
    # Version 0.3 had no network: its profiles are named as it named them.
    return made | ({"tried": tried} if tried else {})


def make(
    lab: Lab, texts: Sequence[Text], made: dict[str, Any], kept: Kept, *, progress: bool
) -> dict[str, Any]:
    """The profile's data, see the module's first lines.

    Raises
    ------
    ValueError
        No text is long enough, or the lab's budget too small, to time swaps.
    """
    experts, every = lab._shape.experts, made["every"]
    norms = expert_norms(lab)
    room_to_swap(lab)
    ids = [read(lab, text, made["max_tokens"]) for text in texts]
    if max(map(len, ids)) < 3:
        raise ValueError("nothing to time: at least one text needs 3 tokens or more")
    scores = [importances(lab, text, made["max_tokens"], norms) for text in texts]
    numbers = numbers_kept(lab._shape.top_k, max(experts))
    short = ShortLayers(lab._engine, ids, scores)

    def measured(f: int, layer: int, n: int) -> tuple[float, float]:
        return once(kept, f"layer {layer}, {n} experts, every {f}", lambda: short({layer: n}, f))

    def run(plan: Plan) -> float:
        layers = dict(enumerate(plan.experts))
        return once(kept, f"{plan.experts} experts, every {plan.f}", lambda: short(layers, plan.f))[
            0
        ]

    wanted = list(itertools.product(every, range(len(experts)), numbers))
    found = [measured(*one) for one in tqdm(wanted, disable=not progress, desc="swapmoe")]
    tables = np.array(found).reshape(len(every), len(experts), len(numbers), 2)
    data = _tables(lab, texts, made["max_tokens"], norms, scores) | {
        "every": every,
        "kept": list(numbers),
        "loss": _short(tables[..., 0].tolist()),
        "swaps": _short(tables[..., 1].tolist()),
    }
    data["base_ms"], data["swap_ms"] = latency(lab, data, max(ids, key=len), made["device"])
    if made.get("tried"):
        some = configurations(experts, lab._shape.top_k, every, made["tried"], made["seed"])
        kls = [run(plan) for plan in tqdm(some, disable=not progress, desc="configurations")]
        added = [Estimates.of(data).added(plan) for plan in some]
        data["tried"] = [
            [p.f, list(p.experts), kl] for p, kl in zip(some, _short(kls), strict=True)
        ]
        data["off"] = {"network": off(unseen(some, kls, experts), kls), "added": off(added, kls)}
        data["network"] = dataclasses.asdict(fitted(some, kls, experts))
        data["planned_by"] = min(data["off"], key=lambda name: data["off"][name])
    data["plans"] = plans(
        lab, Estimates.of(data), made["percent"], made["nats_per_slowdown"], made["seed"]
    )
    return data


def _short(table: Any) -> Any:
    """Six digits are enough, and a third of the file."""
    return [_short(row) for row in table] if isinstance(table, list) else float(f"{table:.6g}")
