"""The contract of every strategy, whoever wrote it: what a user may rely on whatever they choose.

First with `Toy`, which routes at random and checks every promise on the way, then on the engine
with the bundled model.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

import moelab
from moelab.replays.replay import replay
from moelab.scheduling.budget import minimum_budget
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import ROLES, Knobs, Route, Strategy
from moelab.scheduling.stream import LookAhead
from moelab.scheduling.trace import Trace
from moelab.strategies import NAMES, Evict, Precision, make, maker
from moelab.strategies.basics import TierPair
from toy_engine import NBYTES, SHAPE, Toy

PROMPT = "Elizabeth was not at all surprised to hear that"

every_strategy = pytest.mark.parametrize("name", NAMES)


def drawn(strategy: Strategy, rng: random.Random) -> tuple[Strategy, Knobs]:
    """The strategy as it comes, now and then otherwise, and a budget from tight to roomy."""
    bits = strategy.bits or 16
    if rng.random() < 0.5:
        bits, low = rng.choice([(16, None), (16, 4), (8, 2), (4, None)])
        strategy = tuned(strategy, low_bits=low, depth=rng.randrange(4))
    need = minimum_budget(SHAPE, strategy, Knobs(0, bits))
    return strategy, Knobs(int(need * rng.uniform(1, 3)), bits)


def tuned(strategy: Strategy, **values) -> Strategy:
    """Those of the values that the strategy has a parameter for."""
    return strategy.tuned(**{n: v for n, v in values.items() if n in strategy.parameters})


def settings(strategy: Strategy, rng: random.Random) -> dict:
    return dict(zip(("strategy", "knobs"), drawn(strategy, rng), strict=True))


def other_values(strategy: Strategy, rng: random.Random) -> dict:
    """Every parameter somewhere within its range."""
    out = {}
    for name, (_, p, _) in strategy.parameters.items():
        choices = (None, *NBYTES) if p.tier else p.choices
        out[name] = rng.choice(choices) if choices else rng.uniform(p.low, p.high)
    if "t2" in out:
        out["t1"], out["t2"] = sorted((out["t1"], out["t2"]))
    return out


def mixture(rng: random.Random) -> Strategy:
    """Five decisions, each of some strategy or other."""
    names = {role: rng.choice(NAMES) for role in ROLES}
    parts = {role: make(name).parts[role] for role, name in names.items()}
    return Strategy("+".join(names.values()), **parts)


@every_strategy
class TestEveryStrategy:
    @pytest.mark.parametrize("seed", range(3))
    def test_the_budget_holds_after_every_decision_whatever_is_changed(self, name, seed):
        rng = random.Random(seed)
        strategy = make(name)
        toy = Toy(*drawn(strategy, rng), seed)
        for _ in range(2):
            other = make(rng.choice(NAMES))
            toy.sequence(
                8,
                changes={
                    2: settings(strategy, rng),
                    4: other_values(strategy, rng),
                    6: settings(other, rng),
                },
            )
            toy.change(**settings(strategy, rng))

    @pytest.mark.parametrize("seed", range(2))
    def test_the_recorded_trace_decides_the_same_again_also_after_learning(self, name, seed):
        rng = random.Random(seed)
        strategy = make(name)
        toy = Toy(*drawn(strategy, rng), seed)
        for start in range(3):  # the second and third know the first
            changes = {start: settings(strategy, rng), 6: other_values(strategy, rng)}
            trace = toy.sequence(8, changes=changes)
            assert replay(trace).decisions == toy.decided
            assert replay(trace).decisions == toy.decided  # a replay leaves the trace as it was

    def test_a_trace_from_a_file_is_decided_the_same_by_name(self, name, tmp_path):
        strategy = make(name)
        toy = Toy(*drawn(strategy, random.Random(1)), 1)
        path = toy.sequence(8, changes={4: other_values(strategy, toy.rng)}).save(tmp_path / "t")
        again = replay(Trace.load(path), strategies={name: make(name)})
        assert again.decisions == toy.decided

    def test_two_of_them_decide_the_same_under_one_seed(self, name):
        decided = []
        for _ in range(2):
            toy = Toy(*drawn(make(name), random.Random(2)), 2)
            toy.sequence(8)
            toy.sequence(8)
            decided.append(toy.decided)
        assert decided[0] == decided[1]

    def test_the_template_learns_nothing_from_those_who_use_it(self, name):
        strategy, knobs = drawn(make(name), random.Random(3))
        first, second = Toy(strategy, knobs, 3), Toy(strategy, knobs, 3)
        first.sequence(8)
        first.sequence(8)  # has learnt
        second.sequence(8)
        third = Toy(strategy, knobs, 3)
        third.sequence(8)
        assert second.decided == third.decided

    def test_every_parameter_has_its_range_and_nothing_else_is_taken(self, name):
        strategy = make(name)
        for one, (role, p, value) in strategy.parameters.items():
            assert p.text
            assert p.checked(value) == value, f"the default of {one} is out of range"
            good, wrong = (p.low, (p.low + p.high) / 2, p.high), (p.low - 1, p.high + 1, None)
            if p.tier or p.choices:
                good, wrong = (None, *NBYTES) if p.tier else p.choices, (3.5, 17)
            pair = {"t1": {"t2": 1.0}, "t2": {"t1": 0.0}}.get(one, {})  # t1 is never above t2
            for x in good:
                other = strategy.tuned(**pair, **{one: x})
                assert getattr(other.parts[role], one) == p.checked(x)
            wrong = (*wrong, "much", True)
            for x in wrong:
                with pytest.raises(ValueError, match=one):
                    strategy.tuned(**{one: x})
        with pytest.raises(ValueError, match="no parameter 'nonsense'"):
            strategy.tuned(nonsense=1)

    def test_it_says_what_it_is_and_what_its_decisions_are(self, name):
        first = maker(name).__doc__.splitlines()[0]
        assert first.endswith(".")
        assert len(first) <= 96
        strategy = make(name)
        assert strategy.name == name
        assert all(part.title for part in strategy.parts.values())
        assert strategy.keywords == {"strategy": name}
        assert strategy.bits in (None, *NBYTES)

    def test_it_explains_every_resident_expert_in_numbers(self, name):
        toy = Toy(*drawn(make(name), random.Random(4)), 4)
        toy.sequence(6)
        told = {layer: toy.scheduler.why(layer) for layer in range(SHAPE.layers)}
        keys = [SHAPE.key(layer, e) for layer, of in told.items() for e in of]
        assert sorted(keys) == sorted(key for key, _ in toy.scheduler.cache.items())
        for terms in (terms for of in told.values() for terms in of.values()):
            assert terms
            assert all(np.isfinite(value) for value in terms.values())


@pytest.mark.parametrize("seed", range(30))
def test_any_part_of_one_works_with_any_part_of_another(seed):
    rng = random.Random(seed)
    strategy = mixture(rng)
    toy = Toy(*drawn(strategy, rng), seed)
    for _ in range(2):
        trace = toy.sequence(6, changes={3: other_values(strategy, rng)})
        assert replay(trace).decisions == toy.decided, strategy.name


def test_what_goes_at_the_start_of_a_text_does_not_hang_on_where_the_last_one_ended():
    """Nearness counts from the layer at work, and room is made before there is one."""
    parts = {"evict": make("hobbit").evict, "prefetch": make("in_ram").prefetch}
    toy = Toy(make("lru").replace(**parts), Knobs(6 * 1600), 0)
    for _ in range(2):
        assert replay(toy.sequence(3)).decisions == toy.decided


@pytest.mark.parametrize("role", ROLES)
@every_strategy
def test_each_decision_alone_goes_into_plain_lru(name, role):
    strategy = make("lru").replace(**{role: make(name).parts[role]})
    toy = Toy(*drawn(strategy, random.Random(5)), 5)
    toy.sequence(6)
    assert replay(toy.trace).decisions == toy.decided


def test_a_name_that_is_unknown_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="unknown strategy 'nonsense'.*moe_infinity"):
        make("nonsense")


# -- exact counts -------------------------------------------------------------------------------

COUNTED = ("hit", "load", "evict", "skip", "prefetch")
COUNTS = {
    "on_demand": ((0, 464, 464, 0, 0), (0, 464, 464, 0, 0)),
    "lru": ((338, 126, 125, 0, 0), (423, 41, 36, 0, 0)),
    "lfu": ((365, 99, 98, 0, 0), (429, 35, 30, 0, 0)),
    "layer_lru": ((332, 132, 132, 0, 0), (398, 66, 62, 0, 0)),
    "arc": ((339, 125, 124, 0, 0), (423, 41, 36, 0, 0)),
    "s3fifo": ((354, 110, 109, 0, 0), (432, 32, 27, 0, 0)),
    "in_ram": ((338, 126, 126, 0, 0), (421, 43, 43, 0, 0)),
    "edgemoe": ((398, 66, 222, 0, 157), (438, 26, 106, 0, 85)),
    "hobbit": ((369, 87, 273, 8, 191), (422, 37, 137, 5, 105)),
    "moe_apex": ((385, 73, 226, 6, 159), (429, 33, 106, 2, 79)),
    "swapmoe": ((335, 129, 134, 0, 5), (409, 55, 75, 0, 20)),
    "static_pruning": ((332, 132, 132, 0, 0), (387, 77, 77, 0, 0)),
    "mixtral_offloading": ((403, 61, 208, 0, 147), (442, 22, 97, 0, 79)),
    "moe_infinity": ((361, 103, 121, 0, 19), (420, 44, 40, 0, 1)),
    "adapmoe": ((381, 55, 185, 28, 130), (434, 21, 93, 9, 76)),
    "flashmoe": ((332, 132, 132, 0, 0), (401, 63, 59, 0, 0)),
    "least_stale": ((342, 122, 121, 0, 0), (418, 46, 41, 0, 0)),
    "hermes": ((464, 0, 1392, 0, 1392), (464, 0, 1392, 0, 1392)),
    "finemoe": ((337, 127, 204, 0, 78), (429, 35, 40, 0, 10)),
    "max_rank": ((338, 126, 125, 0, 0), (423, 41, 36, 0, 0)),
    "cache_prior": ((338, 126, 125, 0, 0), (423, 41, 36, 0, 0)),
    "pregated": ((406, 58, 188, 0, 131), (444, 20, 61, 0, 46)),
    "emoe": ((332, 132, 132, 0, 0), (387, 77, 77, 0, 0)),
    "drop_if_cold": ((347, 72, 71, 45, 0), (425, 24, 19, 15, 0)),
}
"""With room for 9 and for 13 of 24 experts. Those that 0.3 had decide as there, but EdgeMoE (whose
width counts what is preloaded) and who looks ahead as HOBBIT does (in a prompt too, guesses replace
former ones, and H counts requests)."""


def texts() -> Trace:
    """Two texts of 30 tokens, of experts with favourites; the gates ahead are often right."""
    rng, trace = random.Random(0), Trace(SHAPE)
    favour = [[2 * rng.random() for _ in range(n)] for n in SHAPE.experts]

    def top(scores: list[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        first = 0.5 + 0.5 * rng.random()
        return tuple(sorted(range(6), key=lambda e: -scores[e])[:2]), (first, 1 - first)

    for token in range(60):
        said = [[f + rng.random() for f in row] for row in favour]
        for layer in range(SHAPE.layers):
            experts, weights = top(said[layer])
            ahead = tuple(
                LookAhead(coming, *top([x + rng.random() / 2 for x in said[coming]]))
                for coming in range(layer + 1, SHAPE.layers)
            )
            given = LayerInput(layer, (experts,), (weights,), token % 30 == 0, ahead)
            trace.steps.append(given)
    return trace


@every_strategy
def test_hits_loads_evictions_skips_and_prefetches_of_one_stream_are_exactly_these(name):
    done = [replay(texts(), make(name), Knobs(room * 1600)).counts for room in (9, 13)]
    assert tuple(tuple(counts[kind] for kind in COUNTED) for counts in done) == COUNTS[name]


# -- the same on the engine ----------------------------------------------------------------------


def opened(demo_store):
    return moelab.open("demo", budget="25%", measure_kl=False, progress=False)


@pytest.fixture(scope="module")
def lab(demo_store):
    with opened(demo_store) as lab:
        yield lab


@pytest.fixture(scope="module")
def second_lab(demo_store):
    with opened(demo_store) as lab:
        yield lab


@pytest.fixture(scope="module")
def want(lab):
    """What the model says at full precision with everything in memory."""
    return start(lab, "lru", budget="100%").tokens


def start(lab, strategy, *, tokens=10, **changes):
    """An empty cache, a strategy that has learnt nothing, and a run."""
    lab.update(strategy="lfu", budget="100%", bits=16, prefetch=0, device="disk")
    lab._engine.recover()
    lab.update(**({"strategy": strategy, "budget": "20%"} | changes))
    return generate(lab, tokens)


def generate(lab, tokens=10):
    return lab.generate(PROMPT, max_new_tokens=tokens, ignore_eos=True, seed=3, temperature=0.7)


def live(run) -> list[tuple]:
    """The run's decisions as its events tell them."""
    events = run.events[~run.events.kind.isin(["stall"])]
    rows = events[["kind", "layer", "expert", "bits_asked", "bits"]].itertuples(index=False)
    return [tuple(r) for r in rows]


def decided(outcome) -> list[tuple]:
    return [(d.kind, d.layer, d.expert, d.bits_asked, d.bits) for d in outcome.decisions]


def held_bytes(run) -> np.ndarray:
    """Resident bytes after each event, from the log and what was resident before it."""
    sizes = run.trace.shape.nbytes
    sign = run.events.kind.map({"load": 1, "prefetch": 1, "evict": -1}).astype(float).fillna(0)
    each = run.events.bits.map(sizes | {0: 0})
    return sum(sizes[b] for _, b in run.trace.resident) + np.cumsum(sign * each).to_numpy()


def check_run(lab, run) -> None:
    """Budget and counters of a run, recounted from its events alone."""
    assert held_bytes(run).max() <= lab.settings.budget_bytes
    assert lab.info()["resident_bytes"] <= lab.settings.budget_bytes
    sizes = run.trace.shape.nbytes
    assert held_bytes(run)[-1] == sum(sizes[b] for b in lab.cache_map()["bits"].flat if b)
    events, table, summary = run.events, run.per_token, run.summary()
    late = (events.kind == "hit") & (events.cause == "prefetch late")
    kinds = events.kind.astype(str).where(~late, "late")
    count = Counter(zip(events.token, kinds, strict=True))
    columns = {
        "hits": "hit", "loads": "load", "prefetches": "prefetch", "downgrades": "downgrade",
        "skips": "skip", "substitutes": "substitute", "late": "late",
    }  # fmt: skip
    for row in table[1:].itertuples():
        for column, kind in columns.items():
            assert getattr(row, column) == count[row.token, kind], (row.token, column)
    later = events[events.token > 0]
    total = later.kind.value_counts()
    asked = sum(total.get(k, 0) for k in ("hit", "load", "skip", "substitute"))
    experts = sum(len(e) for s in run.trace.steps if not s.prefill for e in s.experts)
    assert asked == experts  # every activation was served, skipped or substituted, once
    in_time = total.get("hit", 0) - int((late & (events.token > 0)).sum())
    assert summary["hit_ratio"] == pytest.approx(in_time / asked)
    read = later.bytes[later.kind.isin(["load", "prefetch"])].sum()
    assert summary["bytes_per_token"] * (len(table) - 1) == pytest.approx(read)
    assert replay(run.trace).counts["hit"] == total.get("hit", 0)


@every_strategy
class TestEveryStrategyOnTheEngine:
    def test_budget_counters_replay_and_seed(self, lab, second_lab, name, tmp_path):
        run = start(lab, name)
        check_run(lab, run)
        assert decided(replay(run.trace)) == live(run)
        template = lab.settings.strategy
        loaded = Trace.load(run.trace.save(tmp_path / "trace"))
        assert decided(replay(loaded, strategies={name: template})) == live(run)
        learned = generate(lab)
        check_run(lab, learned)
        assert decided(replay(learned.trace)) == live(learned)
        twin = start(second_lab, name)
        if not template.observes & {"in_flight", "unread"}:  # those hang on the disk's pace
            assert twin.tokens == run.tokens
            assert live(twin) == live(run)

    def test_output_is_unchanged_where_it_neither_routes_nor_skips(self, lab, want, name):
        strategy = make(name)
        route, precision = type(strategy.route), type(strategy.precision)
        steers = any(getattr(route, m) is not getattr(Route, m) for m in ("mask", "bias"))
        skips = precision.tier not in (Precision.tier, TierPair.tier)
        if steers or skips or route.stand_in is not Route.stand_in:
            pytest.skip("it changes what is computed, and means to")
        assert start(lab, name, low_bits=None, allocate="lru").tokens == want


@pytest.mark.parametrize("seed", range(4))
def test_mixed_parts_run_on_the_engine(lab, seed):
    strategy = tuned(mixture(random.Random(100 + seed)), low_bits=4, depth=1)
    run = start(lab, strategy, tokens=8, budget="30%")
    check_run(lab, run)
    assert decided(replay(run.trace)) == live(run)


def test_a_trace_saved_after_tuning_in_the_middle_of_a_run_is_decided_the_same(lab, tmp_path):
    start(lab, "hobbit", tokens=1, low_bits=4)
    lab._engine.recover()
    template, tune = lab.settings.strategy, {"w_lru": 0.9, "high_share": 0.6, "t1": 0.3}
    run = lab.generate(PROMPT, max_new_tokens=20, ignore_eos=True, changes={5: tune})
    assert decided(replay(run.trace)) == live(run)
    loaded = Trace.load(run.trace.save(tmp_path / "trace"))
    assert decided(replay(loaded, strategies={"hobbit": template})) == live(run)


def test_parts_and_parameters_are_chosen_by_name_while_a_run_goes_on(lab):
    lab.update(strategy="lru", device="sd_card", budget="20%")
    run = lab.start(PROMPT, max_new_tokens=400, ignore_eos=True)
    try:
        lab.update(evict="moe_infinity", prefetch="mixtral_offloading")
        lab.update(guesses=1)
        settings = lab.update(route="cache_prior", lam=0.3)
    finally:
        run.stop()
        run.join()
        lab.update(device="disk")
    values = settings.strategy.values
    plain = {"low_bits": None, "t1": 0.6, "t2": 0.9}
    assert values == plain | {"guesses": 1, "lam": 0.3, "depth": 1}  # depth comes with the part
    assert settings.prefetch == 1
    assert settings.strategy.name == "lru*"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strategy": "nonsense"}, "unknown strategy 'nonsense'"),
        ({"evict": "nonsense"}, "unknown strategy 'nonsense'"),
        ({"nonsense": 1}, "unknown setting 'nonsense'"),
        ({"strategy": "cache_prior", "lam": 2}, "lam=2: from 0 to 1"),
        ({"strategy": "lru", "lam": 0.2}, "unknown setting 'lam'"),
    ],
)
def test_what_is_unknown_or_out_of_range_changes_nothing(lab, change, told):
    before = lab.settings
    with pytest.raises(ValueError, match=told):
        lab.update(**change)
    assert lab.settings is before


def test_a_policy_of_ones_own_is_a_strategy_like_any_other(lab):
    class Oldest(Evict):
        """First in, first out: counted from what it sees in memory at every layer."""

        came = np.inf

        def observe(self, given, view):
            self.came = np.where(view.bits > 0, np.minimum(self.came, view.clock), np.inf)

        def score(self, view):
            return self.came + np.zeros(view.shape.n)

    run = start(lab, "lru", evict=Oldest(), tokens=8)
    check_run(lab, run)
    assert decided(replay(run.trace)) == live(run)
