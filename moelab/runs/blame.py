"""One token explained: which experts it asked for, what became of each, and what that cost.

A row for each expert that a layer's router chose at this token. What happened is told by one word:
the worst of what the events say, in the order of `OUTCOMES`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.runs.tokens import COLUMNS
from moelab.scheduling.events import CAUSES, EVICTED_LATE, KINDS, PREFETCHED

if TYPE_CHECKING:
    import pandas as pd

    from moelab.runs.recording import Recording

OUTCOMES = ("skip", "substitute", "downgrade", "load", "prefetched", "hit")
"""Not served · by another expert · at fewer bits than asked · read now · read ahead · was there."""

_NAMES = (
    *("layer", "expert", "weight", "outcome", "served", "bits_asked", "bits", "bytes", "cause"),
    "wait_ms",
)


def blame(recording: Recording, token: int) -> pd.DataFrame:
    """See `moelab.Recording.blame`."""
    import pandas as pd

    document, events, gates = recording.document, recording.records, recording.gates
    count = len(document["pieces"])
    if not 0 <= token < count:
        raise ValueError(f"there is no token {token}; there are 0 to {count - 1}")
    low, high = np.searchsorted(events["token"], (token, token + 1))
    rows = events[low:high]
    out = []
    steered = gates.get("wanted", gates["expert"])[token]
    for layer, experts in enumerate(gates["expert"][token].tolist()):
        here = rows[(rows["layer"] == layer) & (rows["at"] == layer)]
        weights = gates["weight"][token, layer].tolist()
        chosen = {e: w for e, w in zip(experts, weights, strict=True) if e >= 0}
        out += _layer(layer, here, chosen, [e for e in steered[layer].tolist() if e >= 0])
    frame = pd.DataFrame(out, columns=list(_NAMES))
    values = recording.figures[:, token]
    kl = float(values[COLUMNS.index("kl")])
    late = rows[(rows["kind"] == KINDS.index("stall")) & (rows["cause"] == EVICTED_LATE)]
    frame.attrs = {
        "token": token,
        "text": document["pieces"][token],
        "kl": None if math.isnan(kl) else kl,
        "served": document["top"]["served"][token],
        "full": document["top"]["full"][token],
        "total_ms": float(values[COLUMNS.index("total_ms")]),
        "evict_ms": float(late["dur_ms"].sum()),
    }
    return frame


def _layer(
    layer: int, rows: np.ndarray, chosen: dict[int, float], wanted: list[int]
) -> list[tuple]:
    """The experts of one layer: those chosen by falling weight, then others of a prompt."""
    outcomes: dict[int, dict[str, Any]] = {}
    waits: dict[int, float] = defaultdict(float)
    stand_ins, last = [], ""
    for r in rows:
        kind, expert = KINDS[r["kind"]], int(r["expert"])
        if kind in ("hit", "load", "skip"):
            outcome = "prefetched" if r["cause"] == PREFETCHED else kind
            outcomes[expert] = _outcome(r, outcome, -1 if kind == "skip" else expert)
        elif kind == "substitute":
            stand_ins.append(r)
        elif kind == "downgrade" and last != "substitute":  # noted right behind what it is about
            outcomes[expert]["outcome"] = "downgrade"
        elif kind == "stall" and r["cause"] != EVICTED_LATE:
            waits[expert] += float(r["dur_ms"])
        last = kind
    missing = sorted(chosen.keys() - outcomes.keys(), key=lambda e: -chosen[e])
    if len(missing) == len(stand_ins):  # asked in this order; of a prompt some are not known
        for expert, r in zip(missing, stand_ins, strict=True):
            outcomes[expert] = _outcome(r, "substitute", int(r["expert"]))
    instead = iter(e for e in wanted if e not in chosen)  # a mask or a bias steered the router
    out = []
    for expert, f in sorted(outcomes.items(), key=lambda item: -chosen.get(item[0], 0.0)):
        asked = expert
        if expert in chosen and expert not in wanted:
            asked = next(instead, expert)
            f["outcome"] = "substitute"
        wait = waits.get(f["served"], 0.0)
        out.append((layer, asked, chosen.get(expert, math.nan), *f.values(), wait))
    return out


def _outcome(r: np.void, outcome: str, served: int) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "served": served,
        "bits_asked": int(r["bits_asked"]),
        "bits": int(r["bits"]),
        "bytes": int(r["bytes"]) if KINDS[r["kind"]] == "load" else 0,
        "cause": CAUSES[r["cause"]],
    }
