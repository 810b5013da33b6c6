"""Exercises of notebooks 09 and 10: all systems side by side, and representations of an expert."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    a_number,
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
FEW = 0.05
"""The loss borne of fewer bits, in nats."""
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


@exercise("10.1")
def what_twelve_bits_spare(answer: Any) -> Said:
    """The share of bytes that the lossless tier of 12 bits spares."""
    share = a_number(answer, "the share of bytes that 12 bit spare, 0.25 is a quarter")
    with moelab.open("demo", tiers=(16, 12), measure_kl=False, progress=False) as lab:
        each = lab.info()["expert_bytes"]
    spared = 1 - each[12] / each[16]
    return judged(
        f"an expert takes {each[16]:,} bytes at 16 bit and {each[12]:,} at 12: {spared:.1%} fewer",
        (share > 1, "Give a share between 0 and 1."),
        (abs(share - spared) > 0.005, "lab.info()['expert_bytes'] has both."),
        right="Not quite a quarter: rare exponents lie in a table, and a blob fills pages.",
    )


@exercise("10.2")
def fewest_bits(answer: Any) -> Said:
    """The fewest bits of the store's tiers at which the text loses less than `FEW`."""
    bits = int(a_number(answer, "bits of a tier", whole=True))
    with opened() as lab:
        tiers = sorted(lab.info()["tiers"])
        if bits not in tiers:
            raise RefusedError(f"give one of the tiers {tiers}; this is {bits}")
        loss = {}
        for tier in (bits, *[t for t in tiers if t < bits][-1:]):
            lab.update(bits=tier, budget="100%")
            loss[tier] = kl_of(lab)
    said = " and ".join(f"{kl:.4f} nats at {tier} bit" for tier, kl in loss.items())
    below = [kl for tier, kl in loss.items() if tier < bits]
    return judged(
        f"on text nobody has seen it loses {said}",
        (loss[bits] > FEW, f"It is to lose less than {FEW}."),
        (any(kl <= FEW for kl in below), "Fewer bits would do."),
    )
