"""The engine obeys the scheduler: it loads, computes, waits and writes down what happened.

One `Engine` owns the model's skeleton (everything but the experts), the arena of resident experts,
the loader and the scheduler. Each MoE layer of a forward pass comes to `_layer`: ask the scheduler,
issue the loads (on demand before prefetch), compute what is resident meanwhile, then what arrives.

T tokens, K active, E experts, D model.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

from moelab.engine import kernels
from moelab.engine.arena import Arena, Slot
from moelab.engine.compute import Batch, ExpertCompute
from moelab.engine.loader import Loader, Ticket
from moelab.engine.model import attach, load_skeleton
from moelab.events import EventLog
from moelab.scheduling.scheduler import Drop, LayerPlan, Scheduler, Serve
from moelab.scheduling.strategy import Key, LookAhead, Shape
from moelab.scheduling.trace import LayerInput, Trace
from moelab.settings import Settings
from moelab.store.store import Store


class Resident:
    """One expert in memory or on its way: its slot and its load's ticket."""

    __slots__ = ("slot", "ticket", "token")

    def __init__(self, slot: Slot, ticket: Ticket, token: int) -> None:
        self.slot, self.ticket, self.token = slot, ticket, token


class Usage:
    """When and how often each expert was loaded and used in this run; arrays ``[L, E]``."""

    def __init__(self, shape: Shape) -> None:
        size = (shape.layers, max(shape.experts))
        self.loaded = np.full(size, -1, np.int32)
        self.used = np.full(size, -1, np.int32)
        self.uses = np.zeros(size, np.int32)


class Engine:
    """A model whose experts live on disk, within a budget.

    Parameters
    ----------
    store
        An opened store.
    settings
        Budget, bits, strategy, device.
    dtype
        Of the non-expert weights and the activations.

    Raises
    ------
    BudgetError
        The budget is below one token's need.
    """

    def __init__(self, store: Store, settings: Settings, *, dtype: torch.dtype) -> None:
        self.store, self.settings = store, settings
        self.shape = shape_of(store)
        kernels.warm_up()
        self.scheduler = Scheduler(self.shape, settings.strategy, settings.knobs())
        self.model = load_skeleton(store.checkpoint_dir, dtype=dtype)
        self.adapter = attach(self.model, self._layer)
        self.compute = ExpertCompute(store, self.adapter)
        self.arena = Arena(dict(store.slot_bytes), settings.budget_bytes)
        self.loader = Loader(max(store.slot_bytes.values()), settings.device)
        self.resident: dict[Key, Resident] = {}
        self.reference = False
        self._masks: set[int] = set()
        self.new_sequence(record=False)

    # -- between tokens ---------------------------------------------------------------------

    def new_sequence(self, *, record: bool = True) -> None:
        """A new prompt: fresh log, trace and counters; the resident experts stay."""
        self.log = EventLog(time.perf_counter())
        self.trace: Trace | None = Trace(self.shape) if record else None
        self.usage = Usage(self.shape)
        self.token = 0
        self.prefill = True
        self.arena.peak_bytes = self.arena.held_bytes
        for here in self.resident.values():
            here.token = -1  # issued before this run: its bytes are nobody's here
        self.scheduler.new_sequence()
        if self.trace is not None:
            self.trace.resident = list(self.scheduler.cache.items())
        self._begin_token()
        self._record_settings(fresh=True)

    def end_of_token(self) -> None:
        """One token is produced; what follows belongs to the next one."""
        self.scheduler.end_of_token()
        self.token += 1
        self.prefill = False
        self._begin_token()

    def apply(self, settings: Settings) -> None:
        """Obey other settings from the next token on; memory above a smaller budget goes back.

        Raises
        ------
        BudgetError
            The budget is below one token's need; nothing changes.
        """
        old = self.settings
        new_strategy = settings.strategy if settings.strategy is not old.strategy else None
        drops = self.scheduler.change(settings.knobs(), new_strategy)
        self.settings = settings
        for drop in drops:
            self._evict(drop)
        self.arena.set_limit(settings.budget_bytes)
        if settings.device != old.device:
            self.loader.use(settings.device)
        if not settings.measure_kl:
            self.compute.release()
        self._record_settings(fresh=new_strategy is not None)
        withdrawn = self.withdrawn
        self._begin_token()  # evictions between tokens are nobody's stall
        self.withdrawn = withdrawn

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, forward passes use every expert at the best tier, unmasked and uncounted."""
        for layer in self._masks:
            self.adapter.set_mask(layer, None)
        self._masks.clear()
        self.reference = True
        try:
            yield
        finally:
            self.reference = False
            self._mask_all()

    def recover(self) -> None:
        """After a failure in the middle of a token: an empty cache, ready for the next run."""
        for here in self.resident.values():
            if not self.loader.cancel(here.ticket):
                with contextlib.suppress(OSError):
                    self.loader.wait(here.ticket)
            self.arena.give(here.slot)
        self.resident.clear()
        settings = self.settings
        self.scheduler = Scheduler(self.shape, settings.strategy, settings.knobs())
        self.arena.set_limit(settings.budget_bytes)
        self.arena.trim()

    def close(self) -> None:
        """Stop the loader and let go of all memory; the engine cannot be used after this."""
        self.loader.close()
        self.adapter.detach()
        self.compute.release()
        self.resident.clear()
        self.arena.trim()

    def _begin_token(self) -> None:
        self._mask_all()
        self.stall: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.bytes = 0
        self.withdrawn: list[tuple[int, int]] = []  # (token that issued a load, bytes not read)

    def _record_settings(self, *, fresh: bool) -> None:
        if self.trace is None:
            return
        changes, at = self.trace.changes, len(self.trace.steps)
        if changes and changes[-1][0] == at:
            fresh |= changes.pop()[3]
        changes.append((at, self.settings.knobs(), self.settings.strategy.name, fresh))

    # -- one layer of a forward pass --------------------------------------------------------

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,  # [T, D]
        idx: torch.Tensor,  # [T, K]
        weights: torch.Tensor,  # [T, K]
        scale_input: bool,
    ) -> torch.Tensor:
        routed = Routed(idx, weights, self.shape.experts[layer])
        if self.reference:
            return self.compute.full_precision(layer, x, routed, scale_input)
        given = self._given(layer, routed)
        plan = self.scheduler.step(given)
        if self.trace is not None:
            self.trace.steps.append(given)
        batch = self.compute.batch(layer, x, routed, scale_input)
        waiting = self._issue(plan, batch)
        self._finish(waiting, batch)
        for drop in plan.after:
            self._evict(drop)
        if layer + 1 < self.shape.layers:
            self._mask(layer + 1)
        return batch.result()

    def _mask_all(self) -> None:
        for layer in range(self.shape.layers):
            self._mask(layer)

    def _mask(self, layer: int) -> None:
        allowed = self.scheduler.mask(layer)
        if allowed is not None:
            self.adapter.set_mask(layer, torch.tensor(allowed, dtype=torch.bool))
            self._masks.add(layer)
        elif layer in self._masks:
            self.adapter.set_mask(layer, None)
            self._masks.discard(layer)

    def _given(self, layer: int, routed: Routed) -> LayerInput:
        ahead: tuple[LookAhead, ...] = ()
        depth = self.scheduler.depth(layer, prefill=self.prefill)
        if depth:
            for coming, idx, weights in self.adapter.look_ahead(layer, depth):
                guess = Routed(idx[-1:], weights[-1:], self.shape.experts[coming])
                ahead += (LookAhead(coming, guess.experts[0], guess.weights[0]),)
        wanted = None
        if layer in self._masks:
            choice = self.adapter.wanted(layer)
            wanted = tuple(map(tuple, choice[0].tolist())) if choice else None
        return LayerInput(layer, routed.experts, routed.weights, self.prefill, ahead, wanted)

    def _issue(self, plan: LayerPlan, batch: Batch) -> list[Serve]:
        """Evict, submit the loads, note every event; returns what is to be computed."""
        waiting: list[Serve] = []
        planned: set[Key] = set()
        for serve in plan.serves:
            key = (plan.layer, serve.served)
            if any(d.key in planned for d in serve.drops):
                self._finish(waiting, batch)
                planned.clear()
            for drop in serve.drops:
                self._evict(drop)
            self._serve(plan.layer, serve)
            waiting.append(serve)
            planned.add(key)
        for expert, asked in plan.skips:
            self._note("skip", plan.layer, expert, asked, 0, 0, "score")
        for fetch in plan.fetches:
            for drop in fetch.drops:
                self._evict(drop)
            nbytes = self.shape.nbytes[fetch.bits]
            self._note("prefetch", *fetch.key, fetch.asked, fetch.bits, nbytes, fetch.cause)
            self._load(fetch.key, fetch.bits, urgent=False)
        return waiting

    def _finish(self, waiting: list[Serve], batch: Batch) -> None:
        """Compute everything in ``waiting``: what is here at once, the rest as it lands."""
        while waiting:
            ready = [s for s in waiting if self._here(batch.layer, s).ticket.done]
            if not ready:
                self._stall(batch.layer, waiting[0])
                continue
            for s in ready:
                waiting.remove(s)
                self.loader.wait(self._here(batch.layer, s).ticket)  # raises where it failed
            batch.add([(s, self._here(batch.layer, s).slot) for s in ready])

    def _here(self, layer: int, serve: Serve) -> Resident:
        return self.resident[layer, serve.served]

    def _stall(self, layer: int, serve: Serve) -> None:
        begun = time.perf_counter()
        self.loader.wait(self._here(layer, serve).ticket)
        seconds = time.perf_counter() - begun
        cause = "on demand" if serve.load else "prefetch late"
        self.stall[cause] += seconds
        asked, bits = serve.asked, serve.bits
        self.log.add(
            self.token, layer, serve.served, "stall", asked, bits, 0, begun, seconds, cause
        )

    # -- memory -----------------------------------------------------------------------------

    def _load(self, key: Key, bits: int, *, urgent: bool) -> None:
        """Submit the load whose event was noted last."""
        slot = self.arena.take(bits)
        path, offset, _ = self.store.location(*key, bits)
        ticket = self.loader.submit(path, offset, slot.view, urgent=urgent)
        self.resident[key] = Resident(slot, ticket, self.token)
        self.log.time_by(ticket)
        self.bytes += slot.nbytes
        self.usage.loaded[key] = self.token

    def _evict(self, drop: Drop) -> None:
        here = self.resident.pop(drop.key)
        cause = drop.cause
        if not here.ticket.done:
            if self.loader.cancel(here.ticket):
                self.withdrawn.append((here.token, here.slot.nbytes))
            else:
                begun = time.perf_counter()
                try:
                    self.loader.wait(here.ticket)
                except OSError:
                    cause = "failed"  # an unread prefetch leaves: nobody needs its bytes
                seconds = time.perf_counter() - begun
                self.stall["evict"] += seconds
                self.log.add(
                    self.token, *drop.key, "stall", drop.bits, drop.bits, 0, begun, seconds, "evict"
                )
        self.arena.give(here.slot)
        nbytes = here.slot.nbytes
        self._note("evict", *drop.key, drop.bits, drop.bits, nbytes, cause)

    # -- what is written down ---------------------------------------------------------------

    def _serve(self, layer: int, s: Serve) -> None:
        kind = "load" if s.load else "substitute" if s.served != s.expert else "hit"
        nbytes = self.shape.nbytes[s.bits]
        self._note(kind, layer, s.served, s.asked, s.bits, nbytes, s.cause)
        self.counts["load_bytes" if s.load else "hit_bytes"] += nbytes
        if s.load:
            self._load((layer, s.served), s.bits, urgent=True)
        if s.bits < s.asked:
            self._note("downgrade", layer, s.served, s.asked, s.bits, 0, s.cause)
        self.usage.used[layer, s.served] = self.token
        self.usage.uses[layer, s.served] += 1

    def _note(
        self, kind: str, layer: int, expert: int, asked: int, bits: int, nbytes: int, cause: str
    ) -> None:
        self.counts[kind] += 1
        now = time.perf_counter()
        self.log.add(self.token, layer, expert, kind, asked, bits, nbytes, now, 0.0, cause)


class Routed:
    """A layer's routing without what counts for nothing (out of range, weight 0).

    ``experts`` and ``weights`` are tuples ``[T][<=K]``; ``idx`` and ``gates`` numpy ``[T, K]``.
    """

    __slots__ = ("experts", "gates", "idx", "weights")

    def __init__(self, idx: torch.Tensor, weights: torch.Tensor, count: int) -> None:
        self.idx = idx.numpy()
        self.gates = weights.float().numpy()
        rows = list(zip(self.idx.tolist(), self.gates.tolist(), strict=True))
        kept = [[(e, w) for e, w in zip(*r, strict=True) if 0 <= e < count and w] for r in rows]
        self.experts = tuple(tuple(e for e, _ in r) for r in kept)
        self.weights = tuple(tuple(w for _, w in r) for r in kept)


def shape_of(store: Store) -> Shape:
    """What the scheduler must know of a store."""
    return Shape(tuple(store.experts_per_layer), store.top_k, dict(store.slot_bytes))
