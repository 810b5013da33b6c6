"""Strategies by name, and the parts they are made of.

A policy of your own is a subclass of one part, live at once:

>>> from moelab.strategies import Evict, lru
>>> class LowestIndex(Evict):
...     def score(self, view):
...         return -view.index_of
>>> strategy = lru().replace(evict=LowestIndex(), name="lowest index")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    Parameter,
    Precision,
    Prediction,
    Prefetch,
    Route,
    Strategy,
    View,
)
from moelab.strategies.adapmoe import adapmoe
from moelab.strategies.arc import arc
from moelab.strategies.basics import drop_if_cold, in_ram, layer_lru, lfu, lru, on_demand
from moelab.strategies.cache_prior import cache_prior
from moelab.strategies.edgemoe import edgemoe
from moelab.strategies.emoe import emoe
from moelab.strategies.finemoe import finemoe
from moelab.strategies.flashmoe import flashmoe
from moelab.strategies.hermes import hermes
from moelab.strategies.hobbit import hobbit
from moelab.strategies.least_stale import least_stale
from moelab.strategies.max_rank import max_rank
from moelab.strategies.mixtral_offloading import mixtral_offloading
from moelab.strategies.moe_apex import moe_apex
from moelab.strategies.moe_infinity import moe_infinity
from moelab.strategies.oracle import oracle
from moelab.strategies.pregated import pregated
from moelab.strategies.s3fifo import s3fifo
from moelab.strategies.static_pruning import static_pruning
from moelab.strategies.swapmoe import swapmoe

GROUPS = {
    "basics": {
        "on_demand": "on demand",
        "lru": "LRU",
        "lfu": "LFU",
        "layer_lru": "LRU per layer",
        "arc": "ARC",
        "s3fifo": "S3-FIFO",
        "in_ram": "all in RAM",
    },
    "papers": {
        "edgemoe": "EdgeMoE",
        "hobbit": "HOBBIT",
        "moe_apex": "MoE-APEX",
        "swapmoe": "SwapMoE",
        "static_pruning": "static pruning",
    },
    "peers": {
        "mixtral_offloading": "mixtral-offloading",
        "moe_infinity": "MoE-Infinity",
        "finemoe": "FineMoE",
        "adapmoe": "AdapMoE",
        "pregated": "Pre-gated MoE",
        "emoe": "eMoE",
        "flashmoe": "FlashMoE",
        "least_stale": "Least-Stale",
        "hermes": "Hermes",
        "cache_prior": "cache-prior routing",
        "max_rank": "max-rank routing",
        "drop_if_cold": "drop if cold",
    },
}
"""Every strategy by group: its name, and how its authors write it."""

_MAKERS: dict[str, Callable[..., Strategy]] = {
    name: globals()[name] for group in GROUPS.values() for name in group
}
NAMES = tuple(_MAKERS)
CALIBRATED = {
    "edgemoe": "edgemoe",
    "hobbit": "hobbit",
    "moe_apex": "hobbit",
    "swapmoe": "swapmoe",
    "static_pruning": "swapmoe",
    "adapmoe": "adapmoe",
    "emoe": "swapmoe",
    "flashmoe": "flashmoe",
}
"""Strategies that take a profile, and the calibration that makes it."""

NEEDS_CALIBRATION = {"edgemoe": "allocate", "flashmoe": "evict"}
"""Those that cannot be used by name without one, and the decision that it is for."""

__all__ = ["CALIBRATED", "GROUPS", "NAMES", "NEEDS_CALIBRATION", "make", "maker"]
__all__ += ["Allocate", "Evict", "Parameter", "Precision", "Prediction", "Prefetch", "Route"]
__all__ += ["Strategy", "View", "adapmoe", "arc", "cache_prior", "drop_if_cold", "edgemoe", "emoe"]
__all__ += ["finemoe", "flashmoe", "hermes", "hobbit", "in_ram", "layer_lru", "least_stale", "lfu"]
__all__ += ["lru", "max_rank", "mixtral_offloading", "moe_apex", "moe_infinity", "on_demand"]
__all__ += ["oracle", "pregated", "s3fifo", "static_pruning", "swapmoe"]


def maker(name: str) -> Callable[..., Strategy]:
    """The function that makes a strategy; its docstring's first line says what it does.

    Raises
    ------
    ValueError
        The name is not known; the message lists those that are.
    """
    name = name.replace("-", "_").lower()
    if name not in _MAKERS:
        raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(NAMES)}")
    return _MAKERS[name]


def make(name: str | Strategy, profile: Mapping[str, Any] | None = None) -> Strategy:
    """A strategy by name; a `Strategy` is returned as it is.

    Parameters
    ----------
    profile
        What a calibration measured (``lab.calibrate(name).data``), for strategies that use one.

    Raises
    ------
    ValueError
        The name is not known; the message lists those that are.
    """
    if isinstance(name, Strategy):
        return name
    make_it = maker(name)
    return make_it(profile) if make_it.__name__ in CALIBRATED else make_it()
