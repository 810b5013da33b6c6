"""A machine at the sizes of a model that is not there: its configuration says all that is timed.

Kernels compute made-up experts and a made-up dense matrix of the model's widths, and a scratch file
is read in loads of an expert's size, while all cores compute. What hangs on no size (a thread that
wakes up, the small operations of a layer) is taken from a model that was measured. What it does not
know: attention over a long context, and what the families' own code costs more than that model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moelab.engine import kernels, readers
from moelab.engine.compute import KernelBatch
from moelab.engine.generation import threads
from moelab.engine.memory import pages
from moelab.engine.pace import (
    MEMORY_BYTES,
    Work,
    compute,
    disk_of,
    expert_times,
    median_ms,
    slots_for,
)
from moelab.models.gating import rule_of
from moelab.store.architecture import Architecture
from moelab.store.blobs import BlobFile
from moelab.store.codecs import GROUP, Layout, decode, nbytes
from moelab.store.machine import Machine

DENSE_BITS, DENSE_ROWS = (16, 8, 4), 2048
SCRATCH_BYTES, SETTLE_S = 1 << 27, 1.0
"""A disk that has just been written to may read slowly for a while."""
ORDINARY = 0x3C
"""A byte of which 16-bit floats are near 0.01 or 1: none is so small that a core slows down."""


def of_sizes(
    of: Architecture, known: Machine, tiers: Sequence[int], folder: Path, *, small_ms: float
) -> dict[int, Machine]:
    """Time this machine at the sizes of a model; a `Machine` by the bits of its dense weights.

    Parameters
    ----------
    of
        The model.
    known
        This machine at another model: what hangs on no size is taken from it.
    tiers
        Of the experts.
    folder
        On the disk that is meant: a scratch file is written and read there.
    small_ms
        What a layer takes besides its weights.
    """
    layout, experts = of.layout, SimpleNamespace(**of.described)
    before, kernels.POOL.threads = kernels.POOL.threads, torch.get_num_threads()
    try:
        with threads(1), torch.inference_mode():
            found = expert_times(tiers, of.shape.top_k, lambda bits: _made_up(of, experts, bits))
            paces = {bits: _dense_pace(experts.hidden, layout.dtype, bits) for bits in DENSE_BITS}
    finally:
        kernels.POOL.threads = before  # a lab's that is open
    machine = dataclasses.replace(
        known,
        computing=dataclasses.replace(known.computing, **found),
        **_scratch(folder, of.shape.nbytes[max(tiers)]),
    )
    return {bits: _with_dense(machine, of, bits, pace, small_ms) for bits, pace in paces.items()}


def _with_dense(
    machine: Machine, of: Architecture, bits: int, pace: float, small_ms: float
) -> Machine:
    """The machine with a layer's weights, and the head's, read at that pace."""
    one = bits / 8 + (4 / GROUP if bits < 16 else 0)  # bytes of a weight
    model: Any = of.model
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    beside = head.numel() + (0 if table is head else table.numel())  # a table is looked up in
    layers = (of.dense_bytes(bits) - one * beside) / of.shape.layers
    layer_ms = small_ms + 1e3 * layers / pace
    computing = dataclasses.replace(
        machine.computing, layer_ms=layer_ms, token_ms=1e3 * one * head.numel() / pace
    )
    return dataclasses.replace(machine, computing=computing)


def _made_up(of: Architecture, experts: Any, bits: int) -> tuple[int, Work]:
    """Experts of these sizes whose bytes mean nothing: ordinary numbers at every tier."""
    slots = slots_for(bits, [of.shape.nbytes[bits]] * of.shape.experts[0], of.shape.top_k)
    for slot in slots:
        slot.view[:] = ORDINARY
    x, layout = torch.ones(1, experts.hidden), of.layout
    rule, biased = rule_of(of.layers[0].module), experts.has_bias
    if kernels.supports(layout, experts, rule):
        like: Any = SimpleNamespace(layout=layout, inner=experts.inner, rule=rule, biased=biased)
        return len(slots), lambda chosen: compute(
            lambda routed: KernelBatch(like, 0, x, routed), chosen, slots
        )

    def by_torch(chosen: list[int]) -> None:  # as a family's own forward: decode, multiply
        for expert in chosen:
            for tensor in decode(slots[expert].view, layout, bits).values():
                torch.mv(tensor.view(-1, tensor.shape[-1]), torch.ones(tensor.shape[-1]))

    return len(slots), by_torch


def _dense_pace(width: int, half: str, bits: int) -> float:
    """Bytes a second of dense weights through the kernels, past the caches."""
    width = max(GROUP, width // GROUP * GROUP)
    (work := _dense_work(width, half, bits))()
    return 1e3 * nbytes(_dense(width, half), bits) / median_ms(work)


def _dense(width: int, half: str) -> Layout:
    return Layout((("w", (DENSE_ROWS, width)),), half)


def _dense_work(width: int, half: str, bits: int) -> Callable[[], None]:
    """Multiplies one of so many matrices that no cache holds them."""
    each = nbytes(_dense(width, half), bits)
    memory, turn = pages(each * max(2, MEMORY_BYTES // each)), itertools.count()
    memory[:] = ORDINARY
    x, places = np.ones((1, width), np.float32), len(memory) // each

    def work() -> None:
        place = memory.ctypes.data + each * (next(turn) % places)
        kernels.linear(place, bits, half, x, DENSE_ROWS)

    return work


def _scratch(folder: Path, load: int) -> dict[str, Any]:
    """The disk below ``folder`` at loads of that size, and how many at once it likes."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        block = os.urandom(1 << 20)
        for _ in range(max(SCRATCH_BYTES, 4 * load) >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        time.sleep(SETTLE_S)
        blobs = BlobFile(Path(file.name))
        depth = readers.best(readers.paces(blobs, load)) if blobs.direct else readers.CACHED
        with _beside():
            return {"disk": disk_of(blobs, load, depth), "readers": depth}


@contextlib.contextmanager
def _beside() -> Iterator[None]:
    """Inside, all cores compute dense weights: readers take their turn from that, as in a run."""
    work, over = _dense_work(DENSE_ROWS, "float16", 16), threading.Event()

    def compute() -> None:
        while not over.is_set():
            work()

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
