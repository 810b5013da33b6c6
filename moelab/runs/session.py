"""A session: settings in, tokens out.

It owns the engine and the settings in force. Whoever wants the engine claims it: a run, a score, a
calibration; while it is claimed, changes of settings are only noted, and the run obeys them before
its next token.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from moelab.engine.engine import Engine
from moelab.engine.generation import Sampler, Sampling, begun_with, warn_of_other_ways
from moelab.engine.pace import measure
from moelab.engine.process import Process
from moelab.engine.speculation import Lengths, Passes
from moelab.models.chat import Messages, encode, messages
from moelab.models.families import positions
from moelab.runs import speculation
from moelab.runs.auto import Auto
from moelab.runs.quality import Measure
from moelab.runs.run import Asked, Run
from moelab.runs.tokens import Noted
from moelab.scheduling.budget import BudgetError
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.trace import Trace
from moelab.settings import MakeStrategy, Settings, is_whole
from moelab.spelling import differences
from moelab.store.machine import Machine

Changes = Mapping[int, Settings | Mapping[str, Any]]
"""Token -> settings from there on, as a whole or as in ``lab.update``."""

CLOSED = "this lab is closed; open it again"


class Session:
    """One engine, its settings, and who is at work.

    Parameters
    ----------
    engine
        Freshly opened.
    strategies
        Makes strategies by name, with what was measured of the model.
    tokenizer
        The model's own.
    name
        Of the model, for its runs.
    """

    def __init__(self, engine: Engine, strategies: MakeStrategy, tokenizer: Any, name: str) -> None:
        self.engine, self.settings = engine, self._checked_settings(engine.settings, engine)
        warn_of_other_ways(engine.model, name)
        self.tokenizer, self._name = tokenizer, name
        self.run: Run | None = None
        self.heard: Callable[[Trace], None] | None = None
        """Is told what every run was routed to, when it is over; it must not raise."""
        self.closed = False
        self._process = Process("this lab was opened")
        self._strategies = strategies
        self.lock, self._busy = threading.RLock(), threading.Lock()
        self.auto: Auto | None = None
        self._machine: Machine | None = None
        self.roofs: dict[int, dict[str, Any]] = {}  # by bits: `moelab.bench.roofline`'s
        self._cause = ""  # of the newest change of the budget, where a person made none

    def update(self, **changes: Any) -> Settings:
        """See `moelab.Lab.update`."""
        self._process.check()  # first of all: in a fork a lock may be held for ever
        own = not {"budget", "memory", "budget_bytes"}.isdisjoint(changes)
        if follow := changes.get("budget") == "auto":
            del changes["budget"]
        with self.lock:
            new = self._change(changes)
            if own:
                self._cause = ""
                self.auto = Auto(self) if follow else None  # a former one sees it and ends
            return new

    def follow(self, auto: Auto, budget: int, cause: str) -> None:
        """Take a budget from whoever watches the machine, if that is still asked for."""
        with self.lock, contextlib.suppress(BudgetError):  # fewer than a strategy of now needs
            if self.auto is auto and not self.closed:
                self._change({"budget": budget})
                self._cause = cause

    def _change(self, changes: dict[str, Any]) -> Settings:
        if self.closed:
            raise RuntimeError(CLOSED)
        new = self.settings.change(self.engine.shape, make=self._strategies, **changes)
        if self.run and self.run.running and self.run.request.draft_bits is not None:
            speculation.check_strategy(new.strategy)
        return self.put(self._checked_settings(new, self.engine))

    @staticmethod
    def _checked_settings(new: Settings, engine: Engine) -> Settings:
        """Refuse what asks a model without trained weights for what it cannot say."""
        if new.measure_kl:
            engine.store.require_weights(f"measure_kl={new.measure_kl}")
        if new.strategy.steers:
            engine.store.require_weights(f"route={new.strategy.route.title!r}")
        return new

    def put(self, new: Settings) -> Settings:
        """Put settings in force as a whole."""
        if self._busy.acquire(blocking=False):  # no run: obey at once
            try:
                self.engine.apply(new)
            except BaseException:  # a policy of somebody's own failed
                self.engine.recover()
                raise
            finally:
                self._busy.release()
        self.settings = new
        return new

    # -- who is at work -----------------------------------------------------------------------

    def claim(self) -> None:
        """Take the engine, waiting only for a run that was told to stop.

        Raises
        ------
        RuntimeError
            Somebody else has it, the lab is closed, or of another process.
        """
        self._process.check()
        last = self.run
        if last is not None and last.stopped:
            last._done.wait()
        with self.lock:
            if self.closed:
                raise RuntimeError(CLOSED)
            if not self._busy.acquire(blocking=False):
                raise RuntimeError("a run is going on; run.stop() it or run.join() first")

    def release(self) -> None:
        """Give the engine back; it obeys what was changed since."""
        with self.lock:
            try:
                if self.engine.settings is not self.settings:
                    self.engine.apply(self.settings)
            except Exception:  # noqa: BLE001, a policy of somebody's own failed: not in force
                self.engine.recover()
                self.settings = self.engine.settings
            finally:
                self._busy.release()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[Engine]:
        """Inside, the engine is the caller's; after an error it is empty and usable."""
        self.claim()
        try:
            yield self.engine
        except BaseException:
            self.engine.recover()
            raise
        finally:
            self.release()

    def close(self) -> None:
        """Stop the run and let go of everything; waits for whoever is at work."""
        self._process.check()
        with self.lock:
            if self.closed:
                return
            self.closed = True
        if self.run is not None:
            self.run.stop()
        self._busy.acquire()  # for good
        self.engine.close()

    def stand(self, settings: Settings, scheduler: Scheduler) -> None:
        """Stand where a run began: these settings, that cache and what its strategy had learnt."""
        with self.lock:
            self.settings = self.engine.settings = settings
            self.engine.loader.use(settings.device)
            self.engine.begin_with(scheduler)

    def machine(self) -> Machine:
        """What this machine is worth at this model; measured once, about a second."""
        if self._machine is None:
            with self.claimed() as engine:
                self._machine = measure(engine)
        return self._machine

    def take_over(self, other: Session) -> None:
        """What another one on the same store has measured of this machine."""
        self._machine = self._machine or other._machine

    # -- what is in memory --------------------------------------------------------------------

    def cache_map(self) -> dict[str, np.ndarray]:
        """See `moelab.Lab.cache_map`."""
        shape, cache = self.engine.shape, self.engine.scheduler.cache
        flying = np.zeros(shape.n, bool)
        flying[self.engine.in_flight()] = True
        loaded = np.full(shape.n, -1, np.int32) if self.run is None else self.run.loaded()
        found = {  # [n] each, and what stands where a layer has fewer experts than others
            "bits": (cache.bits.astype(np.uint8), 0),
            "in_flight": (flying & (cache.bits > 0), False),
            "loaded": (loaded, -1),
            "used": ((cache.last_token - 1).astype(np.int32), -1),
            "uses": (cache.uses.astype(np.int32), 0),
        }
        out, width = {}, max(shape.experts) + shape.free
        for name, (values, none) in found.items():
            out[name] = np.full((shape.layers, width), none, values.dtype)
            out[name][shape.layer_of, shape.index_of] = values
        return out

    def why(self, layer: int) -> dict[int, dict[str, float]]:
        """The evict decision's terms of each resident expert of a layer; also during a run."""
        self._process.check()
        if self.closed:
            raise RuntimeError(CLOSED)
        with self.engine.lock:
            return self.engine.scheduler.why(layer)

    # -- making tokens ------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""
        return self._checked(list(self.tokenizer(text)["input_ids"]))

    def _checked(self, ids: list[int]) -> list[int]:
        """Token ids that the model can be given.

        Raises
        ------
        ValueError
            There are none, or one that the model has no embedding for.
        """
        if not ids:
            raise ValueError("the prompt is empty; give at least one word")
        words = len(self.engine.model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
        if max(ids) >= words:
            word = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"the tokenizer makes token {max(ids)} ({word!r}) of this prompt, the model knows "
                f"0 to {words - 1}; leave it out, or pack the checkpoint with its own tokenizer"
            )
        return ids

    def eos(self, *, chat: bool) -> set[int]:
        """What ends a text; an answer ends with the tokenizer's own end of a turn as well."""
        eos = self.engine.model.generation_config.eos_token_id
        own = self.tokenizer.eos_token_id
        eos = own if eos is None else eos
        return (set(eos if isinstance(eos, list) else [eos]) | ({own} if chat else set())) - {None}

    def start(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int,
        ignore_eos: bool,
        chat: bool | None,
        measure_kl: int | None,
        changes: Changes | None,
        draft: tuple[int | str | None, Lengths],
        **sampling: Any,
    ) -> Run:
        """See `moelab.Lab.start`; of ``sampling`` None is as the model has it."""
        if not is_whole(max_new_tokens, 1):
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: a whole number, 1 or more")
        for token in changes or {}:
            if not is_whole(token, 0):
                raise ValueError(f"changes={{{token!r}: ...}}: a key is a token's number from 0")
        said = messages(self.tokenizer, prompt, chat)
        text = said[-1]["content"] if said else str(prompt)
        ids = self._checked(encode(self.tokenizer, said)) if said else self.encode(text)
        own = begun_with(model := self.engine.model, ids)
        if (most := positions(model)) and max(len(own.source), len(own) + max_new_tokens) > most:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, {max_new_tokens} are to follow, and this model "
                f"was made for {most} positions; what it writes after them makes no sense",
                stacklevel=5,
            )
        if sampling["seed"] is None:
            sampling["seed"] = self.settings.seed
        how = Sampling.of(self.engine.model, **sampling)
        ahead = speculation.check(self.engine, self.settings, how, *draft)
        run = Run(
            Asked(text, max_new_tokens, how, ignore_eos, said, *ahead),
            ids,
            self.tokenizer,
            set() if ignore_eos else self.eos(chat=bool(said)),
            self.engine.shape,
            model=self._name,
            architecture=self.engine.store.manifest.architecture,
            dense=(self.engine.dense_bits, self.engine.dense_bytes),
        )
        self.claim()
        try:
            if measure_kl is not None and measure_kl != self.settings.measure_kl:
                self.update(measure_kl=measure_kl)
            run.history.append((0, self.settings))
            self.run = run
            if self.closed:
                run.stop()
            work = threading.Thread(target=self._work, args=(run, dict(changes or {})), daemon=True)
            work.name = "moelab-run"
            work.start()
        except BaseException:
            self.release()
            raise
        return run

    def _work(self, run: Run, changes: dict[int, Settings | Mapping[str, Any]]) -> None:
        try:
            self._generate(run, changes)
        except BaseException as error:  # noqa: BLE001, kept for join() and the window
            self.engine.recover()
            run.ended, run.error = "failed", error
        finally:
            self.release()
            if self.heard is not None and run.error is None:
                self.heard(run.trace)
            run._end()

    def _generate(self, run: Run, changes: dict[int, Settings | Mapping[str, Any]]) -> None:
        engine, asked = self.engine, run.request
        context = begun_with(engine.model, run._ids)
        sampler, source = Sampler(engine.model, asked.sampling, context), context.source
        passes = Passes(engine, sampler, asked.draft_bits, 0, run._eos, source)
        begun = time.perf_counter()  # a draft is in memory by now
        run.history[:1] = [(0, engine.settings)]
        engine.new_sequence()
        assert engine.trace is not None
        run._begin(engine.log, engine.trace)
        measure, run._verified = Measure(engine, source), passes.made
        lengths = speculation.lengths(asked.draft_length)
        try:
            while not run.ended:
                self._obey(run, changes)
                first = len(run.tokens)
                passes.length = speculation.paced(run, lengths)
                most = min((asked.max_new_tokens, *changes, *lengths)) - first
                made = passes.next(context, first, most)
                for row, (token, logits) in enumerate(made):
                    run.likeliest.append(measure(context, logits, first + row, token))
                    # The clock runs on from token to token: all that a person waits for is in one.
                    ended = time.perf_counter()
                    self._note(run, token, ended - begun, measure, row)
                    begun = ended
                    context.append(token)
                engine.end_of_token(len(made))
                if context[-1] in run._eos:
                    run.ended = "end of text"
                elif len(run.tokens) == asked.max_new_tokens:
                    run.ended = "length"
                elif run.stopped:
                    run.ended = "stopped"
        finally:
            engine.end_of_sequence()

    def _obey(self, run: Run, changes: dict[int, Settings | Mapping[str, Any]]) -> None:
        """Put the latest settings in force for the next token."""
        token = len(run.tokens)
        for at in sorted(at for at in changes if at <= token):
            change = changes.pop(at)
            if isinstance(change, Settings):
                self.settings = change
            else:
                self.update(**change)
        with self.lock:  # settings and their cause are of one change
            old, new, cause = self.engine.settings, self.settings, self._cause
        if new is old:
            return
        if run.request.draft_bits is not None:
            speculation.check_strategy(new.strategy)
        self.engine.apply(new)
        run.history.append((token, new))
        if changed := differences(old, new):
            if "budget" in changed and cause:
                changed["budget"] += f" ({cause})"
            run.changes.append((token, changed))

    def _note(self, run: Run, token: int, seconds: float, measure: Measure, row: int) -> None:
        engine = self.engine
        run.peak_bytes, run.direct = engine.arena.peak_bytes, engine.loader.direct
        setup, run.setup_ms = engine.setup_ms - run.setup_ms, engine.setup_ms
        if engine.loader.outpaced:
            run.outpaced = run.outpaced | {engine.settings.device}
        deciding = 0.0 if row else engine.deciding  # as all of its pass, the first's
        memory = engine.scheduler.cache.used_bytes, engine.settings.budget_bytes
        rest = engine.settings.device, len(engine.log), measure.seconds, setup / 1e3
        noted = Noted("", seconds, deciding, measure.kl, *memory, *rest)
        run._add(token, noted, row)
