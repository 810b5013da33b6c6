"""Figures of quality that a calibration may go by, each defined once: `FIGURES`.

A figure says how it is measured on texts, which way is better, and what a loss under it is: losses
are what EdgeMoE's P bounds and SwapMoE's planner makes small. Both papers go by the metric of their
task, Rouge-2 of summaries.

What it costs, on P pairs whose summaries have T tokens: KL and the targets' loss take one pass a
pair, Rouge-2 takes T passes of one token each, and one through the encoder wherever that works
under other conditions than the last time. Rouge-2 is coarse: a summary of six words has five pairs
of neighbours. `Figure.error` is the standard error of a loss where texts have values of their own.

T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from moelab.calibration.probes import Text, read, texts_of
from moelab.engine.generation import Stream
from moelab.models.chat import takes_pairs
from moelab.runs.quality import kl_divergence
from moelab.runs.rouge import f_measures
from moelab.runs.summaries import Writer

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.strategies.edgemoe import Place

PAIRS = 24
"""Whose summaries are written for Rouge-2, where no other number is asked for."""
Parts = Sequence[float]
"""A figure's values of each text; one of all where texts have none of their own."""


class Figure:
    """A figure of quality on a lab's texts, so many of them (``most``), spread evenly.

    Attributes
    ----------
    least
        Losses below are noise to whoever takes their logarithm.
    """

    least: ClassVar[float] = 1e-5

    def __init__(
        self, lab: Lab, texts: Sequence[Text], max_tokens: int, most: int | None = None
    ) -> None:
        count = min(len(texts), most or len(texts))
        self.texts = [texts[at * len(texts) // count] for at in range(count)]
        self.ids = [read(lab, text, max_tokens) for text in self.texts]
        self.write = Writer(lab._session, max_tokens)
        self._engine = lab._engine

    def measure(self, logits: Callable[[int], torch.Tensor], write: Callable[[int], str]) -> Parts:
        """Its parts: from the logits ``[T, V]`` of a text's number, or from what is written of it.

        Either is asked for under the conditions that are to be measured.
        """
        raise NotImplementedError

    def loss(self, parts: Parts | float, full: Parts | float) -> float:
        """How much worse ``parts`` are than those of full precision; 0 is as good."""
        raise NotImplementedError

    def error(self, parts: Parts, full: Parts) -> float | None:
        """Standard error of `loss`, text by text; None where texts have no values of their own."""
        return None

    def as_it_is(self) -> Parts:
        """Its parts under what is in force now: the caller's `Engine.full_precision`."""
        return self.measure(self._logits, lambda at: self.write(self.ids[at].source))

    def _logits(self, at: int) -> torch.Tensor:
        ids = self.ids[at]
        return Stream(self._engine, ids.source).forward(ids, keep=len(ids))


class MeanKL(Figure):
    """Mean KL of the next token against full precision in nats, lower is better; so is a loss."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        with self._engine.full_precision():
            self._full = [self._logits(at) for at in range(len(self.ids))]

    def measure(self, logits: Callable[[int], torch.Tensor], write: Callable[[int], str]) -> Parts:
        divergences = [kl_divergence(full, logits(at)).sum() for at, full in enumerate(self._full)]
        return [float(sum(divergences)) / sum(map(len, self.ids))]

    def loss(self, parts: Parts | float, full: Parts | float) -> float:
        return float(np.mean(parts))


class NextToken(Figure):
    """Mean next-token loss in nats, lower is better, of pairs the target's.

    A loss is the relative rise of perplexity.
    """

    def measure(self, logits: Callable[[int], torch.Tensor], write: Callable[[int], str]) -> Parts:
        total = 0.0
        for at, ids in enumerate(self.ids):
            found, targets = logits(at)[:-1], torch.tensor(ids[1:])
            total += float(F.cross_entropy(found, targets, reduction="sum"))
        return [total / sum(len(ids) - 1 for ids in self.ids)]

    def loss(self, parts: Parts | float, full: Parts | float) -> float:
        return math.exp(float(np.mean(parts)) - float(np.mean(full))) - 1


class Rouge2(Figure):
    """Rouge-2 of greedy summaries against the pairs' targets, higher is better.

    A loss is its relative fall; by chance it may be negative.

    Raises
    ------
    ValueError
        Not even full precision has any, so that nothing could be lost.
    """

    least = 0.01

    def __init__(
        self, lab: Lab, texts: Sequence[Text], max_tokens: int, most: int | None = None
    ) -> None:
        super().__init__(lab, texts, max_tokens, most or PAIRS)

    def measure(self, logits: Callable[[int], torch.Tensor], write: Callable[[int], str]) -> Parts:
        written = [write(at) for at in range(len(self.ids))]
        return f_measures(written, [text[1] for text in self.texts], ["rouge2"])[:, 0].tolist()

    def loss(self, parts: Parts | float, full: Parts | float) -> float:
        if not (best := float(np.mean(full))):
            raise ValueError(
                f"at full precision the summaries of these {len(self.ids)} pairs have a Rouge-2 of "
                "0, of which nothing can be lost; give other pairs as texts=, or quality='loss'"
            )
        return 1 - float(np.mean(parts)) / best

    def error(self, parts: Parts, full: Parts) -> float | None:
        fallen = np.subtract(full, parts)
        if len(fallen) < 2:
            return None
        return float(fallen.std(ddof=1) / len(fallen) ** 0.5 / np.mean(full))


FIGURES: dict[str, type[Figure]] = {"kl": MeanKL, "loss": NextToken, "rouge2": Rouge2}


def asked_for(lab: Lab, quality: str, pairs: int | None, default: str) -> dict[str, Any]:
    """What a profile is made from, of its figure; nothing where all is as by default.

    Raises
    ------
    ValueError
        There is no such figure, or this model has none of it.
    """
    if quality not in FIGURES:
        raise ValueError(f"quality={quality!r}: one of {', '.join(FIGURES)}")
    if quality == "rouge2" and not takes_pairs(lab._engine.model):
        raise ValueError(
            "quality='rouge2' is of summaries, and this model goes on with a text; "
            "choose 'kl' or 'loss'"
        )
    if pairs is not None and (type(pairs) is not int or pairs < 1):
        raise ValueError(f"pairs={pairs!r}: a whole number of texts, 1 or more")
    pairs = PAIRS if quality == "rouge2" and pairs is None else pairs
    own = {} if quality == default else {"quality": quality}
    return own if pairs is None else own | {"pairs": pairs}


class Evaluator:
    """Quality of the model with each expert at bits of its own, on a few texts.

    Nothing may run in the lab. By default on the model's own probe texts, so many tokens of each.
    """

    def __init__(
        self,
        lab: Lab,
        texts: Sequence[Text] | None = None,
        *,
        max_tokens: int = 64,
        quality: str = "loss",
        most: int | None = None,
    ) -> None:
        self._engine = lab._engine
        self.figure = FIGURES[quality](lab, texts_of(lab, texts), max_tokens, most)
        shape = lab._shape
        first = sum(shape.experts[: shape.encoder_layers])
        self._encoders = [shape.place(key) for key in range(first)]

    def __call__(self, bits: Callable[[Place], int] | None = None) -> Parts:
        """Parts of the figure; ``bits`` from (layer, expert) to a tier, 0 for nothing."""
        self.figure.write.keep([bits(at) for at in self._encoders] if bits else None)
        with self._engine.full_precision(bits):
            return self.figure.as_it_is()
