"""Plans and the surface of all settings: what is chosen holds its limits."""

from __future__ import annotations

import pytest

import moelab
from moelab.runs import eligible as eligible_module
from moelab.runs.eligible import eligible
from moelab.runs.plan import _reasons, _simplest, surface
from moelab.scheduling.budget import BudgetError
from moelab.strategies import NAMES
from moelab.widgets.outlook import Outlook


@pytest.fixture(scope="module", autouse=True)
def shorter():
    """Less to predict and to score: what is chosen is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SCORED": 6, "TOKENS": 12, "BUDGETS": ("10%", "25%", "100%")}.items():
            patch.setattr(f"moelab.runs.plan.{name}", value)
        yield


@pytest.fixture(scope="module")
def planned(demo_store):
    with moelab.open("demo", budget="25%", measure_kl=False, progress=False) as lab:
        before = lab.settings
        how = {"device": "sd_card", "strategies": ("lru", "lfu"), "max_kl": 0.05}
        plan = moelab.plan(lab, budget="30%", **how)
        assert lab.settings is before
        yield lab, plan


def test_a_plan_holds_its_limits_and_says_why(planned):
    _, plan = planned
    assert plan.kl <= 0.05
    assert dict(plan) == plan.settings
    assert plan["device"], plan["budget"] == ("sd_card", "30%")
    assert len(plan.reasons) == 3
    assert [reason.split("=")[0] for reason in plan.reasons] == ["bits", "prefetch", "strategy"]
    said = repr(plan)
    assert "modelled" in said
    assert "measured" in said
    table = plan.table
    allowed = table[(table.kl <= 0.05)]
    assert plan.prediction.token_ms <= allowed.token_ms.min() * 1.02
    faster = table[table.token_ms < plan.prediction.token_ms * 0.98]
    assert (faster.kl > 0.05).all(), "whatever is faster was measured and loses too much"
    assert plan["bits"] < 16, "on an SD card bytes are what counts"


def test_it_can_be_put_in_force_and_made(planned):
    lab, plan = planned
    lab.update(**plan)
    try:
        assert lab.settings.bits == plan["bits"]
        assert lab.settings.device == "sd_card"
        checked = plan.prediction.check(repeats=1)
        assert checked["measured_ms"] > 0
    finally:
        lab.update(budget="25%", bits=16, strategy="lru", device="disk", prefetch=0)


def test_what_cannot_be_is_refused(planned):
    lab, _ = planned
    for asked, said in (
        ({"max_kl": -1}, "max_kl"),
        ({"budget": "0.1%"}, "needs|below"),
        ({"budget": "auto"}, "give a plan a size"),
        ({"max_kl": "low"}, "nats"),
        ({"device": "floppy"}, "floppy"),
        ({"strategies": ()}, "no combination"),
    ):
        with pytest.raises(ValueError, match=said):
            moelab.plan(lab, **asked)
    with lab._session.claimed(), pytest.raises(RuntimeError, match="going on"):
        moelab.plan(lab)
    with pytest.raises(TypeError, match="give the lab"):
        moelab.plan("demo")
    resident = lab.info()["resident_bytes"]
    with pytest.raises(ValueError, match="needs|below"):
        moelab.plan(lab, budget="0.1%")
    assert lab.info()["resident_bytes"] == resident, "what fails there costs nothing here"
    exact = moelab.plan(lab, max_kl=0, strategies="lru", progress=False)
    assert exact["bits"] == 16
    assert 0 <= exact.kl < 1e-6


def test_every_strategy_is_tried_that_the_recorded_stream_can_stand_for(planned):
    lab, _ = planned
    run = lab.generate("Once upon a time", max_new_tokens=2, ignore_eos=True)
    found, left_out = eligible(lab, run, {})
    # They steer the router or send stand-ins; FineMoE goes by what a run of LRU does not record.
    other = {"swapmoe", "static_pruning", "pregated", "emoe", "cache_prior", "max_rank", "finemoe"}
    assert found == [name for name in NAMES if name not in other]
    assert {"arc", "s3fifo", "flashmoe", "least_stale", "hermes", "edgemoe"} <= set(found)
    assert left_out.keys() == other
    assert left_out["swapmoe"] == "it steers the router"
    assert left_out["max_rank"] == "it sends other experts in place of missing ones"
    assert left_out["finemoe"].endswith("not recorded: embedding, probabilities")
    before = lab.settings
    lab.update(strategy="finemoe")
    own = lab.generate("Once upon a time", max_new_tokens=2, ignore_eos=True)
    lab._session.put(before)
    assert "finemoe" in eligible(lab, own, {})[0]


def test_a_budget_below_the_bits_in_force_is_planned_at_fewer(planned, monkeypatch):
    lab, _ = planned
    need = {bits: lab._shape.top_k * size for bits, size in lab._shape.nbytes.items()}
    budget = (need[4] + need[8]) // 2
    assert lab.settings.bits == 16
    with pytest.raises(BudgetError):
        lab.settings.change(lab._shape, budget=budget)
    monkeypatch.setattr(eligible_module, "NAMES", ("on_demand", "lru", "swapmoe"))
    plan = moelab.plan(lab, budget=budget, max_kl=5, progress=False)
    assert plan["bits"] <= 4
    assert "below one layer's need" in plan.left_out["swapmoe"]
    assert "not tried, plan.left_out says why: swapmoe" in repr(plan)


class Said:
    def __init__(self, ms: float) -> None:
        self.token_ms = ms


def test_of_those_that_are_alike_the_simplest():
    found = [
        ({"strategy": "hobbit", "bits": 4, "prefetch": 2}, Said(10.0)),
        ({"strategy": "lfu", "bits": 8, "prefetch": 0}, Said(10.1)),
        ({"strategy": "lru", "bits": 8, "prefetch": 0}, Said(10.15)),
        ({"strategy": "lru", "bits": 16, "prefetch": 0}, Said(12.0)),
    ]
    losses = {0: 0.01, 1: 0.001, 2: 0.001, 3: 0.0}
    assert _simplest(found, losses, 0, 0.05, NAMES) == 2
    assert _simplest(found, {0: 0.01, 1: 0.2, 2: 0.2}, 0, 0.05, NAMES) == 0
    reasons = _reasons(found, losses | {2: 0.2}, 3, 0.05)
    assert reasons[0] == "bits=16, 12.0 ms (8: 10.2 ms, KL 0.2 is too much)"


def test_the_surface_is_memory_speed_and_loss(planned):
    lab, _ = planned
    told = []
    rows = surface(lab, budgets=("5%", "25%", "100%"), told=told.append)
    assert told[-1] == 1.0 == max(told)
    assert list(told) == sorted(told)
    tiers = set(lab.info()["tiers"])
    whole = lab._shape.all_bytes(16)
    assert {(b, t) for b, t in zip(rows.budget_bytes, rows.bits, strict=True)} >= {
        (whole, t) for t in tiers
    }
    at = rows.set_index(["budget_bytes", "bits"])
    assert at.loc[(whole, 16)].kl_mean < at.loc[(whole, 2)].kl_mean
    best = rows[rows.best]
    assert len(best)
    for row in best.itertuples():
        smaller = rows[(rows.budget_bytes <= row.budget_bytes) & (rows.kl_mean <= row.kl_mean)]
        assert smaller.tokens_per_s.max() <= row.tokens_per_s


def test_the_outlook_tells_how_far_it_is_then_points_or_why_not(planned):
    lab, _ = planned
    told = []
    outlook = Outlook(lambda: lab, lambda message: told.append(message["outlook"]))
    outlook.hear({})
    thread = outlook._thread
    outlook.hear({})
    assert outlook._thread is thread, "one at a time"
    thread.join()
    assert told[0]["done"] < 1
    assert {"budget_bytes", "bits", "kl_mean", "best"} <= told[-1]["points"][0].keys()
    with lab._session.claimed():
        outlook.hear({})
        outlook._thread.join()
    assert "going on" in told[-1]["error"]
