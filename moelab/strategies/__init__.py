"""Strategies by name, and the parts they are made of.

A policy of your own is a subclass of one part, live at once:

>>> from moelab.strategies import Evict, lru
>>> class LowestIndex(Evict):
...     def priority(self, key, view):
...         return -key[1]
>>> strategy = lru().replace(evict=LowestIndex(), name="lowest index")
"""

from __future__ import annotations

from collections.abc import Callable

from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    Precision,
    Prefetch,
    Route,
    Strategy,
    View,
)
from moelab.strategies.basics import layer_lru, lfu, lru, on_demand

_MAKERS: dict[str, Callable[[], Strategy]] = {
    "on_demand": on_demand,
    "lru": lru,
    "lfu": lfu,
    "layer_lru": layer_lru,
}
NAMES = tuple(_MAKERS)

__all__ = [
    "NAMES",
    "Allocate",
    "Evict",
    "Precision",
    "Prefetch",
    "Route",
    "Strategy",
    "View",
    "layer_lru",
    "lfu",
    "lru",
    "make",
    "on_demand",
]


def make(name: str | Strategy) -> Strategy:
    """A strategy by name; a `Strategy` is returned as it is.

    Raises
    ------
    ValueError
        The name is not known; the message lists those that are.
    """
    if isinstance(name, Strategy):
        return name
    if name not in _MAKERS:
        raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(NAMES)}")
    return _MAKERS[name]()
