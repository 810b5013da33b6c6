"""The engine obeys the scheduler: it loads, computes, waits and writes down what happened.

One `Engine` owns the model's skeleton (everything but the experts), the memory of resident experts,
the loader and the scheduler. Each MoE layer of a forward pass comes to `_layer`: ask the scheduler,
do what its plan says row by row, compute what is resident meanwhile, then what arrives. The log
holds the plan's own rows, with times.

T tokens, K active, E experts, D model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import torch

from moelab.engine import dense, kernels, readers, small_ops
from moelab.engine.compute import Batch, ExpertCompute, Routed, Serve
from moelab.engine.loader import Loader, Ticket
from moelab.engine.log import EventLog
from moelab.engine.memory import Arena, Slot, give_back
from moelab.models.adapter import attach, load_skeleton
from moelab.scheduling import events as e
from moelab.scheduling.events import LayerPlan
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, LookAhead
from moelab.scheduling.trace import Trace
from moelab.settings import Settings
from moelab.store.foreign import foreign
from moelab.store.store import Store

Heard = Callable[[int, torch.Tensor, Routed], None]
_SERVED = (e.HIT, e.LOAD, e.SUBSTITUTE)  # of 0 bits: an expert without weights, nothing to compute


class Engine:
    """A model whose experts live on disk, within a budget.

    ``dtype`` is what is computed in, ``threads`` the cores that compute (default: torch's own
    number, which obeys OMP_NUM_THREADS and the cores this process may use), ``dense_bits`` what
    large dense weights are kept at.

    Raises
    ------
    BudgetError
        The budget is below one layer's need.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        dense_bits: int = 16,
    ) -> None:
        self.store, self.settings = store, settings
        self.shape, self.threads = store.shape, threads or torch.get_num_threads()
        self.opened = {"dtype": dtype, "threads": self.threads, "dense_bits": dense_bits}
        kernels.warm_up()
        self.scheduler = Scheduler(self.shape, settings.strategy, settings.knobs())
        with foreign((folder := store.checkpoint_dir) / "config.json"):
            made_of, check = store.weights(dense_bits), store.check_model
            self.model = load_skeleton(folder, dtype=dtype, check=check, checkpoint=made_of)
        self.dense_bits, exact = dense_bits, lambda: self.reference is not None
        if dtype == torch.float32:  # else all of it is computed in 16 bits, by torch
            dense.serve(self.model, dense_bits, made_of, exact)
        small_ops.serve_norms(self.model)
        self.dense_bytes = dense.memory_bytes(self.model)
        self.adapter = attach(self.model, self._layer)
        self.shape = dataclasses.replace(self.shape, free=self.adapter.layers[0].free)
        self.adapter.recorded = store.routing and store.routing.of(lambda: self.token)
        self.compute = ExpertCompute(store, self.adapter)
        self.arena = Arena(dict(store.slot_bytes), settings.budget_bytes)
        self.loader = Loader(readers.at_once(store), settings.device)
        self.resident: dict[Key, tuple[Slot, Ticket]] = {}
        self.reference: Callable[[tuple[int, int]], int] | None = None
        self._heard: Heard | None = None
        # Held while the scheduler decides: whoever asks it why sees no half-made decision.
        self.lock = threading.RLock()
        self._ahead: dict[Key, Ticket] = {}  # prefetches whose bytes may not have landed
        self.new_sequence(record=False)
        give_back()

    # -- between tokens ---------------------------------------------------------------------

    def begin_with(self, scheduler: Scheduler) -> None:
        """Go on from a scheduler's cache and what it has learnt; its residents are loaded now."""
        self.recover()  # empty
        self.scheduler = scheduler
        for key, bits in scheduler.cache.items():
            self._load(key, bits, urgent=False)
        for _, ticket in self.resident.values():
            self.loader.wait(ticket)
        self._ahead.clear()

    def new_sequence(self, *, record: bool = True) -> None:
        """A new prompt: fresh log and trace; the resident experts stay."""
        self.log = EventLog(time.perf_counter())
        self.trace: Trace | None = Trace(self.shape) if record else None
        self.token, self.prefill, self.setup_ms = 0, True, 0.0
        self.arena.trim()  # slots of earlier settings are no memory of this run
        self.arena.peak_bytes = self.arena.held_bytes
        if self.trace is not None:
            self.trace.resident = self.scheduler.cache.items()
        self._record_settings(self.scheduler.strategy.fresh(), fresh=True)
        with self.lock:
            self.scheduler.new_sequence()
        self._begin_token()
        self._set_up()
        self._steer_all()  # who is resident may have been renewed for this prompt

    def end_of_sequence(self) -> None:
        """The run is over: what happens from now on is not written into its log and trace."""
        self.log.close()
        self.log, self.trace = EventLog(time.perf_counter()), None
        give_back()

    def end_of_token(self, made: int = 1) -> None:
        """A pass has made so many tokens; what follows belongs to the next one."""
        self.scheduler.end_of_token(made)
        if self.trace is not None:
            self.trace.end_of_pass(made)
        self.token, self.prefill = self.token + made, False
        self._begin_token()

    def apply(self, settings: Settings) -> None:
        """Obey other settings from the next token on; memory above a smaller budget goes back.

        Raises
        ------
        BudgetError
            The budget is below one layer's need; nothing changes.
        Exception
            Whatever a part of the strategy raised; `recover` then goes back to the old settings.
        """
        old, asked = self.settings, settings.strategy
        new_strategy = None if asked is old.strategy else asked
        with self.lock:
            plan = self.scheduler.change(settings.knobs(), new_strategy)
        try:
            begun = time.perf_counter()
            self._issue(plan, None)  # waits where a read has begun of what must leave
            self.setup_ms += 1e3 * (time.perf_counter() - begun)
            self.arena.trim()  # of other bits they may never be asked for again
            # A smaller budget is told when it is kept: evicted and given back before this line.
            self.arena.set_limit(settings.budget_bytes)
            self.settings = settings
            self._record_settings(asked, fresh=not asked.shares(old.strategy))
            self._set_up()
            self._steer_all()
        except BaseException:  # a policy of somebody's own: what was in force is what recovers
            self.settings = old
            raise
        if settings.device != old.device:
            self.loader.use(settings.device)
        if not settings.measure_kl:
            self.compute.release()

    @contextlib.contextmanager
    def full_precision(
        self, bits: Callable[[tuple[int, int]], int] | None = None, heard: Heard | None = None
    ) -> Iterator[None]:
        """Inside, forward passes need no cache: unmasked, uncounted, outside the budget.

        Parameters
        ----------
        bits
            (layer, expert) -> tier it is computed at, 0 for no contribution; default the best
            tier for all.
        heard
            Is told each layer, its input ``[T, D]`` and its routing.
        """
        best, deciding = max(self.store.tiers), self.deciding
        self.adapter.release()
        self.reference, self._heard = bits or (lambda _: best), heard
        try:
            yield
        finally:
            self.reference = self._heard = None
            self._steer_all()
            self.deciding = deciding  # of this token, measuring is no part

    def recover(self) -> None:
        """After a failure in the middle of a token: an empty cache, ready for the next run."""
        # A plan may have been obeyed in part, so cache and memory no longer agree: both begin anew.
        for slot, ticket in self.resident.values():
            if not self.loader.cancel(ticket):
                with contextlib.suppress(OSError):
                    self.loader.wait(ticket)
            self.arena.give(slot)
        self.resident.clear()
        self._ahead.clear()
        self.adapter.release()
        self.scheduler = Scheduler(self.shape, self.settings.strategy, self.settings.knobs())
        self.arena.set_limit(self.settings.budget_bytes)
        self.arena.trim()

    def close(self) -> None:
        """Stop the loader and let go of all memory; the engine cannot be used after this."""
        self.loader.close()
        self.adapter.detach()
        self.compute.release()
        self.resident.clear()
        self.arena.trim()

    def in_flight(self) -> list[Key]:
        """Keys of the resident experts whose bytes have not landed yet; from any thread."""
        return [key for key, (_, ticket) in list(self.resident.items()) if not ticket.done]

    def _begin_token(self) -> None:
        self.deciding = 0.0  # seconds of this token, from the end of the one before it
        self.at = -1  # the layer that decides; -1 between tokens
        self._steer_all()

    def _set_up(self) -> None:
        """Load what the strategy wants resident; waiting for it is ``setup_ms``, no stall."""
        with self.lock:
            plan = self.scheduler.begin()
        told = "in_flight" in self.scheduler.strategy.observes
        awaited = {k: t for k, t in self._ahead.items() if told and not t.done}
        if not (plan.rows or awaited):
            return
        begun = time.perf_counter()
        fetched = self._issue(plan, None)
        for ticket in [*awaited.values(), *(self._ahead[serve.key] for serve in fetched)]:
            self.loader.wait(ticket)
        self.setup_ms += 1e3 * (time.perf_counter() - begun)

    def _record_settings(self, strategy: Strategy, *, fresh: bool) -> None:
        if self.trace is not None:
            at, knobs, values = len(self.trace.steps), self.settings.knobs(), strategy.values
            self.trace.changes.append(Change(at, knobs, strategy.name, fresh, values, strategy))

    # -- one layer of a forward pass --------------------------------------------------------

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,  # [T, D]
        idx: torch.Tensor,  # [T, K]
        weights: torch.Tensor,  # [T, K]
        scale_input: bool,
    ) -> torch.Tensor:
        routed = Routed(idx, weights, self.shape.experts[layer], self.shape.free)
        if self.reference is not None:
            if self._heard is not None:
                self._heard(layer, x, routed)
            # Measuring must not be seen by what is measured: no scheduler, no trace, no log.
            return self.compute.full_precision(layer, x, routed, scale_input, self.reference)
        given = self._given(layer, x, routed)
        self.at = layer
        with self.lock:
            begun = time.perf_counter()
            plan = self.scheduler.step(given)
            self.deciding += time.perf_counter() - begun
        if self.trace is not None:
            self.trace.steps.append(given)
        # When this layer ends, memory holds what the cache says, or a load is on its way there.
        batch = self.compute.batch(layer, x, routed, scale_input)
        self._finish(self._issue(plan, batch), batch)
        if layer + 1 < self.shape.layers:  # its router comes next, and may prefer what is here now
            self._steer(layer + 1)
        return batch.result()

    def _steer(self, layer: int) -> None:
        begun = time.perf_counter()
        self.adapter.steer(layer, self.scheduler.mask(layer), self.scheduler.bias(layer))
        self.deciding += time.perf_counter() - begun

    def _steer_all(self) -> None:
        for layer in range(self.shape.layers):
            self._steer(layer)

    def _given(self, layer: int, x: torch.Tensor, routed: Routed) -> LayerInput:
        """What the scheduler is told of a layer: the routing, and what its parts observe."""
        observes = self.scheduler.strategy.observes
        ahead: tuple[LookAhead, ...] = ()
        prefill = self.prefill or layer < self.shape.encoder_layers
        if depth := self.scheduler.look_ahead(layer, prefill=prefill):
            for coming, idx, weights in self.adapter.look_ahead(layer, depth):
                guess = Routed(idx, weights, self.shape.experts[coming])
                ahead += (LookAhead.of(coming, guess.experts, guess.weights),)
        choice = "wanted" in observes and self.adapter.steers(layer) and self.adapter.wanted(layer)
        wanted = Routed(*choice, self.shape.experts[layer]) if choice else None
        return LayerInput(
            layer,
            routed.experts,
            routed.weights,
            prefill,
            ahead,
            wanted and wanted.experts,
            wanted and wanted.weights,
            tuple(x.float().norm(dim=-1).tolist()) if "norms" in observes else None,
            unread=self._withdraw(layer) if "unread" in observes else (),
            in_flight=self._not_landed() if "in_flight" in observes else (),
            **(self.adapter.observed(layer, observes) | routed.free),
        )

    def _not_landed(self) -> tuple[Key, ...]:
        self._ahead = {k: t for k, t in self._ahead.items() if not t.done}
        return tuple(self._ahead)

    def _withdraw(self, layer: int) -> tuple[Key, ...]:
        """The layer's router has spoken: prefetches for it that were not begun are not read."""
        own = self.shape.keys(layer)
        mine = {k: t for k, t in self._ahead.items() if own.start <= k < own.stop}
        self._ahead = {k: t for k, t in self._ahead.items() if k not in mine}
        return tuple(k for k, t in mine.items() if self.loader.cancel(t))

    def _issue(self, plan: LayerPlan, batch: Batch | None) -> list[Serve]:
        """Do what the rows of a plan say, in their order; returns what is to be computed.

        Between tokens (no ``batch``) that are the loads to wait for. An eviction comes before the
        load it makes room for: the memory held never exceeds the budget.
        """
        waiting: list[Serve] = []
        pending: set[Key] = set()  # their bytes are still needed by this layer
        for row in plan.rows:
            kind, layer, expert, _, bits, _, chosen = row
            key = self.shape.offset[layer] + expert
            if kind == e.EVICT:
                if batch is not None and key in pending:
                    # A prompt needs more experts than fit: those served so far are computed now,
                    # because the bytes of one of them are about to be written over.
                    self._finish(waiting, batch)
                    pending.clear()
                self._evict(key, row)
                continue
            late = kind == e.HIT and bits > 0 and not self.resident[key][1].done
            told = (*row[:5], e.LATE, chosen) if late else row
            size = self.shape.size(key, bits) if bits else 0
            self.log.add(self.token, self.at, told, size, time.perf_counter())
            if kind in (e.LOAD, e.PREFETCH):  # right behind its row: the ticket is the last row's
                self.log.time_by(self._load(key, bits, urgent=kind == e.LOAD))
            if bits and (kind in _SERVED or (kind == e.PREFETCH and batch is None)):
                waiting.append(Serve(chosen, bits, key, load=kind == e.LOAD))
                pending.add(key)
        return waiting

    def _finish(self, waiting: list[Serve], batch: Batch) -> None:
        """Compute everything in ``waiting``: what is here at once, the rest as it lands."""
        while waiting:
            # All that has landed goes into one kernel call. Only with nothing left to compute is a
            # load waited for: the first, because loads come in the order they were issued.
            ready = [s for s in waiting if self.resident[s.key][1].done]
            if not ready:
                self._stall(waiting[0])
                continue
            for s in ready:
                waiting.remove(s)
                self.loader.wait(self.resident[s.key][1])  # raises where it failed
            batch.add([(s, self.resident[s.key][0]) for s in ready])

    def _stall(self, serve: Serve) -> None:
        ticket = self.resident[serve.key][1]
        cause = e.ON_DEMAND if serve.load else e.LATE
        begun = time.perf_counter()
        self.loader.wait(ticket)
        seconds = time.perf_counter() - begun
        asked, place = int(self.scheduler.view.asked[serve.key]), self.shape.place(serve.key)
        row = (e.STALL, *place, asked, serve.bits, cause, place[1])
        self.log.add(self.token, self.at, row, 0, begun, seconds)

    # -- memory -----------------------------------------------------------------------------

    def _load(self, key: Key, bits: int, *, urgent: bool) -> Ticket:
        """Submit a load; it holds its memory from now on."""
        # The arena refuses what would exceed the budget. It never has to: the plan's evictions came
        # before this row. Until the ticket is done the slot is the loader's to write.
        _, offset, nbytes = self.store.location(*self.shape.place(key), bits)
        slot = self.arena.take(bits, nbytes)
        ticket = self.loader.submit(self.store.files[bits], offset, slot.view, urgent=urgent)
        self.resident[key] = (slot, ticket)
        if not urgent:
            self._ahead[key] = ticket
        return ticket

    def _evict(self, key: Key, row: e.Row) -> None:
        """Give the memory back, not before a read that has begun is over: it writes into it."""
        slot, ticket = self.resident[key]
        self._ahead.pop(key, None)
        if not ticket.done and not self.loader.cancel(ticket):
            begun = time.perf_counter()
            try:
                self.loader.wait(ticket)
            except OSError:  # an unread prefetch leaves: nobody needs its bytes
                row = (*row[:5], e.FAILED, row[6])
            seconds = time.perf_counter() - begun
            stall = (e.STALL, *row[1:5], e.EVICTED_LATE, row[6])
            self.log.add(self.token, self.at, stall, 0, begun, seconds)
        del self.resident[key]
        self.arena.give(slot)
        self.log.add(self.token, self.at, row, slot.nbytes, time.perf_counter())
