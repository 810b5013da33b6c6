"""What a user may rely on when a part of their own fails, and when others ask meanwhile."""

from __future__ import annotations

import threading
import time

import pytest

import moelab
from moelab.strategies import Evict, Precision, Prefetch, Route, lru

PROMPT = "Elizabeth was not at all surprised to hear that"


@pytest.fixture
def lab(demo_store):
    with moelab.open("demo", budget="40%", measure_kl=False, progress=False) as lab:
        yield lab


def text(lab, **options):
    return lab.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True, **options).tokens


class Narrow(Route):
    def mask(self, layer, view):
        return [e == 0 for e in range(view.shape.experts[layer])]


class Short(Route):
    def bias(self, layer, view):
        return [1.0]


class BadBegin(Prefetch):
    def begin(self, view):
        raise ZeroDivisionError("bad begin")


class BadObserve(Evict):
    def observe(self, given, view):
        raise ZeroDivisionError("bad observe")

    def score(self, view):
        return view.last_use


class BadScore(Evict):
    def score(self, view):
        raise ZeroDivisionError("bad score")


class BadPredict(Prefetch):
    def predict(self, layer, look_ahead, view):
        raise ZeroDivisionError("bad predict")


class BadTier(Precision):
    def tier(self, request, asked, view):
        raise ZeroDivisionError("bad tier")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"route": Narrow()}, ValueError),
        ({"route": Short()}, ValueError),
        ({"prefetch": BadBegin()}, ZeroDivisionError),
        ({"evict": BadObserve()}, ZeroDivisionError),
        ({"evict": BadScore(), "budget": "15%"}, ZeroDivisionError),
        ({"prefetch": BadPredict()}, ZeroDivisionError),
        ({"precision": BadTier()}, ZeroDivisionError),
    ],
    ids=lambda x: str(x)[:20] if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("before", ["lru", "swapmoe", "cache_prior"])
def test_a_part_that_fails_leaves_nothing_behind(lab, change, error, before):
    """Refused at once or ending the run: afterwards the lab is as if it had never been."""
    want = text(lab)
    lab.update(strategy=before)
    with pytest.raises(error):  # noqa: PT012, at once where it is asked at once
        lab.update(**change)
        text(lab)
    lab.update(strategy="lru", budget="40%")
    assert text(lab) == want
    assert lab.score(max_tokens=8, progress=False).kl_mean < 1e-6
    assert lab.info()["resident_bytes"] <= lab.settings.budget_bytes


def test_a_change_refused_in_the_middle_of_a_run_ends_the_run_not_the_lab(lab):
    want = text(lab)
    run = lab.start(PROMPT, max_new_tokens=400, ignore_eos=True)
    lab.update(prefetch=BadBegin())
    with pytest.raises(ZeroDivisionError, match="bad begin"):
        run.join()
    assert type(lab.settings.strategy.prefetch) is not BadBegin
    assert text(lab) == want


def test_a_change_while_somebody_asks_why_is_obeyed_at_once(lab):
    class Slow(Evict):
        def score(self, view):
            return view.last_use

        def terms(self, view):
            time.sleep(0.2)
            return {"slow": view.last_use}

    lab.update(strategy=lru().replace(evict=Slow(), name="slow"))
    text(lab)
    asker = threading.Thread(target=lambda: [lab.why(layer) for layer in range(6)])
    asker.start()
    time.sleep(0.05)
    lab.update(budget="10%")
    assert lab.info()["resident_bytes"] <= lab.settings.budget_bytes
    text(lab)  # and a run can begin
    asker.join()


def test_a_busy_lab_says_why_and_a_closed_one_that_it_is_closed(lab):
    text(lab)
    with lab._session.claimed():  # as a calibration does
        assert lab.why(0)
    lab.close()
    for ask in (lambda: lab.why(0), lambda: lab.generate(PROMPT), lambda: lab.update(bits=4)):
        with pytest.raises(RuntimeError, match="closed"):
            ask()


@pytest.mark.alone  # what SwapMoE computes with is what has landed by then
def test_asking_why_changes_nothing(lab):
    lab.update(strategy="swapmoe", unit="sequences", budget="35%")
    text(lab)
    want = text(lab)
    lab._engine.recover()
    lab.update(strategy="lru")
    lab.update(strategy="swapmoe", unit="sequences")
    for layer in range(6):
        lab.why(layer)
    text(lab)
    assert text(lab) == want


def test_a_class_is_no_part_and_the_message_says_what_is():
    with pytest.raises(
        TypeError, match=r"evict=BadObserve is a class; make one of it: BadObserve\(\)"
    ):
        lru().replace(evict=BadObserve)


def test_a_strategy_and_a_profile_say_themselves_in_a_line(lab):
    lab.update(strategy="edgemoe")
    assert "tolerated=0.02" in repr(lab.settings.strategy)
    assert len(repr(lab.settings)) < 400
    assert len(repr(lab.calibrate("edgemoe"))) < 200


def test_an_expert_that_is_not_there_has_no_reasons(lab):
    with pytest.raises(ValueError, match="no layer 9; there are 0 to 5"):
        lab.why(9)
    lab.update(strategy="on_demand")
    with pytest.raises(ValueError, match="expert 3 of layer 2 is not resident"):
        lab.why(2, 3)


def test_an_object_given_again_after_a_change_begins_anew(lab):
    class Mine(Evict):
        k = 1

        def score(self, view):
            return self.k * view.index_of

    mine = Mine()
    lab.update(evict=mine)
    mine.k = -1
    lab.update(evict=mine)
    assert lab._engine.scheduler.strategy.evict.k == -1


def test_what_a_strategy_brought_goes_with_it(lab):
    lab.update(strategy=moelab.strategies.hobbit(high=8, low=2))
    assert (lab.settings.bits, lab.settings.low_bits) == (8, 2)
    lab.update(strategy="lru")
    assert (lab.settings.bits, lab.settings.low_bits) == (16, None)
    lab.update(bits=4)
    lab.update(strategy="lfu")
    assert lab.settings.bits == 4  # what a person set stays


def test_a_part_without_attributes_of_its_own_is_refused():
    class Slotted:
        __slots__ = ()
        bias = mask = stand_in = new_sequence = observe = lambda *_: None

    with pytest.raises(TypeError, match="slots"):
        lru().replace(route=Slotted())


def test_calibrating_swapmoe_keeps_within_the_budget(lab):
    lab.update(budget="10%")
    with pytest.raises(ValueError, match="no room to swap.*raise it to"):
        lab.calibrate("swapmoe", again=True, progress=False)
    lab.update(budget="60%")
    with pytest.raises(ValueError, match="3 tokens"):
        lab.calibrate("swapmoe", again=True, progress=False, texts=["a"])
