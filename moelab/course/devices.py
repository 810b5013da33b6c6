"""Exercises of notebook 08: where bus and CPU are even, an SD card borne, a device for guesses."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    a_number,
    exercise,
    is_run,
    kl_of,
    opened,
    settings,
)
from moelab.store.devices import DEVICES, Device

NEAR, LESS, KL_BORNE, SPARED = 0.25, 10, 0.05, 0.12
"""Tolerance of the bandwidth, times fewer bytes, the KL borne, the share of waiting spared."""


@exercise("08.1")
def bus_and_cpu_even(answer: Any, *, run: moelab.Run) -> Said:
    """The bandwidth (bytes a second) at which reading takes as long as computing."""
    bandwidth = a_number(answer, "bytes a second")
    decoded = is_run(run, least=8).per_token.iloc[1:]
    compute, read = decoded["compute_ms"], float(decoded["bytes"].mean())
    if bandwidth <= 0:
        raise RefusedError("a bandwidth is above 0")
    bus = 1e3 * read / bandwidth
    low, high = sorted((float(compute.median()), float(compute.mean())))
    said = (
        f"at {bandwidth / 1e6:.0f} MB/s the {read / 1e6:.2f} MB of a token take {bus:.1f} ms, "
        f"and it computes for {low:.1f} ms"
    )
    if not low * (1 - NEAR) <= bus <= high * (1 + NEAR):
        return False, f"{said}. Divide a token's bytes by the time it computes."
    return True, f"{said}. A slower device is the limit itself, behind a faster one it is the CPU."


@exercise("08.2")
def bear_the_sd_card(answer: Any) -> Said:
    """Settings that read a tenth on the SD card, in a quarter of the memory, at a small KL."""
    given = settings(answer, '{"bits": 8}') | {"device": "sd_card"}
    with opened(device="sd_card") as lab:
        quarter, plain = lab.settings.budget_bytes, _ten_tokens(lab).summary()
    with opened(**given) as lab:
        if lab.settings.budget_bytes > quarter:
            raise RefusedError(f"keep to a quarter of the memory, {quarter / 1e6:.2f} MB")
        ours, kl = _ten_tokens(lab).summary(), kl_of(lab)
    was, now = plain["bytes_per_token"] / 1e3, ours["bytes_per_token"] / 1e3
    said = (
        f"{now:.0f} kB a token instead of {was:.0f}, "
        f"{ours['tpot_ms_median']:.0f} ms instead of {plain['tpot_ms_median']:.0f}, KL {kl:.3f}"
    )
    if now > was / LESS:
        return False, f"{said}. Read {LESS} times less: what makes an expert smaller?"
    if kl > KL_BORNE:
        return False, f"{said}. KL is to stay under {KL_BORNE}."
    return True, f"{said}."


@exercise("08.3")
def a_device_for_guesses(answer: Any) -> Said:
    """A device of one's own on which looking one layer ahead spares some of the waiting."""
    if not isinstance(answer, Device) or not answer.emulated:
        raise RefusedError(f'give a device, Device("mine", 1e9, 0.1, 8); this is {answer!r}')
    if answer.latency_ms > 50 or answer.bandwidth_bytes_s < 5e6:  # pyright: ignore[reportOptionalOperand]
        raise RefusedError("a class cannot wait for that: 50 ms and 5 MB/s are the limits")
    name = "exercise 08.3"
    DEVICES[name] = answer
    try:
        with opened(device=name) as lab:
            without = _waits(lab)
        with opened(device=name, prefetch=1) as lab:
            ahead = _waits(lab)
    finally:
        del DEVICES[name]
    spared = 1 - ahead / without if without else 0.0
    said = f"{without:.1f} ms of waiting a token without looking ahead, {ahead:.1f} ms with it"
    if without < 1:
        return False, f"{said}: next to nothing to spare. Make it slower, but how?"
    if spared < SPARED:
        return False, f"{said} ({-spared:+.0%}). Is its bus busy all the time? Guesses need room."
    return True, f"{said} ({-spared:+.0%}). Latency can be hidden, a full bus cannot."


def _ten_tokens(lab: moelab.Lab) -> moelab.Run:
    prompt = lab.prompts()["novel"][1]
    return lab.generate(prompt, max_new_tokens=11, ignore_eos=True, seed=1)


def _waits(lab: moelab.Lab) -> float:
    """Median waiting of a decoded token, ms."""
    return float(_ten_tokens(lab).per_token["stall_ms"].iloc[1:].median())
