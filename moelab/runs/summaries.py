"""Summaries: what an encoder-decoder writes of a source, greedily, and its Rouge.

A summary is the text of ``lab.generate(source, temperature=0)``; the model's generation config is
obeyed otherwise. `score` adds to the teacher-forced figures those of such texts: errors of one
token go on in the next, as they do for a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moelab.engine.generation import Ids, Sampler, Sampling, Stream, begun_with
from moelab.runs.quality import Score, score_ids, unhurried
from moelab.runs.rouge import rouge

if TYPE_CHECKING:
    from moelab.runs.session import Session


class Writer:
    """Writes one summary after another, of ``most`` tokens at most; the engine is claimed."""

    def __init__(self, session: Session, most: int) -> None:
        self._model, self._engine = session.engine.model, session.engine
        self._tokenizer, self._ends, self._most = session.tokenizer, session.eos(chat=False), most
        self._condition: Any = None
        self._read: dict[tuple[int, ...], Any] = {}

    def keep(self, condition: Any) -> None:
        """From now on the encoder's pass over a source serves again, while this is the same."""
        if condition is None or condition != self._condition:
            self._read.clear()
        self._condition = condition

    def __call__(self, source: Sequence[int], after: Callable[[], object] = lambda: None) -> str:
        """The summary of a source's token ids; ``after`` is called after each token's pass."""
        context = begun_with(self._model, source)
        stream, first = Stream(self._engine, context.source), len(context)
        stream.read = self._read.get(of := tuple(source))
        sampler = Sampler(self._model, Sampling.of(self._model, temperature=0.0), context)
        new = list(context)
        for _ in range(self._most):
            new = [sampler.draw(context, stream.forward(new)[-1])]
            after()
            context += new
            if new[0] in self._ends:
                break
        if self._condition is not None:
            self._read[of] = stream.read
        return self._tokenizer.decode(context[first:], skip_special_tokens=True)


def score(
    session: Session,
    ids: Sequence[Ids],
    references: Sequence[str],
    most: int,
    *,
    progress: bool,
    summaries: bool = True,
) -> Score:
    """Score token ids as `score_ids` does, and where there are references the summaries' Rouge.

    Parameters
    ----------
    session
        Claimed.
    ids
        Of each text, two or more.
    references
        One for each text of an encoder-decoder; else none.
    most
        Tokens of a summary at most.
    progress
        Show bars: of the tokens, then of the summaries.
    summaries
        Write them, which takes two texts a pair.
    """
    engine, found = session.engine, score_ids(session.engine, ids, progress=progress)
    if not (references and summaries):
        return found
    from tqdm.auto import tqdm

    write, served, full = Writer(session, most), list[str](), list[str]()
    with unhurried(engine):
        for text in tqdm(ids, disable=not progress, desc="summaries"):
            engine.new_sequence(record=False)
            served.append(write(text.source, engine.end_of_token))
            with engine.full_precision():
                full.append(write(text.source))
    return replace(found, rouge=rouge(served, references), rouge_full=rouge(full, references))
