"""The models that can be opened by a plain name, and what is missing for those that cannot yet."""

from __future__ import annotations

from moelab.demo.smollm2 import DELTA, INSTALL, TOP_K, folder, is_built, missing
from moelab.demo.smollm2 import NAME as SMOLLM2

__all__ = ["DELTA", "INSTALL", "SMOLLM2", "missing", "offered"]


def offered() -> dict[str, str]:
    """By name of the model what keeps it from being opened here, in words; empty if nothing."""
    if not DELTA.is_file():
        return {"demo": ""}
    return {"demo": "", SMOLLM2: "" if is_built(folder(DELTA, TOP_K)) else missing()}
