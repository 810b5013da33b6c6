"""Contenders, written as people say them: ``"lru + look-ahead 2"``, ``"hobbit + evict lru"``."""

from __future__ import annotations

import ast
import re
from typing import Any

import moelab

ROLES = tuple(moelab.strategies.lru().parts)
"""The five decisions; each may be taken from another strategy."""


def contender(text: str) -> dict[str, Any]:
    """Settings for a contender written in words.

    Parameters
    ----------
    text
        A name of ``moelab.strategies.NAMES``, then any of these, joined by ``+``:
        ``N bit``, ``mixed HIGH/LOW``, ``look-ahead [layers]``, a decision of another strategy
        (``evict edgemoe``), or a parameter of the strategy (``rule=printed``).

    Returns
    -------
    dict
        For ``lab.update``: what is not named is the strategy's own.

    Raises
    ------
    ValueError
        The strategy or an addition is not known, or two additions set the same thing.

    Examples
    --------
    >>> contender("lru + mixed 16/4")
    {'strategy': 'lru', 'bits': 16, 'low_bits': 4}
    >>> contender("on_demand + allocate edgemoe + prefetch edgemoe")
    {'strategy': 'on_demand', 'allocate': 'edgemoe', 'prefetch': 'edgemoe'}
    """
    name, *additions = (part.strip() for part in text.split("+"))
    settings: dict[str, Any] = {"strategy": _known(name, text)}
    for addition in additions:
        for setting, value in _addition(addition, text).items():
            if setting in settings:
                raise ValueError(f"{addition!r} in {text!r} sets {setting} a second time")
            settings[setting] = value
    return settings


def _addition(addition: str, text: str) -> dict[str, Any]:
    if found := re.fullmatch(r"look-ahead(?: ([1-3]))?", addition):
        return {"prefetch": int(found[1] or 1)}
    if found := re.fullmatch(r"mixed (\d+)/(\d+)", addition):
        return {"bits": int(found[1]), "low_bits": int(found[2])}
    if found := re.fullmatch(r"(\d+) bit", addition):
        return {"bits": int(found[1])}
    if found := re.fullmatch(rf"({'|'.join(ROLES)}) (\w+)", addition):
        return {found[1]: _known(found[2], text)}
    if found := re.fullmatch(r"([a-z]\w*) ?= ?([\w.]+)", addition):
        try:
            return {found[1]: ast.literal_eval(found[2])}
        except (SyntaxError, ValueError):  # a word
            return {found[1]: found[2]}
    raise ValueError(
        f"unknown addition {addition!r} in {text!r}; write 'look-ahead', 'look-ahead 2', "
        "'mixed 16/4', '4 bit', 'evict edgemoe' (or another decision) or 'parameter=value'"
    )


def _known(name: str, text: str) -> str:
    if name not in moelab.strategies.NAMES:
        names = ", ".join(moelab.strategies.NAMES)
        raise ValueError(f"unknown strategy {name!r} in {text!r}; choose one of {names}")
    return name
