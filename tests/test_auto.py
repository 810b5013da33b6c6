"""A budget that follows the machine: grown little by little, given back at once, with its cause."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import moelab
from moelab.engine.spare import FILES, Machine
from moelab.runs import auto
from moelab.runs.session import Session

MB = 1_000_000


class Emptied(Machine):
    """A machine whose free memory the test says."""

    spare, waits = 10_000 * MB, 0.0

    def total_bytes(self):
        return 10_000 * MB

    def spare_bytes(self):
        return type(self).spare

    def pressure(self):
        return type(self).waits


@pytest.fixture
def machine(monkeypatch):
    kind = type("Kind", (Emptied,), {})
    monkeypatch.setattr(auto, "Machine", kind)
    monkeypatch.setattr(auto, "LOOK_S", 0.01)
    return kind


def until(lab, budget):
    end = time.monotonic() + 30
    while lab.settings.budget_bytes != budget:
        assert time.monotonic() < end, lab.settings
        time.sleep(0.005)


def test_a_budget_takes_what_is_free_and_gives_it_back_in_a_run_which_says_why(demo_lab, machine):
    lab = demo_lab
    whole, least = (lab.info()[name] for name in ("all_experts_bytes", "minimum_budget_bytes"))
    assert not lab.follows
    how = {"max_new_tokens": 5000, "ignore_eos": True, "changes": {1: {"budget": "auto"}}}
    run = lab.start("Once upon a time", **how)
    until(lab, whole)
    assert lab.follows
    while run.peak_bytes < whole * 0.8:
        run._done.wait(0.01)
    machine.spare = 400 * MB  # below a twentieth of the machine
    until(lab, least)
    machine.waits, machine.spare = 0.5, 10_000 * MB  # free memory does not help where all wait
    time.sleep(0.1)
    assert lab.settings.budget_bytes == least
    machine.waits = 0.0
    until(lab, whole)
    lab.update(budget="30%")
    assert not lab.follows
    written = len(run.tokens)
    while len(run.tokens) < written + 3:
        run._done.wait(0.01)
    run.stop()
    run.join()
    assert run.changes[-1] == (run.changes[-1][0], {"budget": "6.37 MB"})
    told = [change["budget"] for _, change in run.changes[1:-1]]
    assert all("auto: " in words and "of memory to spare" in words for words in told)
    steps = [s.budget_bytes for _, s in run.history]
    growing = [b / a for a, b in itertools.pairwise(steps) if b > a]
    assert len(growing) > 10  # between two tokens it may have grown several times
    for token in run.per_token.itertuples():
        assert token.resident_bytes <= token.budget_bytes


def test_no_token_comes_between_a_budget_and_its_cause(demo_lab, machine, monkeypatch):
    def slowly(session, changes, put=Session._change):
        new = put(session, changes)
        time.sleep(0.1)  # several tokens long
        return new

    monkeypatch.setattr(Session, "_change", slowly)
    how = {"max_new_tokens": 5000, "ignore_eos": True, "changes": {3: {"budget": "auto"}}}
    run = demo_lab.start("Once upon a time", **how)
    until(demo_lab, demo_lab.info()["all_experts_bytes"])
    run.stop()
    run.join()
    told = [change["budget"] for _, change in run.changes]
    assert len(told) > 3
    assert all("auto: " in words for words in told)


def test_a_lab_opened_with_auto_follows_and_what_it_follows_ends_with_it(demo_store, machine):
    with moelab.open(demo_store, budget="auto", progress=False) as lab:
        assert lab.follows
        until(lab, lab.info()["all_experts_bytes"])
        thread = lab._session.auto
    assert thread._session() is None or thread._session().closed
    with pytest.raises(ValueError, match="'25%' or 'auto'"):
        moelab.open(demo_store, budget="automatic")


def test_a_session_has_what_it_follows_before_that_looks(monkeypatch):
    class OneSession:
        auto = None

    class AtOnce(threading.Thread):
        def start(self):
            seen.append(session.auto)

    seen, session = [], OneSession()
    monkeypatch.setattr(auto.threading, "Thread", AtOnce)
    followed = auto.Auto(session)
    assert seen == [followed]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lab_whose_budget_cannot_follow_any_more_does_not_say_that_it_does(demo_lab, machine):
    machine.spare_bytes = lambda _: 1 / 0
    others = set(threading.enumerate())  # of labs that somebody else left open
    demo_lab.update(budget="auto")
    end = time.monotonic() + 30
    while demo_lab.follows or set(threading.enumerate()) - others:
        assert time.monotonic() < end, set(threading.enumerate()) - others
        time.sleep(0.01)


@pytest.mark.parametrize("version", [1, 2])
def test_what_a_control_group_leaves_is_what_can_be_spared(tmp_path, version):
    top = tmp_path / ("memory" if version == 1 else "")
    inner = top / "a"
    inner.mkdir(parents=True)
    (tmp_path / "groups").write_text("3:memory:/a\n" if version == 1 else "0::/a\n")
    limit, used = FILES["memory" if version == 1 else ""]
    (inner / limit).write_text("900000")
    (inner / used).write_text("700000")
    machine = Machine(tmp_path / "groups", tmp_path, tmp_path / "pressure")
    assert (machine.spare_bytes(), machine.pressure()) == (200_000, 0)
    (inner / "memory.stat").write_text("active_file 7\ninactive_file 50000\n")
    (inner / "memory.pressure").write_text("some avg10=12.50 avg60=0.00 avg300=0.00 total=1\n")
    assert (machine.spare_bytes(), machine.pressure()) == (250_000, 0.125)
    (inner / used).write_text("990000")
    assert machine.spare_bytes() == 0


GROUP = Path("/sys/fs/cgroup/memory")
INSIDE = """
import functools, json, os, sys
from pathlib import Path
import moelab
from moelab.runs import auto
# Version 1 tells only the whole machine's pressure, and others work on it too.
auto.Machine = functools.partial(auto.Machine, pressure_file=Path(os.devnull))
lab = moelab.open(sys.argv[1], budget="auto", progress=False, measure_kl=False)
for line in sys.stdin:
    lab.generate("Once", max_new_tokens=4, ignore_eos=True)
    print(json.dumps([lab.settings.budget_bytes, lab.info()["all_experts_bytes"]]), flush=True)
"""
EATER = """
import sys
kept = []
for line in sys.stdin:
    kept.append(b"x" * int(line))
    print("full", flush=True)
"""
LEFT = 60 * 2**20
"""Bytes that the neighbour leaves: fewer than a budget leaves to others, so it has to shrink."""


@pytest.mark.slow
def test_a_neighbour_that_eats_the_memory_of_a_container_gets_it(demo_store, tmp_path):
    group = GROUP / f"moelab-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of version 1 can be made here: {error.strerror}")
    (group / "memory.limit_in_bytes").write_text("2000M")
    into = f"echo $$ > {group}/cgroup.procs && exec "
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    (tmp_path / "groups").write_text(f"1:memory:/{group.name}")
    machine = Machine(tmp_path / "groups")

    def inside(*words):
        words = [sys.executable, "-c", *map(str, words)]
        return subprocess.Popen(["sh", "-c", into + '"$@"', "sh", *words], **streams)

    def told(process, line=""):
        print(line, file=process.stdin, flush=True)
        return process.stdout.readline()

    def eaten():
        """In steps: pages of files that the group has read make room for them."""
        more = machine.spare_bytes() - LEFT
        if more > 0:
            assert told(eater, 2**20 + more // 2) == "full\n"
        return more <= 0

    def wait(condition):
        end = time.monotonic() + 60
        while not condition(*(now := json.loads(told(lab)))):
            assert time.monotonic() < end, (now, machine.spare_bytes())
            time.sleep(0.05)

    lab = inside(INSIDE, demo_store)
    eater = None
    try:
        told(lab)  # it is open
        wait(lambda now, whole: now == whole)
        eater = inside(EATER)
        wait(lambda now, whole: eaten() and now < 0.3 * whole)
        eater.stdin.close()
        eater.wait(30)
        wait(lambda now, whole: now == whole)
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
        status = Path(f"/proc/{lab.pid}/status").read_text()
        assert "VmSwap:\t       0 kB" in status
    finally:
        for process in filter(None, (lab, eater)):
            process.kill()
            process.wait()
        end = time.monotonic() + 30
        while group.exists():  # busy until the system is done with its last process
            assert time.monotonic() < end
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                group.rmdir()
