"""Would this model fit here, and how fast? From its configuration alone, before any download.

Kernels and disk of this machine are timed at the model's own sizes (`moelab.engine.sizes`); the
bundled demo is run once, for what a layer takes besides its weights. A virtual clock goes along
with replays of routing that is drawn like the model's, or like that of the nearest model whose
routing is known. Every speed is *modelled*. What it does not know: the text, a long context, what
else the machine has to do, and how fast its disk will be then.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab import demo
from moelab.bench import ghosts
from moelab.engine.sizes import DENSE_BITS, of_sizes
from moelab.engine.spare import Machine as Spare
from moelab.replays.bounds import NEVER, reuse_distances
from moelab.replays.routing import PROFILES, nearest, routing
from moelab.runs.prediction import Predictor, fitted
from moelab.scheduling.budget import BudgetError, minimum_budget, size
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.settings import parse_budget
from moelab.spelling import number, spelled
from moelab.store.architecture import KNOWN, Architecture
from moelab.store.devices import device as find_device
from moelab.store.machine import Machine
from moelab.store.paths import cache_dir
from moelab.strategies import lru, make
from moelab.views.sheet import Picture, Sheet, Shown, Table, lines

TIERS = (16, 8, 4)
STRATEGIES = ("lru", "lfu", "layer_lru")
"""Of one precision, which need neither look-ahead nor calibration."""
PROCESS_BYTES = 310e6
"""Beyond experts and dense weights, measured: libraries, key-value cache of a short text."""
TOKENS, PROMPT, DEMO_TOKENS = 32, 16, 16
SHARES = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""Of the cliff: where the grid has its budgets, beside all experts."""
MOST_OF = 0.9
DECIDED, WEIGHTS_BYTES = 9, 1 << 25
"""Tokens that are decided to time it, a prompt's among them."""
OFF = (
    "Against ghosts of four models (granite-3.1-1b, olmoe-1b-7b, qwen3-30b-a3b, gpt-oss-20b), "
    "three times each, such speeds were from 20 % too low to 25 % too high, half of them within "
    "10 %."
)
"""Measured on two cores and a shared disk."""
SIZES = "Disk and memory, by bits (demo kl: what the bundled demo loses, not this model)"


@dataclass(frozen=True, repr=False, eq=False)
class Fit(Shown):
    """What a model asks of this machine, and what it would give; shown as a sheet.

    A run of ``chosen`` says what the model's speed here really is; nothing in here was run.

    Attributes
    ----------
    architecture, machine
        The model; the machine by the bits of the dense weights.
    memory_bytes, device
        All that the process may take; where experts come from.
    basis
        What the speeds are modelled on, in words.
    cliff, enough
        Experts below which LRU reads everything for each token, and from which on it hits nine
        tenths of what it could.
    grid
        By ``budget_bytes`` and ``bits``: ``tokens_per_s``, ``hit_ratio``, ``read_bytes`` a token,
        and ``memory_bytes`` in all; by LRU, modelled.
    chosen
        The fastest settings that fit, as `moelab.open` takes them: ``budget``, ``bits``,
        ``strategy``, ``dense_bits``; empty where none do.
    strategies
        Every one of `STRATEGIES` at that budget and these bits, with the columns of ``grid``.
    """

    architecture: Architecture
    machine: Mapping[int, Machine]
    memory_bytes: float
    device: str
    basis: str
    cliff: int
    enough: int
    grid: pd.DataFrame
    chosen: dict[str, Any]
    strategies: pd.DataFrame

    def sentence(self) -> str:
        """What to expect, in one sentence."""
        shape, device = self.architecture.shape, find_device(self.device).title
        if not self.chosen:
            least = min(self.grid["memory_bytes"].tolist())
            return (
                f"{size(self.memory_bytes)} are too few for {self.architecture.name}: it needs "
                f"{size(least)} at least."
            )
        bits, budget = self.chosen["bits"], self.chosen["budget"]
        speed = max(self.strategies["tokens_per_s"].tolist())
        return (
            f"{size(self.memory_bytes)} and {device}: about {number(speed, '.2g')} tokens/s at "
            f"{bits} bit with a budget of {size(budget)} for experts (modelled); below "
            f"{size(self.cliff * shape.nbytes[bits])} it reads everything for each token."
        )

    def sizes(self) -> pd.DataFrame:
        """By bits: bytes on disk, of dense weights, of an expert; budgets; and the demo's loss.

        Of the budgets the smallest is what a layer needs, at the cliff LRU begins to hit, and at
        the sensible one it hits nine tenths of what it could. ``demo_kl`` is the mean KL that the
        bundled demo loses at these bits, measured, in nats; of this model it is not known.
        """
        shape, lost = self.architecture.shape, demo.losses()
        rows = []
        for bits in TIERS:
            knobs = Knobs(shape.all_bytes(bits), bits)
            rows.append(
                {
                    "bits": bits,
                    "store_bytes": shape.all_bytes(bits),
                    "dense_bytes": self.architecture.dense_bytes(bits),
                    "expert_bytes": shape.nbytes[bits],
                    "smallest_budget": minimum_budget(shape, make("lru"), knobs),
                    "cliff_budget": self.cliff * shape.nbytes[bits],
                    "sensible_budget": self.enough * shape.nbytes[bits],
                    "demo_kl": lost[bits],
                }
            )
        return pd.DataFrame(rows)

    def check(self, *, tokens: int = TOKENS, disk: str = "4GB", progress: bool = True) -> Checked:
        """Make a ghost, open it as ``chosen`` says, and run the routing that was modelled.

        Parameters
        ----------
        tokens
            To decode, after a prompt; the speed modelled is that of the first 32, which the cache
            warms up in.
        disk
            Of random experts to read, as in `moelab.ghost`; they are removed again.
        progress
            Say what is being done.

        Raises
        ------
        ValueError
            Nothing fits, or memory is short.
        StoreError
            The disk is short.
        """
        if not self.chosen:
            raise ValueError(self.sentence())
        how = {"tiers": (self.chosen["bits"],), "device": self.device, "measure_kl": False}
        trace, _ = _stream(self.architecture)
        lab = moelab.ghost(
            self.architecture.name if self.architecture.name in KNOWN else self.architecture.config,
            routing=trace, disk=disk, progress=progress, **how, **self.chosen,
        )  # fmt: skip
        try:
            run = lab.generate("x", max_new_tokens=1 + tokens)
        finally:
            ghosts.remove(lab)
        modelled = max(self.strategies["tokens_per_s"].tolist())
        return Checked(modelled, 1e3 / float(run.per_token["total_ms"].iloc[1:].median()))

    def picture(self) -> Picture:
        """Tokens a second over the budget, a line for each tier."""
        return Picture(self.sentence(), self._drawn)

    def sheet(self) -> Sheet:
        """Sentence, picture, tables."""
        of, shape = self.architecture, self.architecture.shape
        sizes = self.sizes()
        sizes = sizes.assign(**{name: sizes[name].map(size) for name in sizes.columns[1:-1]})
        sizes.columns = [name.replace("_bytes", "").replace("_", " ") for name in sizes.columns]
        best: Any = self.strategies[["strategy", "tokens_per_s", "hit_ratio"]].copy()
        best["strategy"] = best["strategy"].map(spelled)
        best.columns = ["strategy", "tokens/s", "hit ratio"]
        parts: list[Picture | Table | str] = [self.picture()]
        parts.append(Table(SIZES, sizes))
        if self.chosen:
            words = f"Strategies at {size(self.chosen['budget'])}, {self.chosen['bits']} bit"
            parts.append(Table(f"{words} (modelled)", best, "hit ratio"))
            given = ", ".join(f"{name}={value!r}" for name, value in self.chosen.items())
            source = KNOWN[of.name]["hub"] if of.name in KNOWN else of.name
            parts.append(f"To open it so: moelab.open({source!r}, {given})")
        form = f"{shape.layers} layers x {max(shape.experts)} experts, top {shape.top_k}"
        return Sheet(f"{of.name}: {form}", self.sentence(), [*parts, self.basis])

    def _drawn(self) -> Any:
        gb, speed = "budget for experts, GB", "tokens/s (modelled)"
        names = {"budget_bytes": gb, "tokens_per_s": speed, "bits": "tier"}
        points = self.grid.rename(columns=names).assign(**{gb: self.grid["budget_bytes"] / 1e9})
        points["tier"] = [f"{bits} bit" for bits in points["tier"]]
        fits = [self.chosen["budget"] / 1e9] if self.chosen else []
        marks = [(at, f"fits in {size(self.memory_bytes)}") for at in fits]
        return lines(points, gb, speed, "tier", marks=marks, log_x=True, log_y=True)


class Checked(NamedTuple):
    """Tokens a second that were modelled, and those that a ghost then made."""

    modelled: float
    measured: float

    def __str__(self) -> str:
        measured, modelled = number(self.measured), number(self.modelled)
        off = self.modelled / self.measured - 1
        return f"{measured} tokens/s measured on a ghost, {modelled} modelled ({off:+.0%})"


def fit(
    model: Any,
    *,
    memory: float | str | None = None,
    device: str = "disk",
    folder: str | Path | None = None,
    progress: bool = True,
) -> Fit:
    """Say what a model would need and how fast it would be here, without its weights.

    Parameters
    ----------
    model
        What `moelab.store.architecture.Architecture` takes: a known name, a folder with a
        config.json, a GGUF file, a hub id, or the keys of a config.json.
    memory
        All that the process may take, like ``"8GB"``; default: what is free now.
    device
        ``"disk"``, or an emulated one of ``moelab.devices()``.
    folder
        On the disk that the store would lie on; default: the cache folder. 128 MB are written
        there, and removed.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        The model, the memory or the device is not known.

    Examples
    --------
    >>> moelab.fit("qwen3-30b-a3b", memory="8GB").chosen["bits"]  # doctest: +SKIP
    4
    """
    find_device(device)
    of = Architecture(model, tiers=TIERS)
    whole = Spare().spare_bytes() if memory is None else parse_budget(memory, of.shape)
    trace, basis = _stream(of)
    place = Path(folder) if folder else cache_dir()
    place.mkdir(parents=True, exist_ok=True)
    known, small_ms, off = _demo()
    computing = dataclasses.replace(known.computing, deciding_ms=_deciding_ms(trace))
    known = dataclasses.replace(known, computing=computing)
    machine = of_sizes(of, known, TIERS, place, small_ms=small_ms)
    disk = machine[16].disk
    basis += (
        f" Measured here: loads of {size(of.shape.nbytes[16])} at {size(disk.bandwidth_bytes_s)}/s "
        f"from this disk, experts' and dense kernels at this model's sizes, and {small_ms:.2g} ms "
        "that a layer of the demo takes besides its weights. All speeds are modelled; that of the "
        f"demo at a quarter of its experts by the same clock was {off:+.0%} off here. {OFF}"
    )
    distances = np.sort(reuse_distances(trace))
    distances = distances[(distances > 0) & (distances < NEVER)]
    cliff, enough = int(distances[0]), int(distances[math.ceil(MOST_OF * len(distances)) - 1])
    dense_bits = next((b for b in DENSE_BITS if 2 * of.dense_bytes(b) <= whole), DENSE_BITS[-1])
    rest = of.dense_bytes(dense_bits) + PROCESS_BYTES
    predict = Predictor(trace, machine[dense_bits])

    def predicted(strategy: str, budget: int, bits: int) -> dict[str, Any] | None:
        try:
            found = predict(strategy=strategy, budget=budget, bits=bits, device=device)
        except BudgetError:  # less than a layer needs
            return None
        row = {"strategy": strategy, "budget_bytes": budget, "bits": bits}
        row |= {"tokens_per_s": 1e3 / found.token_ms, "hit_ratio": found.replay.hit_ratio}
        return row | {"read_bytes": found.replay.bytes / TOKENS, "memory_bytes": rest + budget}

    places = tqdm(_places(of.shape, cliff), unit="setting", disable=not progress)
    rows = [predicted("lru", room * of.shape.nbytes[bits], bits) for bits, room in places]
    grid = pd.DataFrame(filter(None, rows))
    chosen, best = _chosen(of, predicted, whole - rest)
    chosen = chosen and chosen | {"dense_bits": dense_bits}
    return Fit(of, machine, whole, device, basis, cliff, enough, grid, chosen, best)


def _chosen(
    of: Architecture, predicted: Callable[..., dict[str, Any] | None], room: float
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The fastest tier by LRU with all the room there is, and the strategies at it."""
    budgets = {bits: min(int(room), of.shape.all_bytes(bits)) for bits in TIERS}
    found = [predicted("lru", budgets[bits], bits) for bits in TIERS if budgets[bits] > 0]
    by_lru = max(filter(None, found), key=lambda row: row["tokens_per_s"], default=None)
    if by_lru is None:
        return {}, pd.DataFrame(columns=["strategy", "tokens_per_s", "hit_ratio"])
    point = {name: by_lru[name] for name in ("budget_bytes", "bits")}
    others = [predicted(name, *point.values()) for name in STRATEGIES[1:]]
    rows = pd.DataFrame([by_lru, *filter(None, others)])
    rows = rows.sort_values("tokens_per_s", ascending=False, kind="stable", ignore_index=True)
    chosen = {"budget": point["budget_bytes"], "bits": point["bits"]}
    return chosen | {"strategy": rows["strategy"][0]}, rows


def _places(shape: Shape, cliff: int) -> list[tuple[int, int]]:
    """Bits and room in experts of the grid's points."""
    rooms = {*(round(share * cliff) for share in SHARES), shape.n}
    return [(bits, room) for bits in TIERS for room in sorted(rooms) if room <= shape.n]


def _stream(of: Architecture) -> tuple[Trace, str]:
    """Routing of the model, or of the nearest whose routing is known, and which that is."""
    shape = of.shape
    name, like = nearest(of.name, shape)
    trace, profile = routing(like, tokens=TOKENS, prompt=PROMPT), PROFILES[name]
    own = f"{profile.layers} layers x {profile.experts} experts, top {profile.top_k}"
    said = f"Routing is modelled after {name} ({own})"
    closest = "" if name in of.name.lower() else ", the nearest whose routing is known"
    lacking = f"; {of.lacking}" if of.lacking else ""
    return dataclasses.replace(trace, shape=shape), f"{said}{closest}{lacking}."


@functools.cache
def _demo() -> tuple[Machine, float, float]:
    """The machine at the demo, a layer's ms besides weights, how far the clock is off there.

    Its dense weights are so small that what they take is not told apart.
    """
    with moelab.open("demo", budget="100%", measure_kl=False, progress=False) as lab:
        prompt = "Once upon a time"
        lab.generate(prompt, max_new_tokens=4, ignore_eos=True)  # pages, and clocks of the cores
        run = lab.generate(prompt, max_new_tokens=DEMO_TOKENS, ignore_eos=True)
        machine = fitted(run, lab._session.machine())
        off = moelab.predict(run, lab, budget="25%").check(1)["error"]
        return machine, machine.computing.layer_ms, off


def _deciding_ms(trace: Trace) -> float:
    """What the scheduler takes for a layer of a trace, LRU in a quarter of the memory.

    Between two layers the weights go through the core's caches, here other memory: straight on it
    would take a third.
    """
    knobs = Knobs(trace.shape.all_bytes(max(trace.shape.nbytes)) // 4)
    scheduler, found = Scheduler(trace.shape, lru(), knobs), []
    weights = np.zeros(WEIGHTS_BYTES, np.uint8)
    for step in trace.steps[: DECIDED * trace.shape.layers]:
        weights.max()
        begun = time.perf_counter()
        scheduler.step(step)
        found.append(time.perf_counter() - begun)
    return 1e3 * float(np.mean(found[trace.shape.layers :]))
