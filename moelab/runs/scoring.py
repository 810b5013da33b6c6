"""Quality of the running settings: every position decoded through the engine, beside the truth."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from moelab.engine.engine import Engine
from moelab.engine.generation import Decoder, Reference
from moelab.runs.quality import Score, Scorer

CHUNK = 64
"""Positions whose full-precision logits are held at a time."""


def score_ids(engine: Engine, texts: Sequence[Sequence[int]], *, progress: bool = True) -> Score:
    """Score token ids ``[text][position]`` teacher-forced.

    An emulated device is not waited for, unless the strategy goes by what has landed.
    """
    scorer = Scorer()
    if "in_flight" not in engine.scheduler.strategy.observes:
        engine.loader.use("disk")
    try:
        with tqdm(total=sum(map(len, texts)), disable=not progress, desc="score") as bar:
            for ids in texts:
                _score(engine, ids, scorer, bar)
    finally:
        engine.loader.use(engine.settings.device)
    return scorer.score()


def _score(engine: Engine, ids: Sequence[int], scorer: Scorer, bar: tqdm) -> None:
    engine.new_sequence(record=False)
    engine.prefill = False  # one token at a time, under the rules of decoding
    decoder, reference = Decoder(engine), Reference(engine)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        full = reference.logits(ids[: start + len(chunk)], keep=len(chunk))
        for i, token in enumerate(chunk):
            logits = decoder.step([token])
            engine.end_of_token()
            if start + i + 1 < len(ids):
                scorer.add(full[i], logits, ids[start + i + 1])
            bar.update()
