"""The bundled Switch Transformer that writes a package's one-line synopsis from its description.

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


class Pair(NamedTuple):
    """A package's description, and what Debian says of it in one line."""

    text: str
    synopsis: str


def checkpoint() -> Path:
    """Folder of the bundled checkpoint: config, bf16 safetensors and tokenizer.

    Raises
    ------
    FileNotFoundError
        When the weights are not installed.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (MODEL / name).is_file():
            raise FileNotFoundError(
                f"{MODEL / name} is missing: reinstall moelab, or train the model with "
                "`python -m moelab.training.synopsis.train`"
            )
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
