"""Write `prompts.json`: held-out starts to continue, and probes to measure quality on.

Both are cut verbatim from validation documents, which training never saw; a passage that is not
found there is an error.  Run it when the corpus has changed: `python -m moelab.training.held_out`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moelab.demo import HERE
from moelab.store.paths import cache_dir

PROMPTS: dict[str, tuple[str, ...]] = {
    "novel": (
        "Mrs. Dashwood remained at Norland several months;",
        "Marianne, who had never much toleration for",
        "Emma's pensive meditations, as she walked home,",
    ),
    "bible": (
        "Yahweh spoke to Moses, saying,",
        "The two angels came to Sodom at evening.",
        "The words of Nehemiah the son of Hacaliah.",
    ),
    "drama": (
        "SCENE II. Another part of the wood.\n\n[Enter TITANIA, with her Train.]\n\nTITANIA\n",
        "FIRST SERVANT.\nWine, wine, wine!",
        "SEBASTIAN.\nI would not by my will have troubled you;",
    ),
    "dictionary": (
        "pilgrim (noun): someone who",
        "sprocket (noun):",
        "belladonna lily (noun): amaryllis of",
    ),
    "code": (
        "    def __getitem__(self, key):\n",
        "    def __bool__(self):\n",
        "import re\nimport sys\nimport copy\n",
    ),
    "docs": (
        "Normally, an SQL index references columns of",
        "Generator objects are what Python uses to",
        "Compound statements contain (groups of) other statements;",
    ),
}
PROBES: dict[str, str] = {  # where each probe starts
    "novel": "Elinor could not find herself in the carriage with Mrs. Jennings,",
    "bible": "Yahweh spoke to Moses, saying,",
    "drama": "GRATIANO.\nThis is the pent-house under which",
    "dictionary": "beam (noun): the broad side of a ship;",
    "code": '"""Utilities for with-statement contexts.',
    "docs": "Compound statements contain (groups of) other statements;",
}
PROBE_CHARACTERS = {"novel": 1400, "bible": 1150, "drama": 1050}
DEFAULT_CHARACTERS = 1150


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


def build(data: Path) -> dict[str, dict]:
    """Prompts and probes from the validation documents that `corpus.prepare` kept in `data`."""
    prompts: dict[str, list[str]] = {}
    probes: dict[str, str] = {}
    for domain, starts in PROMPTS.items():
        path = data / "tokens" / f"{domain}.validation.json"
        documents = json.loads(path.read_text(encoding="utf-8"))
        for start in starts:
            passage(documents, start, len(start))
        prompts[domain] = list(starts)
        size = PROBE_CHARACTERS.get(domain, DEFAULT_CHARACTERS)
        probes[domain] = passage(documents, PROBES[domain], size)
    return {"prompts": prompts, "probes": probes}


def main(
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
) -> None:
    """Write prompts.json from the validation documents."""
    held_out = build(data or cache_dir() / "demo" / "corpus")
    path = HERE / "prompts.json"
    path.write_text(json.dumps(held_out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
