"""SwapMoE's profiling: what a layer loses when it is short of experts, and what a swap costs.

``lab.calibrate("swapmoe")`` measures, in this order,

1. ‖E_i‖ of every expert, and on sample texts how often each is used, its summed gate
   probabilities and its importance,
2. quality and swaps, for every layer, number of experts kept n and update interval f: the layer
   alone works under the mask that SwapMoE would give it, renewed every f tokens by the importance
   of the unmasked model, while all other layers are whole; loss is that of a figure of quality
   (`figures`), the paper's being Rouge-2 of summaries and ours by default the mean KL,
3. the same of random configurations, all layers short at once, and a small network fitted on them:
   the paper's estimator (its appendix A.2). Of the two estimators that one plans which is nearer on
   configurations it was not made from; both errors are told,
4. latency: tokens of the engine with many updates and with none,
5. with these estimates the planner's configuration for each budget (`swapmoe_planner`).

A swap takes no time in measurements 2 and 3: what is late in a run is a little worse than its
estimate. By Rouge-2 they take (F x L x (N - 1) + tried) x 24 summaries.

T tokens, L layers, E experts, N numbers kept, F intervals.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from moelab.calibration.figures import FIGURES, asked_for
from moelab.calibration.probes import Text, expert_norms, record, soft_counts, texts_of
from moelab.calibration.profile import Kept, once
from moelab.calibration.swapmoe_network import FOLDS, configurations, fitted, off, unseen
from moelab.calibration.swapmoe_quality import ShortLayers, numbers_kept
from moelab.engine.generation import Decoder, Ids
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


def plans(lab: Lab, data: dict[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's configuration for each budget, by experts that fit, beside uniform's."""
    shape, found, estimates = lab._shape, dict[int, Plan](), Estimates.of(data)
    nats, loss = made["nats_per_slowdown"], "kl" if data["quality"] == "kl" else "loss"
    for slots in sorted({int(part * sum(shape.experts) / 100) for part in made["percent"]}):
        if slots >= shape.layers * shape.top_k:
            own: dict[str, Any] = {"start": list(found.values()), "seed": made["seed"]}
            if nats is None:
                found[slots] = plan_to_the_bend(estimates, slots, shape, **own)
            else:
                found[slots] = plan_within(estimates, slots, shape, nats_per_slowdown=nats, **own)
    return {
        str(slots): {
            "f": plan.f,
            "experts": list(plan.experts),
            loss: estimates.kl(plan),
            f"added_{loss}": estimates.added(plan),
            "ms": estimates.ms(plan),
            f"uniform_{loss}": estimates.kl(uniform(slots, shape, plan.f)),
        }
        for slots, plan in found.items()
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
    quality: str = "kl",
    pairs: int | None = None,
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
        Loss that twice the time of a token is worth to the planner (ours), in nats of KL unless
        by another ``quality``; None, as the paper has it: updates are as frequent as they may be
        before the time of a token bends up.
    tried
        Random configurations that the paper's estimator of quality is fitted on; 0: losses of one
        short layer at a time are added up instead (ours).
    device
        Where the latency is measured.
    seed
        Of the genetic search.
    quality
        The figure the planner goes by: ``"kl"``, ``"loss"`` or of an encoder-decoder ``"rouge2"``.
    pairs
        Texts that it is measured on; default all, 24 for Rouge-2.

    Raises
    ------
    ValueError
        Too few configurations to fit anything on, or the model has none of that figure.
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
    # Version 0.3 had one figure and no network: its profiles are named as it named them.
    return made | ({"tried": tried} if tried else {}) | asked_for(lab, quality, pairs, "kl")


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
    quality, tokens = made.get("quality", "kl"), made["max_tokens"]
    figure = FIGURES[quality](lab, texts, tokens, made.get("pairs"))
    if max(map(len, figure.ids)) < 3:
        raise ValueError("nothing to time: at least one text needs 3 tokens or more")
    scores = [importances(lab, text, tokens, norms) for text in figure.texts]
    numbers = numbers_kept(lab._shape.top_k, max(experts))
    short = ShortLayers(lab._engine, figure, scores, norms)

    def run(name: str, experts: Mapping[int, int], f: int) -> Sequence[Any]:
        return once(kept, f"{name} experts, every {f}", lambda: short(experts, f))

    wanted = list(itertools.product(every, range(len(experts)), numbers))
    found = [
        run(f"layer {layer}, {n}", {layer: n}, f)
        for f, layer, n in tqdm(wanted, disable=not progress, desc="swapmoe")
    ]
    tables = np.array([one[:2] for one in found]).reshape(len(every), len(experts), -1, 2)
    data = _tables(lab, figure.texts, tokens, norms, scores) | {
        "quality": quality,
        "every": every,
        "kept": list(numbers),
        "loss": _short(tables[..., 0].tolist()),
        "swaps": _short(tables[..., 1].tolist()),
    }
    if errors := [one[2] for one in found if len(one) > 2 and one[2]]:
        data["standard_error"] = float(np.median(errors))
    longest = max(figure.ids, key=len)
    data["base_ms"], data["swap_ms"] = latency(lab, data, longest, made["device"])
    if made.get("tried"):
        some = configurations(experts, lab._shape.top_k, every, made["tried"], made["seed"])
        losses = [
            run(str(plan.experts), dict(enumerate(plan.experts)), plan.f)[0]
            for plan in tqdm(some, disable=not progress, desc="configurations")
        ]
        data["tried"] = [
            [p.f, list(p.experts), loss] for p, loss in zip(some, _short(losses), strict=True)
        ]
        data |= _network(data, some, losses, figure.least, experts)
    data["plans"] = plans(lab, data, made)
    return data


def _network(
    data: dict[str, Any],
    some: Sequence[Plan],
    losses: Sequence[float],
    least: float,
    experts: Sequence[int],
) -> dict[str, Any]:
    """The paper's estimator, how far either is off, and which one plans."""
    said = {
        "network": unseen(some, losses, experts, least),
        "added": [Estimates.of(data).added(plan) for plan in some],
    }
    wrong = {name: off(told, losses, least) for name, told in said.items()}
    network = dataclasses.asdict(fitted(some, losses, experts, least))
    return {"off": wrong, "network": network, "planned_by": min(wrong, key=lambda n: wrong[n])}


def _short(table: Any) -> Any:
    """Six digits are enough, and a third of the file."""
    return [_short(row) for row in table] if isinstance(table, list) else float(f"{table:.6g}")
