"""Load a missing expert, or compute it where it lies? A cost model of Fiddler and MoNDE.

Both keep experts in a memory that can compute itself, slowly: the CPU's (K. Kamahori et al.,
"Fiddler", arXiv 2402.07033) or one beside the memory chips (T. Kim et al., "MoNDE", arXiv
2405.18832). A missing expert then costs one of two times, of t tokens that chose it:

    load      latency + bytes / bandwidth of the bus
    there     t · (bytes / what is read there a second  +  2 · D · 2 bytes / bandwidth of the bus)

because there every token reads the weights again (Fiddler's code takes a constant a token; its 7 ms
beside 70 ms for a load are to be measured, as it says), and only a token's activations cross the
bus, in and out at 16 bit. **Everything here is modelled**: moelab computes on the CPU alone, runs
nothing of this, and no decision of a strategy is made by it. What computing of resident experts
takes is the same for all and is left out. Fiddler's list of resident experts comes from a profile;
here it is the most used of the trace itself, the best such list.

T tokens, k of E experts each, L layers, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moelab.runs.prediction import trace_of
from moelab.runs.run import Run
from moelab.scheduling.events import LOAD
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Knobs
from moelab.scheduling.trace import Trace
from moelab.spelling import number, size
from moelab.store.devices import Device
from moelab.store.devices import device as find_device
from moelab.strategies import lru
from moelab.views.sheet import Picture, Sheet, Shown, Table, lines

THERE = {
    "cpu": ("the CPU", 50e9),
    "near_memory": ("a processor at the memory", 512e9),
}
"""Titles, and bytes of weights read a second where they lie. The first follows from Fiddler's two
constants for an expert of Mixtral-8x7B, 352 MB in 7 ms; the second is a round number of ours."""
RULES = ("load", "there", "cheaper", "both")
WORDS = {
    "load": "load what is missing (LRU)",
    "there": "compute what is missing where it lies",
    "cheaper": "of each expert the cheaper (Fiddler)",
    "both": "both at once (MoNDE)",
}
PROMPTS = tuple(2**i for i in range(13))
ACTIVATION_BYTES = 2
NOTE = (
    "All of it is modelled: moelab computes on one processor and runs none of this. A load takes "
    "latency and bytes over the bus; computing there reads the weights anew for every token. "
    "Resident are the most used experts of the stream, for loading those that LRU keeps."
)


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one missing expert: to load it, and to compute one token of it there.

    ``load_ms / there_ms`` is the number of tokens from which on loading wins.
    """

    load_ms: float
    there_ms: float

    @classmethod
    def of(cls, nbytes: int, device: Device, there_bytes_s: float, width: int) -> Costs:
        """Of an expert of so many bytes, a bus, who computes there, and D."""
        if device.bandwidth_bytes_s is None:
            raise ValueError(
                "the real disk has no bandwidth to model with: name an emulated device"
            )
        bus = device.bandwidth_bytes_s
        load = device.latency_ms + 1e3 * nbytes / bus
        return cls(load, 1e3 * (nbytes / there_bytes_s + 2 * width * ACTIVATION_BYTES / bus))

    @property
    def even_tokens(self) -> float:
        """Tokens of one expert at which both take the same."""
        return self.load_ms / self.there_ms

    def layer(self, tokens: Sequence[int], rule: str) -> float:
        """Milliseconds of a layer whose missing experts were chosen by so many tokens each."""
        loads, there = self.load_ms * len(tokens), self.there_ms * sum(tokens)
        if rule == "load":
            return loads
        if rule == "there":
            return there
        if rule == "cheaper":
            return sum(min(self.load_ms, self.there_ms * n) for n in tokens)
        # Those with the most tokens are loaded while the others are computed there.
        rest = [there - self.there_ms * s for s in np.cumsum([0, *sorted(tokens, reverse=True)])]
        return min(max(self.load_ms * n, left) for n, left in enumerate(rest))


@dataclass(frozen=True, repr=False, eq=False)
class Where(Shown):
    """What missing experts of a trace would cost by each rule; modelled.

    Attributes
    ----------
    costs
        Of one missing expert.
    device, there
        The bus, and who computes where the experts lie, in words.
    rules
        Of each of `RULES`: ``token_ms`` of a decoded token, ``prompt_ms`` of the trace's prompt,
        ``missing`` experts a decoded token.
    even_prompt
        Tokens of a prompt at which loading and computing there take the same, with even routing
        and nothing resident: `Costs.even_tokens` · E / k.
    """

    costs: Costs
    device: str
    there: str
    rules: pd.DataFrame
    even_prompt: float
    _trace: Trace
    _knobs: Knobs

    def sentence(self) -> str:
        """What pays, in one sentence."""
        of: Any = self.rules.set_index("rule")["token_ms"]
        best = str(of.idxmin())
        return (
            f"Modelled, not run: a token waits {number(float(of['load']))} ms for missing experts "
            f"by {self.device}, {number(float(of['there']))} ms where {self.there} computes them; "
            f"{number(float(of[best]))} ms is the least ({WORDS[best]}). Loading one expert wins "
            f"from {number(self.costs.even_tokens)} of its tokens on, in a prompt from about "
            f"{number(self.even_prompt)}."
        )

    def prompts(self) -> pd.DataFrame:
        """Milliseconds of a prompt of T tokens, even routing, nothing resident: by expectation.

        A layer then has E · (1 - (1 - k/E)^T) experts, and T · k activations.
        """
        shape, costs = self._trace.shape, self.costs
        rows = []
        for tokens in PROMPTS:
            loads = there = 0.0
            for experts in shape.experts:
                loads += costs.load_ms * experts * (1 - (1 - shape.top_k / experts) ** tokens)
                there += costs.there_ms * tokens * shape.top_k
            rows += [(tokens, loads, WORDS["load"]), (tokens, there, WORDS["there"])]
        return pd.DataFrame(rows, columns=["tokens of the prompt", "ms (modelled)", "rule"])

    def sheet(self) -> Sheet:
        """Sentence, picture, table."""
        shown = self.rules.assign(rule=[WORDS[rule] for rule in self.rules["rule"]])
        shown.columns = ["rule", "ms a token", "ms of its prompt", "missing a token"]
        room = size(self._knobs.budget_bytes)
        return Sheet(
            "Load, or compute where it lies?",
            self.sentence(),
            [
                Picture(self.sentence(), self._drawn),
                Table(f"Missing experts of this stream with {room} of memory (modelled)", shown),
                NOTE,
            ],
        )

    def _drawn(self) -> Any:
        marks = [(self.even_prompt, "loading wins")]
        return lines(
            self.prompts(), "tokens of the prompt", "ms (modelled)", "rule",
            marks=marks, log_x=True, log_y=True,
        )  # fmt: skip


def where(
    of: Run | Trace,
    *,
    width: int,
    device: str = "pcie4",
    there: str | float = "cpu",
    knobs: Knobs | None = None,
) -> Where:
    """What a stream's missing experts would cost if they could be computed where they lie.

    Parameters
    ----------
    of
        A run, or a trace.
    width
        D, the model's width: a token's activations cross the bus.
    device
        Of the bus: an emulated one of ``moelab.devices()``.
    there
        Who computes there: one of `THERE`, or bytes of weights read a second.
    knobs
        Budget and bits; default: those the stream was recorded under.

    Raises
    ------
    ValueError
        The device is not known or real, ``there`` is no speed, or the trace records no settings.

    Examples
    --------
    >>> where(run, width=2048, there="near_memory").even_prompt  # doctest: +SKIP
    """
    trace = trace_of(of)
    if knobs is None and not trace.changes:
        raise ValueError("this trace records no settings; give knobs=")
    knobs = knobs or trace.changes[0].knobs
    if width < 0 or knobs.bits not in trace.shape.nbytes:
        tiers = ", ".join(map(str, trace.shape.nbytes))
        raise ValueError(f"width={width}: 0 or more; bits={knobs.bits}: one of {tiers}")
    if isinstance(there, str) and there in THERE:
        title, speed = THERE[str(there)]
    elif isinstance(there, (int, float)) and there > 1:  # no bool either
        title, speed = f"what reads {size(float(there))}/s", float(there)
    else:
        raise ValueError(f"there={there!r}: one of {', '.join(THERE)}, or bytes a second")
    bus, nbytes = find_device(device), trace.shape.nbytes[knobs.bits]
    costs = Costs.of(nbytes, bus, speed, width)
    by_lru, fixed = _missing_by_lru(trace, knobs), _missing_by_list(trace, knobs)
    rows = []
    for rule in RULES:
        missing = by_lru if rule == "load" else fixed
        ms = {True: 0.0, False: 0.0}
        count = 0
        for given, tokens in zip(trace.steps, missing, strict=True):
            ms[given.prefill] += costs.layer(tokens, rule)
            count += 0 if given.prefill else len(tokens)
        decoded = max(1, trace.decoded)
        rows.append((rule, ms[False] / decoded, ms[True], count / decoded))
    rules = pd.DataFrame(rows, columns=["rule", "token_ms", "prompt_ms", "missing"])
    even = costs.even_tokens * float(np.mean(trace.shape.experts)) / trace.shape.top_k
    return Where(costs, bus.title, title, rules, even, trace, knobs)


def _missing_by_lru(trace: Trace, knobs: Knobs) -> list[list[int]]:
    """Tokens of each expert that LRU has to load, step by step."""
    live, found = Scheduler(trace.shape, lru(), knobs), []
    for given in trace.steps:
        if given.prefill and given.layer == 0:
            live.new_sequence()
        tokens = _tokens(given)
        found.append([tokens[row[2]] for row in live.step(given).rows if row[0] == LOAD])
        if given.layer == trace.shape.layers - 1:
            live.end_of_token()
    return found


def _missing_by_list(trace: Trace, knobs: Knobs) -> list[list[int]]:
    """Tokens of each expert that is none of the most used ones that fit."""
    shape, uses = trace.shape, np.zeros(trace.shape.n)
    for given in trace.steps:
        for expert, tokens in _tokens(given).items():
            uses[shape.key(given.layer, expert)] += tokens
    slots = knobs.budget_bytes // shape.nbytes[knobs.bits]
    there = set(np.argsort(-uses, kind="stable")[:slots].tolist())
    return [
        [n for e, n in _tokens(given).items() if shape.key(given.layer, e) not in there]
        for given in trace.steps
    ]


def _tokens(given: LayerInput) -> dict[int, int]:
    return {request.expert: request.tokens for request in given.requests()}
