"""A stream of routing, examined: policy or memory, who guesses it, who caches it, what to set.

Everything is counted on the recorded stream by replay, at one size of expert, without model, disk
or clock. What it does not know: other texts than the recorded one, and what a miss costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moelab.replays.bounds import RECENT
from moelab.replays.files import Trace
from moelab.runs.prediction import trace_of
from moelab.runs.sweep import sweep
from moelab.scheduling.budget import size
from moelab.scheduling.steps import Change
from moelab.scheduling.stream import Knobs, Shape
from moelab.settings import parse_budget
from moelab.spelling import spelled
from moelab.store.architecture import Architecture
from moelab.strategies import NAMES
from moelab.views.elsewhere import elsewhere
from moelab.views.policy_or_memory import MOST_OF, PolicyOrMemory, policy_or_memory
from moelab.views.predictors import predictors
from moelab.views.sheet import Picture, Sheet, Shown, Table, lines

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moelab.runs.run import Run

MEMORY = "memory for experts, GB"


@dataclass(frozen=True, repr=False, eq=False)
class Clinic(Shown):
    """What was found of a stream; it is shown as a sheet, and `save` writes that as a page.

    Attributes
    ----------
    trace
        As it was examined: with the memory and the sizes that were asked for.
    judged
        `moelab.policy_or_memory` of it.
    predictors
        `moelab.predictors` of it.
    strategies
        `moelab.sweep` of every strategy at this memory, the best hit ratio first.
    elsewhere
        What to set in other tools, with the hits of that on this stream.
    """

    trace: Trace
    judged: PolicyOrMemory
    predictors: pd.DataFrame
    strategies: pd.DataFrame
    elsewhere: pd.DataFrame

    @property
    def verdict(self) -> str:
        """``"policy"``, ``"memory"`` or ``"neither"``: which of the two has more to give."""
        return self.judged.verdict

    @property
    def best(self) -> str:
        """The strategy that hits most and computes what was recorded; LRU where none does more."""
        exact: Any = self.strategies[~self.strategies["approximate"].astype(bool)]
        return str(exact["strategy"].iloc[0]) if len(exact) else "lru"

    def figure(self) -> go.Figure:
        """Hit ratio over memory."""
        return self.judged.figure()

    def sheet(self) -> Sheet:
        """Verdict, picture, tables."""
        judged, shape = self.judged, self.trace.shape
        guess = self.predictors.drop(index="always right", errors="ignore")
        guess["in_vain"] = (guess["wrong_per_token"] * judged.expert_bytes).map(size)
        guess: Any = guess.reset_index()[["predictor", "recall", "in_vain", "ahead"]]
        guess.columns = ["predictor", "recall", "read in vain a token", "known before"]
        lacks = ", ".join(self.trace.lacks) or "nothing"
        each = f"{size(judged.expert_bytes)} an expert"
        told = f"Counted on {len(judged.working_set)} decoded tokens by replay; no time is in it."
        loose = (
            "Approximate: with it other experts would have been asked for (it leaves some out, "
            "serves them at fewer bits, or steers the router), or its rule needs what is not here."
        )
        return Sheet(
            f"{shape.layers} layers x {max(shape.experts)} experts, top {shape.top_k}, {each}",
            judged.sentence(),
            (
                Picture(judged.sentence(), self._drawn),
                Table("What memory buys", self._memory(), "LRU hits"),
                Table("Who guesses the next layer's experts", guess, "recall"),
                Table(f"Every strategy at {self._room}", self._strategies(), "hit ratio"),
                Table(f"What to set elsewhere for {self._room}", self.elsewhere, "hits"),
                f"{told} {loose} Not in this stream: {lacks}.",
            ),
        )

    @property
    def _room(self) -> str:
        return size(self.judged.experts * self.judged.expert_bytes)

    def _drawn(self) -> Any:
        gb, judged = self.judged.expert_bytes / 1e9, self.judged
        points = judged.points().assign(**{MEMORY: lambda rows: rows["experts"] * gb})
        marks = [(at * gb, words) for at, words in judged.marks()]
        return lines(points, MEMORY, "hit ratio", "eviction", marks=marks)

    def _memory(self) -> pd.DataFrame:
        """Rows of memory, the least first, and what LRU hits there."""
        judged, whole = self.judged, self.trace.shape.n
        rooms = [
            ("LRU's cliff: below it nothing is hit", judged.cliff),
            (f"{MOST_OF:.0%} of the best eviction's hits by LRU", judged.enough),
            (f"working set of {RECENT} tokens (median)", int(np.median(judged.working_set))),
            ("the memory that is meant", judged.experts),
            ("every expert", whole),
        ]
        rows = sorted(((words, n) for words, n in rooms if n), key=lambda row: row[1])
        return pd.DataFrame(
            [(w, n, size(n * judged.expert_bytes), judged.lru[min(n, whole)]) for w, n in rows],
            columns=["room for", "experts", "memory", "LRU hits"],
        )

    def _strategies(self) -> pd.DataFrame:
        rows: Any = self.strategies
        notes = []
        for row in rows.to_dict("records"):
            said = ["approximate"] if row["approximate"] else []
            said += [f"without its {row['lacks']}"] if row["lacks"] else []
            notes.append(row["error"] or ", ".join(said))
        return pd.DataFrame(
            {
                "strategy": [spelled(name) for name in rows["strategy"]],
                "hit ratio": rows["hit_ratio"],
                "read a token": rows["bytes_per_token"].map(size, na_action="ignore"),
                "note": notes,
            }
        )


def clinic(
    of: Run | Trace | str | Path,
    *,
    model: Any = None,
    memory: float | str | None = None,
    bits: int | None = None,
    strategies: Sequence[str] = NAMES,
    progress: bool = True,
) -> Clinic:
    """Examine a stream of routing: what to change, what to set, and what that would hit.

    Parameters
    ----------
    of
        A run, a trace, or the path of one (also BigMoeOnEdge's, llama.cpp's and vLLM's).
    model
        What says how large an expert is where the stream does not: a known name or whatever else
        `moelab.fit` takes, a lab, a store, or bytes by bits, ``{16: 9437184, 4: 2654208}``.
    memory
        For experts: bytes, ``"4GB"`` or ``"25%"``; default: as recorded.
    bits
        Of the experts; default: as recorded, or the highest tier.
    strategies
        To decide the stream anew by; what they found is kept in the cache folder.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        Fewer than four tokens were decoded, ``memory`` holds no expert or is neither given nor
        recorded, or the model is another one.

    Examples
    --------
    >>> trace = moelab.routing("olmoe-1b-7b", tokens=8)
    >>> moelab.clinic(trace, memory="25%", strategies=["lru"], progress=False).best
    'lru'
    """
    trace = _asked(
        Trace.load(of) if isinstance(of, str | Path) else trace_of(of), model, memory, bits
    )
    judged = policy_or_memory(trace)
    knobs = trace.changes[0].knobs
    grid = {"strategy": list(strategies), "budget": [knobs.budget_bytes], "bits": [knobs.bits]}
    decided = sweep(trace, grid, progress=progress)
    for name in ("hit_ratio", "bytes_per_token", "approximate", "lacks"):
        if name not in decided:  # every one was refused
            decided[name] = np.nan
    decided = decided.fillna({"approximate": True, "lacks": ""})
    decided = decided.sort_values("hit_ratio", ascending=False, kind="stable", ignore_index=True)
    hits = dict(zip(decided["strategy"], decided["hit_ratio"], strict=True))
    advice = elsewhere(trace, knobs.budget_bytes, judged.expert_bytes, hits)
    return Clinic(trace, judged, predictors(trace), decided, advice)


def _asked(trace: Trace, model: Any, memory: float | str | None, bits: int | None) -> Trace:
    """The stream under one setting: the recorded, or what is asked for, from an empty cache."""
    shape = trace.shape if model is None else _sized(trace.shape, model)
    if model is None and memory is None and bits is None and len(trace.changes) == 1:
        return trace
    if memory is None and len(trace.changes) != 1:
        raise ValueError(
            f"this trace records {len(trace.changes)} settings; say how much memory is meant, "
            'as in memory="4GB"'
        )
    was = trace.changes[0].knobs if trace.changes else None
    bits = bits or (was.bits if was and was.bits in shape.nbytes else max(shape.nbytes))
    if bits not in shape.nbytes:
        raise ValueError(f"bits={bits!r}: sizes are known at {', '.join(map(str, shape.nbytes))}")
    budget = was.budget_bytes if memory is None and was else parse_budget(memory or "", shape)
    if budget < shape.nbytes[bits]:
        raise ValueError(
            f"memory={memory!r} holds no expert of {size(shape.nbytes[bits])}: give more"
        )
    name = trace.changes[0].name if len(trace.changes) == 1 else "lru"
    name = name if name in NAMES else "lru"
    changes = [Change(0, Knobs(budget, bits), name)]
    return dataclasses.replace(trace, shape=shape, changes=changes, resident=[])


def _sized(shape: Shape, model: Any) -> Shape:
    """The shape with the sizes of a model, which must be of the same form."""
    if isinstance(model, Mapping):
        return dataclasses.replace(shape, nbytes=dict(model), own={})
    model = Architecture(model) if isinstance(model, str | Path) else model
    of = getattr(model, "_shape", None) or getattr(model, "shape", None)
    if not isinstance(of, Shape):
        raise TypeError(
            f"model is a {type(model).__name__}: a name, a lab, a store, or bytes by bits"
        )
    if of.experts != shape.experts:
        raise ValueError(
            f"the model has {of.layers} layers x {max(of.experts)} experts, the stream "
            f"{shape.layers} x {max(shape.experts)}: it is another model's"
        )
    return dataclasses.replace(shape, nbytes=of.nbytes, own=of.own)
