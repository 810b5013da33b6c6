"""Which experts does the next layer want? Every way of guessing it, judged on a recorded stream.

Each predictor names as many experts of a layer as its router will choose, before it has spoken.
What learns does so on the prompt and the first half of the tokens, and all are judged on the
second: nobody pays for a read to find out which one would have been worth it. By itself this knows
no time: a guess that is right may still come too late. With a lab or a machine the virtual clock's
models say how much of a wait the lead of each would hide.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from moelab.runs.prediction import fitted, trace_of
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.trace import Trace
from moelab.store.devices import device as find_device
from moelab.store.machine import Machine

if TYPE_CHECKING:
    from moelab.lab import Lab
    from moelab.runs.run import Run

Experts = tuple[int, ...]
SIMILAR = 8
"""Tokens that are asked what comes next."""


class Seen(NamedTuple):
    """What may be known when a layer is guessed: its place, and the experts that were asked for."""

    layer: int
    path: Experts  # of the layer before
    token: Experts  # of this layer by the token before
    so_far: tuple[Experts, ...]  # of every layer before, in this token


def predictors(
    of: Run | Trace, on: Lab | Machine | None = None, *, device: str | None = None
) -> pd.DataFrame:
    """Judge the predictors on the decoded tokens of a run or a trace, from the second layer on.

    Parameters
    ----------
    of
        A run, or a trace.
    on
        The lab that it was recorded in, or a `Machine`: then guesses have times.
    device
        That they are read from; default: that of the lab, or the machine's disk.

    Returns
    -------
    DataFrame
        By predictor: ``recall``, the share of the experts asked for that were guessed (as many are
        guessed as asked for: it is the precision too); ``wrong_per_token`` and ``wrong_bytes``,
        guesses that were for nothing and what reading them at the highest tier would cost a token
        if none were resident; ``ahead``, when the guess can be made; ``known``, how often a
        predictor had seen its case before (else it falls back to frequency). ``gate`` is there as
        far as the run looked ahead, and ``always right`` is the control. With ``on``, modelled, in
        ms: ``lead_ms`` between the guess and the need, ``load_ms`` of one expert, ``hidden_ms`` a
        token that right guesses would hide if none were resident and loads did not queue.

    Raises
    ------
    ValueError
        Fewer than four tokens were decoded, or the model has one layer.

    Examples
    --------
    >>> moelab.predictors(run)  # doctest: +SKIP
    """
    trace = trace_of(of)
    tokens = _tokens(trace)
    layers = len(trace.shape.path())
    if len(tokens) < 4 or layers < 2:
        raise ValueError(
            f"{len(tokens)} decoded tokens of {layers} layers: record at least four "
            "tokens of a model with two layers or more"
        )
    half = len(tokens) // 2
    learnt = _Learnt([*_prompt(trace), *(_rows(token) for token in tokens[:half])])
    judged = tokens[half - 1 :]  # the first is there as the token before
    nbytes = max(trace.shape.nbytes.values())
    found = [
        _row(name, ahead, judged, guess, nbytes)
        for name, ahead, guess in (
            ("frequency", "any time", lambda seen, k: (learnt.frequent(seen.layer, k), None)),
            ("previous token", "a token", lambda seen, k: (seen.token[:k], None)),
            ("path (set of experts)", "a layer", learnt.by_set),
            ("path (pairs)", "a layer", learnt.by_pairs),
            ("similar tokens (activation matrix)", "a layer", learnt.by_similar),
        )
    ]
    found += _gate(judged, nbytes)
    asked = sum(len(row) for token in judged[1:] for row in _rows(token)[1:])
    found.append({"predictor": "always right", "recall": 1.0 if asked else 0.0, "ahead": "never"})
    table = pd.DataFrame(found).set_index("predictor")
    table = table.fillna({"wrong_per_token": 0.0, "wrong_bytes": 0.0})
    return table if on is None else _timed(table, of, on, device)


def _timed(
    table: pd.DataFrame, of: Run | Trace, on: Lab | Machine, device: str | None
) -> pd.DataFrame:
    """What the lead of each guess is worth: times are those of the models of the virtual clock."""
    machine, device = (on, device or "disk") if isinstance(on, Machine) else (
        fitted(of, on._session.machine()), device or on.settings.device
    )  # fmt: skip
    trace = trace_of(of)
    of_layer, k = machine.computing, trace.shape.top_k
    bits = max(trace.shape.nbytes)
    layer = (
        of_layer.layer_ms + of_layer.deciding_ms + of_layer.call_ms + k * of_layer.expert_ms[bits]
    )
    layers = len(trace.shape.path())
    whole = layers * layer + of_layer.token_ms
    leads = {"any time": whole, "a token": whole, "never": 0.0, "a layer": layer}
    lead = table.ahead.map(lambda a: leads[a] if a in leads else layer * int(a.split()[0]))
    load = 1e3 * machine.bus(find_device(device)).due(trace.shape.nbytes[bits], 0.0)
    hidden = np.minimum(lead, load) * table.recall * k * (layers - 1)
    return table.assign(lead_ms=lead, load_ms=load, hidden_ms=hidden)


def _tokens(trace: Trace) -> list[list[LayerInput]]:
    """The decoded tokens, each with its layers' inputs."""
    steps = [step for step in trace.steps if not step.prefill]
    layers = len(trace.shape.path())
    return [steps[at : at + layers] for at in range(0, len(steps) - layers + 1, layers)]


def _prompt(trace: Trace) -> Iterator[list[Experts]]:
    """The prompt's tokens as far as all layers recorded them; what an encoder read is not among."""
    path = trace.shape.path()
    layers, steps = len(path), [step for step in trace.steps if step.prefill and step.layer in path]
    for at in range(0, len(steps) - layers + 1, layers):
        whole = steps[at : at + layers]
        yield from (list(rows) for rows in zip(*(s.experts for s in whole), strict=False))


def _rows(token: list[LayerInput]) -> list[Experts]:
    """The experts of each layer, by falling weight."""
    return [tuple(r.expert for r in step.requests()) for step in token]


def _cases(tokens: list[list[Experts]]) -> Iterator[tuple[Seen, Experts]]:
    """What is known before each layer but the first, and what it then asks for."""
    for before, rows in zip([tokens[0], *tokens], tokens, strict=False):
        for layer in range(1, len(rows)):
            yield _seen(layer, rows, before), rows[layer]


def _seen(layer: int, rows: list[Experts], before: list[Experts]) -> Seen:
    return Seen(layer, rows[layer - 1], before[layer], tuple(rows[:layer]))


class _Learnt:
    """What a stream has taught: how often experts come, and what comes after what."""

    def __init__(self, tokens: list[list[Experts]]) -> None:
        self._uses: dict[int, Counter[int]] = defaultdict(Counter)
        self._after_set: dict[tuple[int, Experts], Counter[int]] = defaultdict(Counter)
        self._after_one: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        most = 1 + max(e for rows in tokens for row in rows for e in row)
        self._used = np.zeros((len(tokens), len(tokens[0]), most), bool)  # [N, L, E]
        for at, rows in enumerate(tokens):
            for layer, row in enumerate(rows):
                self._used[at, layer, list(row)] = True
        for seen, asked in _cases(tokens):
            self._uses[seen.layer].update(asked)
            self._after_set[seen.layer, tuple(sorted(seen.path))].update(asked)
            for one in seen.path:
                self._after_one[seen.layer, one].update(asked)

    def frequent(self, layer: int, k: int) -> Experts:
        return tuple(expert for expert, _ in self._uses[layer].most_common(k))

    def by_set(self, seen: Seen, k: int) -> tuple[Experts, bool]:
        """EdgeMoE's key: the very set of experts of the layer before."""
        counts = self._after_set.get((seen.layer, tuple(sorted(seen.path))))
        return self._filled(counts, seen.layer, k)

    def by_pairs(self, seen: Seen, k: int) -> tuple[Experts, bool]:
        """P(expert | expert of the layer before), summed over these."""
        sums: Counter[int] = Counter()
        for one in seen.path:
            counts = self._after_one.get((seen.layer, one), Counter())
            for expert, count in counts.items():
                sums[expert] += count / counts.total()  # pyright: ignore[reportArgumentType]
        return self._filled(sums, seen.layer, k)

    def by_similar(self, seen: Seen, k: int) -> tuple[Experts, bool]:
        """What the most similar tokens went on with: their activation matrices down to here.

        After MoE-Infinity, arXiv 2401.14361, which compares those of whole sequences.
        """
        alike = np.zeros(len(self._used), int)
        for layer, row in enumerate(seen.so_far):
            known = [expert for expert in row if expert < self._used.shape[2]]
            alike += self._used[:, layer, known].sum(1)
        nearest = np.argsort(-alike, kind="stable")[:SIMILAR]
        votes = self._used[nearest, seen.layer].sum(0)
        counts = Counter({int(e): int(votes[e]) for e in np.flatnonzero(votes)})
        return self._filled(counts if alike.any() else None, seen.layer, k)

    def _filled(self, counts: Counter[int] | None, layer: int, k: int) -> tuple[Experts, bool]:
        best = tuple(expert for expert, _ in counts.most_common(k)) if counts else ()
        rest = (e for e in self.frequent(layer, 2 * k) if e not in best)
        return (*best, *rest)[:k], bool(counts)


def _row(
    name: str,
    ahead: str,
    tokens: list[list[LayerInput]],
    guess: Callable[[Seen, int], tuple[Experts, bool | None]],
    nbytes: int,
) -> dict[str, object]:
    right = asked = wrong = 0
    known: list[bool] = []
    rows = [_rows(token) for token in tokens]
    for before, token in pairwise(rows):
        for layer in range(1, len(token)):
            seen, wanted = _seen(layer, token, before), token[layer]
            guessed, had_seen = guess(seen, len(wanted))
            hits = len(set(guessed) & set(wanted))
            right, asked, wrong = right + hits, asked + len(wanted), wrong + len(guessed) - hits
            known += [had_seen] if had_seen is not None else []
    found = _figures(name, ahead, right, asked, wrong, len(tokens) - 1, nbytes)
    return {**found, "known": float(np.mean(known)) if known else np.nan}


def _figures(
    name: str, ahead: str, right: int, asked: int, wrong: int, tokens: int, nbytes: int
) -> dict[str, object]:
    return {
        "predictor": name,
        "recall": right / max(1, asked),
        "wrong_per_token": wrong / tokens,
        "wrong_bytes": wrong * nbytes / tokens,
        "ahead": ahead,
    }


def _gate(tokens: list[list[LayerInput]], nbytes: int) -> Iterator[dict[str, object]]:
    """The coming layers' routers, asked with an earlier layer's input, as the run did."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])  # right, asked, wrong by depth
    for token in tokens[1:]:
        rows = _rows(token)
        for step in token:
            for coming in step.look_ahead:
                wanted = rows[coming.layer - token[0].layer]
                guessed = coming.experts[: len(wanted)]
                hits, at = len(set(guessed) & set(wanted)), sums[coming.layer - step.layer]
                for i, count in enumerate((hits, len(wanted), len(guessed) - hits)):
                    at[i] += count
    for depth, (right, asked, wrong) in sorted(sums.items()):
        ahead = "a layer" if depth == 1 else f"{depth} layers"
        yield _figures(f"gate, {depth} ahead", ahead, right, asked, wrong, len(tokens) - 1, nbytes)
