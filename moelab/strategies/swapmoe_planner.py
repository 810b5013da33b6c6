"""SwapMoE's planner: how often to update, and how many experts each layer keeps.

A configuration is {f, n_1 … n_L}: the virtual experts are renewed every f inputs, layer l keeps
n_l of them. The best one under a memory limit is searched by a genetic algorithm over estimates
that were profiled before. Quality has two estimators: the paper's, a small network fitted on random
configurations that were run (`Network`, its appendix A.2), and ours, losses of one short layer at a
time added up (`Estimates`), which cannot know what arises only where several are short together.

N numbers of experts profiled, F update intervals profiled, L layers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.scheduling.strategy import Shape

DEFAULT_F = 16
HIDDEN = 16
"""Units of the network that estimates quality."""
BEND = 0.05
"""Share of a token's time that more frequent updates may cost."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One configuration: update every ``f`` inputs, keep ``experts[l]`` experts of layer l."""

    f: int
    experts: tuple[int, ...]


def usable(slots: int, shape: Shape) -> int:
    """Experts to deal out evenly, of the ``slots`` that fit the memory.

    A swap needs an expert that can be spared while its successor loads. Where the memory does not
    hold one more than top-k of every layer, one slot is kept free for that.
    """
    least = shape.layers * shape.top_k
    return slots - 1 if least < slots < least + shape.layers else slots


def fits(experts: Sequence[int], slots: int, shape: Shape) -> bool:
    """Whether a plan fits: where a layer keeps top-k and no more, with a slot for its swaps."""
    pairs = zip(experts, shape.experts, strict=True)
    swapless = any(n <= shape.top_k and n < count for n, count in pairs)
    return sum(experts) + (swapless and slots > shape.layers * shape.top_k) <= slots


def deal(experts: Sequence[int], more: int, limits: Sequence[int]) -> tuple[int, ...]:
    """``experts`` of each layer and ``more`` dealt out, always to the layer with the fewest."""
    out = list(experts)
    for _ in range(more):
        short = [layer for layer, limit in enumerate(limits) if out[layer] < limit]
        if not short:
            break
        out[min(short, key=out.__getitem__)] += 1
    return tuple(out)


def uniform(slots: int, shape: Shape, f: int = DEFAULT_F) -> Plan:
    """The same number of experts for every layer, as far as that divides."""
    return Plan(f, deal((0,) * shape.layers, usable(slots, shape), shape.experts))


def largest(plans: Mapping[int, Plan], slots: int, shape: Shape) -> Plan:
    """The largest of ``plans`` (by slots) that fits, what it leaves dealt out; else `uniform`."""
    fitting = [size for size in plans if size <= slots]
    if not fitting:
        return uniform(slots, shape)
    plan = plans[max(fitting)]
    for more in range(slots - sum(plan.experts), 0, -1):
        dealt = deal(plan.experts, more, shape.experts)
        if fits(dealt, slots, shape):
            return Plan(plan.f, dealt)
    return plan


@dataclass(frozen=True, slots=True)
class Network:
    """E_accuracy of the paper's appendix A.2: a small ReLU network, configuration to loss.

    Inputs are log2(f) and the part of its experts that each layer keeps; what comes out is the
    logarithm of the loss, by default KL in nats a token. `moelab.calibration.swapmoe` fits it.

    Parameters
    ----------
    hidden, hidden_bias, out, out_bias
        Weights ``[H][1 + L]``, ``[H]``, ``[H]`` and one number.
    experts
        Number of experts of each layer.
    """

    hidden: Sequence[Sequence[float]]
    hidden_bias: Sequence[float]
    out: Sequence[float]
    out_bias: float
    experts: Sequence[int]

    def inputs(self, plan: Plan) -> np.ndarray:
        """What the network sees of a configuration ``[1 + L]``."""
        return inputs(plan, self.experts)

    def kl(self, plan: Plan) -> float:
        """Estimated loss; none where every layer is whole."""
        if tuple(plan.experts) == tuple(self.experts):
            return 0.0
        seen = np.asarray(self.hidden) @ self.inputs(plan) + np.asarray(self.hidden_bias)
        return math.exp(float(np.maximum(seen, 0) @ np.asarray(self.out)) + self.out_bias)


def inputs(plan: Plan, experts: Sequence[int]) -> np.ndarray:
    """log2(f) in eighths, and the part of its experts that each layer keeps ``[1 + L]``."""
    parts = (n / count for n, count in zip(plan.experts, experts, strict=True))
    return np.array([math.log2(plan.f) / 8, *parts])


@dataclass(frozen=True, slots=True)
class Estimates:
    """What was profiled: quality and swaps of one short layer at a time, and what a swap costs.

    Parameters
    ----------
    every, kept
        Update intervals f in inputs, and experts kept n, at which was measured; ascending.
    loss, swaps
        ``[F][L][N]``: loss of quality, and swaps a token, with only layer l short. The loss is of
        the figure that the profile was made with: KL in nats a token unless another was asked for.
    base_ms, swap_ms
        Time of a token without a swap, and what each swap adds.
    network
        The paper's estimator of quality, asked instead of ours where it is given.
    """

    every: tuple[int, ...]
    kept: tuple[int, ...]
    loss: Sequence[Sequence[Sequence[float]]]
    swaps: Sequence[Sequence[Sequence[float]]]
    base_ms: float
    swap_ms: float
    network: Network | None = None

    @classmethod
    def of(cls, profile: Mapping[str, Any]) -> Estimates:
        """From a profile's data."""
        names = ("every", "kept", "loss", "swaps", "base_ms", "swap_ms")
        every, kept, *rest = (profile[name] for name in names)
        found = profile.get("network") if profile.get("planned_by") == "network" else None
        network = Network(**found) if found else None
        return cls(tuple(every), tuple(kept), *rest, network=network)

    def kl(self, plan: Plan) -> float:
        """Estimated loss of quality, of the same figure."""
        return self.network.kl(plan) if self.network else self.added(plan)

    def added(self, plan: Plan) -> float:
        """The same by our own estimator: the layers' losses added up."""
        return self._sum(self.loss, plan)

    def ms(self, plan: Plan) -> float:
        """Estimated time of a token."""
        return self.base_ms + self.swap_ms * self._sum(self.swaps, plan)

    def cost(self, plan: Plan, nats_per_slowdown: float) -> float:
        """Loss + ``nats_per_slowdown`` x (relative time - 1): what the planner makes small."""
        return self.kl(plan) + nats_per_slowdown * (self.ms(plan) / self.base_ms - 1)

    def prices(self, f: int, shape: Shape, nats_per_slowdown: float) -> list[list[float]]:
        """What each layer adds to `cost` with each number of experts, ``[L][E + 1]``."""
        at, nats = self.every.index(f), nats_per_slowdown * self.swap_ms / self.base_ms
        return [
            [self._at(loss, n) + nats * self._at(swaps, n) for n in range(count + 1)]
            for loss, swaps, count in zip(self.loss[at], self.swaps[at], shape.experts, strict=True)
        ]

    def _sum(self, table: Sequence[Sequence[Sequence[float]]], plan: Plan) -> float:
        rows = table[self.every.index(plan.f)]
        return sum(self._at(row, n) for row, n in zip(rows, plan.experts, strict=True))

    def _at(self, row: Sequence[float], n: int) -> float:
        """Between two measured n the straight line; never worse with more experts."""
        best = row[0]
        for i in range(1, len(self.kept)):
            low, high = self.kept[i - 1 : i + 1]
            after = min(best, row[i])
            if n <= high:
                part = max(0.0, (n - low) / (high - low))
                return best + part * (after - best)
            best = after
        return best


def search(
    cost: Callable[[Plan], float],
    fits: Callable[[Plan], bool],
    start: Sequence[Plan],
    *,
    every: Sequence[int],
    low: int,
    high: Sequence[int],
    seed: int = 0,
    population: int = 60,
    generations: int = 120,
) -> Plan:
    """The cheapest configuration that a genetic algorithm finds.

    Children are a parent with an entry changed, two parents' entries exchanged, or the average of
    two parents; those that do not fit are dropped. Half of the population survives.

    Parameters
    ----------
    cost, fits
        What is made small, and whether a configuration keeps within the memory.
    start
        Configurations to begin with; the result is never dearer than the best of them.
    every, low, high
        Values that f may take; least and, layer by layer, largest number of experts.
    seed, population, generations
        Of the search. It draws nothing from anywhere else.

    Raises
    ------
    ValueError
        No configuration of ``start`` fits.
    """
    rng = random.Random(seed)
    costs = {plan: cost(plan) for plan in start if fits(plan)}
    if not costs:
        raise ValueError("none of the starting configurations fits the memory")
    parents = list(costs)
    children = [_moved(rng.choice(parents), every, low, high, rng) for _ in range(population)]
    for _ in range(generations):
        costs |= {plan: cost(plan) for plan in children if plan not in costs and fits(plan)}
        parents = sorted(costs, key=lambda p: (costs[p], p.f, p.experts))[: population // 2]
        costs = {plan: costs[plan] for plan in parents}
        pairs = [(rng.choice(parents), rng.choice(parents)) for _ in range(population)]
        children = [_mutated(plan, every, low, high, rng) for plan, _ in pairs]
        children += [rng.choice((_exchanged, _averaged))(a, b, rng) for a, b in pairs]
    return parents[0]


def _mutated(
    plan: Plan, every: Sequence[int], low: int, high: Sequence[int], rng: random.Random
) -> Plan:
    """One entry changed; or two, since with the memory full one alone can only get smaller."""
    f, changed = plan.f, list(plan.experts)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(changed) + 1)
        if at == len(changed):
            f = rng.choice(every)
        else:
            reach = 1 + rng.randrange(1 + (high[at] - low) // 4)
            changed[at] = min(high[at], max(low, changed[at] + rng.choice((-reach, reach))))
    return Plan(f, tuple(changed))


def _exchanged(a: Plan, b: Plan, rng: random.Random) -> Plan:
    """Each entry from either parent."""
    picked = tuple(rng.choice(pair) for pair in zip(a.experts, b.experts, strict=True))
    return Plan(rng.choice((a.f, b.f)), picked)


def _averaged(a: Plan, b: Plan, rng: random.Random) -> Plan:
    """Half way between the parents; halves go up or down by chance."""
    mean = ((x + y + rng.randint(0, 1)) // 2 for x, y in zip(a.experts, b.experts, strict=True))
    return Plan(rng.choice((a.f, b.f)), tuple(mean))


def _moved(
    plan: Plan, every: Sequence[int], low: int, high: Sequence[int], rng: random.Random
) -> Plan:
    """A first generation: experts moved between layers, so that the sum stays."""
    out = list(plan.experts)
    for _ in range(rng.randint(1, 3 * len(out))):
        giver, taker = rng.randrange(len(out)), rng.randrange(len(out))
        if out[giver] > low and out[taker] < high[taker]:
            out[giver] -= 1
            out[taker] += 1
    return Plan(rng.choice(every), tuple(out))


def plan_within(
    estimates: Estimates,
    slots: int,
    shape: Shape,
    *,
    nats_per_slowdown: float,
    start: Sequence[Plan] = (),
    every: Sequence[int] = (),
    seed: int = 0,
) -> Plan:
    """The best configuration for a memory of ``slots`` experts.

    ``start`` may hold plans of smaller memories, so that more memory never plans worse; ``every``
    limits f to some of the intervals profiled.

    Raises
    ------
    ValueError
        The memory does not hold top-k experts of every layer.
    """
    even = uniform(slots, shape)
    least = shape.top_k
    if min(even.experts) < least:
        raise ValueError(f"{slots} experts are fewer than top-{shape.top_k} of every layer")
    every = every or estimates.every
    price = {f: estimates.prices(f, shape, nats_per_slowdown) for f in every}

    def cost(plan: Plan) -> float:
        if estimates.network:
            return estimates.cost(plan, nats_per_slowdown)
        return sum(row[n] for row, n in zip(price[plan.f], plan.experts, strict=True))

    return search(
        cost,
        lambda p: fits(p.experts, slots, shape),
        [Plan(f, even.experts) for f in every] + [plan for plan in start if plan.f in every],
        every=every,
        low=least,
        high=[min(count, slots) for count in shape.experts],
        seed=seed,
        generations=40 * (1 + shape.layers),
    )


def plan_to_the_bend(
    estimates: Estimates,
    slots: int,
    shape: Shape,
    *,
    start: Sequence[Plan] = (),
    bend: float = BEND,
    seed: int = 0,
) -> Plan:
    """The best quality at the highest update frequency before the time of a token bends up.

    As the paper does (its 3.4.1): updates as often as they hardly cost time, here at most ``bend``
    above the fastest of the best configurations of each f.

    Raises
    ------
    ValueError
        The memory does not hold top-k experts of every layer.
    """
    found = [
        plan_within(
            estimates, slots, shape, nats_per_slowdown=0.0, start=start, every=(f,), seed=seed
        )
        for f in sorted(estimates.every)
    ]
    fastest = min(map(estimates.ms, found))
    return next(plan for plan in found if estimates.ms(plan) <= (1 + bend) * fastest)
