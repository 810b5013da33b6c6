"""The verified passes of a drafted run as a recording has them, and their figures.

A pass is ``token`` (the first it made; its events are noted there), how many tokens were
``drafted``, ``accepted`` and ``kept`` (the accepted and the verifier's own next one), and what was
read on demand for ``rejected`` tokens only. The texts of these stand in the place of token
``token + accepted``; they are no part of the run's text.

L layers, K active experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moelab.scheduling import events as e

COUNTED = ("token", "drafted", "accepted", "kept", "rejected_loads", "rejected_bytes")
"""Numbers of a pass in recordings and frames; beside them ``rejected``, its texts."""


def for_rejected(rows: np.ndarray, chosen: set[tuple[int, int]]) -> tuple[int, int]:
    """Loads on demand among a pass's events that no token kept ``chosen``, and their bytes."""
    loads = rows[(rows["kind"] == e.LOAD) & (rows["at"] >= 0)]
    places = zip(loads["layer"].tolist(), loads["expert"].tolist(), strict=True)
    lost = loads["bytes"][np.array([place not in chosen for place in places], bool)]
    return len(lost), int(lost.sum())


def told(passes: Sequence[Mapping[str, Any]], first: int, last: int) -> dict[str, float | None]:
    """Figures of the passes that began from token ``first`` to before ``last``.

    ``acceptance``, ``tokens_per_pass``, and ``rejected_bytes`` for each token kept; None where
    there is nothing to divide.
    """
    some = [one for one in passes if first <= one["token"] < last]
    sums = {name: sum(one[name] for one in some) for name in COUNTED}
    return {
        "acceptance": sums["accepted"] / sums["drafted"] if sums["drafted"] else None,
        "tokens_per_pass": sums["kept"] / len(some) if some else None,
        "rejected_bytes": sums["rejected_bytes"] / sums["kept"] if some else None,
    }


def of_token(passes: Sequence[Mapping[str, Any]], token: int) -> dict[str, Any] | None:
    """The pass that made a token; None where no draft was verified."""
    found = (dict(one) for one in passes if one["token"] <= token < one["token"] + one["kept"])
    return next(found, None)


def refold(document: dict[str, Any], events: np.ndarray, experts: np.ndarray) -> None:
    """Check a file's passes, and work out of its events again what rejected tokens cost.

    ``experts``: chosen at each token, ``[T * L * K]``.

    Raises
    ------
    ValueError
        A pass cannot be one of this run's; the message names it.
    """
    tokens, layers = len(document["pieces"]), document["model"]["layers"]
    chosen = experts.reshape(tokens, layers, len(experts) // max(1, tokens * layers))
    free = 1  # the first token that no pass has made yet
    for i, one in enumerate(document.get("passes", ())):
        accepted, count = one["accepted"], one["kept"]
        begin, end = one["token"], one["token"] + count
        fits = free <= begin and end <= tokens and accepted <= one["drafted"]
        if not fits or count < 1 or count - accepted not in (0, 1):
            raise ValueError(f"passes[{i}] cannot be one of {tokens} tokens")
        if len(one["rejected"]) != one["drafted"] - accepted:
            raise ValueError(f"passes[{i}].rejected has {len(one['rejected'])} texts")
        rows = events[slice(*np.searchsorted(events["token"], (begin, end)))]
        taken = {(at, x) for row in chosen[begin:end] for at in range(layers) for x in row[at]}
        one["rejected_loads"], one["rejected_bytes"] = for_rejected(rows, taken)
        free = end
