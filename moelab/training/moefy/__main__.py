"""Measure SmolLM2's mixture and write its card: `python -m moelab.training.moefy --help`.

Every figure of the card is measured here, and stands beside it as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import moelab
from moelab.demo import probes, smollm2
from moelab.demo.mixture import Delta, stock
from moelab.training.moefy.card import card, compare, continuations, routing
from moelab.training.moefy.student import load_delta
from moelab.training.moefy.texts import windows

TOP_KS = (12, 8, 6, 4)
SHOWN = ("What is the capital of France?", "Tell me a short story about a dog.")
TRIED = Path(__file__).parent / "TRIED.md"

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{bits} bit": {"strategy": "lru", "bits": bits} for bits in (16, 8, 4, 3, 2)},
    **{f"HOBBIT, {n} %": {"strategy": "hobbit", "budget": f"{n}%"} for n in (75, 50, 25)},
    # never less than the experts of one token, half
    **{f"SwapMoE, {n} %": {"strategy": "swapmoe", "budget": f"{n}%"} for n in (90, 75, 50)},
}
"""All experts at fewer and fewer bits; then strategies that give up precision, or experts."""


def main(
    held_out: Annotated[Path, typer.Argument(help="Folder of held-out texts, DOMAIN.txt each.")],
    card_file: Annotated[Path, typer.Option("--card", help="To write.")] = Path("CARD.md"),
    delta: Annotated[Path, typer.Option(help="What moefy learnt.")] = smollm2.DELTA,
    most: Annotated[int, typer.Option("--windows", help="Of 256 tokens, per domain.")] = 6,
) -> None:
    """Measure the mixture beside the dense model and in the lab, and write its card."""
    typer.echo("reading the dense model")
    dense, tokenizer = smollm2.load_dense()
    student, facts = load_delta(dense, delta)
    student.rounded(getattr(torch, smollm2.DTYPE))  # what is measured is what is built of the delta
    texts = {
        path.stem: windows([path.read_text(encoding="utf-8")], tokenizer, most=most)
        for path in sorted(held_out.glob("*.txt"))
    }
    typer.echo("beside the dense model")
    compared = compare(dense, student, texts, top_ks=TOP_KS)
    first = torch.cat([ids[:1] for ids in texts.values()])
    shares = {k: routing(student, first, top_k=k) for k in (8, 4)}
    samples = _samples(dense, Delta.load(delta, dense), tokenizer)
    lab = pd.DataFrame([_in_the_lab(delta, name) for name in SETTINGS])
    text = card(
        "SmolLM2-135M as a mixture of experts",
        student.shape,
        compared,
        shares=shares,
        samples=samples,
        offloading=lab,
        facts={**facts, "file": f"{delta.stat().st_size / 1e6:.1f} MB"},
        notes=TRIED.read_text(encoding="utf-8"),
    )
    card_file.write_text(text, encoding="utf-8")
    measured = {"quality": compared, "samples": samples, "in the lab": lab}
    record: dict[str, Any] = {name: frame.to_dict("records") for name, frame in measured.items()}
    record["routing"] = {k: share.tolist() for k, share in shares.items()}
    card_file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{card_file} written")


def _samples(dense: Any, delta: Delta, tokenizer: Any) -> pd.DataFrame:
    prompts = [prompt for asked in smollm2.PROMPTS.values() for prompt in asked]
    dtype = getattr(torch, smollm2.DTYPE)
    models = {"dense": dense} | {
        f"{k} of {delta.shape.experts}": stock(dense, delta, top_k=k, dtype=dtype).float()
        for k in (8, 4)
    }
    return continuations(models, tokenizer, prompts, max_new_tokens=60)


def _in_the_lab(delta: Path, name: str) -> dict[str, Any]:
    """Divergence, on held-out text, and greedy answers under one of `SETTINGS`."""
    typer.echo(f"in the lab: {name}")
    with moelab.open(smollm2.build(delta=delta), progress=False) as lab:
        lab.update(**{"budget": "100%", "bits": 16, "measure_kl": False, **SETTINGS[name]})
        scores = [lab.score(text, max_tokens=96, progress=False) for text in probes().values()]
        answers = [lab.generate(p, max_new_tokens=40, temperature=0).text for p in SHOWN]
    return {
        "setting": name,
        "kl": fmean(score.kl_mean for score in scores),
        "same_top1": fmean(score.same_top1 for score in scores),
        "ratio": geometric_mean(score.perplexity_ratio for score in scores),
        **{prompt: text.strip() for prompt, text in zip(SHOWN, answers, strict=True)},
    }


if __name__ == "__main__":
    typer.run(main)
