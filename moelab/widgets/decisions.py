"""What the dashboard says of strategies: presets by group, parts by decision, their parameters.

The choices of the five drop-downs are the distinct parts (by class) of all named strategies; each
stands for ``lab.update(<decision>=<name of a strategy that has it>)``. A part that no named
strategy has, such as a learner's own class, is shown by its class name. Everything here is words
about strategies: nothing decides, nothing is kept but the named strategies, built once.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from moelab import strategies
from moelab.scheduling.strategy import Parameter, Strategy
from moelab.settings import part_title

QUESTIONS = {
    "allocate": "Before the run: which bits each expert gets, which share of memory each layer",
    "route": "Each token, each layer: which experts may serve it",
    "precision": "Each miss: at how many bits the expert is loaded",
    "evict": "Budget full: who leaves",
    "prefetch": "Ahead of need: who is fetched before a token asks for it",
}
KNOBS = {"allocate": ("bits",), "precision": ("low_bits", "t1", "t2"), "prefetch": ("prefetch",)}
"""The settings that belong to a decision; a strategy's ``preset`` may set them."""

THRESHOLDS = {
    "t1": Parameter("t1", "misses above this unimportance come at low bits"),
    "t2": Parameter("t2", "misses above this unimportance are skipped"),
}
GROUPS = {
    "basics": {
        "on_demand": "on demand",
        "lru": "LRU",
        "lfu": "LFU",
        "layer_lru": "LRU per layer",
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
        "adapmoe": "AdapMoE",
        "cache_prior": "cache-prior routing",
        "drop_if_cold": "drop if cold",
    },
}


@functools.cache
def named() -> dict[str, Strategy]:
    """Every strategy that has a name, as made without a calibration."""
    return {name: strategies.make(name) for name in strategies.NAMES}


def presets() -> list[dict[str, Any]]:
    """The strategies to choose from, by group: name, how it is written, one line about it."""
    groups = {group: {n: t for n, t in of.items() if n in named()} for group, of in GROUPS.items()}
    known = {name for of in groups.values() for name in of}
    groups["others"] = {n: n.replace("_", " ") for n in named() if n not in known}
    return [
        {
            "group": group,
            "entries": [{"name": n, "title": t, "text": _about(n)} for n, t in of.items()],
        }
        for group, of in groups.items()
        if of
    ]


@functools.cache
def _distinct() -> dict[str, dict[type, str]]:
    """Of each decision the distinct parts, and the strategy to name for each.

    Of several strategies with one part, that one is named whose preset sets the decision's own
    settings, so that choosing the part switches it on.
    """
    found: dict[str, dict[type, str]] = {role: {} for role in QUESTIONS}
    for role, kinds in found.items():
        own = KNOBS.get(role, ())
        sets = {
            name: not strategy.preset.keys().isdisjoint(own) for name, strategy in named().items()
        }
        for name, strategy in named().items():
            kind = type(strategy.parts[role])
            if kind not in kinds or (sets[name] and not sets[kinds[kind]]):
                kinds[kind] = name
    return found


def decisions() -> list[dict[str, Any]]:
    """The five decisions: the question each answers, and the parts to choose from."""
    return [
        {
            "role": role,
            "question": QUESTIONS[role],
            "choices": [
                {
                    "value": name,
                    "title": part_title(named()[name].parts[role]),
                    "text": _first_line(kind),
                }
                for kind, name in kinds.items()
            ],
        }
        for role, kinds in _distinct().items()
    ]


def chosen(strategy: Strategy, settings: Any) -> dict[str, Any]:
    """What holds now: the five parts, their parameters, and the knobs that none of them reads."""
    read = {knob for role, knobs in KNOBS.items() for knob in knobs if reads(strategy, role, knob)}
    parameters = [_shown(_having(strategy, p), p, v) for _, p, v in strategy.parameters.values()]
    if settings.low_bits is not None or "low_bits" not in read:  # else they have no effect
        parameters += [
            _shown(["precision"], p, getattr(settings, name))
            for name, p in THRESHOLDS.items()
            if name in read
        ]
    return {
        "strategy": strategy.name,
        "label": spelled(strategy.name),
        "about": about(strategy),
        "parts": {
            role: {"value": _distinct()[role].get(type(part), ""), "title": part_title(part)}
            for role, part in strategy.parts.items()
        },
        "parameters": sorted(parameters, key=lambda p: [*QUESTIONS].index(p["roles"][0])),
        "unread": [knob for knob in ("low_bits", "prefetch") if knob not in read],
    }


def about(strategy: Strategy) -> str:
    """One line about a strategy; of a mix, what differs from the strategy it was made from."""
    base = strategy.name.rstrip("*")
    if base not in named():
        return "a strategy of your own"
    other = [
        f"{role}: {part_title(part)}"
        for role, part in strategy.parts.items()
        if type(part) is not type(named()[base].parts[role])
    ]
    return f"{spelled(base)} but for {'; '.join(other)}" if other else _about(base)


def spelled(name: str) -> str:
    """A strategy's name as its authors write it; a mix goes by what it was made from."""
    base = name.rstrip("*")
    words = next((of[base] for of in GROUPS.values() if base in of), base)
    return words if base == name else f"{words}, mixed"


def reads(strategy: Strategy, role: str, knob: str) -> bool:
    """Whether a part's methods look at this setting, so that its control has an effect."""
    methods = inspect.getmembers(type(strategy.parts[role]), inspect.isfunction)
    return any(knob in method.__code__.co_names for _, method in methods)


def _having(strategy: Strategy, parameter: Parameter) -> list[str]:
    """The decisions whose part has this parameter: one object may take several."""
    parts = strategy.parts.items()
    return [role for role, part in parts if parameter in getattr(part, "parameters", ())]


def _shown(roles: list[str], parameter: Parameter, value: Any) -> dict[str, Any]:
    return {
        "roles": roles,
        "name": parameter.name,
        "text": parameter.text,
        "low": parameter.low,
        "high": parameter.high,
        "step": parameter.step,
        "choices": list(parameter.choices),
        "value": value if parameter.choices else float(value),
    }


def _about(name: str) -> str:
    return _first_line(strategies.maker(name))


def _first_line(what: Any) -> str:
    return (inspect.getdoc(what) or "").partition("\n")[0].replace("`", "")
