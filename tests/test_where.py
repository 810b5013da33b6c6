"""Load or compute there: the cost model against sums that a hand can do."""

from __future__ import annotations

import itertools

import pytest

from moelab.bench.where import RULES, THERE, Costs, where
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.strategy import Knobs, Shape
from moelab.scheduling.trace import Trace
from moelab.store.devices import Device
from moelab.strategies import lru

MB = 10**6
SHAPE = Shape((4,), 2, {16: 25 * MB})
BUS = Device("a bus of 25 GB/s", 25e9, 0.5, 1)


def step(*rows: tuple[int, ...], prefill: bool = False) -> LayerInput:
    return LayerInput(0, rows, tuple((0.5,) * len(row) for row in rows), prefill)


def stream(budget: int) -> Trace:
    steps = [step((0, 1), (0, 1), (0, 2), prefill=True), step((0, 3)), step((2, 3)), step((0, 3))]
    return Trace(SHAPE, steps, [Change(0, Knobs(budget), "lru", strategy=lru())])


def test_a_load_takes_latency_and_bytes_and_each_token_there_reads_the_weights_again():
    costs = Costs.of(25 * MB, BUS, 250e9, width=2500)
    assert costs.load_ms == pytest.approx(0.5 + 1.0)
    assert costs.there_ms == pytest.approx(0.1 + 1e3 * 2 * 2500 * 2 / 25e9)  # 10 kB in and out
    assert costs.even_tokens == pytest.approx(1.5 / 0.1004)
    with pytest.raises(ValueError, match="name an emulated device"):
        Costs.of(25 * MB, Device("the disk"), 250e9, 1)


def test_fiddlers_constants_are_ten_tokens_an_expert():
    mixtral = 3 * 4096 * 14336 * 2
    there = 1e3 * mixtral / THERE["cpu"][1]
    assert there == pytest.approx(7, rel=0.02)  # beside 70 for a load
    assert Costs(70, there).even_tokens == pytest.approx(10, rel=0.02)


def test_each_rule_on_three_missing_experts():
    costs, tokens = Costs(load_ms=10, there_ms=1), [25, 4, 1]
    assert costs.layer(tokens, "load") == 30
    assert costs.layer(tokens, "there") == 30
    assert costs.layer(tokens, "cheaper") == 10 + 4 + 1
    assert costs.layer(tokens, "both") == 10  # one load, and 5 there meanwhile
    assert [costs.layer([], rule) for rule in RULES] == [0, 0, 0, 0]


def test_both_at_once_is_the_best_split_and_the_cheaper_the_least_sum_of_all():
    costs, tokens = Costs(load_ms=7, there_ms=2), [9, 1, 3, 3, 6]
    every = list(itertools.product((0, 1), repeat=5))
    loads = [sum(costs.load_ms for on in split if on) for split in every]
    there = [
        sum(costs.there_ms * n for on, n in zip(split, tokens, strict=True) if not on)
        for split in every
    ]
    assert costs.layer(tokens, "cheaper") == min(map(sum, zip(loads, there, strict=True)))
    assert costs.layer(tokens, "both") == min(map(max, zip(loads, there, strict=True)))


def test_what_is_missing_is_counted_by_lru_and_by_the_most_used():
    found = where(stream(2 * 25 * MB), width=0, device="pcie4", there=25e9)
    load, there = found.costs.load_ms, found.costs.there_ms  # 1.01 and 1 ms
    assert (load, there) == pytest.approx((1.01, 1.0))
    rules = found.rules.set_index("rule")
    # uses: 0 five, 1 two, 2 two, 3 three: 0 and 3 are there
    assert rules.missing["there"] == pytest.approx(1 / 3)  # expert 2 of the second token
    assert rules.token_ms["there"] == rules.token_ms["cheaper"] == pytest.approx(there / 3)
    assert rules.prompt_ms["there"] == pytest.approx(3 * there)  # 1 twice, 2 once
    assert rules.prompt_ms["cheaper"] == pytest.approx(load + there)
    assert rules.prompt_ms["both"] == pytest.approx(load)  # 1 is loaded, 2 computed meanwhile
    # LRU: the prompt loads all three, of which two stay; then 3, then 2, then 0 at least
    assert rules.prompt_ms["load"] == pytest.approx(3 * load)
    assert rules.token_ms["load"] == pytest.approx(rules.missing["load"] * load)
    assert rules.missing["load"] >= 1


def test_the_prompt_at_which_loading_wins_and_the_curves_that_cross_there():
    found = where(stream(2 * 25 * MB), width=1000, there="cpu")
    assert found.even_prompt == pytest.approx(found.costs.even_tokens * 4 / 2)
    table = found.prompts().pivot(index="tokens of the prompt", columns="rule").iloc[:, :]
    curves = {name[1]: table[name] for name in table}
    (load,), (there,) = (
        [c for n, c in curves.items() if n.startswith(w)] for w in ("load", "comp")
    )
    assert load[1] == pytest.approx(2 * found.costs.load_ms)  # k of four, for one token
    assert load.iloc[-1] == pytest.approx(4 * found.costs.load_ms)
    assert there[8] == pytest.approx(16 * found.costs.there_ms)
    assert there[1] < load[1]
    assert there.iloc[-1] > load.iloc[-1]


def test_it_says_that_nothing_of_it_was_run(tmp_path):
    found = where(stream(2 * 25 * MB), width=1000)
    sheet = found.sheet()
    assert found.sentence().startswith("Modelled, not run:")
    assert "runs none of this" in sheet.text()
    assert "(modelled)" in sheet.text()
    page = found.save(tmp_path / "where").read_text()
    assert page.count("(modelled)") >= 1
    assert "image/svg+xml" in page


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"there": "moon"}, "there='moon': one of cpu, near_memory, or bytes a second"),
        ({"there": 0}, "there=0"),
        ({"there": True}, "there=True"),
        ({"device": "disk"}, "name an emulated device"),
        ({"device": "moon"}, "unknown device"),
    ],
)
def test_what_is_no_speed_or_no_bus_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        where(stream(2 * 25 * MB), width=1000, **wrong)


def test_a_stream_without_settings_needs_them():
    bare = Trace(SHAPE, stream(50 * MB).steps)
    with pytest.raises(ValueError, match="give knobs="):
        where(bare, width=1000)
    assert len(where(bare, width=1000, knobs=Knobs(50 * MB)).rules) == len(RULES)
