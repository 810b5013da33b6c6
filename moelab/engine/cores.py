"""Jobs shared among cores: numbered chunks of one job at a time, taken without a lock or the GIL.

A job is published as one 64-bit word, ``epoch | chunks | next``, that every core adds one to: the
word it finds says which chunk is its own, and whether there is one. So a core that comes late, or
never, costs nothing: whoever published takes the chunks that are left, and only waits for those
that somebody has begun. Workers look for a job for a moment (`PATIENCE`) after the last one, giving
way to whoever wants the core, then sleep. What this module does not know: what a chunk is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from moelab.engine.vectors import AVX2, intrinsic_of, kernel

_I64 = ir.IntType(64)
_WORD, _DONE, JOB, SIZE = 0, 64, 128, 384
"""Byte offsets in a board: the word, the chunks done, the job's own 32 numbers; and its size."""
_BITS, _MASK = 20, (1 << 20) - 1
PATIENCE = 2000
"""Looks for a job before a worker sleeps: 1.6 ms, measured on two cores of an AMD EPYC."""


def _pointer(b: Any, address: ir.Value) -> ir.Value:
    return b.inttoptr(address, ir.PointerType(_I64))


@intrinsic_of(types.int64(types.intp))
def _load(b: Any, args: list[ir.Value]) -> ir.Value:
    return b.load_atomic(_pointer(b, args[0]), "seq_cst", 8)


@intrinsic_of(types.void(types.intp, types.int64))
def _store(b: Any, args: list[ir.Value]) -> None:
    b.store_atomic(args[1], _pointer(b, args[0]), "seq_cst", 8)


@intrinsic_of(types.int64(types.intp, types.int64))
def _add(b: Any, args: list[ir.Value]) -> ir.Value:
    return b.atomic_rmw("add", _pointer(b, args[0]), args[1], "seq_cst")


@intrinsic_of(types.void())
def _pause(b: Any, args: list[ir.Value]) -> None:  # noqa: ARG001
    if AVX2:
        kind = ir.FunctionType(ir.VoidType(), [])
        function = b.module.globals.get("llvm.x86.sse2.pause") or ir.Function(
            b.module, kind, "llvm.x86.sse2.pause"
        )
        b.call(function, [])


_yield = (
    types.ExternalFunction("sched_yield", types.int32()) if hasattr(os, "sched_yield") else None
)


@kernel
def _relax() -> None:
    for _ in range(8):
        _pause()
    if _yield is not None:
        _yield()


@kernel
def publish(board: int, chunks: int) -> None:
    """Offer ``chunks`` chunks of the job that stands on the board; the last job must be over."""
    epoch = (_load(board) >> (2 * _BITS)) + 1
    _store(board + _DONE, 0)
    _store(board, (epoch << (2 * _BITS)) | (chunks << _BITS))


@kernel
def take(board: int) -> int:
    """The number of a chunk that is now the caller's, or -1."""
    word = _load(board)
    if word & _MASK >= (word >> _BITS) & _MASK:
        return -1
    word = _add(board, 1)  # of a later job, perhaps: then this is a chunk of that
    return word & _MASK if word & _MASK < (word >> _BITS) & _MASK else -1


@kernel
def done(board: int) -> None:
    """One chunk is done."""
    _add(board + _DONE, 1)


@kernel
def finish(board: int, chunks: int) -> None:
    """Return when all chunks are done; nobody reads the job after this."""
    while _load(board + _DONE) < chunks:
        _relax()


@kernel
def idle(looks: int) -> int:
    """Wait a moment; one look more."""
    _relax()
    return looks + 1


class Pool:
    """Threads that take chunks of whatever is published on one board.

    Parameters
    ----------
    work
        ``work(board, patience)``: takes and runs chunks until none came for so many looks.
    """

    def __init__(self, work: Callable[[int, int], Any]) -> None:
        self._work, self._threads = work, 1
        self._board = np.zeros(SIZE // 8, np.int64)
        self._address = self._board.ctypes.data
        self._busy = threading.Lock()
        self._bells: list[threading.Semaphore] = []
        self._asleep: list[bool] = []

    @property
    def threads(self) -> int:
        """Cores that share a job, the caller's included."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        if not 1 <= count <= 64:
            raise ValueError(f"threads={count}: 1 to 64")
        while len(self._bells) < count - 1:
            number = len(self._bells)
            self._bells.append(threading.Semaphore(0))
            self._asleep.append(True)
            name = f"moelab-core-{number + 1}"
            threading.Thread(target=self._serve, args=(number,), name=name, daemon=True).start()
        self._threads = count

    def _serve(self, number: int) -> None:
        while True:
            self._asleep[number] = True
            self._bells[number].acquire()
            self._work(self._address, PATIENCE)

    def call(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """``kernel(board, *args)`` on the workers' board, or, where that is taken, on nobody's."""
        if not self._busy.acquire(blocking=False):
            alone = np.zeros(SIZE // 8, np.int64)
            return kernel(alone.ctypes.data, *args)
        try:
            for number in range(self._threads - 1):
                if self._asleep[number]:
                    self._asleep[number] = False
                    self._bells[number].release()
            return kernel(self._address, *args)
        finally:
            self._busy.release()
