"""Background loads: the right bytes, on demand before prefetch, errors that name the file."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from moelab.engine import memory, readers
from moelab.engine.loader import Loader, LoadError
from moelab.engine.memory import Arena, pages
from moelab.store import devices
from moelab.store.blobs import BlobFile
from moelab.store.devices import Device
from moelab.store.store import Store

PAGE = 4096


def slot(count=1):
    return pages(count * PAGE)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "blobs.bin"
    path.write_bytes(b"".join(bytes([i]) * PAGE for i in range(64)))
    return BlobFile(path)


@pytest.fixture
def loader():
    loader = Loader(3)
    yield loader
    loader.close()


@pytest.fixture
def slow(monkeypatch):
    """A device that does one load at a time, 0.2 s each."""
    monkeypatch.setitem(devices.DEVICES, "slow", Device("slow", PAGE / 0.2, 0.0, 1))
    return "slow"


def test_a_load_brings_the_bytes_of_its_place(loader, file):
    views = [slot(2) for _ in range(8)]
    begun = time.perf_counter()
    tickets = [loader.submit(file, 2 * i * PAGE, v, urgent=True) for i, v in enumerate(views)]
    for i, (ticket, view) in enumerate(zip(tickets, views, strict=True)):
        loader.wait(ticket)
        assert view[0] == 2 * i
        assert view[-1] == 2 * i + 1
        assert begun <= ticket.started <= ticket.finished


def test_a_file_system_without_direct_reads_is_read_all_the_same(loader, file, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    file, view = BlobFile(file.path), slot()
    assert not file.direct
    loader.wait(loader.submit(file, 5 * PAGE, view, urgent=True))
    assert (view == 5).all()


def test_a_direct_read_that_is_refused_falls_back(loader, file):
    unaligned = slot(2)[7 : 7 + PAGE]  # memory that O_DIRECT may refuse
    loader.wait(loader.submit(file, 9 * PAGE, unaligned, urgent=True))
    assert (unaligned == 9).all()


def test_on_demand_goes_before_prefetch(loader, file, slow):
    loader.use(slow)
    guesses = [loader.submit(file, i * PAGE, slot(), urgent=False) for i in range(6)]
    needed = loader.submit(file, 7 * PAGE, slot(), urgent=True)
    loader.wait(needed)
    assert sum(g.done for g in guesses) <= 1  # only the one that was under way
    late = guesses[-1]
    loader.wait(late)  # now it is needed: it overtakes the others
    assert sum(g.done for g in guesses[:-1]) <= 2


def test_a_load_not_begun_can_be_withdrawn(loader, file, slow):
    loader.use(slow)
    first = loader.submit(file, 0, slot(), urgent=True)
    second = loader.submit(file, PAGE, view := slot(), urgent=False)
    assert loader.cancel(second)
    loader.wait(first)
    assert not loader.cancel(first)
    assert second.cancelled
    assert not view.any()


def test_a_file_that_ends_early_is_named(loader, file):
    with pytest.raises(LoadError, match=r"cannot read blobs.bin at 262144"):
        loader.wait(loader.submit(file, 64 * PAGE, slot(), urgent=True))


def test_a_closed_loader_takes_nothing(file):
    loader = Loader(3)
    loader.close()
    with pytest.raises(LoadError, match="open the lab again"):
        loader.submit(file, 0, slot(), urgent=True)


def test_a_done_load_lets_go_of_its_memory(loader, file):
    ticket = loader.submit(file, 0, slot(), urgent=True)
    loader.wait(ticket)
    assert len(ticket.into) == 0


def test_an_arena_never_holds_more_than_its_limit():
    arena = Arena({16: 4 * PAGE, 4: PAGE}, 9 * PAGE)
    big = [arena.take(16), arena.take(16)]
    with pytest.raises(AssertionError, match="exceed the budget"):
        arena.take(16)
    arena.give(big.pop())
    small = [arena.take(4) for _ in range(5)]  # the free big slot had to go for these
    assert arena.held_bytes == 9 * PAGE
    assert arena.peak_bytes == 9 * PAGE
    for s in small:
        arena.give(s)
    arena.set_limit(5 * PAGE)
    assert arena.held_bytes <= 5 * PAGE
    arena.trim()
    assert arena.held_bytes == 4 * PAGE  # the one still in use


def told(what: str, file: str = "status") -> int:
    """Bytes that the system says of this process."""
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/self/{file}").read_text())[1]) << 10


@pytest.mark.skipif(not memory.END_TO_END, reason="slots have address space of their own here")
def test_slots_lie_end_to_end_and_given_back_they_are_gone():
    nbytes = 55 * PAGE  # an expert of the bundled model
    arena, before = Arena({16: nbytes}, 1000 * nbytes), told("RssAnon")
    slots = [arena.take(16) for _ in range(600)]  # more than one piece of address space
    for s in slots:
        s.view[:] = 7
    steps = np.diff(sorted(s.addr for s in slots))
    assert (steps == nbytes).sum() > 590
    assert abs(told("RssAnon") - before - arena.held_bytes) < 8 * memory.HUGE
    for s in slots[::2]:  # holes everywhere
        arena.give(s)
    arena.trim()
    assert arena.held_bytes == 300 * nbytes
    assert abs(told("RssAnon") - before - arena.held_bytes) < 8 * memory.HUGE
    assert all((s.view == 7).all() for s in slots[1::2]), "the others keep what is in them"
    again = [arena.take(16) for _ in range(300)]
    assert {s.addr for s in again} == {s.addr for s in slots[::2]}
    assert not any(s.view.any() for s in again), "what was given back is gone"


@pytest.mark.skipif(not memory.END_TO_END, reason="no huge pages are asked for here")
def test_slots_are_on_huge_pages_where_the_system_has_them():
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.is_file() or "[never]" in mode.read_text():
        pytest.skip("this system has no transparent huge pages")
    before, nbytes = told("AnonHugePages", "smaps_rollup"), 55 * PAGE
    arena = Arena({16: nbytes}, 200 * nbytes)
    slots = [arena.take(16) for _ in range(200)]
    for s in slots:
        s.view[:] = 1
    assert told("AnonHugePages", "smaps_rollup") - before > 0.8 * arena.held_bytes


def test_a_disk_is_measured_once_for_each_size_of_a_load(demo_store, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))
    monkeypatch.setattr(readers, "paces", lambda file, size: asked.append(size) or {1: 5.0, 2: 9.0})
    store = Store.open(demo_store)
    monkeypatch.setattr(BlobFile, "direct", True)
    assert [readers.at_once(store) for _ in range(3)] == [2, 2, 2]
    assert asked == [store.slot_bytes[16]]
    (tmp_path / "disks.json").write_text('{"a": [1]')  # damaged: measured anew
    assert readers.at_once(store) == 2
    assert len(asked) == 2
    monkeypatch.setattr(BlobFile, "direct", False)
    assert readers.at_once(store) == readers.CACHED, "the page cache is no disk"


def test_more_readers_have_to_pay(file):
    assert readers.best({1: 1.0, 2: 1.05, 4: 1.08}) == 1
    assert readers.best({1: 1.0, 2: 2.0, 4: 3.0, 8: 3.2}) == 4
    found = readers.paces(file, PAGE)
    assert list(found) == list(readers.DEPTHS)
    assert min(found.values()) > 0
