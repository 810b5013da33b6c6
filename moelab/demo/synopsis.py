"""The Switch Transformer that writes a package's one-line synopsis from its description.

`checkpoint()` is its folder, which stock transformers loads
(`SwitchTransformersForConditionalGeneration`); `pairs()` are descriptions it never saw in training
with the synopses that Debian gives them, by section of the archive.  How it was trained is in
`moelab.training.synopsis`, what it does in `SYNOPSIS.md`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from moelab.demo import HERE

NAME = "synopsis"
MODEL = HERE / "synopsis_model"
PAIRS = HERE / "synopsis_pairs.json"
FILES = ("config.json", "generation_config.json", "model.safetensors")
FILES += ("tokenizer.json", "tokenizer_config.json")
READABLE = range(120, 601)
"""Letters of a description that is offered to be chosen: it fits into a field."""
OFFERED = 2
"""Of a section's descriptions, at most."""


class Pair(NamedTuple):
    """A package's name and description, and what Debian says of it in one line."""

    text: str
    synopsis: str


def checkpoint() -> Path:
    """Folder of the bundled checkpoint: config, bf16 safetensors and tokenizer.

    Raises
    ------
    FileNotFoundError
        When the weights are not installed.
    """
    for name in FILES:
        if not (MODEL / name).is_file():
            raise FileNotFoundError(f"{MODEL / name} is missing: reinstall moelab")
    return MODEL


@cache
def _held_out() -> dict[str, dict[str, list[list[str]]]]:
    return json.loads(PAIRS.read_text(encoding="utf-8"))


def pairs(part: Literal["validation", "test"] = "test") -> dict[str, list[Pair]]:
    """Held-out pairs by section of the archive, a sample of the split's.

    The test part (256 pairs) is for figures, the validation part (128) for choosing anything.
    """
    rows = _held_out()[part]
    return {section: [Pair(*pair) for pair in found] for section, found in rows.items()}


def prompts() -> dict[str, list[str]]:
    """Held-out descriptions of the test part to choose from, `OFFERED` of a section at most."""
    found = {
        section: [pair.text for pair in these if len(pair.text) in READABLE][:OFFERED]
        for section, these in pairs("test").items()
    }
    return {section: texts for section, texts in found.items() if texts}


def probes() -> dict[str, Pair]:
    """A held-out pair of each section of the validation part, to measure quality on."""
    return {section: these[0] for section, these in pairs("validation").items()}


@cache
def references() -> dict[str, str]:
    """Every held-out description and what Debian says of it in one line."""
    every = (pair for part in ("validation", "test") for of in pairs(part).values() for pair in of)
    return {pair.text.strip(): pair.synopsis for pair in every}
