"""Runs beside each other: every figure, where the texts part, who is beaten by whom; saved runs.

Built on recordings, so it needs neither model nor kernel. Figures of time are compared only where
they come from the same device: a measured and an emulated speed have no difference.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.runs.recording import SUFFIX, Recording
from moelab.runs.schema import SAMPLED

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from moelab.runs.run import Run

TIMED = ("tokens_per_s", "setup_ms", "ttft_ms", "tpot_ms_median", "tpot_ms_p99", "stall_share")
"""Figures that hang on the device."""

MEMORY, SPEED = "peak memory of experts, MB", "tokens/s"
_TEXT = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}
_LOOKS: list[Any] = [
    {"selector": ".given", "props": "opacity: 0.65"},
    {"selector": "mark", "props": "color: #000; background: #f0b429; border-bottom: solid #a35200"},
    {"selector": ".since", "props": "text-decoration: underline dotted #a35200"},
]


class Comparison:
    """Runs beside each other, by name; made by `compare` and by ``lab.what_if``.

    Parameters
    ----------
    recordings
        Name -> recording, at least one.
    """

    def __init__(self, recordings: Mapping[str, Recording]) -> None:
        if not recordings:
            raise ValueError("nothing to compare; give runs or recordings")
        self.recordings = dict(recordings)
        self._documents = {name: r.document for name, r in recordings.items()}

    @property
    def names(self) -> list[str]:
        """The runs' names, in the order given."""
        return list(self._documents)

    def table(self) -> pd.DataFrame:
        """Every figure of ``Run.summary``, a column a run, and the settings it began with.

        With two runs, ``difference`` is the second minus the first. It is left out for times that
        come from different devices; ``timing`` says which are measured and which emulated.
        """
        import pandas as pd

        columns = {
            name: {"settings": doc["settings"][0]["short"]} | doc["summary"]
            for name, doc in self._documents.items()
        }
        frame = pd.DataFrame(columns, dtype=object)
        if len(columns) == 2:
            a, b = columns.values()
            # Runs of two versions may not have the same figures.
            frame["difference"] = [self._difference(k, a.get(k), b.get(k)) for k in frame.index]
        frame.columns.name = "figure"
        return frame

    @property
    def same_device(self) -> bool:
        """Whether all times come from one device and way of timing, so that they compare."""
        return len({_origin(doc) for doc in self._documents.values()}) == 1

    @property
    def diverges_at(self) -> int | None:
        """The first token at which a text differs from the first one's; None where none does."""
        first, *others = self._documents.values()
        parts = [_parting(first["ids"], other["ids"]) for other in others]
        return min((p for p in parts if p is not None), default=None)

    def texts(self) -> dict[str, str]:
        """What each run wrote, without the prompt."""
        return {name: "".join(doc["pieces"]) for name, doc in self._documents.items()}

    def front(self) -> list[str]:
        """Runs that no other beats: at most its memory and KL and at least its speed.

        Only runs on the same device, timed the same way, are held against each other; a KL that
        one of the two did not measure does not count.
        """
        points = self.points()
        worse = points[[MEMORY, SPEED, "KL"]].to_numpy() * (1, -1, 1)  # NaN: not known
        apart = worse[:, None] - worse[None]  # [run, other, figure]
        timing = points["timing"].to_numpy()
        beats = (timing[:, None] == timing) & (apart < 0).any(-1) & ~(apart > 0).any(-1)
        return points["run"][~beats.any(0)].tolist()

    def code(self, name: str) -> str:
        """Code that makes this run again: the settings, and what was changed at which token.

        A lab just opened holds no experts; where the run began with some, a comment says so.

        Raises
        ------
        ValueError
            There is no run of that name.
        """
        if name not in self._documents:
            raise ValueError(f"no run {name!r}; there are {', '.join(map(repr, self._documents))}")
        return code_of(self._documents[name])

    def figure(self) -> go.Figure:
        """Memory against speed; colour and size are the KL, shape is how the time was taken.

        A dotted line joins the runs that no other beats (`front`). Hollow: KL was not measured.
        """
        import moelab

        return moelab.charts.memory_and_speed(self)

    def points(self) -> pd.DataFrame:
        """What `figure` draws: run, memory in MB, speed, KL (NaN: not measured) and timing."""
        import pandas as pd

        points = []
        for name, doc in self._documents.items():
            s, timing = doc["summary"], " on ".join(_origin(doc))
            points.append(
                (name, s["peak_resident_bytes"] / 1e6, s["tokens_per_s"], s["kl_mean"], timing)
            )
        frame = pd.DataFrame(points, columns=["run", MEMORY, SPEED, "KL", "timing"])
        return frame.astype({MEMORY: float, SPEED: float, "KL": float})

    def __repr__(self) -> str:
        at = self.diverges_at
        parting = "the same tokens" if at is None else f"first different token: {at}"
        table = self.table().map(_cell).to_string()
        return f"<Comparison of {', '.join(self.names)}; {parting}>\n{table}"

    def _repr_html_(self) -> str:
        at = self.diverges_at
        words = "All tokens are the same." if at is None else f"First different token: {at}."
        if not self.same_device:
            words += " Times come from different devices or ways of timing: see the row timing."
        table = self.table()
        table.loc["text"] = {name: _marked(doc, at) for name, doc in self._documents.items()}
        text, rest = (["text"], slice(None)), (table.index[:-1], slice(None))
        style = table.loc[["text", *table.index[:-1]]].style.format(_cell, rest, escape="html")
        style = style.format(None, text, na_rep="").set_properties(text, **_TEXT)
        style = style.format_index(escape="html", axis=1).set_table_styles(_LOOKS)
        return f"<p role='status'>{words}</p>{style.to_html()}"

    def _difference(self, key: str, a: Any, b: Any) -> float | None:
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
        return b - a if numbers and (self.same_device or key not in TIMED) else None


def compare(*runs: Run | Recording, **named: Run | Recording) -> Comparison:
    """Put runs or recordings beside each other.

    Parameters
    ----------
    runs
        Named by their settings in short.
    named
        Named as given: ``compare(lru=a, hobbit=b)``.

    Raises
    ------
    ValueError
        Nothing is given.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="25%")
    >>> a = lab.generate("The", max_new_tokens=4)
    >>> moelab.compare(a, a).diverges_at is None
    True
    """
    recordings: dict[str, Recording] = {}
    for run in runs:
        one = recorded(run)
        recordings[unused(one.document["settings"][0]["short"], recordings)] = one
    return Comparison(recordings | {name: recorded(run) for name, run in named.items()})


class SavedRuns(Mapping[str, Recording]):
    """Name -> recording, in the order saved; ``lab.saved``.

    Attributes
    ----------
    version
        Grows with every change, for whoever shows them.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="25%")
    >>> run = lab.generate("The", max_new_tokens=4)
    >>> lab.save_run(run, "a quarter")
    'a quarter'
    >>> list(lab.saved)
    ['a quarter']
    """

    def __init__(self) -> None:
        self._saved: dict[str, tuple[Recording, Run | None]] = {}
        self._lock = threading.RLock()  # a view, a what-if and a cell may all save at once
        self.version = 0

    def __getitem__(self, name: str) -> Recording:
        return self._entry(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._saved))

    def __len__(self) -> int:
        return len(self._saved)

    def add(self, run: Run | Recording, name: str = "") -> str:
        """Save a run as it stands now; returns its name, numbered where it was taken.

        A run that is saved already keeps its name where no other is given.
        """
        recording = recorded(run)
        ids, short = recording.document["ids"], recording.document["settings"][0]["short"]
        with self._lock:
            mine = (
                n for n, (r, of) in self._saved.items() if of is run and r.document["ids"] == ids
            )
            if not name and (known := next(mine, None)):
                return known
            name = unused(name or short, self._saved)
            self._saved[name] = recording, None if recording is run else run  # pyright: ignore[reportArgumentType]
            self.version += 1
        return name

    def run(self, name: str) -> Run | None:
        """The run itself where it was made in this session, which ``lab.what_if`` needs."""
        return self._entry(name)[1]

    def remove(self, name: str) -> None:
        """Remove a run."""
        with self._lock:
            self._entry(name)
            del self._saved[name]
            self.version += 1

    def rename(self, name: str, new: str) -> str:
        """Give a saved run another name, in its place; returns it, numbered where it was taken."""
        new = new.strip()
        with self._lock:
            self._entry(name)
            if not new:
                raise ValueError("a saved run needs a name")
            new = unused(new, {n: p for n, p in self._saved.items() if n != name})
            self._saved = {(new if n == name else n): p for n, p in self._saved.items()}
            self.version += 1
        return new

    def compare(self) -> Comparison:
        """All of them beside each other."""
        return Comparison(dict(self))

    def save(self, folder: str | Path) -> list[Path]:
        """Write each to ``folder`` as ``NAME.moelab.json.gz``, replacing files of these names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        taken: dict[str, Path] = {}
        for name, recording in self.items():
            stem = unused(re.sub(r"[^\w.,%+()-]+", " ", name).strip() or "run", taken)
            taken[stem] = recording.save(folder / f"{stem}{SUFFIX}")
        return list(taken.values())

    def load(self, folder: str | Path) -> list[str]:
        """Add every recording of a folder, named by its file; returns the names.

        Raises
        ------
        ValueError
            There is none, or a file is not a recording; then none is added.
        """
        files = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not files:
            raise ValueError(f"no recording (*{SUFFIX}) in {folder}")
        found = [(Recording.load(file), file.name.removesuffix(SUFFIX)) for file in files]
        return [self.add(recording, name) for recording, name in found]

    def _entry(self, name: str) -> tuple[Recording, Run | None]:
        if name not in self._saved:
            there = ", ".join(map(repr, self._saved)) or "none yet"
            raise KeyError(f"no run is saved as {name!r}; there are {there}")
        return self._saved[name]


def recorded(run: Run | Recording) -> Recording:
    """A run as it stands now; a recording is returned as it is."""
    record = getattr(run, "recording", None)
    return record() if callable(record) else run  # pyright: ignore[reportReturnType]


def unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number after it where it is taken."""
    if name not in taken:
        return name
    return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)


def code_of(document: Mapping[str, Any]) -> str:
    """The code that makes a recorded run again."""
    doc, (first, *later) = document, document["settings"]
    sampling = doc["sampling"]
    asked = {"max_new_tokens": doc["max_new_tokens"]}
    asked |= {n: sampling[n] for n in SAMPLED}
    if doc["ignore_eos"]:
        asked["ignore_eos"] = True
    if not doc["messages"]:
        asked["chat"] = False  # of a model that could: the text was to go on
    lines = ["import moelab", "", first["code"]]
    if held := len(doc["start"]["expert"]):
        lines.append(f"# this run began with {held} experts resident; a lab just opened has none")
    words = ", ".join(f"{k}={v!r}" for k, v in asked.items())
    lines += ["run = lab.generate(", f"    {doc['messages'] or doc['prompt']!r},", f"    {words},"]
    updates = [s for s in later if s["update"]]
    if updates:
        lines.append("    changes={")
        lines += [f"        {s['token']}: dict({s['update']})," for s in updates]
        lines.append("    },")
    return "\n".join([*lines, ")"])


# -- inside ---------------------------------------------------------------------------------------


def _origin(doc: Mapping[str, Any]) -> tuple[str, str]:
    return str(doc["summary"]["timing"]), str(doc["summary"]["device"])


def _parting(a: Sequence[int], b: Sequence[int]) -> int | None:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(len(a), len(b)) if same is None and len(a) != len(b) else same


def _marked(doc: Mapping[str, Any], at: int | None) -> str:
    """Prompt and text as HTML: the first different token is marked, what follows is underlined."""
    pieces = list(map(escape, doc["pieces"]))
    body = "".join(pieces)
    if at is not None:
        before, here, after = "".join(pieces[:at]), "".join(pieces[at : at + 1]), pieces[at + 1 :]
        mark = f"<mark title='token {at}: the first that differs'>{here or '∎'}</mark>"
        body = f"{before}{mark}<span class='since'>{''.join(after)}</span>"
    return f"<span class='given'>{escape(doc['prompt'])}</span>{body}"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (int, float)) and abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
