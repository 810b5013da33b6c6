"""Drop-if-cold: a missing expert that hardly counts is not worth waiting for.

A training-free rule of thumb of offloading systems: of the k experts that a router chose, a missing
one is dropped if its normalised gate weight is below F/k. With F <= 1 the first expert always
stays, since the largest of k weights that sum to 1 is at least 1/k. The others keep their weights.
"""

from __future__ import annotations

from typing import ClassVar

from moelab.scheduling.strategy import Parameter, Precision, Request, Strategy, View
from moelab.strategies.basics import LRU, GateLookAhead


class DropIfCold(Precision):
    """Skip where missing and weight < F/k."""

    title = "drop if missing and weight < F/k"
    parameters: ClassVar = (
        Parameter("factor", "F: a missing expert below F/k of the gate weight is dropped"),
    )

    def __init__(self, factor: float = 0.6) -> None:
        self.factor = self.parameters[0].checked(factor)

    def tier(self, request: Request, asked: int, view: View) -> int:
        return 0 if request.weight < self.factor / view.shape.top_k else asked


def drop_if_cold(*, factor: float = 0.6) -> Strategy:
    """LRU; a missing expert with little gate weight is dropped instead of loaded."""
    return Strategy("drop_if_cold", LRU(), precision=DropIfCold(factor), prefetch=GateLookAhead())
