"""The bundled models: two small ones, really trained, and what makes `smollm2-moe`.

`checkpoint()` is the demo's folder, which stock transformers loads (`Qwen3MoeForCausalLM`);
`prompts()` and `probes()` are text it never saw in training, by domain.  How it was trained is in
`moelab.training.train`, what it does in `CARD.md`; the others are in `smollm2`, whose card is
`SMOLLM2.md`, and `synopsis`, whose card is `SYNOPSIS.md`.  Importing this imports nothing heavy.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

__all__ = ["DOMAINS", "checkpoint", "gguf", "losses", "probes", "prompts"]

HERE = Path(__file__).parent
DOMAINS = ("novel", "bible", "drama", "dictionary", "code", "docs")


def checkpoint() -> Path:
    """Folder of the bundled checkpoint: config, bf16 safetensors and tokenizer.

    Raises
    ------
    FileNotFoundError
        When the weights are not installed.

    Examples
    --------
    >>> AutoModelForCausalLM.from_pretrained(moelab.demo.checkpoint())  # doctest: +SKIP
    """
    folder = HERE / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: reinstall moelab, or train the demo model with "
                "`python -m moelab.training.train` (2 cores, under 3 hours)"
            )
    return folder


def gguf(file: str | Path, *, blocks: str = "Q8_0") -> Path:
    """Write the small one as a GGUF file, like those that people own; returns the file.

    Parameters
    ----------
    file
        Its tokenizer.json is put beside it.
    blocks
        Of its matrices: F32, F16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.

    Examples
    --------
    >>> moelab.open(moelab.demo.gguf("models/demo.gguf"))  # doctest: +SKIP
    """
    from moelab.demo.as_gguf import write

    file = Path(file)
    write(checkpoint(), file, blocks)
    return file


@cache
def _held_out() -> dict[str, dict]:
    return json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))


def prompts() -> dict[str, list[str]]:
    """Short held-out starts to continue, by domain."""
    return {domain: list(_held_out()["prompts"][domain]) for domain in DOMAINS}


def probes() -> dict[str, str]:
    """Held-out text of 300-400 tokens, by domain, to measure quality on."""
    return {domain: _held_out()["probes"][domain] for domain in DOMAINS}


def losses() -> dict[int, float]:
    """Bits -> mean KL that the small one loses at them, in nats, as its card has it."""
    card = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    return {int(bits): found["kl_mean"] for bits, found in card["bits"].items()}
