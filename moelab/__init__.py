"""moelab: a lab for Mixture-of-Experts offloading.

Open a model with its experts on disk, give it a memory budget, and watch what that does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.4.0"

_HOMES = {
    "open": "moelab.opening",
    "ghost": "moelab.bench.ghosts",
    "doctor": "moelab.health",
    "Lab": "moelab.lab",
    "Run": "moelab.runs.run",
    "Recording": "moelab.runs.recording",
    "Settings": "moelab.settings",
    "Dashboard": "moelab.widgets.dashboard",
    "Store": "moelab.store.store",
    "StoreError": "moelab.store.store",
    "BudgetError": "moelab.scheduling.budget",
    "Strategy": "moelab.scheduling.strategy",
    "Trace": "moelab.replays.files",
    "pack": "moelab.store.pack",
    "replay": "moelab.runs.prediction",
    "predict": "moelab.runs.prediction",
    "plan": "moelab.runs.plan",
    "routing": "moelab.replays.routing",
    "predictors": "moelab.views.predictors",
    "sweep": "moelab.runs.sweep",
    "policy_or_memory": "moelab.views.policy_or_memory",
    "fit": "moelab.bench.fit",
    "clinic": "moelab.views.clinic",
    "moefy": "moelab.training.moefy",
    "compare": "moelab.runs.compare",
    "report": "moelab.views.report",
    "perfetto": "moelab.views.perfetto",
    "charts": "moelab.views.charts",
    "challenge": "moelab.course.challenge",
    "devices": "moelab.store.devices",
    "strategies": "moelab.strategies",
    "demo": "moelab.demo",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import moelab`` itself is instant."""
    if name not in _HOMES:
        raise AttributeError(f"moelab has no {name!r}; it has {', '.join(sorted(_HOMES))}")
    home = import_module(_HOMES[name])
    if _HOMES[name] == f"moelab.{name}":
        return home
    return globals().setdefault(name, getattr(home, name, home))


def __dir__() -> list[str]:
    return sorted(__all__)
