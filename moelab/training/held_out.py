"""Cut `prompts.json` anew from the held-out text: starts to continue, and probes of quality.

Both stand verbatim in validation documents, which training never saw; what is not found there is an
error.  Run it when the corpus has changed, or when `prompts.json` was edited, where a probe needs
only its start and about its length: `python -m moelab.training.held_out`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moelab.demo import HERE, probes, prompts
from moelab.store.paths import cache_dir

START = 60  # characters that a probe is found by


def passage(documents: list[str], start: str, length: int) -> str:
    """At least `length` characters from `start`, to the end of the line or sentence."""
    for text in documents:
        at = text.find(start)
        if at < 0 or len(text) < at + length:
            continue
        ends = [text.find(mark, at + length) for mark in (". ", "\n")]
        end = min((e for e in ends if e >= 0), default=len(text) - 1)
        return text[at : end + 1].rstrip()
    raise ValueError(f"no validation document has {length} characters from {start!r} on")


def main(
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
) -> None:
    """Check the prompts and cut the probes, from the validation documents, into prompts.json."""
    tokens = (data or cache_dir() / "demo" / "corpus") / "tokens"
    cut = {}
    for domain, probe in probes().items():
        documents = json.loads((tokens / f"{domain}.validation.json").read_text(encoding="utf-8"))
        for start in prompts()[domain]:
            passage(documents, start, len(start))
        cut[domain] = passage(documents, probe[:START], len(probe) - 1)
    path, held_out = HERE / "prompts.json", {"prompts": prompts(), "probes": cut}
    path.write_text(json.dumps(held_out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
