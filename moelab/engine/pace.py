"""How fast this machine is at what a token is made of, for the virtual clock of a replay.

Each piece is timed by itself, many times, and the median kept: the kernels on experts read from the
store, the head on a made-up state, a thread that wakes up, and the disk. What it does not know is
what the engine does between them: a recorded run says that (`Computing.fitted`).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moelab.engine import kernels, readers
from moelab.engine.compute import Routed, Serve
from moelab.engine.engine import Engine
from moelab.engine.generation import Stream, threads
from moelab.engine.memory import Slot, pages
from moelab.replays.clock import Computing
from moelab.store.devices import Device
from moelab.store.machine import Machine

TIMES = 12
"""Of each piece."""
APART = 5.0
"""Milliseconds that a core sleeps before it is timed as one that has waited."""
MEMORY_BYTES = 1 << 27
"""Of experts to compute in turn, at most: as many as a cache would hold are timed too fast."""


def measure(engine: Engine) -> Machine:
    """Time this machine on this model; about a second, with nothing else to do.

    ``layer_ms`` is 0: it comes from a run.
    """
    kernels.POOL.threads = engine.threads
    with threads(1), torch.inference_mode():
        experts, calls, slower = {}, [], []
        for bits in engine.store.tiers:
            one, many, rested = _experts(engine, bits)
            count = engine.shape.top_k
            experts[bits] = (many - one) / (count - 1) if count > 1 else one
            calls.append(max(0.0, one - experts[bits]))
            slower.append(rested / many)
        head: Any = engine.model.get_output_embeddings()
        width = head.weight.shape[-1]
        state = torch.randn(1, 1, width, dtype=engine.model.dtype)
        token_ms = _median(lambda: head(state))
    computing = Computing(
        0.0,
        token_ms,
        {bits: max(0.0, ms) for bits, ms in experts.items()},
        call_ms=statistics.median(calls),
        ask_ms=_asking(engine),
        wake_ms=_wake(engine),
        after_wait=max(1.0, statistics.median(slower)),
    )
    return Machine(computing, _disk(engine), engine.loader.readers)


def _median(work: Callable[[], object], *, rest_ms: float = 0.0) -> float:
    """Milliseconds of ``work``, each time after a pause."""
    found = []
    for _ in range(TIMES):
        time.sleep(rest_ms / 1e3)
        begun = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def _experts(engine: Engine, bits: int) -> tuple[float, float, float]:
    """Milliseconds of one call for an expert, for a token's, and for these after a pause."""
    store, shape = engine.store, engine.shape
    experts, count = shape.experts[0], shape.top_k
    held = min(experts, max(count, MEMORY_BYTES // store.slot_bytes[bits]))
    slots = [Slot(bits, pages(store.slot_bytes[bits])) for _ in range(held)]
    for expert, slot in enumerate(slots):
        store.read(0, expert, bits, into=slot.view)
    # The input as the first router is given it: of the width that the experts take.
    x = torch.randn(1, store.manifest.hidden, dtype=engine.model.dtype)
    turn = itertools.count()

    def work(some: int) -> None:
        first = next(turn) * some
        chosen = [(first + i) % held for i in range(some)]
        weights = torch.full((1, some), 1 / some)
        routed = Routed(torch.tensor([chosen]), weights, experts)
        batch = engine.compute.batch(0, x, routed, scale_input=False)
        batch.add([(Serve(e, bits), slots[e]) for e in chosen])
        batch.result()

    work(count)
    rested = _median(lambda: work(count), rest_ms=APART)
    return _median(lambda: work(1)), _median(lambda: work(count)), rested


def _asking(engine: Engine) -> float:
    """Milliseconds of asking the next layer's router with this layer's input."""
    found: list[float] = []

    def heard(layer: int, _x: torch.Tensor, _routed: Routed) -> None:
        begun = time.perf_counter()
        for _coming, idx, weights in engine.adapter.look_ahead(layer, 1):
            Routed(idx, weights, engine.shape.experts[layer])
            found.append(1e3 * (time.perf_counter() - begun))

    with engine.full_precision(lambda _: 0, heard):
        stream = Stream(engine)
        for _ in range(4):
            stream.forward([0])
    return statistics.median(found) if found else 0.0


def _wake(engine: Engine) -> float:
    """Milliseconds from an emulated load that is due to whoever waited for it."""
    store, bits = engine.store, min(engine.store.tiers)
    into, late = pages(store.slot_bytes[bits]), []
    held = Device("a pause", 1e15, 4 * APART, 1)
    before = engine.loader.profile
    engine.loader.use(held)
    try:
        for _ in range(TIMES // 2):
            ticket = engine.loader.submit(store.files[bits], 0, into, urgent=True)
            engine.loader.wait(ticket)
            late.append(1e3 * (time.perf_counter() - ticket.started) - held.latency_ms)
    finally:  # also where a read fails
        engine.loader.use(before)
    return max(0.0, statistics.median(late))


def _disk(engine: Engine) -> Device:
    """The disk as a device: how fast all readers are together, and what a single load waits."""
    store, bits = engine.store, max(engine.store.tiers)
    file, nbytes, depth = store.files[bits], store.slot_bytes[bits], engine.loader.readers
    pace = max(readers.pace(file, nbytes, depth) for _ in range(3))
    into, rng = pages(nbytes), random.Random(0)
    places = [nbytes * rng.randrange(file.nbytes // nbytes) for _ in range(TIMES)]
    turn = iter(places)
    alone = _median(lambda: file.read_into(into, next(turn), direct=True))
    latency = max(0.0, alone - 1e3 * nbytes / pace)
    return Device("this machine's disk", pace, latency, depth)
