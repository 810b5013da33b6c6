"""A short fine-tune of the bundled model on code, and what pruning by router change is worth there.

`python -m moelab.training.finetune` fine-tunes on the library of the Python that runs it (files
held out whole), then drops experts of the fine-tuned model by the rules of `static_pruning` and
measures what each loses on the held-out files, at equal numbers of experts. Minutes on one core;
stopped, both go on where they were. Of the fine-tuned model only numbers are kept.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from tqdm.auto import tqdm

import moelab
from moelab.calibration.router_change import router_change
from moelab.calibration.swapmoe import tables
from moelab.demo import checkpoint
from moelab.scheduling.writing import write_atomically
from moelab.store.paths import cache_dir
from moelab.strategies import static_pruning
from moelab.training.corpus import Corpus, save_tokens, split
from moelab.training.train import Recipe, Training

DOMAIN = "code"
TOKENS, RATE = 160_000, 1e-3
"""Of the fine-tune, and its peak learning rate."""
RULES = ("change", "count", "importance", "norm", "index")
"""`static_pruning`'s; ``index`` keeps the lowest numbers: as good as drawn by lot."""
KEPT = (14, 12, 8)
"""Experts of 16 that stay in each layer; the paper's script drops a quarter."""
TEXTS, SCORED, COUNTED = 4, 64, 128
"""Held-out files, tokens of each, and of each piece of training text that is counted."""


def code(folder: Path) -> Corpus:
    """Python's library as a corpus of one domain; at once when it was made before."""
    if (folder / "corpus.json").is_file():
        return Corpus.load(folder)
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_text("utf-8", errors="replace") for file in files]
    tokenizer = Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))
    return save_tokens(folder, tokenizer, {DOMAIN: split(texts, tokenizer)}, {DOMAIN: 1.0})


def fine_tuned(
    folder: Path, *, tokens: int = TOKENS, rate: float = RATE, progress: bool = True
) -> Path | None:
    """The checkpoint of the bundled model fine-tuned on code; None after Ctrl-C.

    A folder that holds a part of it goes on from there.
    """
    recipe = Recipe(tokens=tokens, lr=rate, warmup_steps=8, contexts=((1.0, 512),))
    training = Training(code(folder / "corpus"), recipe, folder / "run", init=checkpoint())
    return training.export() if training.train(progress=progress) else None


def losses(
    folder: Path, tuned: Path, *, kept: tuple[int, ...] = KEPT, progress: bool = True
) -> list[dict[str, Any]]:
    """What each rule loses on held-out code with so many experts of a layer.

    Parameters
    ----------
    folder
        Of the fine-tune; rows are written there one by one, and not measured again.
    tuned
        What `fine_tuned` gave.
    kept
        Experts that stay in each layer.

    Returns
    -------
    list of dict
        ``rule``, ``kept``, ``kl`` (nats, against the whole fine-tuned model), ``perplexity_ratio``.
    """
    file = folder / "losses.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    known = {(row["rule"], row["kept"]) for row in rows}
    corpus = folder / "corpus"
    held_out = json.loads((corpus / "tokens" / f"{DOMAIN}.validation.json").read_text())[:TEXTS]
    with moelab.open(tuned, tiers=(16,), measure_kl=False, progress=False) as lab:
        profile = _profile(lab, Corpus.load(corpus), tuned)
        each, layers = lab.info()["expert_bytes"][16], lab.info()["layers"]
        todo = [(rule, n) for n in kept for rule in RULES if (rule, n) not in known]
        for rule, n in tqdm(todo, desc="scoring", disable=not progress):
            one = static_pruning(profile, by=rule) if rule != "index" else static_pruning()
            lab.update(strategy=one, budget=n * layers * each)
            scores = [lab.score(t, max_tokens=SCORED, progress=False) for t in held_out]
            ratio = statistics.geometric_mean(score.perplexity_ratio for score in scores)
            kl = statistics.fmean(score.kl_mean for score in scores)
            rows.append({"rule": rule, "kept": n, "kl": kl, "perplexity_ratio": ratio})
            write_atomically(file, json.dumps(rows, indent=1).encode())
    return rows


def _profile(lab: moelab.Lab, corpus: Corpus, tuned: Path) -> dict[str, Any]:
    """What the rules go by: router change, and the other tables on the fine-tune's own text."""
    ids = corpus.train[DOMAIN]
    starts = np.linspace(0, len(ids) - COUNTED, TEXTS * 2).astype(int)
    decode = lab._store.tokenizer().decode
    texts = [decode(ids[at : at + COUNTED].tolist()) for at in starts]
    return tables(lab, texts, tokens=COUNTED) | {"change": router_change(checkpoint(), tuned)}


def main(
    out: Annotated[Path | None, typer.Option(help="folder of the fine-tune (user cache)")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to fine-tune on")] = TOKENS,
    threads: Annotated[int, typer.Option(help="of torch; 0: one a core", min=0)] = 0,
) -> None:
    """Fine-tune the demo on code and measure what each rule of pruning loses there."""
    if threads:
        torch.set_num_threads(threads)
    folder = out or cache_dir() / "demo" / DOMAIN
    tuned = fine_tuned(folder, tokens=tokens)
    if tuned is None:
        print("interrupted; run the same command to go on")
        return
    print(pd.DataFrame(losses(folder, tuned)).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
