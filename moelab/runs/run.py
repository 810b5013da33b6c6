"""A run: one generation in a worker thread, its text, events, per-token figures and summary."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.engine.generation import Decoder, Reference, Sampler, Sampling, likeliest
from moelab.runs.events import EventLog
from moelab.runs.quality import kl_divergence
from moelab.runs.tokens import COLUMNS, figures, row, since_device
from moelab.scheduling.trace import Trace
from moelab.store.devices import DEVICES

if TYPE_CHECKING:
    import pandas as pd

    from moelab.engine.engine import Engine
    from moelab.runs.recording import Recording
    from moelab.scheduling.strategy import Shape
    from moelab.settings import Settings


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What one token cost. Token 0 is the first generated one and carries the whole prefill.

    ``total_ms`` is compute plus stalls; measuring KL is not part of it. ``stall_ms`` is by cause:
    ``on demand``, ``prefetch late`` (a guess was right but still on its way), ``evict``.
    ``bytes`` were read from the device (prefetches too), ``load_bytes`` of them on demand;
    ``hit_bytes`` were served from memory.
    """

    token: int
    text: str
    total_ms: float
    compute_ms: float
    stall_ms: dict[str, float]
    bytes: int
    hit_bytes: int
    hits: int
    loads: int
    prefetches: int
    downgrades: int
    skips: int
    substitutes: int
    kl: float | None
    resident_bytes: int
    budget_bytes: int
    device: str
    load_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run was asked for: the arguments of ``lab.start`` that made it.

    ``messages`` is the conversation where the chat template was used, else empty; the prompt is
    then what was said last.
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The five likeliest next tokens (id, probability), before sampling; ``full`` where measured.

    ``served`` is what the cache made of it, ``full`` the model at full precision.
    """

    served: tuple[tuple[int, float], ...]
    full: tuple[tuple[int, float], ...] | None = None


_COUNTED = ("downgrades", "skips", "substitutes")


def _differences(old: Settings, new: Settings) -> dict[str, str]:
    """What changed, as words; of a strategy chosen whole only its name, not its parts."""
    before, after = old.shown(), new.shown()
    changed = {k: v for k, v in after.items() if before[k] != v}
    if old.strategy is not new.strategy and ("strategy" not in changed or "*" in after["strategy"]):
        had = old.shown_strategy()
        own = {k: v for k, v in new.shown_strategy().items() if had.get(k) != v}
        changed = {k: v for k, v in changed.items() if k != "strategy" or not own} | own
    return changed


class Run:
    """One generation. Made by ``lab.start`` and ``lab.generate``, not by hand.

    Attributes
    ----------
    request
        What was asked for: prompt, tokens at most, sampling.
    prompt, text
        What was given and what has been generated so far.
    tokens
        Ids generated so far.
    token_reports
        One `TokenReport` for each token so far; grows while the run goes on.
    changes
        (token, {setting: new value}) for each change of settings that acted during the run.
    history
        (token, `Settings`): in force from that token on; the first are those it began with.
    likeliest
        One `Likeliest` for each token so far.
    outpaced
        Emulated devices that were faster than this machine's disk: their times are the disk's.
    error
        What ended the run, or None.
    """

    def __init__(
        self,
        request: Asked,
        ids: list[int],
        tokenizer: Any,
        eos: set[int],
        shape: Shape,
        *,
        model: str = "",
        architecture: str = "",
    ) -> None:
        self.request, self.prompt, self.text = request, request.prompt, ""
        self.model, self.architecture = model, architecture
        self.error: BaseException | None = None
        self.tokens: list[int] = []
        self.token_reports: list[TokenReport] = []
        self.changes: list[tuple[int, dict[str, str]]] = []
        self.history: list[tuple[int, Settings]] = []
        self.likeliest: list[Likeliest] = []
        self.outpaced: set[str] = set()
        self._ids, self._tokenizer, self._eos = ids, tokenizer, eos
        self._stop, self._done = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._log, self._trace = EventLog(), Trace(shape)
        self._peak_bytes, self._direct, self._setup_ms = 0, True, 0.0

    # -- for the person ---------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether tokens are still coming."""
        return not self._done.is_set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end before its last token."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End the run after the token it is at. Returns at once; `join` waits."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> Run:
        """Wait for the end; Ctrl-C stops the run. Raises what the run raised."""
        try:
            self._done.wait(timeout)
        except KeyboardInterrupt:
            self.stop()
            self._done.wait(10)
            raise
        if self.error is not None:
            raise self.error
        return self

    @property
    def events(self) -> pd.DataFrame:
        """Every event so far; the columns are those of `moelab.runs.events.DTYPE`."""
        return self._log.frame()

    @property
    def log(self) -> EventLog:
        """The event log itself: numpy records, Perfetto export."""
        return self._log

    @property
    def trace(self) -> Trace:
        """The recorded activations and settings, for replay."""
        return self._trace

    @property
    def per_token(self) -> pd.DataFrame:
        """One row a token; ``stall_ms`` is the sum, ``stall_by_cause`` the parts."""
        import pandas as pd

        rows = []
        for r in list(self.token_reports):
            row = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)}
            row["stall_by_cause"] = row["stall_ms"]
            row["stall_ms"] = sum(r.stall_ms.values())
            rows.append(row)
        names = [f.name for f in dataclasses.fields(TokenReport)] + ["stall_by_cause"]
        frame = pd.DataFrame(rows, columns=names)
        frame["kl"] = frame["kl"].astype(float)
        return frame

    def summary(self) -> dict[str, Any]:
        """The run in figures; works while the run goes on.

        Ratios, speeds and bytes are of decoded tokens, without prefill. Times are of the tokens
        since the device last changed, so that measured and emulated ones are never averaged;
        ``tokens_per_s`` counts compute and stalls, not the measuring of KL. ``hit_ratio`` is hits
        over requests, ``byte_hit_ratio`` the part of the bytes served that was not loaded on
        demand, ``stall_share`` the part of the time spent waiting. ``setup_ms`` went into loading
        what the strategy wants resident before the first token and at changes.
        """
        reports = list(self.token_reports)
        values = np.array([row(r) for r in reports], np.float64).reshape(-1, len(COLUMNS))
        decoded, since = reports[1:], since_device(reports)
        whole, timed = figures(values), figures(values[since:], first=since)
        times = [r.total_ms for r in reports[max(1, since) :]] or [0.0]
        hit, load = (sum(getattr(r, n) for r in decoded) for n in ("hit_bytes", "load_bytes"))
        device = reports[-1].device if reports else ""
        emulated = bool(reports) and DEVICES[device].emulated
        return {
            "tokens": len(reports),
            "tokens_per_s": timed["tokens_per_s"] or 0.0,
            "setup_ms": self._setup_ms,
            "ttft_ms": reports[0].total_ms if reports else 0.0,
            "tpot_ms_median": float(np.median(times)),
            "tpot_ms_p99": float(np.quantile(times, 0.99)),
            "hit_ratio": whole["hit_ratio"] or 0.0,
            "byte_hit_ratio": hit / (hit + load) if hit + load else 0.0,
            "bytes_per_token": whole["bytes_per_token"] or 0.0,
            "stall_share": timed["stall_share"] or 0.0,
            **{n: sum(getattr(r, n) for r in decoded) for n in _COUNTED},
            "kl_mean": whole["kl_mean"],
            "peak_resident_bytes": self._peak_bytes,
            "budget_bytes": reports[-1].budget_bytes if reports else 0,
            "device": device,
            "timing": "emulated" if emulated else "measured" if self._direct else "page cache",
        }

    # -- what stays -------------------------------------------------------------------------

    def recording(self) -> Recording:
        """The run so far as a thing by itself, see `moelab.Recording`; it does not grow."""
        from moelab.runs.recording import Recording

        return Recording.of(self)

    def save(self, path: str | Path) -> Path:
        """Write ``*.moelab.json.gz`` for ``moelab.Recording.load``; see `Recording.save`."""
        return self.recording().save(path)

    def report(self, path: str | Path, **kinds: Any) -> list[Path]:
        """Write one HTML page without network, tables and a picture; see `Recording.report`."""
        return self.recording().report(path, **kinds)

    def blame(self, token: int) -> pd.DataFrame:
        """What one token used and what it cost; see `Recording.blame`."""
        return self.recording().blame(token)

    def __repr__(self) -> str:
        state = "running" if self.running else "failed" if self.error else "done"
        return f"<Run {state}, {len(self.tokens)} tokens: {self.text[:60]!r}>"

    # -- the worker -------------------------------------------------------------------------

    def _start(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._guard, args=(work,), daemon=True)
        self._thread.name = "moelab-run"
        self._thread.start()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001, kept for join() and the window; a thread has nobody to tell
            self.error = e
        finally:
            self._done.set()

    def _generate(self, engine: Engine, latest: Callable[[], Settings]) -> None:
        self.history[:1] = [(0, engine.settings)]
        engine.new_sequence()
        self._log = engine.log
        if engine.trace is not None:
            self._trace = engine.trace
        try:
            self._decode(engine, latest)
        finally:
            engine.end_of_sequence()

    def _decode(self, engine: Engine, latest: Callable[[], Settings]) -> None:
        decoder, sampler = Decoder(engine), Sampler(self.request.sampling)
        reference: Reference | None = None
        context, new = list(self._ids), list(self._ids)
        for index in range(self.request.max_new_tokens):
            self._obey(engine, latest(), index)
            logits = decoder.step(new)
            kl = best = None
            if engine.settings.measure_kl:
                reference = reference or Reference(engine)
                full = reference.logits(context)[-1]
                kl, best = float(kl_divergence(full, logits)), likeliest(full)
            self.likeliest.append(Likeliest(likeliest(logits), best))
            token = sampler.draw(context, logits)
            self._report(engine, index, token, decoder.seconds, kl)
            engine.end_of_token()
            context.append(token)
            new = [token]
            if self._stop.is_set() or token in self._eos:
                break

    def _obey(self, engine: Engine, settings: Settings, index: int) -> None:
        if settings is engine.settings:
            return
        changed = _differences(engine.settings, settings)
        engine.apply(settings)
        self.history.append((index, settings))
        if changed:
            self.changes.append((index, changed))

    def _report(
        self, engine: Engine, index: int, token: int, seconds: float, kl: float | None
    ) -> None:
        self.tokens.append(token)
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        piece = ""
        if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
            piece, self.text = text[len(self.text) :], text
        stall = {cause: 1e3 * s for cause, s in engine.stall.items()}
        counts, read = engine.counts, engine.bytes
        for issued, nbytes in engine.withdrawn:  # a load that never began was counted when issued
            if issued == index:
                read -= nbytes
            elif 0 <= issued < len(self.token_reports):
                old = self.token_reports[issued]
                self.token_reports[issued] = dataclasses.replace(old, bytes=old.bytes - nbytes)
        self._peak_bytes, self._direct = engine.arena.peak_bytes, engine.loader.direct
        self._setup_ms = engine.setup_ms
        if engine.loader.outpaced:
            self.outpaced = self.outpaced | {engine.settings.device}
        self.token_reports.append(
            TokenReport(
                token=index,
                text=piece,
                total_ms=1e3 * seconds,
                compute_ms=1e3 * seconds - sum(stall.values()),
                stall_ms=stall,
                bytes=read,
                hit_bytes=counts["hit_bytes"],
                hits=counts["hit"],
                loads=counts["load"],
                prefetches=counts["prefetch"],
                downgrades=counts["downgrade"],
                skips=counts["skip"],
                substitutes=counts["substitute"],
                kl=kl,
                resident_bytes=engine.arena.held_bytes,
                budget_bytes=engine.settings.budget_bytes,
                device=engine.settings.device,
                load_bytes=counts["load_bytes"],
            )
        )
