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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from moelab.engine import kernels, readers
from moelab.engine.compute import Batch, Routed, Serve
from moelab.engine.engine import Engine
from moelab.engine.generation import Stream, begun_with, threads
from moelab.engine.memory import HUGE, Slot, pages
from moelab.replays.clock import Computing
from moelab.store.blobs import BlobFile
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
        tiers, k = engine.store.tiers, engine.shape.top_k
        found = expert_times(tiers, k, lambda bits: _stored(engine, bits))
        head: Any = engine.model.get_output_embeddings()
        width = head.weight.shape[-1]
        state = torch.randn(1, 1, width, dtype=engine.model.dtype)
        token_ms = median_ms(lambda: head(state))
    computing = Computing(0.0, token_ms, **found, ask_ms=_asking(engine), wake_ms=_wake(engine))
    store, bits = engine.store, max(engine.store.tiers)
    disk = disk_of(store.files[bits], store.slot_bytes[bits], engine.loader.readers)
    return Machine(computing, disk, engine.loader.readers)


def median_ms(work: Callable[[], object], *, rest_ms: float = 0.0) -> float:
    """Milliseconds of ``work``, each time after a pause."""
    found = []
    for _ in range(TIMES):
        time.sleep(rest_ms / 1e3)
        begun = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


Work = Callable[[list[int]], object]
"""Computes the experts in these places, for one token."""


def expert_times(
    tiers: Iterable[int], top_k: int, made: Callable[[int], tuple[int, Work]]
) -> dict[str, Any]:
    """What `Computing` says of experts; ``made`` gives how many are in memory, and their `Work`."""
    experts, calls, slower = {}, [], []
    for bits in tiers:
        one, many, rested = _experts(*made(bits), top_k)
        each = (many - one) / (top_k - 1) if top_k > 1 else one
        experts[bits] = max(0.0, each)
        calls.append(max(0.0, one - each))
        slower.append(rested / many)
    after = max(1.0, statistics.median(slower))
    return {"expert_ms": experts, "call_ms": statistics.median(calls), "after_wait": after}


def _experts(held: int, work: Work, count: int) -> tuple[float, float, float]:
    """Milliseconds of one call for an expert, for a token's, and for these after a pause."""
    turn = itertools.count()

    def some(count: int) -> None:
        first = next(turn) * count
        work([(first + i) % held for i in range(count)])

    some(count)
    rested = median_ms(lambda: some(count), rest_ms=APART)
    return median_ms(lambda: some(1)), median_ms(lambda: some(count)), rested


def _stored(engine: Engine, bits: int) -> tuple[int, Work]:
    """Experts of the store, through the engine's own batch."""
    store, shape = engine.store, engine.shape
    sizes = [store.location(0, expert, bits)[2] for expert in range(shape.experts[0])]
    slots = slots_for(bits, sizes, shape.top_k)
    for expert, slot in enumerate(slots):
        store.read(0, expert, bits, into=slot.view)
    # The input as the first router is given it: of the width that the experts take.
    x = torch.randn(1, store.manifest.hidden, dtype=engine.model.dtype)

    def batch_of(routed: Routed) -> Batch:
        return engine.compute.batch(0, x, routed, scale_input=False)

    return len(slots), lambda chosen: compute(batch_of, chosen, slots)


def slots_for(bits: int, sizes: Sequence[int], top_k: int) -> list[Slot]:
    """Memory of as many experts, of these bytes, as a cache does not hold; at least a token's."""
    held = max(top_k, MEMORY_BYTES // max(sizes))
    return [Slot(bits, pages(nbytes, huge=nbytes >= HUGE)) for nbytes in sizes[:held]]


def compute(batch_of: Callable[[Routed], Batch], chosen: list[int], slots: list[Slot]) -> None:
    """A layer's output from the experts in these slots."""
    weights = torch.full((1, len(chosen)), 1 / len(chosen))
    batch = batch_of(Routed(torch.tensor([chosen]), weights, len(slots)))
    batch.add([(Serve(e, slots[e].bits), slots[e]) for e in chosen])
    batch.result()


def _asking(engine: Engine) -> float:
    """Milliseconds of asking the next layer's router with this layer's input."""
    found: list[float] = []

    def heard(layer: int, _x: torch.Tensor, _routed: Routed) -> None:
        begun = time.perf_counter()
        for _coming, idx, weights in engine.adapter.look_ahead(layer, 1):
            Routed(idx, weights, engine.shape.experts[layer])
            found.append(1e3 * (time.perf_counter() - begun))

    with engine.full_precision(lambda _: 0, heard):
        stream = Stream(engine, begun_with(engine.model, [0]).source)
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


def disk_of(file: BlobFile, nbytes: int, depth: int) -> Device:
    """The disk as a device: how fast all readers are together, and what a single load waits."""
    pace = max(readers.pace(file, nbytes, depth) for _ in range(3))
    into, rng = pages(nbytes), random.Random(0)
    places = [nbytes * rng.randrange(file.nbytes // nbytes) for _ in range(TIMES)]
    turn = iter(places)
    alone = median_ms(lambda: file.read_into(into, next(turn), direct=True))
    latency = max(0.0, alone - 1e3 * nbytes / pace)
    return Device("this machine's disk", pace, latency, depth)
