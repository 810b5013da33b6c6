"""One sequence through the engine, token by token, beside the full-precision model on request.

A hand-written loop instead of ``generate()``: settings and a stop take effect between tokens.
Sampling is transformers' own logits processors, made from the model's generation config, with a
generator of our own.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from moelab.engine import kernels
from moelab.engine.chunks import FEW_TOKENS
from moelab.engine.engine import Engine
from moelab.engine.small_ops import GrowingLayer, growing
from moelab.engine.spare import Machine
from moelab.models.chat import start_token
from moelab.models.families import encoder_of


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; ``temperature`` 0 is greedy, ``top_k`` 0 (or -1) is off.

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
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: 0 (greedy) or above")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: 0 (the likeliest token only) to 1 (off)")
        if not isinstance(self.top_k, int) or self.top_k < -1:
            raise ValueError(f"top_k={self.top_k!r}: a whole number, 0 or -1 for off")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: above 0 (1: none)")
        object.__setattr__(self, "top_k", max(0, self.top_k))

    @classmethod
    def of(cls, model: PreTrainedModel, **own: Any) -> Sampling:
        """As the model's generation config says, but for what is given; None is not given."""
        config = model.generation_config
        said = {name: getattr(config, name) for name in ("top_p", "top_k", "repetition_penalty")}
        said["temperature"] = (config.temperature or 1.0) if config.do_sample else 0.0
        said |= {name: value for name, value in own.items() if value is not None}
        return cls(**{name: value for name, value in said.items() if value is not None})


OTHER_WAYS = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale", "num_return_sequences"), 1),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"), None),
    **dict.fromkeys(("constraints", "force_words_ids", "stop_strings", "max_time"), None),
    **dict.fromkeys(("token_healing", "forced_eos_token_id"), None),
}
"""What a generation config may ask for beyond logits processors, and what it is when it is off."""


def warn_of_other_ways(model: PreTrainedModel, name: str) -> None:
    """Name what the model's generation config asks for that no run does, like ``num_beams=4``."""
    asked = {way: getattr(model.generation_config, way, None) for way in OTHER_WAYS}
    if found := [f"{way}={v!r}" for way, v in asked.items() if v and v != OTHER_WAYS[way]]:
        warnings.warn(
            f"the generation config of {name!r} asks for {', '.join(found)}, which no run does; "
            "all else in it is honoured",
            stacklevel=6,  # whoever opened the lab
        )


class Ids(list[int]):
    """Token ids of a text, and the ``source`` that an encoder, if there is one, reads before it."""

    def __init__(self, ids: Iterable[int], source: Iterable[int] = ()) -> None:
        super().__init__(ids)
        self.source = list(source)


def begun_with(model: Any, prompt: Sequence[int]) -> Ids:
    """What a text goes on from: a prompt, or an encoder-decoder's start token.

    Raises
    ------
    ValueError
        An encoder-decoder without one, or with one that is no token.
    """
    two = model.config.is_encoder_decoder
    return Ids([start_token(model)], prompt) if two else Ids(prompt)


class Sampler:
    """Draws tokens from logits, after the ``prompt``."""

    def __init__(self, model: Any, sampling: Sampling, prompt: Ids) -> None:
        self._greedy = sampling.temperature == 0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        config = copy.deepcopy(model.generation_config)
        own = asdict(sampling) | {"temperature": float(sampling.temperature)}
        for name, value in (OTHER_WAYS | own | {"do_sample": not self._greedy}).items():
            setattr(config, name, value)  # `update` would log what is at odds in the model's own
        model._prepare_special_tokens(config, device="cpu")
        read = torch.tensor([prompt.source]) if prompt.source else None
        self._steps = model._get_logits_processor(config, len(prompt), read, device="cpu")

    def draw(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after ``ids`` from logits ``[V]``."""
        with threads(1):  # to wake another one takes longer than what it does
            scores = logits.float()[None].clone()  # a processor may write into it
            if self._steps:
                scores = self._steps(torch.tensor([ids]), scores)  # pyright: ignore[reportArgumentType]
            if self._greedy:
                return int(scores[0].argmax())
            shares = scores[0].softmax(-1)
            return int(torch.multinomial(shares, 1, generator=self._generator))


TOP = 5


BLOCK = 64


def likeliest(logits: torch.Tensor, drawn: int | None = None) -> tuple[tuple[int, float], ...]:
    """The `TOP` likeliest tokens and their softmax probability, from logits ``[V]``.

    After them the token that was ``drawn``, where it is none of them.
    """
    logits = logits.float()
    padded = F.pad(logits, (0, -len(logits) % BLOCK), value=-math.inf).view(-1, BLOCK)
    # Whoever is among the best is in one of the best blocks: a fraction of the vocabulary to sort.
    blocks = padded.amax(1).topk(min(TOP, len(padded))).indices
    best = padded[blocks].flatten().topk(TOP)
    ids = blocks[best.indices // BLOCK] * BLOCK + best.indices % BLOCK
    if drawn is not None and drawn not in ids:
        ids = torch.cat([ids, ids.new_tensor([drawn])])
    values = torch.cat([best.values, logits[ids[TOP:]]])
    shares = (values - logits.logsumexp(-1)).exp()
    found = zip(ids.tolist(), shares.tolist(), strict=True)
    return tuple((token, share) for token, share in found if token < len(logits))


TINY_PARAMETERS = 16_000_000
"""Below this many non-expert weights, waking a second thread costs more than it computes."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses at most ``count`` threads; the kernels have cores of their own."""
    before = torch.get_num_threads()
    if count < before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count < before:
            torch.set_num_threads(before)


class NotFiniteError(RuntimeError):
    """Logits with a NaN or an infinity in them: nothing can be drawn from or measured on these."""


class Stream:
    """A growing sequence with its key-value cache.

    ``source``: what an encoder reads before the first token, whole in one pass, because each of its
    tokens attends to all. ``read``: what the encoder made of it, None until then.

    Raises
    ------
    ValueError
        An encoder-decoder is given no source.
    """

    def __init__(self, engine: Engine, source: Sequence[int] = ()) -> None:
        if engine.model.config.is_encoder_decoder and not source:
            raise ValueError("an encoder-decoder reads a source first: give one")
        self.engine, self._source = engine, list(source)
        self._ids: list[int] = []
        self.read: Any = None
        self._cache = growing(engine.model.config)
        weights = (p for p in engine.model.parameters() if p.device.type != "meta")
        self._tiny = sum(p.numel() for p in weights) < TINY_PARAMETERS

    @property
    def rewinds(self) -> bool:
        """Whether every layer's keys and values can be forgotten from a token on."""
        layers = getattr(self._cache, "layers", [None])  # an encoder-decoder's is of two parts
        return all(isinstance(layer, GrowingLayer) for layer in layers)

    def rewind(self, count: int) -> None:
        """Forget all but the first ``count`` tokens."""
        del self._ids[count:]
        for layer in self._cache.layers:
            layer.rewind(count)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], *, keep: int = 1) -> torch.Tensor:
        """Append ``ids`` and return the logits of the last ``keep`` positions ``[keep, V]``.

        Raises
        ------
        NotFiniteError
            They have a NaN or an infinity; the message says at which token, and where from.
        """
        reads = self._source if self.read is None else ()
        # Of a few tokens torch's own operations are small ones.
        few = self._tiny or max(len(ids), len(reads)) <= FEW_TOKENS
        kernels.POOL.threads = 1 if self._tiny else self.engine.threads
        with threads(1 if few else self.engine.threads):
            if reads:
                self.read = encoded(self.engine.model, reads)
            kept = {"past_key_values": self._cache, "use_cache": True}
            logits = logits_of(self.engine.model, ids, self.read, keep, **kept)  # [keep, V]
            self._ids += ids
            largest = logits.amax(-1)  # [keep]; of a NaN it is NaN, and -inf may be a mask
            if not (finite := largest.isfinite()).all():
                at = len(self._ids) - keep + int(finite.int().argmin())
                raise NotFiniteError(
                    f"NaN or infinity in the logits after token {at} of the sequence (id "
                    f"{self._ids[at]}): {cause(self.engine, self._ids[: at + 1], self._source)}"
                )
        return logits


WHOLE = 20
"""Bytes of each pair of an encoder's tokens and each head: scores, biases and shares as float32."""


def encoded(model: Any, source: Sequence[int]) -> Any:
    """What the encoder makes of a source.

    Raises
    ------
    MemoryError
        Attention among all of its tokens takes more than the machine can spare.
    """
    need = WHOLE * model.config.num_attention_heads * len(source) ** 2
    if need > 1 << 28 and need > (spare := Machine().spare_bytes()):
        raise MemoryError(
            f"an encoder reads a text whole: {len(source)} tokens take {need / 1e6:.0f} MB at "
            f"once, and this machine can spare {spare / 1e6:.0f} MB; give a shorter text"
        )
    return encoder_of(model)(torch.tensor([list(source)]))


def logits_of(model: Any, ids: Sequence[int], read: Any, keep: int, **kept: Any) -> torch.Tensor:
    """Logits ``[keep, V]`` at the end of ``ids``, of a decoder that ``read`` is for or none."""
    tokens = torch.tensor([list(ids)])
    if read is None:
        return model(tokens, logits_to_keep=keep, **kept).logits[0, -keep:]  # a few ignore it
    return model(encoder_outputs=read, decoder_input_ids=tokens, **kept).logits[0, -keep:]


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

    def __init__(self, engine: Engine, source: Sequence[int] = ()) -> None:
        super().__init__(engine, source)
        self._seen = 0

    def logits(self, ids: Sequence[int], *, keep: int = 1) -> torch.Tensor:
        """Logits ``[keep, V]`` at the end of the whole sequence ``ids``; catches up as needed."""
        new = ids[self._seen :]
        with self.engine.full_precision():
            out = self.forward(new, keep=keep)
        self._seen = len(ids)
        return out


@torch.inference_mode()
def cause(engine: Engine, ids: Sequence[int], source: Sequence[int] = ()) -> str:
    """What makes the logits after ``ids`` not finite: a weight, a module, or too few bits."""
    model = engine.model
    for name, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        if weight.device.type != "meta" and not weight.isfinite().all():
            return f"{name} has NaN or infinity; repair the checkpoint and pack it again"
    dtype, found = str(model.dtype).removeprefix("torch."), []

    def watch(name: str) -> Any:
        def seen(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and not first.isfinite().all():
                found.append(name)

        return seen

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        with engine.full_precision():
            logits_of(model, ids, encoded(model, source) if source else None, 1, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return "at full precision they are finite; lab.update(bits=...) with more bits"
    if dtype == "float32":
        return f"{found[0]} is the first whose output is not finite; its weights are too large"
    return f"{found[0]} overflows {dtype} first; open the model with dtype=torch.float32"
