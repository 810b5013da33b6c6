"""The dashboard without a browser: traits in, traits out, over a lab that has no model."""

from __future__ import annotations

import base64
import dataclasses
import gc
import itertools
import math
import re
import threading
import time
import weakref
import xml.dom.minidom

import numpy as np
import pytest

import moelab
from fake_lab import FakeLab
from moelab import strategies
from moelab.runs.saved import SavedRuns
from moelab.runs.tokens import COLUMNS, figures
from moelab.spelling import about, in_words, merge_changes, size
from moelab.strategies import Evict, Parameter, Precision
from moelab.views.picture import lay_out
from moelab.widgets import Dashboard, frame, notebook
from moelab.widgets.frame import Framer
from moelab.widgets.queries import explained_now as reasons


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.01)


def publishers():
    return [t for t in threading.enumerate() if t.name == "moelab-dashboard"]


@pytest.fixture
def lab():
    lab = FakeLab(token_ms=0.05)
    yield lab
    if lab.run is not None:
        lab.run.stop()


@pytest.fixture
def dashboard(lab):
    others = publishers()  # of a test whose lab is not collected yet
    dashboard = Dashboard(lab)
    yield dashboard
    dashboard.close()
    wait_until(lambda: not set(publishers()) - set(others))


def says(dashboard, do, **content):
    """What the browser would send."""
    dashboard._handle_custom_msg({"do": do, **content}, [])


def tokens(dashboard):
    return dashboard.frame["first"] + dashboard.frame["count"]


def column(shown, name):
    rows = np.frombuffer(shown["values"], "<f4").reshape(len(COLUMNS), shown["count"])
    return rows[COLUMNS.index(name)]


class TestFrame:
    def test_before_a_run_the_whole_picture_is_there(self, lab):
        shown = framer_of(lab).build()
        assert (shown["run"], shown["running"], shown["count"]) == (0, False, 0)
        assert len(shown["map"]["bits"]) == 8 * 32
        assert len(shown["map"]["uses"]) == 8 * 32 * 4
        assert shown["resident"]["budget_bytes"] == lab.settings.budget_bytes

    def test_tokens_arrive_as_one_array_by_column(self, lab):
        run = lab.start("Once", max_new_tokens=12, measure_kl=True)
        run.join()
        shown = framer_of(lab).build()
        want = run.token_reports
        assert "".join(shown["texts"]) == run.text
        assert np.allclose(column(shown, "on demand"), [r.stall_ms["on demand"] for r in want])
        assert np.allclose(column(shown, "kl"), [r.kl for r in want])
        assert column(shown, "bytes").tolist() == [np.float32(r.bytes) for r in want]

    def test_figures_are_those_of_the_summary(self, lab):
        lab.update(low_bits=4)
        run = lab.start("Once", max_new_tokens=30, measure_kl=True)
        run.join()
        whole, summary = framer_of(lab).build()["whole"], run.summary()
        for key in ("tokens_per_s", "hit_ratio", "bytes_per_token", "stall_share", "kl_mean"):
            assert whole[key] == pytest.approx(summary[key], rel=1e-5), key

    def test_figures_of_nothing_are_none_not_nan(self):
        assert set(figures(np.empty((0, len(COLUMNS)))).values()) == {0, None}

    def test_resident_bytes_are_those_of_the_map(self, lab):
        lab.start("Once", max_new_tokens=5).join()
        shown = framer_of(lab).build()
        bits = np.frombuffer(shown["map"]["bits"], np.uint8)
        assert shown["resident"]["experts"] == (bits > 0).sum()
        assert shown["resident"]["bytes"] == (bits == 16).sum() * 221_184

    def test_a_report_put_right_later_is_read_again(self, lab, monkeypatch):
        run = lab.start("Once", max_new_tokens=4)
        run.join()
        framer, reports = framer_of(lab), run.token_reports
        framer.build()
        reports[1] = dataclasses.replace(reports[1], text=" put right", bytes=7)
        monkeypatch.setattr(type(run), "token_reports", reports)
        shown = framer.build()
        assert shown["texts"][1] == " put right"
        assert column(shown, "bytes")[1] == 7

    def test_a_new_run_starts_over(self, lab):
        framer = framer_of(lab)
        lab.start("Once", max_new_tokens=9).join()
        first = framer.build()
        lab.start("Twice", max_new_tokens=3).join()
        second = framer.build()
        assert (first["count"], second["count"], second["prompt"]) == (9, 3, "Twice")
        assert first["run"] != second["run"]

    def test_long_runs_keep_the_newest_tokens(self, lab, monkeypatch):
        monkeypatch.setattr(frame, "LONGEST", 10)
        monkeypatch.setattr(frame, "STRIDE", 4)
        framer = framer_of(lab)
        for tokens, first in ((10, 0), (11, 4), (14, 4), (25, 16)):
            lab.start("Once", max_new_tokens=tokens).join()
            shown = framer.build()
            assert (shown["first"], shown["count"]) == (first, tokens - first)
            assert len(shown["texts"]) == shown["whole"]["tokens"] == tokens - first

    def test_measured_and_emulated_tokens_are_never_averaged_together(self, lab):
        lab.hold_at = 10
        run = lab.start("Once", max_new_tokens=40)
        wait_until(lambda: len(run.token_reports) == 10)
        lab.update(device="hdd")
        run.go_on.set()
        run.join()
        shown = framer_of(lab).build()
        assert [o["emulated"] for o in shown["origins"]] == [False, True]
        since = shown["origins"][-1]["token"]
        emulated = [r for r in lab.run.token_reports if r.device == "hdd"]
        assert since == 40 - len(emulated) == 10
        total = sum(r.total_ms for r in emulated)
        assert shown["whole"]["tokens_per_s"] == pytest.approx(1e3 * len(emulated) / total)

    def test_why_a_run_ended_is_said(self, lab):
        lab.start("Once", max_new_tokens=5).join()
        assert framer_of(lab).build()["ended"] == "all 5 tokens asked for"
        run = lab.start("Once", max_new_tokens=100_000)
        wait_until(lambda: len(run.token_reports) > 3)
        assert framer_of(lab).build()["ended"] == ""
        run.stop()
        run.join()
        count = len(run.tokens)
        assert framer_of(lab).build()["ended"] == f"stopped at {count} of 100000 tokens"

    def test_figures_of_a_run_under_other_settings_say_which(self, lab):
        lab.start("Once", max_new_tokens=5).join()
        framer = framer_of(lab)
        assert framer.build()["of"] == ""
        lab.update(bits=8)
        assert framer.build()["of"] == "lru, 25 %, 16 bit, disk"
        lab.update(bits=16)
        assert framer.build()["of"] == "", "they are those in force again"

    def test_one_sentence_is_always_there_and_a_change_says_what_it_did(self, lab):
        framer = framer_of(lab)
        assert framer.build()["sentence"] == frame.IDLE
        lab.hold_at = 20
        run = lab.start("Once", max_new_tokens=40)
        wait_until(lambda: len(run.token_reports) == 20)
        before = framer.build()
        account = run.account(before["span"][0])
        assert (before["sentence"], before["change"]) == (account.sentence(run.limits()), "")
        lab.update(bits=2)
        run.go_on.set()
        run.join()
        after = framer.build()
        account = run.account(after["span"][0])
        assert after["sentence"] == account.sentence(run.limits())
        assert re.match(r"bits 16 \N{RIGHTWARDS ARROW} 2: .*wait \N{MINUS SIGN}\d", after["change"])

    def test_a_slider_drag_is_one_mark(self):
        drag = [(5, {"budget": "8 MB"}), (6, {"budget": "7 MB"}), (9, {"budget": "6 MB"})]
        marks = merge_changes([*drag, (11, {"bits": "4"}), (40, {"bits": "2", "device": "hdd"})])
        assert [m["label"] for m in marks] == ["budget 6 MB", "bits 4", "bits 2, device hdd"]
        assert [(m["first"], m["last"]) for m in marks] == [(5, 9), (11, 11), (40, 40)]

    def test_a_mark_that_says_too_much_is_cut(self):
        (mark,) = merge_changes([(5, {"evict": "a policy of many words", "w_lru": "0.25" * 9})])
        assert mark["label"].startswith("evict a policy of many words, w lru 0.25")
        assert mark["label"].endswith("…")
        assert len(mark["label"]) <= 48

    def test_errors_are_sentences(self):
        assert in_words(ValueError("raise it to 4 MB")) == "raise it to 4 MB"
        assert in_words(KeyError("x")) == "KeyError: 'x'"
        assert in_words(MemoryError()) == "MemoryError"


def framer_of(lab):
    return Framer(lab, lab.info())


class TestActions:
    def test_controls_act_on_the_lab_at_once(self, lab, dashboard):
        says(dashboard, "update", changes={"budget": 9_000_000}, n=1)
        says(dashboard, "update", changes={"bits": 4}, n=2)
        assert (lab.settings.budget_bytes, lab.settings.bits) == (9_000_000, 4)
        assert dashboard.controls["budget_bytes"] == 9_000_000
        assert dashboard.controls["budget_experts"] == 9_000_000 // 65_536
        assert dashboard.controls["answered"] == 2

    def test_run_and_stop(self, lab, dashboard):
        says(dashboard, "run", form={"prompt": "Once", "max_new_tokens": 5000})
        wait_until(lambda: lab.run.token_reports)
        assert lab.run.prompt == "Once"
        says(dashboard, "stop")
        wait_until(lambda: not lab.run.running)
        assert len(lab.run.token_reports) < 5000
        assert not dashboard.error

    def test_a_refused_setting_is_drawn_by_its_control_until_mended(self, lab, dashboard):
        before = lab.settings
        says(dashboard, "update", where="budget", changes={"budget": 1000}, n=1)
        assert dashboard.error["where"] == "budget"
        text = dashboard.error["text"]
        assert re.search(r"raise it to \d+ bytes \([\d.]+ [kM]B\) or more", text)
        assert text.endswith(f"it stays at {size(before.budget_bytes)}")
        assert lab.settings == before
        assert dashboard.controls["budget_bytes"] == before.budget_bytes
        says(dashboard, "update", changes={"budget": 9_000_000}, n=2)
        assert dashboard.error == {}

    def test_a_refused_run_is_drawn(self, dashboard):
        says(dashboard, "run", form={"prompt": "", "max_new_tokens": 5}, where="run")
        assert dashboard.error["where"] == "run"
        assert "empty" in dashboard.error["text"]
        says(dashboard, "run", form={"prompt": "Once", "max_new_tokens": 1}, where="run")
        assert dashboard.error == {}

    def test_what_ends_a_run_is_in_the_frame(self, lab, dashboard):
        dashboard.start()
        lab.fail_at = 50
        run = lab.start("Once", max_new_tokens=500)
        wait_until(lambda: dashboard.frame["error"])
        assert "experts-4.bin" in dashboard.frame["error"]
        wait_until(lambda: not dashboard.frame["running"])
        with pytest.raises(RuntimeError):
            run.join()

    def test_that_a_run_is_going_on_is_said_only_while_one_is(self, lab, dashboard):
        dashboard.start()
        for _ in range(2):
            says(dashboard, "run", form={"prompt": "Once", "max_new_tokens": 100_000})
        assert "a run is going on" in dashboard.error["text"]
        wait_until(lambda: dashboard.frame["running"])
        says(dashboard, "stop")
        wait_until(lambda: not dashboard.error)
        says(dashboard, "run", form={"prompt": "Once", "max_new_tokens": "many"})
        assert dashboard.error["where"] == "run"
        lab.start("Once", max_new_tokens=100_000)  # in a cell
        wait_until(lambda: not dashboard.error)
        lab.run.stop()

    def test_an_answer_comes_to_whatever_waits_for_one(self, dashboard):
        for n, message in enumerate(({"do": "stop"}, {"do": "run", "form": {}}, {"do": "update"})):
            says(dashboard, **message, n=n)
            assert dashboard.controls["answered"] == n, message

    @pytest.mark.parametrize("message", ["dance", "", "stop"])
    def test_unknown_messages_and_stop_without_a_run_are_harmless(self, dashboard, message):
        says(dashboard, message)
        assert not dashboard.error

    def test_a_hundred_updates_from_ten_threads(self, lab, dashboard):
        def drag(start):
            for i in range(10):
                budget = 5_000_000 + 10_000 * (10 * start + i)
                says(dashboard, "update", changes={"budget": budget}, n=10 * start + i)

        threads = [threading.Thread(target=drag, args=(i,)) for i in range(10)]
        lab.start("Once", max_new_tokens=300)
        dashboard.start()
        for t in threads:
            t.start()
        for t in threads:
            t.join(20)
        assert not dashboard.error
        assert len(lab.updates) == 100
        wait_until(lambda: dashboard.controls["budget_bytes"] == lab.settings.budget_bytes)
        assert dashboard.controls["answered"] == 99


class Nearest(Evict):
    """Keep what lies close ahead; an eviction policy as a learner writes it in a cell."""

    parameters = (
        Parameter("pull", "how much nearness counts", low=0.0, high=2.0),
        Parameter("order", "which way round", choices=("near", "far")),
    )

    def __init__(self):
        self.pull, self.order = 0.5, "near"

    def score(self, view):
        return -self.pull * view.layer_of


class OneTier(Precision):
    def tier(self, request, asked, view):
        return asked


class TestDecisions:
    def test_every_named_strategy_is_offered_once_with_a_line_that_explains_it(self, dashboard):
        offered = [p for group in dashboard.options["presets"] for p in group["entries"]]
        assert sorted(p["name"] for p in offered) == sorted(strategies.NAMES)
        assert all(p["text"] and p["title"] for p in offered)
        assert all(g["entries"] for g in dashboard.options["presets"])

    def test_each_decision_offers_the_distinct_parts_of_all_strategies(self, dashboard):
        offered = {d["role"]: d["choices"] for d in dashboard.options["decisions"]}
        assert list(offered) == ["allocate", "route", "precision", "evict", "prefetch"]
        for role, choices in offered.items():
            have = {type(strategies.make(name).parts[role]) for name in strategies.NAMES}
            stand_for = {type(strategies.make(c["value"]).parts[role]) for c in choices}
            assert stand_for == have, role
            titles = [c["title"] for c in choices]
            assert len(titles) == len(set(titles)) == len(have), role

    @pytest.mark.parametrize("name", strategies.NAMES)
    def test_what_a_strategy_is_made_of_is_shown_and_can_be_chosen(self, lab, name):
        now = frame.chosen(strategies.make(name))
        offered = {d["role"]: {c["value"]: c for c in d["choices"]} for d in frame.decisions()}
        for role, part in now["parts"].items():
            if part["value"] or part["title"] != "nothing ahead":  # no strategy is made with that
                assert offered[role][part["value"]]["title"] == part["title"], role
        assert now["about"] == next(
            p["text"] for g in frame.presets() for p in g["entries"] if p["name"] == name
        )

    def test_a_part_that_is_switched_off_is_shown_as_what_it_does(self, lab):
        made = strategies.make("lru")
        titles = {role: part["title"] for role, part in frame.chosen(made)["parts"].items()}
        assert (titles["precision"], titles["prefetch"]) == ("as asked for", "nothing ahead")
        assert repr(made) == "<Strategy lru>"
        on = made.tuned(depth=1)
        assert frame.chosen(on)["parts"]["prefetch"]["title"].startswith("the next layers' gates")
        assert repr(on) == "<Strategy lru: depth=1>"

    @pytest.mark.parametrize("name", strategies.NAMES)
    def test_its_parameters_are_explained_and_within_their_range(self, lab, name):
        for p in frame.chosen(strategies.make(name))["parameters"]:
            assert p["text"], p["name"]
            assert p["value"] in p["choices"] or p["low"] <= p["value"] <= p["high"], p["name"]

    def test_one_decision_is_changed_and_the_others_stay(self, lab, dashboard):
        says(dashboard, "update", where="decide_evict", changes={"evict": "lfu"}, n=1)
        assert type(lab.settings.strategy.evict) is type(strategies.lfu().evict)
        assert lab.settings.strategy.name == "lru*"
        now = dashboard.controls
        assert now["parts"]["evict"]["value"] == "lfu"
        assert now["label"] == "LRU, mixed"
        assert now["about"] == f"LRU but for evict: {now['parts']['evict']['title']}"
        says(dashboard, "update", where="strategy", changes={"strategy": "lru"}, n=2)
        assert dashboard.controls["about"] == "One pool; the least recently used expert leaves."

    def test_a_class_of_ones_own_is_shown_by_its_name(self, lab, dashboard):
        lab.update(evict=Nearest())
        dashboard.start()
        wait_until(lambda: dashboard.controls["parts"]["evict"]["title"] == "Nearest")
        assert dashboard.controls["parts"]["evict"]["value"] == ""
        own = strategies.Strategy("mine", Nearest())
        assert about(own) == "a strategy of your own"

    def test_its_parameters_come_and_go_with_the_part_and_reach_the_lab(self, lab, dashboard):
        lab.update(evict=Nearest())
        says(dashboard, "update", where="pull", changes={"pull": 1.25}, n=1)
        shown = {p["name"]: p for p in dashboard.controls["parameters"]}
        text = {"name": "pull", "text": "how much nearness counts", "roles": ["evict"]}
        limits = {"low": 0.0, "high": 2.0, "step": 0.05, "choices": []}
        assert shown["pull"] == text | limits | {"value": 1.25}
        assert lab.settings.strategy.evict.pull == 1.25
        assert (shown["order"]["value"], shown["order"]["choices"]) == ("near", ["near", "far"])
        says(dashboard, "update", where="order", changes={"order": "far"}, n=2)
        assert lab.settings.strategy.evict.order == "far"
        says(dashboard, "update", where="decide_evict", changes={"evict": "lfu"}, n=3)
        assert not {"pull", "order"} & {p["name"] for p in dashboard.controls["parameters"]}

    def test_a_refused_parameter_is_drawn_by_its_control(self, lab, dashboard):
        lab.update(evict=Nearest())
        says(dashboard, "update", where="pull", changes={"pull": 3}, n=1)
        assert dashboard.error["where"] == "pull"
        assert "0 to 2" in dashboard.error["text"]
        assert lab.settings.strategy.evict.pull == 0.5
        says(dashboard, "dismiss")
        assert dashboard.error == {}

    def test_thresholds_are_there_where_the_precision_part_reads_them(self, lab, dashboard):
        lab.update(precision=OneTier())
        says(dashboard, "update", where="bits", changes={"bits": 8}, n=1)
        assert "low_bits" in dashboard.controls["unread"]
        assert "t1" not in {p["name"] for p in dashboard.controls["parameters"]}
        says(dashboard, "update", where="strategy", changes={"strategy": "lru"}, n=2)
        assert "low_bits" not in dashboard.controls["unread"]
        assert not dashboard.controls["parameters"], "without low bits they have no effect"
        says(dashboard, "update", where="low_bits", changes={"low_bits": 4}, n=3)
        says(dashboard, "update", where="t1", changes={"t1": 0.95}, n=4)
        assert dashboard.error["where"] == "t1"
        says(dashboard, "update", where="t2", changes={"t2": 0.7}, n=5)
        shown = {p["name"]: p["value"] for p in dashboard.controls["parameters"]}
        assert (shown["t1"], shown["t2"]) == (0.6, 0.7) == (lab.settings.t1, lab.settings.t2)

    def test_an_unknown_part_is_drawn_by_its_drop_down(self, dashboard):
        says(dashboard, "update", where="decide_evict", changes={"evict": "nobody"}, n=1)
        assert dashboard.error["where"] == "decide_evict"
        assert "nobody" in dashboard.error["text"]


class TestWhy:
    @pytest.fixture
    def filled(self, lab):
        lab.start("Once", max_new_tokens=20).join()
        return lab

    @staticmethod
    def resident(lab):
        return next((int(at), int(e)) for at, e in np.argwhere(lab.cache_map()["bits"] > 0))

    def test_the_terms_of_a_resident_expert_come_beside_its_neighbours(self, filled):
        layer, expert = self.resident(filled)
        said = reasons(filled, layer, expert)
        assert (said["layer"], said["expert"], said["error"]) == (layer, expert, "")
        term = said["terms"][0]
        every = {e: terms["uses since"] for e, terms in filled.why(layer).items()}
        assert term["name"] == "uses since"
        assert term["value"] == every[expert]
        assert (term["low"], term["high"]) == (min(every.values()), max(every.values()))
        assert reasons(FakeLab(), 0, 0)["terms"] == [], "it is not resident"

    def test_the_view_asks_and_is_answered_once(self, filled, dashboard, monkeypatch):
        sent = []
        monkeypatch.setattr(dashboard, "send", sent.append)
        layer, expert = self.resident(filled)
        says(dashboard, "why", layer=layer, expert=expert)
        assert [m["why"]["expert"] for m in sent] == [expert]
        assert sent[0]["why"]["policy"] == dashboard.controls["parts"]["evict"]["title"]

    def test_what_a_policy_of_ones_own_may_say_or_raise_is_told(self, lab, monkeypatch):
        monkeypatch.setattr(lab, "why", lambda _: {7: {"priority": math.inf}})
        (term,) = reasons(lab, 0, 7)["terms"]
        assert term["value"] is None  # JSON knows no infinity
        monkeypatch.setattr(lab, "why", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in reasons(lab, 0, 7)["error"]

    def test_asking_all_the_time_harms_no_run(self, demo_lab):
        """Each eviction policy is asked by others while a run goes on, and decides all the same."""
        evict = next(d for d in frame.decisions() if d["role"] == "evict")
        for name in [choice["value"] for choice in evict["choices"]]:
            strategy = strategies.make(name)  # as without a calibration
            demo_lab.update(strategy=strategy, budget="50%")
            run, said = demo_lab.start("The", max_new_tokens=12, ignore_eos=True), 0
            while run.running or not (said or name == "on_demand"):  # which keeps nothing for long
                for layer, expert in np.argwhere(demo_lab.cache_map()["bits"] > 0).tolist():
                    answer = reasons(demo_lab, layer, expert)
                    said += len(answer["terms"])
                    assert not answer["error"], name
                    time.sleep(0.001)
            run.join()
            assert len(run.tokens) == 12
            live = run.events[~run.events.kind.isin(["stall"])]
            again = moelab.replay(run.trace).decisions
            assert list(zip(live.kind, live.layer, live.expert, strict=True)) == [
                (d.kind, d.layer, d.expert) for d in again
            ], name


class TestPublishing:
    def test_what_is_known_of_a_lab_is_asked_when_settings_change(self, lab, dashboard):
        dashboard.start()
        before = lab.asked_info
        lab.start("Once", max_new_tokens=60).join()
        wait_until(lambda: tokens(dashboard) == 60 and not dashboard.frame["running"])
        assert lab.asked_info == before
        lab.update(bits=8)
        wait_until(lambda: dashboard.controls["bits"] == 8)
        assert lab.asked_info == before + 1

    def test_a_run_and_settings_from_python_show_up(self, lab, dashboard):
        dashboard.start()
        lab.update(bits=4)
        wait_until(lambda: dashboard.controls["bits"] == 4)
        run = lab.start("From a cell", max_new_tokens=60)
        wait_until(lambda: dashboard.frame["prompt"] == "From a cell")
        run.join()
        wait_until(lambda: tokens(dashboard) == 60 and not dashboard.frame["running"])

    @pytest.mark.alone
    def test_frames_are_paced_while_they_are_acknowledged(self, lab, dashboard):
        dashboard.observe(lambda c: says(dashboard, "ack", seq=c["new"].get("seq", -1)), "frame")
        dashboard.start()
        lab.start("Once", max_new_tokens=100_000)
        wait_until(lambda: dashboard.frame["running"])
        begun, before = time.monotonic(), dashboard.frame["seq"]
        time.sleep(2)
        per_s = (dashboard.frame["seq"] - before) / (time.monotonic() - begun)
        assert 4 < per_s < 16

    @pytest.mark.alone
    def test_a_view_that_does_not_keep_up_gets_fewer_frames(self, lab, dashboard):
        dashboard.start()
        lab.start("Once", max_new_tokens=100_000)
        wait_until(lambda: dashboard.frame["running"] and dashboard.frame["seq"] > 6)
        begun, before = time.monotonic(), dashboard.frame["seq"]
        time.sleep(2)
        per_s = (dashboard.frame["seq"] - before) / (time.monotonic() - begun)
        assert 0.5 < per_s < 4

    def test_nothing_is_sent_while_nothing_changes(self, lab, dashboard):
        lab.start("Once", max_new_tokens=5).join()
        dashboard.start()
        wait_until(lambda: tokens(dashboard) == 5)
        time.sleep(0.6)
        before = dashboard.frame["seq"]
        time.sleep(1)
        assert dashboard.frame["seq"] == before

    def test_the_last_token_is_always_shown(self, lab, dashboard):
        dashboard.start()
        for n in (1, 2, 17):
            lab.start("Once", max_new_tokens=n).join()
            wait_until(lambda n=n: tokens(dashboard) == n and not dashboard.frame["running"])

    def test_a_fault_while_reading_the_lab_is_drawn_and_survived(self, lab, dashboard, monkeypatch):
        dashboard.start()
        with monkeypatch.context() as broken:
            broken.setattr(lab, "cache_map", lambda: 1 / 0)
            wait_until(lambda: "ZeroDivisionError" in dashboard.error.get("text", ""))
        lab.start("Once", max_new_tokens=3).join()
        wait_until(lambda: tokens(dashboard) == 3)
        wait_until(lambda: not dashboard.error)


class TestLife:
    def test_threads_follow_the_views(self, dashboard):
        assert not publishers()
        says(dashboard, "hello", view="a")
        says(dashboard, "hello", view="b")
        assert len(publishers()) == 1
        says(dashboard, "gone", view="a")
        assert len(publishers()) == 1
        says(dashboard, "gone", view="b")  # the cell was run again, or the page is closed
        wait_until(lambda: not publishers())
        says(dashboard, "hello", view="c")  # a reload
        assert len(publishers()) == 1

    def test_close_ends_the_thread_and_leaves_the_run(self, lab):
        dashboard = Dashboard(lab)
        dashboard.start()
        run = lab.start("Once", max_new_tokens=100_000)
        dashboard.close()
        wait_until(lambda: not publishers())
        assert run.running

    def test_a_hundred_starts_and_stops_leave_one_thread_or_none(self, dashboard):
        for _ in range(100):
            dashboard.start()
            dashboard.stop()
        wait_until(lambda: not publishers())
        dashboard.start()
        assert len(publishers()) == 1

    def test_one_that_is_gone_for_good_lets_its_lab_go(self):
        lab = FakeLab(token_ms=0.05)
        old, gone = Dashboard(lab), weakref.ref(lab)
        says(old, "hello", view="a")
        says(old, "run", form={"prompt": "Once", "max_new_tokens": 100_000})
        wait_until(lambda: old.frame["count"])
        new = Dashboard(FakeLab())  # the cell is run again
        try:
            del lab
            says(old, "gone", view="a")
            wait_until(lambda: gc.collect() >= 0 and gone() is None)  # its run has ended too
            assert old.frame == {}
            says(old, "hello", view="b")
            assert "run its cell again" in old.error["text"]
            assert not publishers()
        finally:
            old.close()
            new.close()

    def test_one_whose_lab_somebody_keeps_comes_back(self, lab, dashboard):
        says(dashboard, "hello", view="a")
        run = lab.start("From a cell", max_new_tokens=100_000)
        other = Dashboard(lab)
        other.close()
        says(dashboard, "gone", view="a")
        assert run.running, "only what was started here is stopped"
        says(dashboard, "hello", view="b")
        wait_until(lambda: dashboard.frame.get("prompt") == "From a cell")
        wait_until(lambda: len(publishers()) == 1)

    def test_the_newest_keeps_its_lab_while_nobody_looks(self):
        dashboard = Dashboard(FakeLab())
        says(dashboard, "hello", view="a")
        says(dashboard, "gone", view="a")  # the notebook's tab is closed, its kernel goes on
        gc.collect()
        says(dashboard, "hello", view="b")
        assert not dashboard.error
        dashboard.close()

    def test_what_a_cell_showed_is_closed_when_it_is_run_again(self, lab, monkeypatch):
        where = {}
        monkeypatch.setattr(notebook, "_here", lambda: (where["cell"], where["execution"]))
        monkeypatch.setattr(notebook, "_cells", {})
        shown = [Dashboard(lab) for _ in range(4)]

        def run(cell, execution, *dashboards):
            where.update(cell=cell, execution=execution)
            for one in dashboards:
                one._repr_mimebundle_()

        run("first", "1", shown[0], shown[1])  # two in one cell
        run("second", "2", shown[1])
        assert all(one.comm for one in shown)
        run("first", "3", shown[2])
        assert [one.comm is None for one in shown] == [True, False, False, False]
        run("", "4", shown[3])  # who knows where
        assert [one.comm is None for one in shown] == [True, False, False, False]
        run("second", "5", shown[3])
        assert shown[1].comm is None
        for one in shown:
            one.close()
        wait_until(lambda: not publishers())

    def test_a_cell_that_is_run_again_keeps_the_runs_its_former_lab_had_saved(self, monkeypatch):
        told, execution = [], itertools.count()
        monkeypatch.setattr(notebook, "_here", lambda: ("cell", str(next(execution))))
        monkeypatch.setattr(SavedRuns, "take_over", lambda *both: told.append(both))
        old, new = FakeLab(), FakeLab()
        old.saved, new.saved = SavedRuns(), SavedRuns()
        for lab in (old, new):
            Dashboard(lab)._repr_mimebundle_()
        assert told == [(new.saved, old.saved)]
        Dashboard.newest().close()
        wait_until(lambda: not publishers())

    def test_two_dashboards_of_one_lab(self, lab, dashboard):
        other = Dashboard(lab)
        try:
            dashboard.start()
            other.start()
            says(other, "update", changes={"bits": 8}, n=1)
            lab.start("Once", max_new_tokens=20).join()
            for one in (dashboard, other):
                wait_until(lambda one=one: tokens(one) == 20 and one.controls["bits"] == 8)
        finally:
            other.close()

    def test_state_is_small_enough_for_the_wire(self, dashboard):
        state = dashboard.get_state()
        assert len(state["_esm"]) + len(state["_css"]) < 200_000
        assert "import " not in re.sub(r"//.*|/\*.*?\*/", "", state["_esm"], flags=re.DOTALL)
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", state["_esm"] + state["_css"])


class TestReport:
    @pytest.fixture
    def report(self, lab, dashboard):
        lab.update(device="hdd", measure_kl=True)
        lab.hold_at = 10
        run = lab.start("if a < b & c:", max_new_tokens=60)
        wait_until(lambda: len(run.token_reports) == 10)
        lab.update(bits=4)
        run.go_on.set()
        run.join()
        lab.hold_at = None
        return dashboard.report()

    def test_it_is_one_well_formed_self_contained_piece(self, report):
        html, svg = report.html(), report.svg()
        image = xml.dom.minidom.parseString(html).documentElement
        kind, data = image.getAttribute("src").split(",")
        assert (image.tagName, kind) == ("img", "data:image/svg+xml;base64")
        assert base64.b64decode(data).decode() == svg
        xml.dom.minidom.parseString(svg)
        assert "<script" not in svg
        assert not re.findall(r"https?://(?!www\.w3\.org/)", svg)
        assert len(html) < 100_000

    def test_it_says_settings_figures_and_where_times_come_from(self, report, lab):
        svg = report.svg()
        assert "emulated: HDD, 50 MB/s" in svg
        assert "4 bit" in svg
        assert "bits 4" in svg  # the mark on the time axis
        assert "60 tokens" in svg
        assert "if\u00a0a\u00a0&lt;\u00a0b\u00a0&amp;\u00a0c:" in svg
        assert "60 tokens" in report.html()  # for who cannot see the picture

    def test_it_says_what_a_mix_is_made_of(self, lab, dashboard):
        lab.update(evict="lfu")
        title = strategies.make("lfu").evict.title
        assert f"LRU but for evict: {title}" in dashboard.report().svg()

    def test_it_is_a_copy_that_later_runs_do_not_change(self, report, lab):
        before = report.html()
        lab.start("Other", max_new_tokens=3).join()
        assert report.html() == before

    def test_it_can_be_drawn_before_any_run(self, dashboard):
        svg = dashboard.report().svg()
        xml.dom.minidom.parseString(svg)
        assert "no token yet" in svg

    def test_the_saved_dashboard_cell_holds_a_picture(self, dashboard):
        data, _ = dashboard._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        xml.dom.minidom.parseString(data["text/html"])
        assert publishers()  # showing it starts it

    def test_a_big_map_stays_small(self):
        lab = FakeLab(layers=48, experts=128, top_k=8, token_ms=0)
        lab.start("Once", max_new_tokens=3).join()
        dashboard = Dashboard(lab)
        report = dashboard.report()
        dashboard.close()
        xml.dom.minidom.parseString(report.svg())
        assert len(report.html()) < 1_000_000

    def test_text_with_control_characters_stays_well_formed(self, lab, dashboard):
        lab.start("a\x00b\tc\u2028d\r\n\x1b[0m", max_new_tokens=2).join()
        xml.dom.minidom.parseString(dashboard.report().svg())

    def test_text_is_broken_at_the_edge_and_at_line_ends(self):
        rows = lay_out(["abc", "de\n\nf"], columns=4)
        assert ["".join(letter for letter, _ in row) for row in rows] == ["abcd", "e", "", "f"]
        assert [piece for row in rows for _, piece in row] == [0, 0, 0, 1, 1, 1]
