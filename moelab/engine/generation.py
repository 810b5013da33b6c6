"""One sequence through the engine, token by token, beside the full-precision model on request.

A hand-written loop instead of ``generate()``: settings and a stop take effect between tokens.
Sampling is transformers' own logits processors with a generator of our own.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moelab.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; ``temperature`` 0 is greedy.

    Raises
    ------
    ValueError
        A value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: above 0, at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: above 0 (1: none)")


class Sampler:
    """Draws tokens from logits."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature == 0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._steps = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            self._steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._steps.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._steps.append(TopPLogitsWarper(sampling.top_p))

    def draw(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after ``ids`` from logits ``[V]``."""
        scores = self._steps(torch.tensor([ids]), logits.float()[None])[0]  # pyright: ignore[reportArgumentType]
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


TOP = 5


BLOCK = 64


def likeliest(logits: torch.Tensor) -> tuple[tuple[int, float], ...]:
    """The `TOP` likeliest tokens and their softmax probability, from logits ``[V]``."""
    logits = logits.float()
    padded = F.pad(logits, (0, -len(logits) % BLOCK), value=-math.inf).view(-1, BLOCK)
    # Whoever is among the best is in one of the best blocks: a fraction of the vocabulary to sort.
    blocks = padded.amax(1).topk(min(TOP, len(padded))).indices
    best = padded[blocks].flatten().topk(TOP)
    ids = blocks[best.indices // BLOCK] * BLOCK + best.indices % BLOCK
    shares = (best.values - logits.logsumexp(-1)).exp()
    found = zip(ids.tolist(), shares.tolist(), strict=True)
    return tuple((token, share) for token, share in found if token < len(logits))


TINY_PARAMETERS = 16_000_000
"""Below this many non-expert weights, waking a second thread costs more than it computes."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses at most ``count`` threads."""
    before = torch.get_num_threads()
    if count < before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count < before:
            torch.set_num_threads(before)


class Stream:
    """A growing sequence with its key-value cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._cache = DynamicCache(config=engine.model.config)
        weights = (p for p in engine.model.parameters() if p.device.type != "meta")
        self._tiny = sum(p.numel() for p in weights) < TINY_PARAMETERS

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], *, keep: int = 1) -> torch.Tensor:
        """Append ``ids`` and return the logits of the last ``keep`` positions ``[keep, V]``."""
        one_is_the_loaders = max(1, torch.get_num_threads() - 1)
        with threads(1 if self._tiny else one_is_the_loaders):
            out = self.engine.model(
                torch.tensor([list(ids)]),  # pyright: ignore[reportArgumentType]
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        return out.logits[0]


class Decoder(Stream):
    """The run's own sequence: measures the time of each step."""

    seconds = 0.0

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits ``[V]`` after ``ids``; ``seconds`` then holds how long it took."""
        begun = time.perf_counter()
        logits = self.forward(ids)[-1]
        self.seconds = time.perf_counter() - begun
        return logits


class Reference(Stream):
    """The same model at full precision over the same tokens, outside budget, cache and clock."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._seen = 0

    def logits(self, ids: Sequence[int], *, keep: int = 1) -> torch.Tensor:
        """Logits ``[keep, V]`` at the end of the whole sequence ``ids``; catches up as needed."""
        new = ids[self._seen :]
        with self.engine.full_precision():
            out = self.forward(new, keep=keep)
        self._seen = len(ids)
        return out
