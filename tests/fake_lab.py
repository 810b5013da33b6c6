"""A lab with no model: the unit-test double of `moelab.Lab`.

Settings, scheduler, log and runs are the real ones. What is made up is the routing (skewed, local,
random), the text, the KL and the times: a load costs what the named device would take.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np

import moelab
from moelab.engine.generation import Sampling
from moelab.engine.log import EventLog
from moelab.runs.run import Asked, Likeliest, Run
from moelab.runs.session import Session
from moelab.runs.tokens import Noted
from moelab.scheduling import events as e
from moelab.scheduling.budget import minimum_budget
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.stream import Shape
from moelab.scheduling.trace import Trace
from moelab.settings import Settings
from moelab.spelling import differences
from moelab.strategies import make

EXPERT_BYTES = {16: 221_184, 8: 118_784, 4: 65_536, 3: 49_152, 2: 36_864}
WORDS = "the experts of a layer wait on disk until a router asks , and then one of them is read .\n"
KL = {16: 1e-4, 8: 2e-3, 4: 0.03, 3: 0.12, 2: 0.6}


class FakeTokenizer:
    """Token n is the n-th of a few words, again and again."""

    words = WORDS.split(" ")

    def decode(self, ids, **_):
        return " ".join(self.words[i % len(self.words)] for i in ids)

    def __call__(self, text, **_):
        return {"input_ids": [0]}


class FakeRun(Run):
    """A run whose tokens a thread makes up until it is stopped."""

    def __init__(self, lab, prompt, max_new_tokens):
        asked = Asked(prompt, max_new_tokens, Sampling())
        made_by = {"model": "demo", "architecture": "Qwen3MoeForCausalLM"}
        super().__init__(asked, [], FakeTokenizer(), set(), lab._shape, **made_by)
        self._begin(EventLog(), Trace(lab._shape, resident=lab.scheduler.cache.items()))
        self.history = [(0, lab.settings)]
        self.fail_at, self.hold_at, self.go_on = lab.fail_at, lab.hold_at, threading.Event()

    def loop(self, lab):
        for token in range(self.request.max_new_tokens):
            if token == self.hold_at:
                self.go_on.wait(60)
            if token == self.fail_at:
                self.error = RuntimeError("store is truncated: experts-4.bin, layer 2, expert 7")
            if self.stopped or self.error:
                break
            with lab._lock:
                seconds = lab.step(token)
            self._stop.wait(seconds * lab.token_ms)
        self.ended = "failed" if self.error else "stopped" if self.stopped else "length"
        self._done.set()


class FakeLab:
    """The part of `Lab` that the dashboard may use."""

    closed = follows = False
    name = "synthetic"
    _strategies = staticmethod(lambda name, _using, _role: make(name))

    def __init__(self, *, layers=8, experts=32, top_k=4, token_ms=1.0, budget=0.25, seed=0):
        self.token_ms, self._lock = token_ms, threading.RLock()
        self._shape = Shape((experts,) * layers, top_k, EXPERT_BYTES)
        budget_bytes = int(budget * self._shape.all_bytes(16))
        self.settings = Settings(budget_bytes, 16, make("lru"), seed=seed)
        self.scheduler = Scheduler(self._shape, self.settings.strategy, self.settings.knobs())
        self.engine = SimpleNamespace(
            shape=self._shape, scheduler=self.scheduler, in_flight=self._in_flight
        )
        self.run = self.fail_at = self.hold_at = None  # at which token its next run fails, or waits
        self.updates, self.asked_info = [], 0
        self._rng = np.random.default_rng(seed)
        ranks = np.tile(np.arange(1, experts + 1), (layers, 1))
        self._popular = -0.7 * np.log(self._rng.permuted(ranks, axis=1))  # [L, E], log odds

    def update(self, **changes):
        with self._lock:
            old, new = self.settings, self.settings.change(self._shape, **changes)
            self.updates.append(changes)
            other = new.strategy if new.strategy is not old.strategy else None
            plan, self.settings = self.scheduler.change(new.knobs(), other), new
            if self.run is not None and self.run.running:
                token = len(self.run.tokens)
                self.run.changes.append((token, differences(old, new)))
                self.run.history.append((token, new))
                self._obey(plan, token)
                self._begin(token, fresh=not new.strategy.shares(old.strategy))
            return new

    def why(self, layer):
        with self._lock:
            return self.scheduler.why(layer)

    def info(self):
        self.asked_info += 1
        s, shape = self.settings, self._shape
        return {
            "name": self.name,
            "layers": shape.layers,
            "encoder_layers": 0,
            "experts_per_layer": max(shape.experts),
            "top_k": shape.top_k,
            "tiers": tuple(EXPERT_BYTES),
            "expert_bytes": dict(EXPERT_BYTES),
            "all_experts_bytes": shape.all_bytes(16),
            "dense_bits": 16,
            "dense_bytes": 1_000_000,
            "token_cycle_bytes": shape.token_cycle_bytes(s.bits),
            "minimum_budget_bytes": minimum_budget(shape, s.strategy, s.knobs()),
            "budget_bytes": s.budget_bytes,
            "budget_experts": s.budget_bytes // EXPERT_BYTES[s.bits],
            "architecture": "Qwen3Moe",
        }

    def prompts(self):
        return {
            "novel": ["It was a bright cold day in April, and the clocks"],
            "code": ["def main(argv: list[str]) -> int:\n    ", "import os\nimport sys\n\nclass "],
        }

    def cache_map(self):
        with self._lock:
            return Session.cache_map(self)  # pyright: ignore[reportArgumentType]

    def start(self, prompt, *, max_new_tokens=200, measure_kl=None):
        if not prompt:
            raise ValueError("the prompt is empty; type some text to continue")
        if self.run is not None and self.run.running:
            raise RuntimeError("a run is going on; stop it first")
        if measure_kl is not None:
            self.update(measure_kl=measure_kl)
        with self._lock:
            self.run = run = FakeRun(self, prompt, max_new_tokens)
            self.scheduler.new_sequence()
            self._begin(0)
        threading.Thread(target=run.loop, args=(self,), name="fake-run", daemon=True).start()
        return run

    def step(self, token):
        """One token more: route, decide; the seconds that would have cost."""
        run, s = self.run, self.settings
        begun = len(run.log)
        scores = self._popular + self._rng.gumbel(size=self._popular.shape)  # [L, E]
        even = (1 / self._shape.top_k,) * self._shape.top_k
        for layer, row in enumerate(np.argsort(-scores)[:, : self._shape.top_k].tolist()):
            given = LayerInput(layer, (tuple(row),), (even,), not token)
            run.trace.steps.append(given)
            self._obey(self.scheduler.step(given), token)
        self.scheduler.end_of_token()
        held = self.scheduler.cache.used_bytes
        run.peak_bytes = max(run.peak_bytes, held)
        rough = KL[s.bits] + KL[s.low_bits or s.bits]
        kl = 0.5 * rough * self._rng.lognormal(0, 1) if s.measure_kl else None
        waits = run.log.records(begun)["dur_ms"].sum() / 1e3
        seconds = float(self._rng.gamma(40, 2.5e-4) + waits)
        rows = len(run.log)
        run.likeliest.append(Likeliest(served=()))
        run._add(token, Noted("", seconds, 0.0, kl, held, s.budget_bytes, s.device, rows))
        return seconds

    def _in_flight(self):
        if not (self.settings.prefetch and self.run is not None and self.run.running):
            return []
        expert = int(self._rng.integers(max(self._shape.experts)))
        return [self._shape.key(layer, expert) for layer in range(self._shape.layers)]

    def _begin(self, token, *, fresh=True):
        """What a trace says of settings, and what the strategy wants resident under them."""
        strategy, knobs, trace = self.settings.strategy, self.settings.knobs(), self.run.trace
        values = strategy.values
        change = Change(len(trace.steps), knobs, strategy.name, fresh, values, strategy.fresh())
        trace.changes.append(change)
        self._obey(self.scheduler.begin(), token)

    def _obey(self, plan, token):
        device, log = moelab.devices()[self.settings.device], self.run.log
        guessed = bool(self.settings.prefetch)
        for row in plan.rows:
            kind, layer, expert, *bits, _, _ = row
            nbytes = EXPERT_BYTES[bits[1]]
            log.add(token, plan.layer, row, nbytes, 0.0)
            if kind == e.LOAD:
                wait = nbytes / (device.bandwidth_bytes_s or 1.2e9) + device.latency_ms * 1e-4
                causes = {e.ON_DEMAND: wait, e.EVICTED_LATE: 1e-4}
                if guessed:
                    causes |= {e.ON_DEMAND: 0.5 * wait, e.LATE: 0.3 * wait}
                for cause, seconds in causes.items():
                    stall = (e.STALL, layer, expert, *bits, cause, expert)
                    log.add(token, plan.layer, stall, 0, 0.0, seconds)
