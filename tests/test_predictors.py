"""Predictors judged on streams whose answer is known, and against each other."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

import moelab
from moelab.replays.clock import Computing
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import LookAhead, Shape
from moelab.scheduling.trace import Trace
from moelab.store.devices import Device
from moelab.store.machine import Machine

SHAPE = Shape((8, 8, 8), 2, {16: 1000, 4: 300})


def stream(chosen, *, tokens=12, prompt=(), ahead=None) -> Trace:
    """``chosen(token, layer)`` are a token's experts; a prompt's are the same, all at once."""
    trace = Trace(SHAPE)
    for layer in range(3) if prompt else ():
        rows = tuple(chosen(t, layer) for t in prompt)
        weights = ((0.6, 0.4),) * len(rows)
        trace.steps.append(LayerInput(layer, rows, weights, prefill=True))
    for t in range(tokens):
        for layer in range(3):
            guess = () if ahead is None or layer == 2 else (ahead(t, layer + 1),)
            trace.steps.append(
                LayerInput(layer, (chosen(t, layer),), ((0.6, 0.4),), look_ahead=guess)
            )
    return trace


def pair(number: int) -> tuple[int, int]:
    return (2 * (number % 4), 2 * (number % 4) + 1)


def test_a_path_that_always_leads_to_the_same_experts_is_found_by_both_tables():
    table = moelab.predictors(stream(lambda t, layer: pair(t * t + t // 3 + layer), tokens=40))
    assert table.recall["path (pairs)"] == table.recall["path (set of experts)"] == 1
    assert table.known["path (pairs)"] == 1
    assert table.wrong_per_token["path (pairs)"] == 0
    assert table.recall["frequency"] < 1


def test_a_set_that_never_recurs_is_known_by_its_pairs_alone():
    kinds = random.Random(0).sample(list(combinations(range(8), 2)), 28)
    after = [4, 6, 0, 2, 7, 5, 1, 3]

    def chosen(t, layer):
        return kinds[t] if layer == 0 else tuple(after[e] for e in chosen(t, layer - 1))

    table = moelab.predictors(stream(chosen, tokens=28))
    assert table.known["path (set of experts)"] == 0
    assert table.recall["path (set of experts)"] == table.recall["frequency"] < 0.5
    assert table.recall["path (pairs)"] > 0.9


def test_the_same_experts_again_are_what_the_token_before_says():
    table = moelab.predictors(stream(lambda _, layer: pair(layer)))
    assert table.recall["previous token"] == table.recall["frequency"] == 1
    sudden = moelab.predictors(stream(lambda t, _: pair(t // 6), prompt=range(6)))
    assert sudden.recall["frequency"] == 0, "learnt before the change"
    assert sudden.recall["previous token"] == pytest.approx(5 / 6)


def test_a_gate_that_looks_ahead_is_judged_by_depth_and_a_wrong_guess_costs_its_bytes():
    def right(t, layer):
        return LookAhead(layer, pair(t + layer), (0.6, 0.4))

    def half(t, layer):
        first, second = pair(t + layer)
        return LookAhead(layer, (first, 7 - second), (0.6, 0.4))

    good = moelab.predictors(stream(lambda t, layer: pair(t + layer), ahead=right))
    assert good.recall["gate, 1 ahead"] == good.recall["always right"] == 1
    poor = moelab.predictors(stream(lambda t, layer: pair(t + layer), ahead=half))
    assert poor.recall["gate, 1 ahead"] == 0.5
    assert poor.wrong_per_token["gate, 1 ahead"] == 2
    assert poor.wrong_bytes["gate, 1 ahead"] == 2000
    assert (poor.wrong_bytes["always right"], poor.ahead["always right"]) == (0, "never")


def test_tokens_alike_down_to_here_say_what_comes():
    """Three ways through the layers that meet in the middle one: only what came before tells."""

    def chosen(t, layer):
        way = (t * t + t // 2) % 3
        return pair(0) if layer == 1 else pair(way)

    table = moelab.predictors(stream(chosen, tokens=60))
    assert table.recall["similar tokens (activation matrix)"] == 1
    assert table.recall["path (pairs)"] < 0.9
    other = moelab.predictors(stream(lambda t, layer: pair(t + layer), prompt=range(9)))
    assert other.known["similar tokens (activation matrix)"] == 1


def test_with_a_machine_each_lead_has_a_worth():
    computing = Computing(2.0, 6.0, {16: 1.0, 4: 1.0}, call_ms=0.5, deciding_ms=0.5)
    machine = Machine(computing, Device("a disk", 1e6, 1.0, 1), readers=1)
    trace = stream(lambda _, layer: pair(layer))
    table = moelab.predictors(trace, machine)
    assert table.load_ms.tolist() == [2.0] * len(table)
    assert table.lead_ms["path (pairs)"] == 5.0  # 2 + 0.5 + 0.5 + two experts
    assert table.lead_ms["previous token"] == 3 * 5.0 + 6.0
    assert table.lead_ms["always right"] == table.hidden_ms["always right"] == 0
    assert table.hidden_ms["previous token"] == 2.0 * 2 * 2  # two layers of two, all right
    slow = moelab.predictors(trace, machine, device="sd_card")
    assert (slow.load_ms > 1).all()


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="3 decoded tokens of 3 layers: record at least four"):
        moelab.predictors(stream(lambda t, layer: pair(t + layer), tokens=3))


def test_a_run_that_looked_ahead_has_its_gate_judged(demo_lab):
    demo_lab.update(strategy="lfu", prefetch=1)
    run = demo_lab.generate("Once upon a time", max_new_tokens=24, temperature=0, ignore_eos=True)
    table = moelab.predictors(run)
    assert table.recall["gate, 1 ahead"] > table.recall["frequency"]
    assert table.recall.between(0, 1).all()
    timed = moelab.predictors(run, demo_lab, device="sd_card")
    assert (timed.load_ms > 3).all(), "an expert takes 6.6 ms at 40 MB/s"
    assert timed.hidden_ms["gate, 1 ahead"] > 0
