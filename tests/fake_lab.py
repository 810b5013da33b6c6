"""A lab with no model: the unit-test double of `moelab.Lab`.

Experts are drawn from a skewed, local random routing, the cache is a plain least-recently-used
list whatever the strategy says, and a load costs what the named device would take. Figures it shows
mean nothing; settings are the real ones, so they change and are refused as in a lab.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np

import moelab
from moelab.engine.generation import Sampling
from moelab.engine.log import EventLog
from moelab.runs.run import Asked, Likeliest, Run
from moelab.scheduling.events import CAUSE, CODES
from moelab.scheduling.stream import Shape
from moelab.scheduling.trace import LayerInput, Trace
from moelab.settings import Settings
from moelab.spelling import differences
from moelab.strategies import make

EXPERT_BYTES = {16: 221_184, 8: 118_784, 4: 65_536, 3: 49_152, 2: 36_864}
WORDS = "the experts of a layer wait on disk until a router asks , and then one of them is read .\n"
DEVICES = moelab.devices()


@dataclass
class FakeReport:
    token: int
    text: str
    compute_ms: float = 0.0
    deciding_ms: float = 0.0
    stall_ms: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    hits: int = 0
    loads: int = 0
    prefetches: int = 0
    downgrades: int = 0
    skips: int = 0
    substitutes: int = 0
    kl: float | None = None
    resident_bytes: int = 0
    budget_bytes: int = 0
    device: str = "disk"

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.deciding_ms + sum(self.stall_ms.values())


class FakeRun:
    """A thread that makes up tokens until it is stopped; it can be recorded like a real one."""

    model, architecture, recording = "demo", "Qwen3MoeForCausalLM", Run.recording

    def __init__(self, lab, prompt, max_new_tokens, token_ms):
        self.request = Asked(prompt, max_new_tokens, Sampling())
        self.log, self.trace = EventLog(), Trace(lab._shape, resident=lab._resident())
        self.history, self.tokens, self.likeliest = [(0, lab.settings)], [], []
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.token_reports, self.changes, self.outpaced = [], [], set()
        self.error = None
        self.fail_at, self.hold_at, self.go_on = lab.fail_at, lab.hold_at, threading.Event()
        self._lab, self._token_ms = lab, token_ms
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fake-run", daemon=True)

    @property
    def text(self):
        return "".join(r.text for r in self.token_reports)

    @property
    def running(self):
        return self._thread.is_alive()

    @property
    def stopped(self):
        return self._stop.is_set()

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        self._stop.set()

    def join(self, timeout=None):
        self._thread.join(timeout)
        if self.error:
            raise self.error

    def _loop(self):
        words = WORDS.split(" ")
        for token in range(self.max_new_tokens):
            if self._stop.is_set():
                return
            if token == self.hold_at:
                self.go_on.wait(60)
            if token == self.fail_at:
                self.error = RuntimeError("store is truncated: experts-4.bin, layer 2, expert 7")
                return
            with self._lab._lock:
                report = self._lab.step(token, (" " if token else "") + words[token % len(words)])
                report.kl = self._lab.kl() if self._lab.settings.measure_kl else None
                self.tokens.append(token)
                self.likeliest.append(Likeliest(served=()))
                self.token_reports.append(report)
            self._stop.wait(report.total_ms * self._token_ms / 1e3)

    def summary(self):
        every = list(self.token_reports)
        kls = [x.kl for x in every if x.kl is not None]
        r = every[1:]  # token 0 carries the prefill
        total = sum(x.total_ms for x in r)
        hits, loads = sum(x.hits for x in r), sum(x.loads for x in r)
        times = [x.total_ms for x in r] or [float("nan")]
        return {
            "tokens": len(every),
            "tokens_per_s": len(r) / total * 1e3 if total else 0.0,
            "ttft_ms": every[0].total_ms if every else 0.0,
            "tpot_ms_median": float(np.median(times)),
            "tpot_ms_p99": float(np.quantile(times, 0.99)),
            "hit_ratio": hits / (hits + loads) if hits + loads else 0.0,
            "byte_hit_ratio": hits / (hits + loads) if hits + loads else 0.0,
            "bytes_per_token": sum(x.bytes for x in r) / len(r) if r else 0.0,
            "stall_share": sum(sum(x.stall_ms.values()) for x in r) / total if total else 0.0,
            "downgrades": sum(x.downgrades for x in r),
            "skips": 0,
            "peak_resident_bytes": max((x.resident_bytes for x in r), default=0),
            "kl_mean": float(np.mean(kls)) if kls else None,
            "budget_bytes": self._lab.settings.budget_bytes,
            "device": self._lab.settings.device,
            "timing": "fake",
        }


class FakeLab:
    """The part of `Lab` that the dashboard may use, over a made-up cache."""

    def __init__(self, *, layers=8, experts=32, top_k=4, token_ms=1.0, budget=0.25, seed=0):
        self.layers, self.experts, self.top_k, self.token_ms = layers, experts, top_k, token_ms
        self._shape = Shape((experts,) * layers, top_k, EXPERT_BYTES)
        self.settings = Settings(int(budget * self._all(16)), 16, make("lru"), seed=seed)
        self.run = self.fail_at = self.hold_at = None  # at which token its next run fails, or waits
        self.updates, self.asked_why, self.asked_info = [], 0, 0
        self._rng = np.random.default_rng(seed)
        self._lock = threading.RLock()
        ranks = np.tile(np.arange(1, experts + 1), (layers, 1))
        self._popular = -0.7 * np.log(self._rng.permuted(ranks, axis=1))  # [L, E], log odds
        self._clear()
        self._cache, self._held = OrderedDict(), 0

    def _all(self, bits):
        return self.layers * self.experts * EXPERT_BYTES[bits]

    def _clear(self):
        shape = (self.layers, self.experts)
        self._loaded = np.full(shape, -1, np.int32)
        self._used = np.full(shape, -1, np.int32)
        self._uses = np.zeros(shape, np.int32)

    def update(self, **changes):
        settings = self.settings.change(self._shape, **changes)
        self.updates.append(changes)
        changed = differences(self.settings, settings)
        with self._lock:
            self.settings = settings
            if self.run is not None and self.run.running:
                token = len(self.run.token_reports)
                self.run.changes.append((token, changed))
                self.run.history.append((token, settings))
            self._evict(-1)
        return settings

    def why(self, layer):
        self.asked_why += 1
        with self._lock:
            order = list(self._cache)
        since = {k: float(len(order) - i) for i, k in enumerate(order) if k[0] == layer}
        return {k[1]: {"uses since": n, "bits": 16.0} for k, n in since.items()}

    def _resident(self):
        return [(self._shape.key(*place), bits) for place, bits in self._cache.items()]

    def _least(self, bits):
        return self.top_k * EXPERT_BYTES[bits]

    def info(self):
        self.asked_info += 1
        s = self.settings
        return {
            "name": "demo",
            "layers": self.layers,
            "experts_per_layer": self.experts,
            "top_k": self.top_k,
            "tiers": tuple(EXPERT_BYTES),
            "expert_bytes": dict(EXPERT_BYTES),
            "all_experts_bytes": self._all(16),
            "token_cycle_bytes": self.top_k * self.layers * EXPERT_BYTES[s.bits],
            "minimum_budget_bytes": self._least(s.bits),
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
            bits = np.zeros((self.layers, self.experts), np.uint8)
            for key, b in self._cache.items():
                bits[key] = b
            in_flight = np.zeros_like(bits, bool)
            if self.settings.prefetch and self.run is not None and self.run.running:
                in_flight[:, self._rng.integers(self.experts)] = True
            return {
                "bits": bits,
                "in_flight": in_flight & (bits > 0),
                "loaded": self._loaded.copy(),
                "used": self._used.copy(),
                "uses": self._uses.copy(),
            }

    def start(self, prompt, *, max_new_tokens=200, measure_kl=None):
        if not prompt:
            raise ValueError("the prompt is empty; type some text to continue")
        if self.run is not None and self.run.running:
            raise RuntimeError("a run is going on; stop it first")
        if measure_kl is not None:
            self.settings = replace(self.settings, measure_kl=measure_kl)
        self._clear()
        self.run = FakeRun(self, prompt, max_new_tokens, self.token_ms)
        return self.run.start()

    def _evict(self, at, need=0):
        while self._cache and self._held + need > self.settings.budget_bytes:
            key, bits = self._cache.popitem(last=False)
            self._held -= EXPERT_BYTES[bits]
            self._note("evict", at, key, bits, "room")

    def _note(self, kind, at, key, bits, cause=""):
        if self.run is not None:
            token, asked = len(self.run.token_reports), self.settings.bits
            row = (CODES[kind], *key, asked, bits, CAUSE[cause], key[1])
            self.run.log.add(token, at, row, EXPERT_BYTES[bits], 0.0)

    def step(self, token, text):
        """One token: route, hit or load, and what it would have cost."""
        report, s = FakeReport(token, text), self.settings
        device = DEVICES[s.device]
        with self._lock:
            scores = self._popular + self._rng.gumbel(size=self._popular.shape)  # [L, E]
            for layer, chosen in enumerate(np.argsort(-scores)[:, : self.top_k].tolist()):
                for rank, e in enumerate(chosen):
                    self._ask(report, layer, e, rank, token)
                even = (1 / self.top_k,) * self.top_k
                self.run.trace.steps.append(LayerInput(layer, (tuple(chosen),), (even,), not token))
            report.resident_bytes = self._held
        report.budget_bytes, report.device = s.budget_bytes, s.device
        report.compute_ms = float(self._rng.gamma(40, 0.25))
        bandwidth = device.bandwidth_bytes_s or 1.2e9
        wait = report.bytes / bandwidth * 1e3 + report.loads * device.latency_ms * 0.1
        late = 0.3 * wait if s.prefetch else 0.0
        report.stall_ms = {"on demand": wait * (0.5 if s.prefetch else 1.0)}
        report.stall_ms |= {"prefetch late": late, "evict": 0.1 * report.loads}
        return report

    def _ask(self, report, layer, expert, rank, token):
        s, key = self.settings, (layer, expert)
        bits = s.low_bits if s.low_bits and rank >= 2 else s.bits
        report.downgrades += bits != s.bits
        self._used[key] = token
        self._uses[key] += 1
        if self._cache.get(key, 0) >= bits:
            report.hits += 1
            self._cache.move_to_end(key)
            self._note("hit", layer, key, self._cache[key])
            return
        if key in self._cache:
            self._note("evict", layer, key, self._cache[key], "upgrade")
            self._held -= EXPERT_BYTES[self._cache.pop(key)]
        self._evict(layer, EXPERT_BYTES[bits])
        self._note("load", layer, key, bits, "on demand")
        if s.strategy.name != "on_demand":
            self._cache[key] = bits
            self._held += EXPERT_BYTES[bits]
        else:
            self._note("evict", layer, key, bits, "not kept")
        self._loaded[key] = token
        report.loads += 1
        report.bytes += EXPERT_BYTES[bits]

    def kl(self):
        scale = {16: 1e-4, 8: 2e-3, 4: 0.03, 3: 0.12, 2: 0.6}
        low = self.settings.low_bits or self.settings.bits
        return float(0.5 * (scale[self.settings.bits] + scale[low]) * self._rng.lognormal(0, 1))
