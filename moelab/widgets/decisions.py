"""What the dashboard says of strategies: presets by group, parts by decision, their parameters.

The choices of the five drop-downs are the distinct parts (by class) of all named strategies; each
stands for ``lab.update(<decision>=<name of a strategy that has it>)``. A part that no named
strategy has, such as a learner's own class, is shown by its class name. Everything here is words
about strategies: nothing decides.
"""

from __future__ import annotations

import functools
from typing import Any

from moelab import strategies
from moelab.runs.words import about, first_line, named, spelled
from moelab.scheduling.strategy import Parameter, Strategy, part_title

QUESTIONS = {
    "allocate": "Before the run: which bits each expert gets, which share of memory each layer",
    "route": "Each token, each layer: which experts may serve it",
    "precision": "Each miss: at how many bits the expert is loaded",
    "evict": "Budget full: who leaves",
    "prefetch": "Ahead of need: who is fetched before a token asks for it",
}
SWITCHES = ("low_bits", "depth")
"""Parameters with a control of their own; where they are off, their part does nothing."""


def presets() -> list[dict[str, Any]]:
    """The strategies to choose from, by group: name, how it is written, one line about it."""
    return [
        {
            "group": group,
            "entries": [{"name": n, "title": t, "text": about(named()[n])} for n, t in of.items()],
        }
        for group, of in strategies.GROUPS.items()
    ]


@functools.cache
def _distinct() -> dict[str, dict[type, str]]:
    """Of each decision the distinct parts, and the strategy to name for each.

    Of several strategies with one part, that one is named which has it switched on, so that
    choosing the part does something.
    """
    found: dict[str, dict[type, str]] = {role: {} for role in QUESTIONS}
    for role, kinds in found.items():
        for name, strategy in named().items():
            kind = type(strategy.parts[role])
            if kind not in kinds or (
                _is_on(strategy.parts[role]) and not _is_on(named()[kinds[kind]].parts[role])
            ):
                kinds[kind] = name
    return found


def _is_on(part: Any) -> bool:
    return all(getattr(part, p.name) for p in part.parameters if p.name in SWITCHES)


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


_SWITCH_OF = {"low_bits": "low_bits", "prefetch": "depth"}
"""Controls of the dashboard, and the parameter that each sets."""


def chosen(strategy: Strategy) -> dict[str, Any]:
    """What holds now: the five parts, their parameters, and the switches that none of them has."""
    known = strategy.parameters
    off = set(SWITCHES)
    if "low_bits" in known and known["low_bits"][2] is None:
        off |= {"t1", "t2"}  # they have no effect
    parameters = [
        _shown(_having(strategy, p), p, v) for name, (_, p, v) in known.items() if name not in off
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
        "unread": [name for name, has in _SWITCH_OF.items() if has not in known],
    }


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
