"""What the dashboard says of strategies: presets by group, parts by decision, their parameters.

The choices of the five drop-downs are the distinct parts (by class) of all named strategies; each
stands for ``lab.update(<decision>=<name of a strategy that has it>)``. A part that no named
strategy has, such as a learner's own class, is shown by its class name. Everything here is words
about strategies: nothing decides.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from moelab.runs.words import GROUPS, about, first_line, named, spelled
from moelab.scheduling.strategy import Parameter, Strategy
from moelab.settings import OF_ROLE, part_title

QUESTIONS = {
    "allocate": "Before the run: which bits each expert gets, which share of memory each layer",
    "route": "Each token, each layer: which experts may serve it",
    "precision": "Each miss: at how many bits the expert is loaded",
    "evict": "Budget full: who leaves",
    "prefetch": "Ahead of need: who is fetched before a token asks for it",
}

THRESHOLDS = {
    "t1": Parameter("t1", "misses above this unimportance come at low bits"),
    "t2": Parameter("t2", "misses above this unimportance are skipped"),
}


def presets() -> list[dict[str, Any]]:
    """The strategies to choose from, by group: name, how it is written, one line about it."""
    groups = {group: {n: t for n, t in of.items() if n in named()} for group, of in GROUPS.items()}
    known = {name for of in groups.values() for name in of}
    groups["others"] = {n: n.replace("_", " ") for n in named() if n not in known}
    return [
        {
            "group": group,
            "entries": [{"name": n, "title": t, "text": about(named()[n])} for n, t in of.items()],
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
        own = OF_ROLE.get(role, ())
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
                    "text": first_line(kind),
                }
                for kind, name in kinds.items()
            ],
        }
        for role, kinds in _distinct().items()
    ]


def chosen(strategy: Strategy, settings: Any) -> dict[str, Any]:
    """What holds now: the five parts, their parameters, and the knobs that none of them reads."""
    read = {
        knob for role, knobs in OF_ROLE.items() for knob in knobs if reads(strategy, role, knob)
    }
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
