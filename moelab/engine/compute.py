"""What experts compute: the kernels where they know its activation, else a family's own code.

A `Batch` collects the output of one layer while its experts arrive, and adds them up in the order
of their numbers: a floating-point sum depends on the order, and where two experts are nearly equal
to a router its last bit chooses. So the same experts at the same bits write the same text, whatever
was in the cache. `full_precision` is the measuring instrument: the same layer with every expert at
the store's best tier, read through the page cache and outside the budget, for comparing logits.
A kernel reads a slot as large as the layout says; that the model has that layout was checked when
the store was opened.

T tokens, K active, D model, n experts of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moelab.engine import kernels
from moelab.engine.chunks import FEW_TOKENS
from moelab.engine.memory import HUGE, Slot, pages
from moelab.models.adapter import Adapter, expert_forward
from moelab.models.gating import SWIGLU, rule_of_all
from moelab.scheduling.stream import MIXED, Key
from moelab.store.mixed import decode
from moelab.store.store import Store

AT_ONCE = 8
"""Experts that full precision reads before it computes them."""


class Routed:
    """A layer's routing without what counts for nothing (out of range, weight 0).

    ``experts`` and ``weights`` are tuples ``[T][<=K]``; ``idx`` and ``gates`` numpy ``[T, K]``.
    ``free`` has ``free`` and ``free_weights`` of `LayerInput`, where experts have no weights.
    """

    __slots__ = ("experts", "free", "gates", "idx", "weights")

    def __init__(self, idx: torch.Tensor, weights: torch.Tensor, count: int, free: int = 0) -> None:
        self.idx = idx.numpy()
        self.gates = weights.float().numpy()
        rows = list(zip(self.idx.tolist(), self.gates.tolist(), strict=True))
        kept = [[(e, w) for e, w in zip(*r, strict=True) if 0 <= e < count and w] for r in rows]
        self.experts = tuple(tuple(e for e, _ in r) for r in kept)
        self.weights = tuple(tuple(w for _, w in r) for r in kept)
        self.free: dict[str, Any] = {}
        if free:
            some = range(count, count + free)
            own = [[(e, w) for e, w in zip(*r, strict=True) if e in some and w] for r in rows]
            pairs = (tuple(tuple(pair[at] for pair in row) for row in own) for at in (0, 1))
            self.free = dict(zip(("free", "free_weights"), pairs, strict=True))


class Serve(NamedTuple):
    """One expert to compute: the router's ``expert`` by the copy of ``key`` at ``bits``.

    ``load``: on demand, not there when the layer asked for it.
    """

    expert: int
    bits: int
    key: Key = -1
    load: bool = False


class ExpertCompute:
    """Computes experts of one store for one model."""

    def __init__(self, store: Store, adapter: Adapter) -> None:
        self.store, self.adapter = store, adapter
        self.layout = store.layout
        self.inner = store.manifest.inner
        found = rule_of_all(layer.module for layer in adapter.layers)
        self.fast = kernels.supports(store.layout, store.manifest, found)
        self.rule, self.biased = found or SWIGLU, store.manifest.has_bias
        self._full: dict[tuple[int, int], Slot] = {}  # (place, bytes) -> memory of full precision

    def release(self) -> None:
        """Let go of full precision's memory."""
        self._full.clear()

    def batch(self, layer: int, x: torch.Tensor, routed: Routed, scale_input: bool) -> Batch:
        """A new layer's output, to be filled expert by expert; ``x`` is ``[T, D]``."""
        if not self.fast or scale_input:
            return TorchBatch(self, layer, x, routed, scale_input)
        few = len(x) <= FEW_TOKENS  # then one kernel call serves all experts that are here
        return (KernelBatch if few else PrefillBatch)(self, layer, x, routed)

    def full_precision(
        self,
        layer: int,
        x: torch.Tensor,
        routed: Routed,
        scale_input: bool,
        bits: Callable[[tuple[int, int]], int],
    ) -> torch.Tensor:
        """The layer without cache or budget, each expert at its ``bits`` (0: none); ``[T, D]``."""
        batch = self.batch(layer, x, routed, scale_input)
        wanted = sorted({e for row in routed.experts for e in row})
        tiers = [(e, bits((layer, e))) for e in wanted]
        served = [Serve(e, b) for e, b in tiers if b]
        for some in (served[at : at + AT_ONCE] for at in range(0, len(served), AT_ONCE)):
            batch.add([(s, self._read(layer, s, place)) for place, s in enumerate(some)])
        return batch.result()

    def _read(self, layer: int, serve: Serve, place: int) -> Slot:
        """The expert in one of `AT_ONCE` slots, which the next one in that place writes over."""
        nbytes = self.store.location(layer, serve.expert, serve.bits)[2]
        slot = self._full.get((place, nbytes))
        if slot is None:
            slot = Slot(serve.bits, pages(nbytes, huge=nbytes >= HUGE))
            self._full[place, nbytes] = slot
        self.store.read(layer, serve.expert, serve.bits, into=slot.view)
        return slot


class _Layer:
    """One layer's output in the making: `add` experts, then take the ``result``."""

    def __init__(self, compute: ExpertCompute, layer: int, x: torch.Tensor, routed: Routed) -> None:
        self.layer, self._compute, self._x, self._routed = layer, compute, x, routed

    def _coded(self, serve: Serve) -> int:
        """What the copy's bytes are: its bits, or of "mixed" the form of whoever serves."""
        if serve.bits != MIXED:
            return serve.bits
        store = self._compute.store
        first = sum(store.experts_per_layer[: self.layer])
        expert = serve.expert if serve.key < 0 else serve.key - first
        return store.coded(self.layer, expert, serve.bits)


class KernelBatch(_Layer):
    """Experts of few tokens, each at its own bits: one kernel call for all that are here."""

    def __init__(self, compute: ExpertCompute, layer: int, x: torch.Tensor, routed: Routed) -> None:
        super().__init__(compute, layer, x, routed)
        self._in = x.float().contiguous()  # the kernels go by its address
        self._calls: list[np.ndarray] = []  # [n, T, D]
        self._experts: list[int] = []  # of all calls

    def add(self, served: Sequence[tuple[Serve, Slot]]) -> None:
        """Compute experts whose bytes are in memory, each once; these are free to go afterwards."""
        if not served:
            return
        served = sorted(served, key=lambda one: one[0].expert)
        gates = [[0.0] * len(self._in) for _ in served]
        place = {serve.expert: at for at, (serve, _) in enumerate(served)}
        for t, row in enumerate(zip(self._routed.experts, self._routed.weights, strict=True)):
            for expert, weight in zip(*row, strict=True):
                if expert in place:  # as `_gates`, which takes 90 us for so few
                    gates[place[expert]][t] += weight
        outputs = np.zeros((len(served), *self._in.shape), np.float32)
        kernels.compute_experts(
            np.array([m.addr for _, m in served], np.uintp),
            np.array([self._compute.layout.form(self._coded(s)) for s, _ in served], np.int64),
            self._in.numpy(),
            np.array(gates, np.float32),
            outputs,
            inner=self._compute.inner,
            half=self._compute.layout.dtype,
            rule=self._compute.rule,
            biased=self._compute.biased,
        )
        self._calls.append(outputs)
        self._experts += [s.expert for s, _ in served]

    def result(self) -> torch.Tensor:
        """Add up, one expert after another."""
        if not self._calls:
            return torch.zeros_like(self._x)
        outputs = self._calls[0]
        if len(self._calls) > 1:
            outputs = np.concatenate(self._calls)[np.argsort(self._experts)]
        return torch.from_numpy(np.add.reduce(outputs, 0)).to(self._x.dtype)


class PrefillBatch(_Layer):
    """Experts of many tokens, one after another, each on the tokens that chose it.

    An output waits until those of all experts before it are added: none where all of them are in
    the cache; at worst, where the first expert comes last, K times the layer's output.
    """

    _dtype = torch.float32

    def __init__(self, compute: ExpertCompute, layer: int, x: torch.Tensor, routed: Routed) -> None:
        super().__init__(compute, layer, x, routed)
        self._out = torch.zeros_like(x, dtype=self._dtype)
        self._order = sorted({e for row in routed.experts for e in row})
        self._early: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, served: Sequence[tuple[Serve, Slot]]) -> None:
        """Compute one expert after another."""
        served = sorted(served, key=lambda one: one[0].expert)
        gates = torch.from_numpy(self._gates(served)) if served else ()
        for (serve, memory), gate in zip(served, gates, strict=True):
            rows = gate.nonzero()[:, 0]
            y = self._expert(self._coded(serve), memory, rows, gate[rows, None].to(self._dtype))
            self._early[serve.expert] = rows, y
            while self._order and self._order[0] in self._early:
                self._out.index_add_(0, *self._early.pop(self._order.pop(0)))

    def _gates(self, served: Sequence[tuple[Serve, Slot]]) -> np.ndarray:
        """Gate weights of experts for every token, float32 ``[n, T]``."""
        experts = np.array([serve.expert for serve, _ in served])[:, None, None]
        # A token's weights for one expert are added: a few routers choose an expert twice.
        return np.where(self._routed.idx == experts, self._routed.gates, np.float32(0)).sum(2)

    def result(self) -> torch.Tensor:
        """The layer's output; what waits behind an expert that was left out is added now."""
        for expert in sorted(self._early):
            self._out.index_add_(0, *self._early[expert])
        return self._out.to(self._x.dtype)

    def _expert(
        self, bits: int, memory: Slot, rows: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        x = self._x[rows].float()
        like = self._compute
        return kernels.compute_prefill(memory.view, bits, like.layout, x, like.rule) * gate


class TorchBatch(PrefillBatch):
    """Experts of any kind: decoded to tensors and run by the family's own forward."""

    def __init__(
        self, compute: ExpertCompute, layer: int, x: torch.Tensor, routed: Routed, scale_input: bool
    ) -> None:
        self._dtype, self._scale_input = x.dtype, scale_input
        self._module = compute.adapter.layers[layer].module
        super().__init__(compute, layer, x, routed)

    def _expert(
        self, bits: int, memory: Slot, rows: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        tensors = decode(memory.view, self._compute.layout, bits, dtype=self._dtype)
        x = self._x[rows]
        y = expert_forward(self._module, x * gate if self._scale_input else x, tensors)
        return y if self._scale_input else y * gate


Batch = KernelBatch | PrefillBatch
