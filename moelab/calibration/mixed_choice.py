"""Which form each expert gets: the least sum of costs within a number of bytes, exactly.

Costs are what `moelab.calibration.mixed` measured; they are taken to add up, over projections and
over experts. One choice of many for each of many under one limit is a knapsack: solved by dynamic
programming over bytes, in steps of what all differences of sizes have in common.

n experts of the model, F forms, L layers, E experts of a layer, P projections, B bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moelab.scheduling.stream import Shape
from moelab.store.codecs import Layout
from moelab.store.mixed import BITS, forms_of, nbytes

UNITS = ("expert", "layer", "model")
"""Who has a form of its own."""


def choose(costs: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """One of F options for each of G, with the least sum of costs within ``room``; exact.

    Parameters
    ----------
    costs, sizes
        float and int ``[G, F]``, sizes in bytes.
    room
        Bytes of all together.

    Returns
    -------
    numpy.ndarray
        int ``[G]``: which option.

    Raises
    ------
    ValueError
        Not even the smallest fit.

    Examples
    --------
    >>> choose(np.array([[0.0, 1.0], [0.0, 3.0]]), np.array([[8, 4], [8, 4]]), 12).tolist()
    [1, 0]
    """
    least = sizes.min(1, keepdims=True)
    if (spare := room - int(least.sum())) < 0:
        raise ValueError(f"the fewest bits take {least.sum()} bytes; give as much, not {room}")
    step = int(np.gcd.reduce((sizes - least).ravel())) or 1
    extra, most = (sizes - least) // step, spare // step
    most = min(most, int(extra.max(1).sum()))
    best, picks = np.zeros(most + 1), np.zeros((len(costs), most + 1), np.int16)
    for at, (own, its) in enumerate(zip(costs, extra.tolist(), strict=True)):
        found = np.full(most + 1, np.inf)
        for option in np.lexsort((np.arange(len(own)), own)).tolist():  # of equal ones the first
            if (more := its[option]) > most:
                continue
            through = best[: most + 1 - more] + own[option]
            better = through < found[more:]
            found[more:][better] = through[better]
            picks[at, more:][better] = option
        best = found
    chosen, left = np.zeros(len(costs), np.int64), most
    for at in reversed(range(len(costs))):
        chosen[at] = picks[at, left]
        left -= int(extra[at, chosen[at]])
    return chosen


def costs_of(data: dict[str, Any], forms: Sequence[int]) -> np.ndarray:
    """What each expert costs in each form, nats a token: float ``[n, F]``."""
    together = [tuple(digits) for digits in data["projections"]]
    rows = []
    for kl, errors in zip(data["kl"], data["errors"], strict=True):
        error = np.array(errors)  # [E, P, B]
        share = error / np.maximum(error.sum(0), 1e-300)
        own = np.array(kl) * np.where(error.sum(0) > 0, share, 1 / len(error))
        at = [[BITS.index(int(str(form)[d[0]])) for d in together] for form in forms]
        rows.append(np.stack([sum(own[:, p, b] for p, b in enumerate(of)) for of in at], axis=1))
    return np.concatenate(rows)


def chosen_forms(
    shape: Shape, layout: Layout, data: dict[str, Any], room: int, unit: str = "expert"
) -> list[int]:
    """The form of each expert within ``room`` bytes; by ``unit`` all of a layer, or all, alike."""
    alike = [form for form in forms_of(layout) if _together(form, data["projections"])]
    costs, sizes = costs_of(data, alike), [nbytes(layout, form) for form in alike]
    group = {"expert": np.arange(shape.n), "layer": shape.layer_of, "model": np.zeros(shape.n, int)}
    of = group[unit]
    sums = np.zeros((of[-1] + 1, len(alike)))
    np.add.at(sums, of, costs)
    picks = choose(sums, np.bincount(of)[:, None] * np.array(sizes), room)
    return [alike[pick] for pick in picks[of].tolist()]


def _together(form: int, projections: Sequence[Sequence[int]]) -> bool:
    return all(len({str(form)[place] for place in digits}) == 1 for digits in projections)
