"""Several tokens in one pass: a draft writes a chain, the engine verifies it within its budget.

LLMCad (arXiv 2309.04255), with a chain in place of its tree. The draft is the model itself with all
experts at a low tier, held whole in memory beside the budget; it reads the keys and values of the
tokens verified so far, and its own are forgotten. The verifying pass asks for the union of its
tokens' experts, as a small prompt does; the chain is kept as far as greedy decoding would have
written it, with the token that follows there.

Greedy text is the same to the token, because each position is computed as if it came alone: kernels
meet few tokens one by one, an expert that a token did not choose adds zero, and torch's own
products and attention, whose rounding depends on how many rows come at once, get one row at a time
(`one_by_one`). What it does not know: sampling, caches of keys that forget (sliding windows), and
attention that is not transformers' "sdpa".

A draft writes as many tokens as it is told, or with "auto" as many as it is sure of, by the paper's
rule (`Pacing`).

T tokens, H heads, n keys, D model width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moelab.engine.chunks import FEW_TOKENS
from moelab.engine.compute import Routed, Serve
from moelab.engine.engine import Engine
from moelab.engine.generation import Decoder, Sampler
from moelab.engine.memory import Slot, pages
from moelab.engine.spare import Machine
from moelab.scheduling.budget import bits_in_words

LONGEST = FEW_TOKENS - 1
"""Drafted tokens of a pass: with the token before them, as many as kernels meet one by one."""
AUTO = "auto"
Length = int | str
"""Tokens of a draft, 0 for none; `AUTO`: as many as the draft is sure of."""
Lengths = Length | Mapping[int, Length]
"""One, or token -> length of the drafts from there on."""
_SDPA, _BY_QUERY = "sdpa", "moelab_by_query"
_PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Draft:
    """All experts at one tier in memory; inside `serving`, MoE layers are computed by them.

    Attributes
    ----------
    nbytes
        What they take, beside the budget.

    Raises
    ------
    MemoryError
        The machine cannot spare so much.
    """

    def __init__(self, engine: Engine, bits: int) -> None:
        shape, store = engine.shape, engine.store
        self.nbytes = shape.all_bytes(bits)
        if (spare := Machine().spare_bytes()) < self.nbytes:
            raise MemoryError(
                f"a draft of all experts at {bits_in_words(bits)} takes {self.nbytes / 1e6:.0f} MB "
                f"beside the budget, and this machine can spare {spare / 1e6:.0f} MB; draft with "
                "fewer bits"
            )
        self._engine, self._bits = engine, bits
        whole = pages(self.nbytes)
        ends = list(accumulate(shape.size(key, bits) for key in range(shape.n)))
        slots = (Slot(bits, whole[at:end]) for at, end in pairwise([0, *ends]))
        self._slots = {shape.place(key): slot for key, slot in enumerate(slots)}
        for place, slot in self._slots.items():
            store.read(*place, bits, into=slot.view)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, a forward pass is the draft's: no scheduler, no trace, no log."""
        with self._engine.adapter.served_by(self._layer):
            yield

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,  # [T, D]
        idx: torch.Tensor,
        weights: torch.Tensor,
        scale_input: bool,
    ) -> torch.Tensor:
        routed = Routed(idx, weights, self._engine.shape.experts[layer])
        batch = self._engine.compute.batch(layer, x, routed, scale_input)
        chosen = sorted({expert for row in routed.experts for expert in row})
        batch.add([(Serve(expert, self._bits), self._slots[layer, expert]) for expert in chosen])
        return batch.result()


@dataclass(frozen=True, slots=True)
class Pass:
    """One verified chain: the run's tokens from ``token`` on, ``kept`` of them.

    ``drafted`` tokens were in the chain, ``accepted`` of them are among those kept; ``rejected``
    are the others, in the place of token ``token + accepted``.
    """

    token: int
    drafted: int
    accepted: int
    kept: int
    draft_ms: float
    verify_ms: float
    rejected: tuple[int, ...] = ()


class Pacing:
    """When a chain is long enough: LLMCad's rule, where the tree is a chain.

    Drafting ends when the product of the probabilities that the draft gave its tokens falls below
    ``alpha``. That is halved after a pass in which all were right; after another one it is the
    share that was wrong (the rule as printed; the paper's text has another one).
    """

    def __init__(self, alpha: float = 0.01) -> None:
        self.alpha, self._confidence = alpha, 1.0

    def begin(self) -> None:
        """A new chain."""
        self._confidence = 1.0

    def goes_on(self, token: int, logits: torch.Tensor) -> bool:
        """Whether the chain goes on after ``token``, drawn from logits ``[V]``."""
        self._confidence *= float((logits[token].float() - logits.float().logsumexp(-1)).exp())
        return self._confidence >= self.alpha

    def verified(self, drafted: int, accepted: int) -> None:
        """What became of a chain; one of no token says nothing."""
        if drafted:
            wrong = drafted - accepted
            self.alpha = wrong / drafted if wrong else 0.5 * self.alpha


class Passes:
    """Makes a run's tokens: one a pass, or with a draft as many as one pass verifies.

    Parameters
    ----------
    engine, sampler
        Who computes tokens, and who draws them.
    draft_bits, length
        The draft's tier, None for no draft, and how many tokens it writes at a time, at most; the
        length may be set between passes.
    ends
        Tokens that end a text.
    source
        What an encoder reads before the first pass.

    Attributes
    ----------
    made
        The verified chains so far.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: Sampler,
        draft_bits: int | None = None,
        length: Length = 0,
        ends: Collection[int] = (),
        source: Sequence[int] = (),
    ) -> None:
        self._decoder, self._sampler = Decoder(engine, source), sampler
        self._draft = None if draft_bits is None else Draft(engine, draft_bits)
        self.length, self._ends, self._pacing = length, ends, Pacing()
        self._known = 0  # tokens whose keys and values are in the cache
        self.made: list[Pass] = []

    def next(self, context: Sequence[int], first: int, most: int) -> list[tuple[int, torch.Tensor]]:
        """The next tokens after ``context``, ``most`` at most, each with its logits ``[V]``.

        ``first``: number of the first of them; the prompt's pass, 0, makes one.
        """
        begun, chain = time.perf_counter(), list[int]()
        if self._draft is not None and first:
            length = LONGEST if self.length == AUTO else int(self.length)
            chain = self._chain(context, min(length, most - 1))
        drafted = time.perf_counter()
        new = [*context[self._known :], *chain]
        with one_by_one(self._decoder.engine) if chain else contextlib.nullcontext():
            logits = self._decoder.forward(new, keep=len(chain) + 1)
        out: list[tuple[int, torch.Tensor]] = []
        for at, row in enumerate(logits):
            out.append((self._sampler.draw([*context, *chain[:at]], row), row))
            if out[-1][0] in self._ends or [out[-1][0]] != chain[at : at + 1]:
                break
        self._known = len(context) + len(out) - 1
        if chain:
            self._decoder.rewind(self._known)
        if self._draft is not None and first:
            accepted = sum(a == b for (a, _), b in zip(out, chain, strict=False))
            ms = 1e3 * (drafted - begun), 1e3 * (time.perf_counter() - drafted)
            self._pacing.verified(len(chain), accepted)
            rejected = tuple(chain[accepted:])
            self.made.append(Pass(first, len(chain), accepted, len(out), *ms, rejected))
        return out

    def _chain(self, context: Sequence[int], length: int) -> list[int]:
        """What the draft writes after ``context``; it ends with the text."""
        chain: list[int] = []
        if length < 1:
            return chain
        assert self._draft is not None
        self._pacing.begin()
        with self._draft.serving():
            while len(chain) < length and not (chain and chain[-1] in self._ends):
                logits = self._decoder.forward([chain[-1]] if chain else context[self._known :])[-1]
                chain.append(self._sampler.draw([*context, *chain], logits))
                if self.length == AUTO and not self._pacing.goes_on(chain[-1], logits):
                    break
        self._decoder.rewind(self._known)
        return chain


class _RowByRow(TorchFunctionMode):
    """Products of rows with one matrix, a row at a time.

    Every torch function passes through it: on the bundled model a pass takes about twice as long.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) > 1:
            x, matrix = args[:2]
            if matrix.ndim == 2 and x.ndim > 1 and x.shape[-2] > 1:
                return torch.cat([func(r, *args[1:], **kwargs) for r in x.split(1, -2)], -2)
        return func(*args, **kwargs)


def _by_query(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, K]
    key: torch.Tensor,  # [1, H, n, K]
    value: torch.Tensor,
    _mask: None,
    **own: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the last T of n tokens, each to those up to itself as if it were the last."""
    before, found = key.shape[2] - query.shape[2], []
    for t in range(query.shape[2]):
        upto, one = slice(before + t + 1), query[:, :, t : t + 1]
        told = sdpa_attention_forward(module, one, key[:, :, upto], value[:, :, upto], None, **own)
        found.append(told[0])
    return torch.cat(found, 1), None


ALL_ATTENTION_FUNCTIONS.register(_BY_QUERY, _by_query)  # without a mask: none is made for it


@contextlib.contextmanager
def one_by_one(engine: Engine) -> Iterator[None]:
    """Inside, a pass over a few tokens computes each position as if it came alone."""
    config = engine.model.config
    config._attn_implementation = _BY_QUERY
    try:
        with _RowByRow():
            yield
    finally:
        config._attn_implementation = _SDPA


def why_not(engine: Engine) -> str:
    """What keeps this model from verifying several tokens in one pass; empty where nothing does."""
    if engine.model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    attention = engine.model.config._attn_implementation
    if attention != _SDPA:
        return f"its attention is transformers' {attention!r}, and only {_SDPA!r} is known"
    if not Decoder(engine).rewinds:
        return "its cache of keys and values forgets (sliding windows or states): no way back"
    return ""
