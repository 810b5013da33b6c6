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
from collections.abc import Callable, Iterator

import torch

from moelab.engine import kernels
from moelab.engine.compute import Batch, ExpertCompute
from moelab.engine.loader import Loader, Ticket
from moelab.engine.memory import Arena
from moelab.engine.questions import Questions
from moelab.engine.resident import Resident, Usage
from moelab.engine.routed import Routed, shape_of
from moelab.models.adapter import attach, load_skeleton
from moelab.models.steering import Steering
from moelab.runs.events import EventLog
from moelab.scheduling.plan import Drop, LayerPlan, Serve
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, LookAhead
from moelab.scheduling.trace import Change, LayerInput, Trace
from moelab.settings import Settings
from moelab.store.store import Store


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
        The budget is below one layer's need.
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
        self.reference: Callable[[Key], int] | None = None
        self._heard: list[LayerInput] | None = None
        self._listen_depth = 0
        self.questions = Questions()
        self._ahead: dict[Key, Ticket] = {}  # prefetches whose bytes may not have landed
        self.steering = Steering(self.adapter)
        self.new_sequence(record=False)

    # -- between tokens ---------------------------------------------------------------------

    def begin_with(self, scheduler: Scheduler) -> None:
        """Go on from a scheduler's cache and what it has learnt; its residents are loaded now."""
        self.recover()  # empty
        self.scheduler = scheduler
        for key, bits in scheduler.cache.items():
            self._note("prefetch", *key, bits, bits, self.shape.nbytes[bits], "set-up")
            self._load(key, bits, urgent=False)
        for here in self.resident.values():
            self.loader.wait(here.ticket)
        self._ahead.clear()

    def new_sequence(self, *, record: bool = True) -> None:
        """A new prompt: fresh log, trace and counters; the resident experts stay."""
        self.log = EventLog(time.perf_counter())
        self.trace: Trace | None = Trace(self.shape) if record else None
        self.usage = Usage(self.shape)
        self.token = 0
        self.prefill = True
        self.setup_ms = 0.0
        self.arena.trim()  # slots of earlier settings are no memory of this run
        self.arena.peak_bytes = self.arena.held_bytes
        for here in self.resident.values():
            here.token = -1  # issued before this run: its bytes are nobody's here
        if self.trace is not None:
            self.trace.resident = list(self.scheduler.cache.items())
        self._record_settings(self.scheduler.strategy.fresh(), fresh=True)
        self.scheduler.new_sequence()
        self._begin_token()
        self._set_up()
        self._begin_token()

    def end_of_sequence(self) -> None:
        """The run is over: what happens from now on is not written into its log and trace."""
        self.log, self.trace = EventLog(time.perf_counter()), None

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
            The budget is below one layer's need; nothing changes.
        Exception
            Whatever a part of the strategy raised; `recover` then goes back to the old settings.
        """
        old = self.settings
        new_strategy = settings.strategy if settings.strategy is not old.strategy else None
        drops = self.scheduler.change(settings.knobs(), new_strategy)
        self.settings = settings
        try:
            for drop in drops:
                self._evict(drop)
            self.arena.set_limit(settings.budget_bytes)
            self.arena.trim()  # of other bits they may never be asked for again
            fresh = not settings.strategy.shares(old.strategy)
            self._record_settings(settings.strategy, fresh=fresh)
            self._set_up()
            withdrawn = self.withdrawn
            self._begin_token()  # evictions between tokens are nobody's stall
            self.withdrawn = withdrawn
        except BaseException:  # a policy of somebody's own: what was in force is what recovers
            self.settings = old
            raise
        if settings.device != old.device:
            self.loader.use(settings.device)
        if not settings.measure_kl:
            self.compute.release()

    @contextlib.contextmanager
    def full_precision(self, bits: Callable[[Key], int] | None = None) -> Iterator[None]:
        """Inside, forward passes need no cache: unmasked, uncounted, outside the budget.

        Parameters
        ----------
        bits
            (layer, expert) -> tier it is computed at, 0 for no contribution; default the best
            tier for all.
        """
        best = max(self.store.tiers)
        self.steering.release()
        self.reference = bits or (lambda _: best)
        try:
            yield
        finally:
            self.reference = None
            self._steer_all()

    @contextlib.contextmanager
    def listening(self, depth: int = 0) -> Iterator[list[LayerInput]]:
        """Inside, layers at full precision are written down, with ``depth`` routers asked ahead.

        Here a look-ahead holds the experts and weights of every token, ``[T][K]``.
        """
        self._heard, self._listen_depth = [], depth
        try:
            yield self._heard
        finally:
            self._heard = None

    def recover(self) -> None:
        """After a failure in the middle of a token: an empty cache, ready for the next run."""
        for here in self.resident.values():
            if not self.loader.cancel(here.ticket):
                with contextlib.suppress(OSError):
                    self.loader.wait(here.ticket)
            self.arena.give(here.slot)
        self.resident.clear()
        self._ahead.clear()
        self.steering.release()
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
        self._steer_all()
        self.stall: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.at = -1  # the layer that decides; -1 between tokens
        self.bytes = 0
        self.withdrawn: list[tuple[int, int]] = []  # (token that issued a load, bytes not read)

    def _set_up(self) -> None:
        """Load what the strategy wants resident before it goes on, and wait: no token's stall."""
        plan, told = self.scheduler.begin(), "in_flight" in self.scheduler.strategy.observes
        awaited = {k: t for k, t in self._ahead.items() if told and not t.done}
        if not plan.fetches and not awaited:
            return
        begun = time.perf_counter()
        self._issue(plan, None)
        for ticket in [*awaited.values(), *(self._ahead[f.key] for f in plan.fetches)]:
            self.loader.wait(ticket)
        self.setup_ms += 1e3 * (time.perf_counter() - begun)

    def _record_settings(self, strategy: Strategy, *, fresh: bool) -> None:
        if self.trace is None:
            return
        changes, at = self.trace.changes, len(self.trace.steps)
        parameters = {name: value for name, (_, _, value) in strategy.parameters.items()}
        change = Change(at, self.settings.knobs(), strategy.name, fresh, parameters, strategy)
        changes.append(change)

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
        self.questions.answer(self.scheduler)
        if self.reference is not None:
            if self._heard is not None:
                self._heard.append(self._overheard(layer, x, routed))
            return self.compute.full_precision(layer, x, routed, scale_input, self.reference)
        given = self._given(layer, x, routed)
        self.at = layer
        plan = self.scheduler.step(given)
        if self.trace is not None:
            self.trace.steps.append(given)
        batch = self.compute.batch(layer, x, routed, scale_input)
        waiting = self._issue(plan, batch)
        self._finish(waiting, batch)
        for drop in plan.after:
            self._evict(drop)
        after = layer + 1
        if after < self.shape.layers:
            self.steering.steer(after, self.scheduler.mask(after), self.scheduler.bias(after))
        return batch.result()

    def _steer_all(self) -> None:
        for layer in range(self.shape.layers):
            self.steering.steer(layer, self.scheduler.mask(layer), self.scheduler.bias(layer))

    def _given(self, layer: int, x: torch.Tensor, routed: Routed) -> LayerInput:
        """What the scheduler is told of a layer: the routing, and what its parts observe."""
        observes = self.scheduler.strategy.observes
        ahead: tuple[LookAhead, ...] = ()
        depth = self.scheduler.depth(layer, prefill=self.prefill)
        if depth:
            for coming, idx, weights in self.adapter.look_ahead(layer, depth):
                guess = Routed(idx[-1:], weights[-1:], self.shape.experts[coming])
                ahead += (LookAhead(coming, guess.experts[0], guess.weights[0]),)
        wanted = None
        if "wanted" in observes and self.steering.steers(layer):
            choice = self.adapter.wanted(layer)
            wanted = Routed(*choice, self.shape.experts[layer]) if choice else None
        return LayerInput(
            layer,
            routed.experts,
            routed.weights,
            self.prefill,
            ahead,
            wanted and wanted.experts,
            wanted and wanted.weights,
            tuple(x.float().norm(dim=-1).tolist()) if "norms" in observes else None,
            unread=self._withdraw(layer) if "unread" in observes else (),
            in_flight=self._in_flight() if "in_flight" in observes else (),
        )

    def _overheard(self, layer: int, x: torch.Tensor, routed: Routed) -> LayerInput:
        ahead: tuple[LookAhead, ...] = ()
        depth = min(self._listen_depth, self.shape.layers - 1 - layer)
        for coming, idx, weights in self.adapter.look_ahead(layer, depth) if depth else ():
            guess = Routed(idx, weights, self.shape.experts[coming])
            ahead += (LookAhead(coming, guess.experts, guess.weights),)  # pyright: ignore[reportArgumentType]
        norms = tuple(x.float().norm(dim=-1).tolist())
        return LayerInput(layer, routed.experts, routed.weights, True, ahead, norms=norms)

    def _in_flight(self) -> tuple[Key, ...]:
        self._ahead = {k: t for k, t in self._ahead.items() if not t.done}
        return tuple(self._ahead)

    def _withdraw(self, layer: int) -> tuple[Key, ...]:
        """The layer's router has spoken: prefetches for it that were not begun are not read."""
        late = [k for k, t in self._ahead.items() if k[0] == layer and self._cancel(k, t)]
        self._ahead = {k: t for k, t in self._ahead.items() if k[0] != layer}
        return tuple(late)

    def _cancel(self, key: Key, ticket: Ticket) -> bool:
        if not self.loader.cancel(ticket):
            return False
        here = self.resident[key]
        self.withdrawn.append((here.token, here.slot.nbytes))
        return True

    def _issue(self, plan: LayerPlan, batch: Batch | None) -> list[Serve]:
        """Evict, submit the loads, note every event; returns what is to be computed."""
        waiting: list[Serve] = []
        planned: set[Key] = set()
        for drop in plan.withdrawn:
            self._evict(drop)
        for serve in plan.serves:
            key = (plan.layer, serve.served)
            if batch is not None and any(d.key in planned for d in serve.drops):
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
            self.token, layer, layer, serve.served, "stall", asked, bits, 0, begun, seconds, cause
        )

    # -- memory -----------------------------------------------------------------------------

    def _load(self, key: Key, bits: int, *, urgent: bool) -> None:
        """Submit the load whose event was noted last."""
        slot = self.arena.take(bits)
        path, offset, _ = self.store.location(*key, bits)
        ticket = self.loader.submit(path, offset, slot.view, urgent=urgent)
        self.resident[key] = Resident(slot, ticket, self.token)
        if not urgent:
            self._ahead[key] = ticket
        self.log.time_by(ticket)
        self.bytes += slot.nbytes
        self.usage.loaded[key] = self.token

    def _evict(self, drop: Drop) -> None:
        here = self.resident[drop.key]
        cause = drop.cause
        self._ahead.pop(drop.key, None)
        if not here.ticket.done and not self._cancel(drop.key, here.ticket):
            begun = time.perf_counter()
            try:
                self.loader.wait(here.ticket)
            except OSError:
                cause = "failed"  # an unread prefetch leaves: nobody needs its bytes
            seconds = time.perf_counter() - begun
            self.stall["evict"] += seconds
            bits = drop.bits
            self.log.add(
                self.token, self.at, *drop.key, "stall", bits, bits, 0, begun, seconds, "evict"
            )
        del self.resident[drop.key]
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
        self.log.add(self.token, self.at, layer, expert, kind, asked, bits, nbytes, now, 0.0, cause)
