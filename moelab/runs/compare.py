"""Runs beside each other: every figure, where the texts part, who is beaten by whom; saved runs.

Built on recordings, so it needs neither model nor kernel. Figures of time are compared only where
they come from the same device: a measured and an emulated speed have no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.runs.recording import Recording
from moelab.runs.rounds import TIMED
from moelab.runs.schema import SAMPLED
from moelab.settings import as_written
from moelab.spelling import in_turn, number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from moelab.runs.run import Run

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
        """Every figure of ``Run.summary``, a column a run, and its settings.

        With two runs, ``difference`` is the second minus the first. It is left out for times that
        come from different devices, or of which `verdict` cannot tell two apart; ``timing`` says
        which are measured and which emulated. ``runs`` is how often each was made; of several times
        the medians are shown, and as ``slowest`` and ``fastest`` its tokens a second.
        """
        import pandas as pd

        columns = {
            n: {"settings": settings_of(doc)} | self.figures(n) | self._spread(n)
            for n, doc in self._documents.items()
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

    def figures(self, name: str) -> dict[str, Any]:
        """A run's summary; of a run that was made several times, times are the medians."""
        found = dict(self._documents[name]["summary"])
        each = self._documents[name].get("repeats") or ()
        for key in TIMED:
            known = [one[key] for one in each if one.get(key) is not None]
            found |= {key: statistics.median(known)} if known else {}
        return found

    def ranges(self, name: str) -> tuple[float, float] | None:
        """Tokens a second of a run's slowest and fastest time; None where it has no speed."""
        doc = self._documents[name]
        each = [one["tokens_per_s"] for one in (doc.get("repeats") or [doc["summary"]])]
        return None if None in each else (min(each), max(each))

    def verdict(self) -> str:
        """Which run is the fastest, and from which of the others it is not told apart.

        Two runs are told apart where the ranges of their repeats lie apart by more than either is
        wide: of three times each, that ranges do not meet is chance in one case of ten.
        """
        speeds = {name: self.ranges(name) for name in self.names}
        if len(speeds) < 2:
            return "one run: there is nothing to compare it with"
        if short := [name for name, speed in speeds.items() if speed is None]:
            return f"{short[0]!r} wrote fewer than two tokens: it has no speed"
        if not self.same_device:
            return "times come from different devices or ways of timing: speeds are not compared"
        first, *others = sorted(self.names, key=self._speed, reverse=True)
        told = {name: f"{name!r} {self._told(name)}" for name in self.names}
        if once := [name for name in self.names if self._times(name) < 2]:
            return (
                f"{told[first]}, {', '.join(told[n] for n in others)} tokens/s; {once[0]!r} was "
                "made once, so the difference may be noise: lab.repeat() or lab.what_if() tells"
            )
        same = [name for name in others if not self._apart(first, name)]
        made = f"{min(map(self._times, self.names))} runs each"
        if same:
            alike = ", ".join(told[name] for name in (first, *same))
            return f"not told apart: {alike} tokens/s, {made}"
        rest = ", ".join(told[name] for name in others)
        return f"{first!r} is the fastest: {self._told(first)} against {rest} tokens/s, {made}"

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
        one of the two did not measure does not count, and speeds that are not told apart are
        equal. A run without a speed, of fewer than two tokens, neither beats nor stands.
        """
        points = self.points().dropna(subset=[SPEED])
        worse = points[[MEMORY, SPEED, "KL"]].to_numpy() * (1, -1, 1)  # NaN: not known
        apart = worse[:, None] - worse[None]  # [run, other, figure]
        timing = points["timing"].to_numpy()
        names = points["run"].tolist()
        apart[..., 1] *= [[self._apart(a, b) for b in names] for a in names]
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
            s, timing = self.figures(name), " on ".join(_origin(doc))
            points.append(
                (name, s["peak_resident_bytes"] / 1e6, s["tokens_per_s"], s["kl_mean"], timing)
            )
        frame = pd.DataFrame(points, columns=["run", MEMORY, SPEED, "KL", "timing"])
        return frame.astype({MEMORY: float, SPEED: float, "KL": float})

    def __repr__(self) -> str:
        at = self.diverges_at
        parting = "the same tokens" if at is None else f"first different token: {at}"
        table = self.table().map(_cell).to_string()
        head = f"<Comparison of {', '.join(self.names)}; {parting}; {self.verdict()}>"
        return f"{head}\n{table}"

    def _repr_html_(self) -> str:
        at = self.diverges_at
        words = "All tokens are the same." if at is None else f"First different token: {at}."
        words = escape(f"{words} Speed: {self.verdict()}.")
        table = self.table()
        table.loc["text"] = {name: _marked(doc, at) for name, doc in self._documents.items()}
        text, rest = (["text"], slice(None)), (table.index[:-1], slice(None))
        style = table.loc[["text", *table.index[:-1]]].style.format(_cell, rest, escape="html")
        style = style.format(None, text, na_rep="").set_properties(text, **_TEXT)
        style = style.format_index(escape="html", axis=1).set_table_styles(_LOOKS)
        return f"<p role='status'>{words}</p>{style.to_html()}"

    def _difference(self, key: str, a: Any, b: Any) -> float | None:
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
        told = key not in TIMED or (self.same_device and self._apart(*self.names))
        return b - a if numbers and told else None

    def _times(self, name: str) -> int:
        """How often a run was made."""
        return len(self._documents[name].get("repeats") or [None])

    def _apart(self, one: str, other: str) -> bool:
        """Whether two speeds differ by more than noise; where one was made once, nobody knows."""
        a, b = self.ranges(one), self.ranges(other)
        if a is None or b is None or min(self._times(one), self._times(other)) < 2:
            return True
        return max(a[0] - b[1], b[0] - a[1]) > max(a[1] - a[0], b[1] - b[0])

    def _speed(self, name: str) -> float:
        return self.figures(name)["tokens_per_s"] or 0.0

    def _told(self, name: str) -> str:
        speed, ends = number(self._speed(name)), self.ranges(name)
        return speed if self._times(name) < 2 or not ends else f"{speed} ({_span(ends)})"

    def _spread(self, name: str) -> dict[str, Any]:
        slow, fast = self.ranges(name) or (None, None)
        return {"runs": self._times(name), "slowest": slow, "fastest": fast}


def compare(*runs: Run | Recording, **named: Run | Recording) -> Comparison:
    """Put runs or recordings beside each other.

    Parameters
    ----------
    runs
        Named by their settings in short; one that changed is written ``25 % → 50 %``.
    named
        Named as given: ``compare(lru=a, hobbit=b)``.

    Raises
    ------
    ValueError
        Nothing is given.
    TypeError
        Something else than runs and recordings is given.

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
        recordings[unused(settings_of(one.document), recordings)] = one
    return Comparison(recordings | {name: recorded(run) for name, run in named.items()})


def recorded(run: Run | Recording) -> Recording:
    """A run as it stands now; a recording is returned as it is.

    Raises
    ------
    TypeError
        It is something else.
    """
    record = getattr(run, "recording", None)
    found = record() if callable(record) else run
    if not isinstance(found, Recording):
        raise TypeError(
            f"this is a {type(run).__name__}; give what lab.generate returned, or a recording: "
            "moelab.Recording.load(file)"
        )
    return found


def unused(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number after it where it is taken."""
    if name not in taken:
        return name
    return next(f"{name} ({i})" for i in range(2, len(taken) + 3) if f"{name} ({i})" not in taken)


def settings_of(document: Mapping[str, Any]) -> str:
    """A recorded run's settings in short, and what they became on the way."""
    return in_turn([entry["short"] for entry in document["settings"]])


def code_of(document: Mapping[str, Any]) -> str:
    """The code that makes a recorded run again."""
    doc, (first, *later) = document, document["settings"]
    sampling = doc["sampling"]
    asked = {"max_new_tokens": doc["max_new_tokens"]}
    asked |= {n: sampling[n] for n in SAMPLED}
    if doc["ignore_eos"]:
        asked["ignore_eos"] = True
    if draft := doc.get("draft"):
        lengths = dict(draft["lengths"])
        asked["draft_bits"] = as_written(draft["bits"])
        asked["draft_length"] = lengths if len(lengths) > 1 else lengths.get(0, 0)
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


def given(document: Mapping[str, Any]) -> str:
    """The prompt as it stands before a text: on a line of its own before an answer or a summary."""
    own = document["messages"] or document["model"].get("encoder_layers")
    return document["prompt"] + "\n" * bool(own)


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
    return f"<span class='given'>{escape(given(doc))}</span>{body}"


def _span(ends: tuple[float, float]) -> str:
    low, high = map(number, ends)
    return low if low == high else f"{low}\N{EN DASH}{high}"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, (int, float)) and abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
