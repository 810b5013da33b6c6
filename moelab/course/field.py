"""Exercises of notebooks 09 and 10: all systems side by side, and representations of an expert."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    exercise,
    given,
    judged,
    kl_of,
    opened,
    settings,
    written,
)

BUDGET, DEVICE = "25%", "emmc"
KL_BORNE, SPARED = 0.02, 0.1
"""The loss borne in nats, and the share of LFU's bytes that a system is to spare."""
TOKENS = 24
PROMPT = "It is a truth universally acknowledged, that"


def _bytes(**changes: Any) -> float:
    """Bytes a token of a run under these settings."""
    with opened(budget=BUDGET, device=DEVICE, **changes) as lab:
        return float(written(lab, PROMPT, TOKENS).summary()["bytes_per_token"])


@exercise("09.1")
def one_that_pays(answer: Any) -> Said:
    """A strategy that reads a tenth less than LFU at 16 bit for a loss that is hardly one."""
    name = given(answer, str, "a strategy's name, like 'hobbit'")
    if name not in moelab.strategies.NAMES:
        raise RefusedError(f"give one of moelab.strategies.NAMES; this is {name!r}")
    with opened(budget=BUDGET, strategy=name) as lab:
        loss = kl_of(lab, texts=2)
    mine, lfu = _bytes(strategy=name), _bytes(strategy="lfu")
    return judged(
        f"{name} loses {loss:.3f} nats and reads {mine / 1e3:.0f} kB a token, LFU {lfu / 1e3:.0f}",
        (loss > KL_BORNE, f"The KL is to stay below {KL_BORNE}: look at the lower left."),
        (mine > (1 - SPARED) * lfu, f"Spare {SPARED:.0%}: whose misses are not all loads?"),
        right="Few bytes, and hardly a loss.",
    )


@exercise("09.2")
def a_mix_that_beats_edgemoe(answer: Any) -> Said:
    """Settings that read less than EdgeMoE and lose less."""
    changes = settings(answer, "{'strategy': 'hobbit', 'evict': 'lfu'}", device=DEVICE)
    changes.pop("device")
    if "budget" in changes:
        raise RefusedError(f"the budget is {BUDGET} for all: leave it out")
    with opened(budget=BUDGET, **changes) as lab:
        loss = kl_of(lab, texts=2)
    mine, edgemoe = _bytes(**changes), _bytes(strategy="edgemoe")
    return judged(
        f"yours reads {mine / 1e3:.0f} kB a token and loses {loss:.3f} nats, EdgeMoE reads "
        f"{edgemoe / 1e3:.0f} kB",
        (mine >= edgemoe, "Read less than that: what makes each expert smaller?"),
        (loss > KL_BORNE, f"The KL is to stay below {KL_BORNE}."),
        right="Fewer bytes for less loss.",
    )
