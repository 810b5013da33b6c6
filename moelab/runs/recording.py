"""A run as a thing by itself: saved, sent, opened and looked at without model, lab or kernel.

A recording holds every event, figure and gate of a run, the settings in force, the likeliest
tokens beside those of full precision, and what the strategy went by at each eviction. What was
resident at a token and layer is what was when the run began and all rows of events up to there.

T tokens, L layers, E experts of a layer, K active experts.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import moelab
from moelab.engine.log import as_frame
from moelab.replays.why import by_row, until
from moelab.runs.account import Account, Limits
from moelab.runs.passes import of_token
from moelab.runs.schema import (
    EVENTS,
    GATES,
    MOST_BYTES,
    decoded,
    embedded,
    encoded,
    pack,
    records,
    unpack,
)
from moelab.runs.snapshot import RunReader
from moelab.runs.tokens import COLUMNS
from moelab.scheduling import events as codes
from moelab.scheduling.writing import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from moelab.runs.run import Run

SUFFIX = ".moelab.json.gz"
Evictions = dict[str, dict[str, Any]]
OUTCOMES = ("skip", "substitute", "downgrade", "load", "late", "prefetched", "hit")
"""Not served · by another expert · at fewer bits than asked · read now · read ahead, and still on
its way · read ahead · was there."""
_BY_GUESS = {codes.PREFETCHED: "prefetched", codes.LATE: "late"}

_NAMES = ("layer", "expert", "weight", "outcome", "served", "bits_asked", "bits", "bytes", "cause")
_NAMES += ("wait_ms",)


class Recording:
    """Everything a view of a run needs. Made by ``run.recording()`` or `load`, not by hand.

    Attributes
    ----------
    document
        All of it as JSON has it; long columns as base64 (`moelab.runs.schema`).
    prompt, text
        What was given and what was generated.

    Examples
    --------
    >>> run = lab.generate("Once upon a time", max_new_tokens=8)
    >>> recording = run.recording()
    >>> recording.cache_map(token=3, layer=0)["bits"].shape
    (6, 16)
    """

    def __init__(
        self, document: dict[str, Any], explain: Callable[[], Evictions] | None = None
    ) -> None:
        self.document, self._explain = document, explain
        self.prompt: str = document["prompt"]
        self.text = "".join(document["pieces"])

    @classmethod
    def of(cls, run: Run) -> Self:
        """What a run has been so far."""
        read = RunReader(run).read()
        events, gates = read["events"], read["gates"]
        columns = {name: encoded(events[name], dtype) for name, dtype in EVENTS.items()}
        known = [name for name in GATES if gates[name] is not None]
        document = read | {
            "values": encoded(read["values"], "<f4"),
            "events": events | columns,
            "gates": gates | {name: encoded(gates[name], GATES[name]) for name in known},
        }
        rows = np.flatnonzero(events["kind"] == codes.EVICT)
        trace = until(run.trace, run.passes(len(read["pieces"])))
        return cls(document, lambda: by_row(trace, rows))

    # -- files ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a ``*.moelab.json.gz`` file (gzip'd JSON); returns its path.

        The first time, the strategy is asked about its evictions, which takes a replay of the run.
        """
        path = Path(path)
        if not path.name.endswith(SUFFIX):
            path = path.with_name(path.name + SUFFIX)
        write_atomically(path, self.packed())
        return path

    def packed(self) -> bytes:
        """The bytes that `save` writes and an exported page holds."""
        return pack(self.document | {"evictions": self.evictions, "sentence": self.sentence()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`, or a page written by `report`.

        Raises
        ------
        ValueError
            It is neither, or damaged; the message names the file and the field.

        Examples
        --------
        >>> moelab.Recording.load("run.html").blame(3)  # doctest: +SKIP
        """
        path = Path(path)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{path.name} has {size} bytes; {MOST_BYTES} at most")
        data = path.read_bytes()
        if data[:1] == b"<":
            data = embedded(data.decode("utf-8", "replace"), path.name)
        return cls(unpack(data, path.name))

    def report(
        self,
        path: str | Path,
        *,
        png: bool | None = None,
        csv: bool = True,
        parquet: bool | None = None,
    ) -> list[Path]:
        """Write the run as one HTML page that needs no network, and pictures and tables beside it.

        Parameters
        ----------
        path
            Of the page; ``run.html`` puts ``run.png``, ``run.events.csv``, ``run.tokens.csv``,
            ``run.events.parquet`` and ``run.tokens.parquet`` beside it.
        png, csv, parquet
            Whether to write these. None: where the library for it is installed.

        Returns
        -------
        list
            The files written, the page first.

        Raises
        ------
        ImportError
            A library that was asked for is missing; the message has the command that installs it.
        """
        return moelab.report(self, path, png=png, csv=csv, parquet=parquet)

    # -- looking ----------------------------------------------------------------------------

    @property
    def evictions(self) -> Evictions:
        """Why each expert was evicted: {row of the event: the strategy's terms}.

        ``policy``, ``terms`` (names), ``texts``, ``victim`` and at most 8 ``survivors`` as
        [layer, expert, bits, value of each term], those who would have gone next first.
        """
        if "evictions" not in self.document:
            self.document["evictions"] = self._explain() if self._explain else {}
            self._explain = None  # it held the run's whole trace
        return self.document["evictions"]

    @functools.cached_property
    def records(self) -> np.ndarray:
        """The events as records of `moelab.scheduling.events.DTYPE`."""
        return records(self.document["events"])

    @property
    def events(self) -> pd.DataFrame:
        """Every event; the columns are those of `moelab.scheduling.events.DTYPE`."""
        return as_frame(self.records)

    @functools.cached_property
    def figures(self) -> np.ndarray:
        """Figures of each token, [C, T] in the order of `moelab.runs.tokens.COLUMNS`."""
        return decoded(self.document["values"], "<f4").reshape(len(COLUMNS), -1)

    @functools.cached_property
    def gates(self) -> dict[str, np.ndarray]:
        """``expert`` (-1: none) and ``weight`` at the last position of each token, [T, L, K].

        ``wanted`` is the router's own choice, where a mask or a bias steered it in this run.
        """
        g, m = self.document["gates"], self.document["model"]
        size = (len(self.document["pieces"]), m["layers"], g["K"])
        known = {name: dtype for name, dtype in GATES.items() if g[name] is not None}
        return {name: decoded(g[name], dtype).reshape(size) for name, dtype in known.items()}

    @property
    def per_token(self) -> pd.DataFrame:
        """One row a token: id, text and the figures of `moelab.runs.tokens.COLUMNS`."""
        import pandas as pd

        d = self.document
        own = {"token": range(len(d["ids"])), "id": d["ids"], "text": d["pieces"]}
        return pd.DataFrame(own | dict(zip(COLUMNS, self.figures, strict=True)))

    def summary(self) -> dict[str, Any]:
        """The run in figures, as ``run.summary()`` gave them."""
        return dict(self.document["summary"])

    def account(self, first: int = 1, last: int | None = None) -> Account:
        """Where the time and the bytes of tokens ``first`` to before ``last`` went, on average."""
        last = len(self.document["pieces"]) if last is None else last
        rows = slice(*np.searchsorted(self.records["token"], (first, last)))
        return Account.of(self.figures.T[first:last], self.records[rows])

    def sentence(self) -> str:
        """Why the speed is what it is, of the tokens since settings last changed."""
        m, now = self.document["model"], self.document["settings"][-1]
        each = m["expert_bytes"][now["shown"]["bits"]]
        budget = self.figures[COLUMNS.index("budget_bytes"), -1:].sum()
        layers = m["layers"] - m.get("encoder_layers", 0)  # those of a decoded token
        limits = Limits(int(budget), m["top_k"] * layers * each, now["shown"].get("evict", ""))
        return self.account(max(1, now["token"])).sentence(limits)

    def blame(self, token: int) -> pd.DataFrame:
        """What one token used and what it cost: a row for each expert, layer by layer.

        Parameters
        ----------
        token
            From 0. Token 0 carries the prompt: experts that only earlier positions of the prompt
            used have no gate weight. Of a drafted chain's pass the first token it kept carries all,
            with the experts of rejected ones; of the others only what became of their own is told.

        Returns
        -------
        DataFrame
            ``layer``, ``expert`` (as the router chose), gate ``weight``, ``outcome`` (the
            worst that happened, in the order of `OUTCOMES`), ``served`` (the expert that computed,
            -1: none), ``bits_asked``, ``bits``, ``bytes`` (read on demand), ``wait_ms``,
            ``cause``. In ``.attrs``: ``kl``, the likeliest tokens ``served`` and at ``full``
            precision as [text, probability], ``text``, ``total_ms``, and ``layer_wait_ms``, all
            waiting of each layer: that for these experts, and ``evict_ms``, in all layers, for
            copies that had to leave while they were still on their way; ``draft``: the verified
            pass that made it, with what rejected tokens cost (`moelab.runs.passes`), or None.

        Raises
        ------
        ValueError
            There is no such token.

        Examples
        --------
        >>> table = lab.generate("Once upon a time", max_new_tokens=8).blame(3)
        >>> len(table.query("layer == 0"))
        2
        """
        import pandas as pd

        document, events, gates = self.document, self.records, self.gates
        count, layers = len(document["pieces"]), document["model"]["layers"]
        if not (isinstance(token, Integral) and 0 <= token < count):
            raise ValueError(f"there is no token {token!r}; there are 0 to {count - 1}")
        draft, out = of_token(document.get("passes", ()), token), []
        begin = draft["token"] if draft else token
        rows = events[slice(*np.searchsorted(events["token"], (begin, begin + 1)))]
        rows = rows if begin == token else rows[rows["kind"] != codes.STALL]
        steered = gates.get("wanted", gates["expert"])[token]
        for layer, experts in enumerate(gates["expert"][token].tolist()):
            here = rows[(rows["layer"] == layer) & (rows["at"] == layer)]
            weights = gates["weight"][token, layer].tolist()
            chosen = {e: w for e, w in zip(experts, weights, strict=True) if e >= 0}
            all_of = _layer(layer, here, chosen, [e for e in steered[layer].tolist() if e >= 0])
            out += [row for row in all_of if begin == token or row[1] in chosen]
        frame = pd.DataFrame(out, columns=list(_NAMES))
        values = self.figures[:, token]
        kl = float(values[COLUMNS.index("kl")])
        waits = rows[(rows["kind"] == codes.STALL) & (rows["at"] >= 0)]
        leaving = waits["cause"] == codes.EVICTED_LATE
        frame.attrs = {
            "token": token,
            "text": document["pieces"][token],
            "kl": None if math.isnan(kl) else kl,
            "served": document["top"]["served"][token],
            "full": document["top"]["full"][token],
            "total_ms": float(values[COLUMNS.index("total_ms")]),
            "layer_wait_ms": np.bincount(waits["at"], waits["dur_ms"], layers).tolist(),
            "evict_ms": float(waits["dur_ms"][leaving].sum()),
            "draft": draft,
        }
        return frame

    def cache_map(self, token: int = -1, layer: int | None = None) -> dict[str, np.ndarray]:
        """What was resident when ``layer`` of ``token`` had been decided, arrays ``[L, E + free]``.

        Parameters
        ----------
        token, layer
            Default: the end; -1 counts from the end. A layer of -1 is before the first one.

        Returns
        -------
        dict
            ``bits``, ``loaded``, ``used`` and ``uses`` as in ``lab.cache_map()``.

        Raises
        ------
        ValueError
            There is no such token or layer.
        """
        m, start, e = self.document["model"], self.document["start"], self.records
        count = len(self.document["pieces"])
        last = int(m["layers"]) - 1
        layer = last if layer is None else layer
        if not (isinstance(token, Integral) and -max(1, count) <= token < count):
            raise ValueError(f"there is no token {token!r}; there are 0 to {count - 1}")
        if not (isinstance(layer, Integral) and -1 <= layer <= last):
            raise ValueError(f"there is no layer {layer!r}; there are 0 to {last}")
        token %= max(1, count)
        order = e["token"].astype(np.int64) * (m["layers"] + 2) + e["at"] + 1
        e = e[: np.searchsorted(order, token * (m["layers"] + 2) + layer + 1, side="right")]
        cell, kind = e["layer"].astype(np.int64) * m["experts"] + e["expert"], e["kind"]
        size = m["layers"] * m["experts"]
        bits, loaded, used = np.zeros(size, np.uint8), *np.full((2, size), -1, np.int32)
        begun = np.array([start["layer"], start["expert"]], np.int64)
        bits[begun[0] * m["experts"] + begun[1]] = start["bits"]
        coming = np.isin(kind, [codes.LOAD, codes.PREFETCH])
        moved = coming | (kind == codes.EVICT)
        bits[cell[moved]] = np.where(coming, e["bits"], 0)[moved]  # of several the last one stays
        loaded[cell[coming]] = e["token"][coming]
        serving = np.isin(kind, [codes.HIT, codes.LOAD, codes.SUBSTITUTE])
        used[cell[serving]] = e["token"][serving]
        uses = np.bincount(cell[serving], minlength=size).astype(np.int32)
        found = {"bits": bits, "loaded": loaded, "used": used, "uses": uses}
        return {name: flat.reshape(m["layers"], m["experts"]) for name, flat in found.items()}

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return moelab.report(self)._repr_mimebundle_(**kwargs)

    def __repr__(self) -> str:
        d = self.document
        return f"<Recording of {d['model']['name']}, {len(d['ids'])} tokens: {self.text[:60]!r}>"


def _layer(
    layer: int, rows: np.ndarray, chosen: dict[int, float], wanted: list[int]
) -> list[tuple]:
    """The experts of one layer: those chosen by falling weight, then others of a prompt."""
    outcomes: dict[int, dict[str, Any]] = {}
    waits: dict[int, float] = defaultdict(float)
    stand_ins, last = [], ""
    for r in rows:
        kind, expert = codes.KINDS[r["kind"]], int(r["expert"])
        if kind in ("hit", "load", "skip"):
            outcome = _BY_GUESS.get(r["cause"], kind)
            outcomes[expert] = _outcome(r, outcome, -1 if kind == "skip" else expert)
        elif kind == "substitute":
            stand_ins.append(r)
        elif kind == "downgrade" and last != "substitute":  # noted right behind what it is about
            outcomes[expert]["outcome"] = "downgrade"
        elif kind == "stall" and r["cause"] != codes.EVICTED_LATE:
            waits[expert] += float(r["dur_ms"])
        last = kind
    missing = sorted(chosen.keys() - outcomes.keys(), key=lambda e: -chosen[e])
    if len(missing) == len(stand_ins):  # asked in this order; of a prompt some are not known
        for expert, r in zip(missing, stand_ins, strict=True):
            outcomes[expert] = _outcome(r, "substitute", int(r["expert"]))
    instead = iter(e for e in wanted if e not in chosen)  # a mask or a bias steered the router
    out = []
    for expert, f in sorted(outcomes.items(), key=lambda item: -chosen.get(item[0], 0.0)):
        asked = expert
        if expert in chosen and expert not in wanted:
            asked = next(instead, expert)
            f["outcome"] = "substitute"
        wait = waits.get(f["served"], 0.0)
        out.append((layer, asked, chosen.get(expert, math.nan), *f.values(), wait))
    return out


def _outcome(r: np.void, outcome: str, served: int) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "served": served,
        "bits_asked": int(r["bits_asked"]),
        "bits": int(r["bits"]),
        "bytes": int(r["bytes"]) if codes.KINDS[r["kind"]] == "load" else 0,
        "cause": codes.CAUSES[r["cause"]],
    }
