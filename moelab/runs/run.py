"""A run: one generation, its text, events, per-token figures and summary.

It is the record; who makes the tokens is `moelab.runs.session`.
"""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.engine.generation import Sampling
from moelab.engine.log import EventLog
from moelab.engine.process import Process
from moelab.replays.files import Trace
from moelab.runs.account import Account, Limits
from moelab.runs.tokens import Noted, TokenReport, Tokens, summary, table
from moelab.scheduling.strategy import part_title
from moelab.store.devices import DEVICES

if TYPE_CHECKING:
    import pandas as pd

    from moelab.engine.speculation import Length, Lengths, Pass
    from moelab.runs.recording import Recording
    from moelab.runs.speculation import Speculation
    from moelab.scheduling.strategy import Shape
    from moelab.settings import Settings


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run was asked for: the arguments of ``lab.start`` that made it.

    ``messages`` is the conversation where the chat template was used, else empty; the prompt is
    then what was said last. ``draft_bits`` None: no draft; ``draft_length`` is its first one, or
    those from some tokens on.
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    messages: tuple[dict[str, str], ...] = ()
    draft_bits: int | None = None
    draft_length: Lengths = 0


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The five likeliest next tokens (id, probability) before sampling, and the one drawn if other.

    ``served`` is what the cache made of it, ``full`` the model at full precision where measured.
    """

    served: tuple[tuple[int, float], ...]
    full: tuple[tuple[int, float], ...] | None = None


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
    changes
        (token, {setting: new value}) for each change of settings that acted during the run.
    history
        (token, `Settings`): in force from that token on; the first are those it began with.
    draft_lengths
        (token, length): how many tokens the draft wrote ahead from there on; empty without one.
    likeliest
        One `Likeliest` for each token so far.
    peak_bytes
        Most memory that experts held at once.
    setup_ms
        Time that went into loading what the strategy wants resident before the first token and at
        changes.
    direct
        Whether loads bypassed the page cache.
    outpaced
        Emulated devices that were faster than this machine's disk: their times are the disk's.
    ended
        Why it ended: ``"end of text"``, ``"length"`` (all tokens asked for), ``"stopped"`` or
        ``"failed"``; empty while it goes on.
    repeats
        Times of this run and of those that repeated it, where it was made again (`Rounds`).
    dense
        Bits that large dense weights are kept at, and bytes of all that is no expert's.
    error
        What made the run fail, or None.
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
        dense: tuple[int, int] = (16, 0),
    ) -> None:
        self.request, self.prompt, self.text = request, request.prompt, ""
        self.model, self.architecture, self.dense = model, architecture, dense
        self.ended, self.repeats = "", []
        self.error: BaseException | None = None
        self.tokens: list[int] = []
        self.changes: list[tuple[int, dict[str, str]]] = []
        self.history: list[tuple[int, Settings]] = []
        self.likeliest: list[Likeliest] = []
        self.outpaced: set[str] = set()
        self.draft_lengths: list[tuple[int, Length]] = []
        self._draft_length: Length = 0
        self._verified: list[Pass] = []
        self._places: list[tuple[int, int]] = []  # of each token: its pass, and the row in it
        self._ids, self._tokenizer, self._eos = ids, tokenizer, eos
        self._stop, self._done = threading.Event(), threading.Event()
        self.peak_bytes, self.direct, self.setup_ms = 0, True, 0.0
        self._process = Process("this run goes on")
        self._begin(EventLog(), Trace(shape))

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
        if self.running:  # else there is nothing to wait for, in whatever process
            self._process.check()
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
    def token_reports(self) -> list[TokenReport]:
        """One `TokenReport` for each token so far, folded from the event log."""
        return self._tokens.reports()

    @property
    def events(self) -> pd.DataFrame:
        """Every event so far; the columns are those of `moelab.scheduling.events.DTYPE`."""
        return self._log.frame()

    def loaded(self) -> np.ndarray:
        """Last token of this run at which each expert was loaded, -1: none ``[n]``, by key."""
        return self._tokens.loaded(self._trace.shape)

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

        names = [f.name for f in dataclasses.fields(TokenReport)]
        rows = [[getattr(r, name) for name in names] for r in self.token_reports]
        frame = pd.DataFrame(rows, columns=names).astype({"kl": float})
        causes = frame["stall_ms"]
        return frame.assign(stall_ms=[sum(c.values()) for c in causes], stall_by_cause=causes)

    def summary(self) -> dict[str, Any]:
        """The run in figures; works while the run goes on.

        Ratios, speeds and bytes are of decoded tokens, without prefill, and None where none was
        decoded. Times are of the tokens since the device last changed, so that measured and
        emulated ones are never averaged; ``tokens_per_s`` is what a watch shows,
        ``engine_tokens_per_s`` without measuring and set-up. ``hit_ratio`` is hits over requests (a
        right guess that came too ``late`` is none), of which ``free_hits`` are experts without
        weights (0 bytes), where a model has such; ``byte_hit_ratio`` the part of the bytes served
        that was not loaded on demand, ``stall_share`` the part of the engine's time spent waiting.
        ``setup_ms`` and ``setup_bytes`` went into loading what the strategy wants resident before
        the first token and at changes.
        """
        reports = self.token_reports
        emulated = bool(reports) and DEVICES[reports[-1].device].emulated
        timing = "emulated" if emulated else "measured" if self.direct else "page cache"
        return summary(reports, setup_ms=self.setup_ms, peak_bytes=self.peak_bytes, timing=timing)

    def account(self, first: int = 1, last: int | None = None) -> Account:
        """Where the time and the bytes of tokens ``first`` to before ``last`` went, on average."""
        reports = self.token_reports[:last]
        return Account.of(table(reports[first:]), self._tokens.records(first, len(reports)))

    @property
    def draft_length(self) -> Length:
        """Tokens that the draft writes ahead; set it and the next draft obeys, 0: none."""
        return self._draft_length

    @draft_length.setter
    def draft_length(self, length: Length) -> None:
        from moelab.runs.speculation import check_length

        if self.request.draft_bits is None:
            raise ValueError(f"draft_length={length!r}: begin the run with draft_bits=")
        self._draft_length = check_length(length)

    @property
    def speculation(self) -> Speculation | None:
        """What drafting was worth by now; None without ``draft_bits``."""
        from moelab.runs.speculation import speculation

        bits = self.request.draft_bits
        return None if bits is None else speculation(self, self._verified, bits)

    def passes(self, tokens: int) -> int:
        """Forward passes that made the first ``tokens``: as many, but where drafts were verified.

        The trace has one step a layer and pass.
        """
        return self._places[tokens - 1][0] + 1 if tokens else 0

    def limits(self) -> Limits:
        """What the strategy in force had to do with, for `Account.sentence`."""
        settings, shape = self.history[-1][1], self._trace.shape
        cycle = shape.token_cycle_bytes(settings.bits)
        return Limits(settings.budget_bytes, cycle, part_title(settings.strategy.evict))

    def sentence(self) -> str:
        """Why the speed is what it is, of the tokens since settings last changed."""
        return self.account(max(1, self.history[-1][0])).sentence(self.limits())

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

    # -- for the session that makes it --------------------------------------------------------

    def _begin(self, log: EventLog, trace: Trace) -> None:
        self._log, self._trace, self._tokens = log, trace, Tokens(log)

    def _add(self, token: int, noted: Noted, row: int = 0) -> None:
        """One more token; its text is noted here, where the text so far is known.

        ``row``: of its pass, which is a new one where that is 0.
        """
        last = self._places[-1][0] if self._places else -1
        self._places.append((last + (row == 0), row))
        self.tokens.append(token)
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        piece = ""
        if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
            piece, self.text = text[len(self.text) :], text
        self._tokens.add(noted._replace(text=piece))

    def _end(self) -> None:
        """No byte comes any more: what was kept back as half a character is the end of the text."""
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        if self.tokens:
            self._tokens.extend(text[len(self.text) :])
        self.text = text
        self._done.set()
