"""Exercises of notebooks 00, 01 and 05 to 08: live lab, own policy, what if, models, devices."""

from __future__ import annotations

from typing import Any

import numpy as np

import moelab
from moelab.course.verdict import (
    RefusedError,
    Said,
    a_number,
    belady,
    exercise,
    given,
    hit_ratio,
    is_run,
    judged,
    kl_of,
    opened,
    recorded,
    settings,
    written,
)
from moelab.replays.clock import Computing
from moelab.scheduling.budget import minimum_budget
from moelab.scheduling.stream import Knobs
from moelab.store.devices import DEVICES, Device
from moelab.store.machine import Machine
from moelab.strategies import make

TOKENS = 16
WITH = 30
"""Of a run to be judged."""
LIVE_LESS, CARD_LESS = 4, 10
"""Times fewer bytes a token: at the same budget, and on the SD card."""
SPARED, HIDDEN = 0.05, 0.12
"""The share of bytes that a what-if spares, and of waiting that looking ahead hides."""
ROOMS = (18, 24, 36)
"""Experts in memory at which an eviction rule is tried."""
CLEARLY = 0.01
"""The hit ratio by which an eviction rule is to lead."""
FEWER, MORE = 0.25, 0.2
"""Loads on demand that prefetching spares, and bytes it may read more."""
KL_BORNE, NEAR = 0.05, 0.25
"""The KL borne, and the tolerance of a bandwidth."""
LEAST_BANDWIDTH = 1e5
"""Bytes a second; a lower number was meant in MB/s."""
LEARNER = Machine(
    Computing(1.0, 0.5, dict.fromkeys((16, 8, 4, 3, 2), 0.2), 0.1, 0.1),
    Device("a disk", 1e9, 0.1, 4),
    readers=4,
)
"""The machine by whose clock a device is judged: every learner's the same, however busy theirs."""
PROMPT = "It is a truth universally acknowledged, that"


@exercise("00.1")
def experts_of_a_token(answer: Any) -> Said:
    """How many of all experts one token uses."""
    count = a_number(answer, "experts of one token, all layers together", whole=True)
    with opened() as lab:
        info = lab.info()
        run = lab.generate("The", max_new_tokens=4, ignore_eos=True)
    served = run.events.query("token == 3 and kind in ('hit', 'load')")
    used = len(served[["layer", "expert"]].drop_duplicates())
    if count != used:
        return False, (
            f"a token did not use {count:g}. Move along a row of the cache map after a run: a dot "
            "marks what the newest token used. Then count the rows."
        )
    return True, (
        f"{used} of {info['layers'] * info['experts_per_layer']}: {info['layers']} layers, "
        f"{info['top_k']} in each. The others could have stayed on disk."
    )


@exercise("00.2")
def stop_the_waiting(answer: Any) -> Said:
    """A run that reads a quarter of the bytes with no more memory than at the start."""
    run = is_run(given(answer, moelab.Lab, "the lab itself: lab").run, least=TOKENS)
    with opened() as lab:
        allowed = lab.settings.budget_bytes
        plain = lab.generate(run.prompt, max_new_tokens=len(run.token_reports), ignore_eos=True)
    was, now = (r.summary()["bytes_per_token"] / 1e3 for r in (plain, run))
    most = max(token.budget_bytes for token in run.token_reports[1:])
    return judged(
        f"your last run read {now:.0f} kB a token, at 16 bit and LRU it would be {was:.0f}",
        (most > allowed, f"But it took {most / 1e6:.2f} MB; keep to {allowed / 1e6:.2f} MB."),
        (now > was / LIVE_LESS, f"Make it {LIVE_LESS} times less: what makes an expert smaller?"),
        right="The same memory holds more experts when each is smaller.",
    )


@exercise("01.1")
def the_longest_wait(answer: Any, *, run: moelab.Run) -> Said:
    """(token, layer, expert) of the longest single wait of the decoded tokens."""
    given(answer, tuple, "(token, layer, expert)", length=3)
    events = is_run(run, least=TOKENS).events.query("kind == 'stall' and token > 0")
    waits = events.set_index(["token", "layer", "expert"])["dur_ms"].groupby(level=[0, 1, 2]).sum()
    if waits.empty:
        raise RefusedError("nothing waited in this run; take a slower device")
    mine = f"{waits[answer]:.1f} ms" if answer in waits.index else "not at all"
    return judged(
        f"{answer} waited {mine}, the longest wait took {waits.max():.1f} ms",
        (answer != waits.idxmax(), "Click the tallest bar, or sort run.blame(token)."),
        right="Nothing waited longer.",
    )


@exercise("01.2")
def spare_bytes_same_text(answer: Any) -> Said:
    """A what-if that reads less and writes the same text, with no more memory."""
    from moelab.runs.compare import Comparison

    recordings = given(answer, Comparison, "what lab.what_if(run, ...) returns").recordings
    if len(recordings) != 2:
        raise RefusedError(f"these are {len(recordings)} runs; a what-if compares two")
    was, then = (recording.document for recording in recordings.values())
    if len(was["ids"]) < TOKENS:
        raise RefusedError(f"the run has {len(was['ids'])} tokens; take one of {TOKENS}")
    first, second = was["summary"], then["summary"]
    spared = 1 - second["bytes_per_token"] / first["bytes_per_token"]
    at = answer.diverges_at
    return judged(
        f"{first['bytes_per_token'] / 1e3:.0f} kB a token as it was, "
        f"{second['bytes_per_token'] / 1e3:.0f} then ({-spared:+.0%})",
        (second["budget_bytes"] > first["budget_bytes"], "But that takes more memory."),
        (at is not None, f"But the texts part at token {at}. Which decision leaves them alone?"),
        (spared < SPARED, f"Spare {SPARED:.0%}: who should leave when the memory is full?"),
        right="Every token is the same.",
    )


@exercise("05.1")
def beats_lfu(answer: Any) -> Said:
    """An `Evict` that hits clearly more often than LFU, on average over three budgets."""
    both = _with("evict", answer), moelab.strategies.lfu()
    with opened() as lab:
        trace, one = recorded(lab), lab._shape.nbytes[16]
    hits = np.array([[hit_ratio(trace, s, room * one, 16) for s in both] for room in ROOMS])
    rows = [
        f"{room} experts: {mine:.1%}, LFU {lfu:.1%}, Belady {belady(trace, room):.1%}"
        for room, (mine, lfu) in zip(ROOMS, hits, strict=True)
    ]
    mine, lfu = hits.mean(axis=0)
    return judged(
        f"yours hits {mine:.1%} on average, LFU {lfu:.1%} ({'; '.join(rows)})",
        (
            mine < lfu + CLEARLY,
            f"Lead by {100 * CLEARLY:g} percentage point: think of whose turn comes last.",
        ),
    )


@exercise("05.2")
def guesses_that_pay(answer: Any) -> Said:
    """A `Prefetch` that, over LRU, spares loads without reading much more."""
    from moelab.strategies import Prefetch

    strategies = [_with("prefetch", part) for part in (Prefetch(), answer)]
    with opened() as lab:
        trace, knobs = recorded(lab, look_ahead=3), lab.settings.knobs()
    none, mine = (moelab.replay(trace, strategy, knobs) for strategy in strategies)
    fewer = 1 - mine.counts["load"] / none.counts["load"]
    more = mine.bytes / none.bytes - 1
    return judged(
        f"over LRU, loads on demand: {none.counts['load']} without, {mine.counts['load']} with "
        f"yours ({-fewer:+.0%}); {mine.counts['prefetch']} prefetches, bytes read {more:+.0%}",
        (fewer < FEWER, f"Spare {FEWER:.0%} or more: who is asked early and not there yet?"),
        (more > MORE, f"Read {MORE:.0%} more at most: leave out the doubtful guesses."),
    )


@exercise("05.3")
def half_way_to_belady(answer: Any) -> Said:
    """A head start λ that hits half-way between LRU and Belady at a small KL."""
    lam = a_number(answer, "λ from 0 to 1")
    with opened(route="cache_prior") as lab:
        lab.update(lam=lam)
        led, kl = written(lab, PROMPT, 40).summary()["hit_ratio"], kl_of(lab)
    with opened() as lab:
        plain = written(lab, PROMPT, 40)
        best = belady(plain.trace, lab.info()["budget_experts"])
    lru = plain.summary()["hit_ratio"]
    half = (lru + best) / 2
    return judged(
        f"λ = {lam:g} hits {led:.1%} at KL {kl:.3f}; LRU {lru:.1%}, Belady on LRU's own "
        f"routing {best:.1%}",
        (led < half, f"Half-way is {half:.1%}: lead the router more."),
        (kl > KL_BORNE, f"KL is to stay under {KL_BORNE}: lead it less."),
        right="Belady's bound holds for a fixed routing; yours is not.",
    )


def _with(role: str, part: Any) -> moelab.Strategy:
    """LRU, nothing ahead, with one part taken by the answer."""
    from moelab.strategies import Prefetch, lru

    try:
        return lru().replace(prefetch=Prefetch()).replace(**{role: part})
    except TypeError as error:
        raise RefusedError(str(error)) from error


@exercise("06.1")
def enough_for_lru(answer: Any, *, run: moelab.Run) -> Said:
    """Fewest experts with which LRU hits nine tenths of what Belady hits with room for 30."""
    experts = a_number(answer, "experts", whole=True)
    is_run(run, least=TOKENS)
    found = moelab.policy_or_memory(run.trace, experts=WITH)
    if found.enough is None or not 0 <= experts < len(found.lru):
        raise RefusedError(f"{experts:g} experts: 0 to {len(found.lru) - 1}")
    goal = 0.9 * found.best
    mine, less = (float(found.lru[max(0, int(experts) - n)]) for n in (0, 1))
    return judged(
        f"with room for {experts:g} LRU hits {mine:.1%}, nine tenths of the best possible with "
        f"{WITH} are {goal:.1%}",
        (mine < goal, "More memory."),
        (less >= goal, "Less would do."),
    )


@exercise("06.2")
def half_as_long(answer: Any) -> Said:
    """Settings that halve a token's predicted time on an SD card at a small KL."""
    ours = settings(answer, '{"strategy": "lfu"}', device="sd_card")
    asked = {k: v for k, v in ours.items() if k not in ("device", "budget")}
    if "budget" in answer:
        raise RefusedError("the budget is given: a quarter of the memory")
    with opened() as lab:
        trace = recorded(lab, look_ahead=1)
    where = {"budget": "25%", "device": "sd_card"}
    plain, mine = (
        moelab.predict(trace, LEARNER, **{"strategy": "lru", **where, **own}).token_ms
        for own in ({}, asked)
    )
    with opened(**ours) as lab:
        kl = kl_of(lab)
    return judged(
        f"{mine:.1f} ms a token instead of {plain:.1f} (modelled), KL {kl:.3f} (measured)",
        (2 * mine > plain, "Half is asked for: which bytes need not be read?"),
        (kl > KL_BORNE, f"KL is to stay under {KL_BORNE}."),
    )


@exercise("07.1")
def first_hit(answer: Any) -> Said:
    """Fewest experts with which LRU hits anything in Qwen3-30B-A3B's modelled routing."""
    experts = a_number(answer, "experts", whole=True)
    found = moelab.policy_or_memory(moelab.routing("qwen3-30b-a3b", tokens=32), experts=1500)
    if not 1 <= experts < len(found.lru):
        raise RefusedError(f"{experts:g} experts: 1 to {len(found.lru) - 1}")
    mine, less = (float(found.lru[int(experts) - n]) for n in (0, 1))
    return judged(
        f"with room for {experts:g} LRU hits {mine:.2%}, with one less {less:.2%}",
        (mine == 0, "Nothing is hit yet."),
        (less > 0, "It began before."),
    )


@exercise("07.2")
def least_memory(answer: Any) -> Said:
    """GB that Qwen3-30B-A3B needs at 4 bit: dense weights, and one layer's experts of a token."""
    from moelab.store.architecture import Architecture  # needs torch, which a help does not

    gb, of = a_number(answer, "GB"), Architecture("qwen3-30b-a3b")
    budget = minimum_budget(of.shape, make("lru"), Knobs(of.shape.all_bytes(4), 4))
    least = (of.dense_bytes(4) + budget) / 1e9
    return judged(
        f"{gb:g} GB said; dense weights take {of.dense_bytes(4) / 1e9:.2f} GB at 4 bit",
        (gb < 0.9 * least, "That is too little to hold the dense weights and one layer's experts."),
        (gb > 1.1 * least, "Less will do: which experts have to be there at one moment?"),
    )


@exercise("08.1")
def bus_and_cpu_even(answer: Any, *, run: moelab.Run) -> Said:
    """The bandwidth (bytes a second) at which reading takes as long as computing."""
    bandwidth = a_number(answer, "bytes a second")
    decoded = is_run(run, least=8).per_token.iloc[1:]
    compute, read = decoded["compute_ms"], float(decoded["bytes"].mean())
    if bandwidth <= 0:
        raise RefusedError("a bandwidth is above 0")
    if bandwidth < LEAST_BANDWIDTH:
        raise RefusedError(
            f"{bandwidth:g} bytes a second: did you mean MB/s? Then give {bandwidth:g}e6"
        )
    bus = 1e3 * read / bandwidth
    low, high = sorted((float(compute.median()), float(compute.mean())))
    near = low * (1 - NEAR) <= bus <= high * (1 + NEAR)
    return judged(
        f"at {bandwidth / 1e6:.0f} MB/s the {read / 1e6:.2f} MB of a token take {bus:.1f} ms, "
        f"and it computes for {low:.1f} ms",
        (not near, "Divide a token's bytes by the time it computes."),
        right="A slower device is the limit itself, behind a faster one it is the CPU.",
    )


@exercise("08.2")
def bear_the_sd_card(answer: Any) -> Said:
    """Settings that read a tenth on the SD card, in a quarter of the memory, at a small KL."""
    ours = settings(answer, '{"bits": 8}', device="sd_card")
    with opened(device="sd_card") as lab:
        quarter, plain = lab.settings.budget_bytes, _ten_tokens(lab).summary()
    with opened(**ours) as lab:
        if lab.settings.budget_bytes > quarter:
            raise RefusedError(f"keep to a quarter of the memory, {quarter / 1e6:.2f} MB")
        mine, kl = _ten_tokens(lab).summary(), kl_of(lab)
    was, now = plain["bytes_per_token"] / 1e3, mine["bytes_per_token"] / 1e3
    return judged(
        f"{now:.0f} kB a token instead of {was:.0f}, {mine['tpot_ms_median']:.0f} ms instead of "
        f"{plain['tpot_ms_median']:.0f}, KL {kl:.3f}",
        (now > was / CARD_LESS, f"Read {CARD_LESS} times less: what makes an expert smaller?"),
        (kl > KL_BORNE, f"KL is to stay under {KL_BORNE}."),
    )


@exercise("08.3")
def a_device_for_guesses(answer: Any) -> Said:
    """A device of one's own on which looking one layer ahead spares some of the waiting."""
    device = given(answer, Device, what := 'a device, Device("mine", 1e9, 0.1, 8)')
    if device.bandwidth_bytes_s is None:
        raise RefusedError(f"give {what}; this is {answer!r}")
    if device.latency_ms > 50 or device.bandwidth_bytes_s < 5e6:
        raise RefusedError("a class cannot wait for that: 50 ms and 5 MB/s are the limits")
    name, waits = "exercise 08.3", []
    with opened() as lab:
        trace = recorded(lab, look_ahead=1)
    DEVICES[name] = device
    try:
        for layers in (0, 1):
            found = moelab.predict(
                trace, LEARNER, device=name, strategy="lru", budget="25%", prefetch=layers
            )
            waits.append(float(found.per_token["stall_ms"].mean()))
    finally:
        del DEVICES[name]
    without, ahead = waits
    spared = 1 - ahead / without if without else 0.0
    return judged(
        f"by the virtual clock, {without:.1f} ms of waiting a token without looking ahead and "
        f"{ahead:.1f} ms with it ({-spared:+.0%})",
        (without < 1, "There is next to nothing to spare. Make it slower, but how?"),
        (spared < HIDDEN, "Is its bus busy all the time? Guesses need room."),
        right="Latency can be hidden, a full bus cannot.",
    )


def _ten_tokens(lab: moelab.Lab) -> moelab.Run:
    return written(lab, lab.prompts()["novel"][1], 11)
