"""The event log: cheap to write, and true about times it learns later."""

from __future__ import annotations

import time

from moelab.engine.log import EventLog
from moelab.scheduling import events as e


class Ticket:
    started, finished, cancelled = 10.5, 10.75, False


def log_of_two() -> EventLog:
    log = EventLog(10.0)
    log.add(3, 0, (e.LOAD, 1, 7, 16, 4, e.ON_DEMAND, 7), 4096, 10.1)
    log.time_by(Ticket)
    log.add(3, 1, (e.STALL, 1, 7, 16, 4, e.ON_DEMAND, 7), 0, 10.2, 0.55)
    return log


def test_a_load_takes_its_times_from_its_ticket():
    load, stall = log_of_two().records()
    assert (load["start_ms"], load["dur_ms"]) == (500.0, 250.0)
    assert round(float(stall["start_ms"]), 6) == 200.0


def test_a_cancelled_load_read_nothing(monkeypatch):
    monkeypatch.setattr(Ticket, "cancelled", True)
    load, _ = log_of_two().records()
    assert (load["bytes"], load["cause"]) == (0, e.CANCELLED)


def test_rows_before_the_first_load_on_its_way_are_settled(monkeypatch):
    monkeypatch.setattr(Ticket, "finished", 0.0)
    log = log_of_two()
    assert log.settled == 0
    monkeypatch.undo()
    assert log.settled == 2


def test_a_load_on_its_way_when_the_run_ends_changes_its_account_no_more(monkeypatch):
    monkeypatch.setattr(Ticket, "finished", 0.0)
    log = log_of_two()
    log.close()
    told = log.records().tolist()
    monkeypatch.setattr(Ticket, "cancelled", True)
    assert (log.records().tolist(), log.settled) == (told, 2)


def test_a_frame_has_words_for_kinds_and_all_columns():
    frame = log_of_two().frame()
    assert list(frame.columns) == list(e.DTYPE.names)
    assert list(frame.kind) == ["load", "stall"]
    assert list(frame.cause) == ["on demand", "on demand"]
    assert EventLog().frame().empty


def test_writing_the_events_of_a_token_costs_far_below_two_percent_of_it():
    """OLMoE, 16 layers of top-8: some 350 events a token, of 100 ms at the very best on a CPU."""
    per_token_s = 0.100 * 0.02
    best = 1.0
    for _ in range(5):
        log, begun = EventLog(), time.perf_counter()
        for i in range(350):
            log.add(i, 0, (e.HIT, 0, 1, 16, 16, e.NONE, 1), 4096, time.perf_counter())
        best = min(best, time.perf_counter() - begun)
    assert best < per_token_s
