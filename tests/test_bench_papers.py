"""The suite of the papers: how contenders are written, what is compared with what, what is kept."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import moelab
import tiny_models
from moelab import bench
from moelab.bench.cases import ROLES, Case, above_budget, opened, run_figures, settle
from moelab.bench.kept import Kept
from moelab.bench.papers import edgemoe, everyone, hobbit, paths, suite, swapmoe
from moelab.bench.papers.results import FULL, QUICK, Change, Ratio, Results
from moelab.bench.tables import circumstances

TABLES = Path(__file__).parent.parent / "notebooks" / "PAPERS_MEASURED.md"
SVG = "{http://www.w3.org/2000/svg}"

# -- contenders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        *((name, {}) for name in moelab.strategies.NAMES),  # brings its own settings
        (
            "on_demand + allocate edgemoe + prefetch edgemoe + evict edgemoe",
            {"allocate": "edgemoe", "prefetch": "edgemoe", "evict": "edgemoe"},
        ),
        (
            "edgemoe + rule=printed + width=2 + tolerated=0.05",
            {"rule": "printed", "width": 2, "tolerated": 0.05},
        ),
    ],
)
def test_a_contender_is_a_strategy_with_decisions_of_others_and_parameters(words, settings):
    assert set(ROLES) == {"allocate", "route", "precision", "evict", "prefetch"}
    assert bench.contender(words) == {"strategy": words.split(" + ")[0]} | settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lru + evict magic", "unknown strategy 'magic' in 'lru [+] evict magic'; choose one of"),
        ("lru + wings", "unknown addition 'wings'"),
        ("lru + look-ahead 7", "unknown addition 'look-ahead 7'"),
        ("lru + prefetch hobbit + look-ahead", "'look-ahead' .*sets prefetch a second time"),
        ("lru + 4 bit + mixed 16/4", "'mixed 16/4' .*sets bits a second time"),
    ],
)
def test_what_is_not_a_contender_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        bench.contender(words)


def test_a_mixed_contender_runs_as_written(demo_store):
    case = Case("on_demand + 4 bit + prefetch hobbit + evict lru", "50%", "nvme")
    with opened("demo", case) as lab:
        now, parts = lab.settings, lab.settings.strategy.parts
    assert (now.bits, now.device, now.prefetch) == (4, "nvme", 2)
    assert type(parts["prefetch"]).__name__ == "StackedGates"
    assert type(parts["evict"]).__name__ == "LRU"


def test_one_lab_set_to_case_after_case_is_set_like_a_new_one(demo_store):
    cases = [Case("hobbit", "50%", "sd_card"), Case("lru + look-ahead", "25%", "disk")]
    cases += [Case("lru", "25%", "disk"), Case("swapmoe", "37.5%", "disk")]
    with moelab.open("demo", measure_kl=False) as lab:
        for case in cases:
            settled = settle(lab, case)
            with opened("demo", case) as new:
                fresh = new.settings
            assert settled.knobs() == fresh.knobs(), case
            assert settled.strategy.name == fresh.strategy.name


# -- what is measured of a run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_run(demo_store):
    with opened("demo", Case("hobbit", "25%", "disk")) as lab:
        return lab.generate("Once upon a time", max_new_tokens=16, ignore_eos=True)


def test_figures_count_the_events_of_decoded_tokens(mixed_run):
    told, events = run_figures(mixed_run), mixed_run.events
    decoded = [e for e in events.itertuples() if e.token > 0]
    loads = [e for e in decoded if e.kind == "load"]
    assert told["high"] == sum(e.bits == e.bits_asked for e in loads)
    assert told["low"] == sum(e.bits < e.bits_asked for e in loads)
    assert told["high"] + told["low"] == mixed_run.per_token["loads"].iloc[1:].sum()
    assert told["skipped"] == told["skips"] == sum(e.kind == "skip" for e in decoded)
    assert told["stalls"] == sum(e.kind == "stall" for e in decoded)
    assert told["generated"] == mixed_run.tokens


def runs(*speeds: float, text: int = 1) -> list[dict]:
    """Figures of runs that differ in speed."""
    return [
        {"tokens_per_s": s, "generated": [text], "stalls": 2, "peak_resident_bytes": int(s)}
        for s in speeds
    ]


A, B = Case("hobbit", "25%", "nvme"), Case("lru", "25%", "nvme")


def test_a_row_is_the_median_the_mean_of_counts_and_the_largest_memory():
    measured = Results("demo", ["a"], QUICK, runs={A: runs(10, 30, 20)})
    assert list(measured.rows([A, B])) == [A]
    row = measured.rows([A, B])[A]
    assert (row["tokens_per_s"], row["tokens_per_s_min"], row["tokens_per_s_max"]) == (20, 10, 30)
    assert (row["stalls"], row["peak_resident_bytes"], row["repeats"]) == (2, 30, 3)


def test_ratios_are_taken_prompt_by_prompt():
    measured = Results("demo", ["a"], QUICK, runs={A: runs(20, 90, 40), B: runs(10, 30, 40)})
    ratio = measured.times_as_fast(A, B)
    assert ratio == Ratio(2, 1, 3)  # of 2, 3, 1; medians alone would say 4 / 3
    assert str(ratio) == "2.00x (1.00-3.00)"
    assert measured.times_as_fast(A, Case("lfu", "25%", "nvme")) is None


def test_the_best_ratio_is_one_of_which_all_pairs_agree_that_it_is_not_1():
    noisy, sure = ("25%", "nvme", "lru"), ("25%", "sd_card", "lru")
    ratios = {noisy: Ratio(3, 0.5, 4), sure: Ratio(1.2, 1.1, 1.4)}
    assert Ratio(0.8, 0.7, 0.9).told_apart
    best = hobbit._versus(Results("demo", ["a"], QUICK), ratios)[0]
    assert best.ours == "1.20x (1.10-1.40) over lru"
    del ratios[sure]
    told = hobbit._versus(Results("demo", ["a"], QUICK), ratios)
    assert [row.ours for row in told[:2]] == ["none is told apart from 1"] * 2


def test_every_case_has_the_same_prompts_however_often_it_runs():
    measured = Results("demo", list("abcdef"), FULL)
    assert "".join(map(measured.prompt_of, range(FULL.compared))) == "abcabc"


def test_the_log_says_who_was_above_the_budget(mixed_run):
    shape = mixed_run.trace.shape
    start = sum(shape.size(*copy) for copy in mixed_run.trace.resident)
    budgets = [token.budget_bytes for token in mixed_run.token_reports]
    peak = mixed_run.summary()["peak_resident_bytes"]

    def above(resident: int, budgets: list[int], events=mixed_run.events) -> int:
        return above_budget(events, resident, shape, budgets)

    assert above(start, budgets) == above(start, [peak] * 16) == 0
    assert above(start, [peak - 1] * 16) > 0
    assert above(start + budgets[0], budgets) == 16
    kept = mixed_run.events[mixed_run.events["kind"] != "evict"]  # as if nothing ever left
    assert above(start, budgets, kept) > 0


def test_where_a_rival_is_better_is_said():
    ours, others = {"25%": 1.0, "50%": 0.5, "75%": 0.2}, {"25%": 2.0, "50%": 0.6, "75%": 0.1}
    assert swapmoe._where_lower(ours, others) == "worse at 25%, 50%; better at 75%"


def test_the_same_text_means_every_prompt():
    measured = Results("demo", ["a"], QUICK, runs={A: runs(1, 1), B: [*runs(1), *runs(1, text=7)]})
    others = (A, B, Case("lfu", "25%", "nvme"))
    assert [measured.same_text(A, other) for other in others] == [True, False, None]


# -- the whole suite, in a minute ---------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(demo_store) -> suite.Suite:
    return suite.papers(quick=True, progress=False)


def frame(quick: suite.Suite, section: str, table: int = 0):
    return quick.reports[section].tables[table].frame


@pytest.mark.slow
def test_the_ladder_has_every_rung_and_preloading_never_changes_the_text(quick):
    ladder = frame(quick, edgemoe.NAME).set_index("rung")
    assert list(ladder.index) == list(edgemoe.RUNGS)
    told = ladder["same text"]
    assert {rung for rung in ladder.index if told[rung] == "yes"} == set(edgemoe.SAME_BITS)
    assert told.drop(list(edgemoe.SAME_BITS)).isna().all()
    assert ladder.loc["on demand", "KL"] < everyone.UNCHANGED < ladder.loc["on demand, 4 bit", "KL"]
    assert ladder.loc["everything in RAM", "peak MB"] == pytest.approx(
        quick.results.info["all_experts_bytes"] / 1e6
    )
    whole = ladder["peak MB"]["everything in RAM":"everything in RAM, 4 bit"]
    assert whole.is_monotonic_decreasing
    assert whole.iloc[2] < 0.4 * whole.iloc[0]
    assert ladder.loc["everything in RAM, 8 bit", "KL"] < ladder.loc["on demand, 4 bit", "KL"]
    budget = ladder["budget MB"].astype(float)
    assert (ladder["peak MB"] <= budget + 0.005).all()
    assert budget["on demand"] < budget["+ buffer (EdgeMoE)"] < budget["everything in RAM"]


def test_what_the_bits_cost_where_they_were_chosen_is_told_with_its_sign():
    bits = {"tolerated": 0.02, "low": 2, "high": 4, "experts at low": 7, "calibrated loss": 0.015}
    assert "holds 7 experts at 2 bit and the others at 4 bit: perplexity +1.5%" in edgemoe._said(
        bits, summaries=False
    )
    every = bits | {"high": 2, "experts at low": 0, "calibrated loss": -0.016}
    assert "holds every expert at 2 bit: Rouge-2 +1.6%" in edgemoe._said(every, summaries=True)


@pytest.mark.slow
def test_hobbit_meets_everyone_and_its_questions_are_answered(quick):
    speeds = frame(quick, hobbit.NAME)
    assert set(speeds["strategy"]) == {hobbit.OURS, *hobbit.OTHERS}
    assert (speeds["strategy"] == "on_demand").sum() == 1
    ratios = frame(quick, hobbit.NAME, 1)
    assert ratios["as fast as"].tolist() == list(hobbit.OTHERS)
    assert ratios["NVMe SSD"].str.fullmatch(r"[\d.]+x \([\d.]+-[\d.]+\)").all()
    assert len(quick.reports[hobbit.NAME].tables) == 6
    assert len(quick.results.runs[Case(hobbit.OURS, "25%", "nvme")]) == QUICK.compared
    text = quick.markdown()
    for note in (hobbit.DISK, hobbit.LIVE, edgemoe.WHY_MORE):
        assert note in text
    shares = frame(quick, hobbit.NAME, 3)[list(hobbit.PAPER_SHARES)].sum(axis=1)
    assert shares.tolist() == pytest.approx([1, 1])
    gates = quick.results.found["gates"]
    assert list(gates) == ["+1", "+2", "+3"]
    assert all(0 < right["first"] <= 1 for right in gates.values())
    penalties = quick.results.found["penalties"]["25%"]
    assert set(penalties) == {"HOBBIT", "HOBBIT, equal weights", "LRU", "LFU"}
    assert min(penalties.values()) > 0


@pytest.mark.slow
def test_swapmoe_never_waits_and_never_exceeds_its_budget(quick):
    table = frame(quick, swapmoe.NAME)
    swaps = table[table["strategy"] == "swapmoe"]
    assert len(swaps) == 2
    assert swaps["stalls a run"].tolist() == [0, 0]
    assert swaps["tokens above budget"].tolist() == [0, 0]  # by the log; see the test that it tells
    assert table.set_index("strategy").loc["on_demand", "stalls a run"] > 0
    whole = swaps.set_index("budget").loc["100%", "KL"]
    assert whole < everyone.UNCHANGED < swaps.set_index("budget").loc["25%", "KL"]
    dense = quick.results.found["dense bits"]
    assert [row["bits"] for row in dense] == ["16", "8", "4"]
    assert dense[0]["perplexity"] == 0
    assert dense[0]["MB"] > dense[-1]["MB"]
    plans = quick.results.found["plans"]["25%"]
    counts = {name: plans[name]["experts"] for name in ("planned", "uniform")}
    assert all(len(experts) == quick.results.info["layers"] for experts in counts.values())
    assert max(counts["uniform"]) - min(counts["uniform"]) <= 1


@pytest.mark.slow
def test_everyone_is_a_point(quick):
    table = frame(quick, everyone.NAME).set_index("strategy")
    assert set(moelab.strategies.NAMES) - {"in_ram"} <= set(table.index)
    assert any(name.startswith("in_ram + ") for name in table.index)
    assert table["NVMe SSD: tokens/s"].is_monotonic_decreasing
    for exact in ("on_demand", "lru", "lfu", "layer_lru", "mixtral_offloading", "moe_infinity"):
        assert table.loc[exact, "KL"] < everyone.UNCHANGED, exact


@pytest.mark.slow
def test_record_and_report_hold_every_case_and_table(quick):
    record, text = json.loads(json.dumps(quick.record())), quick.markdown("here.svg")
    assert record["complete"]
    assert len(record["cases"]) == len(quick.results.runs)
    assert list(record["sections"]) == [s.NAME for s in suite.SECTIONS]
    beside = [r for section in record["sections"].values() for r in section["theirs_and_ours"]]
    assert all(row["theirs"] and row["ours"] for row in beside)
    assert record["machine"]["cores"] >= 1
    reports = quick.reports.values()
    assert re.findall("^### .*", text, re.MULTILINE) == [f"### {r.title}" for r in reports]
    for caption in (table.caption for report in reports for table in report.tables):
        assert f"**{caption}**" in text
    assert "](here.svg)" in text
    assert not re.search(r"\bnan\b", text.lower())


@pytest.mark.slow
def test_the_files_are_written_and_the_kept_file_keeps_the_rest(quick, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{suite.BEGIN}\nwas here before\n{suite.END}\nafter\n")
    (tmp_path / "pictures").mkdir()
    files = bench.Files(
        tmp_path / "p.json", tmp_path / "p.md", readme, tmp_path / "pictures" / "p.svg"
    )
    assert files.write(quick) == [files.json, files.markdown, files.picture, files.tables]
    text = readme.read_text()
    assert text.startswith(f"# before\n{suite.BEGIN}\n")
    assert text.endswith(f"{suite.END}\nafter\n")
    assert "was here before" not in text
    assert "](pictures/p.svg)" in text
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"README.md", "pictures", "p.json", "p.md"}  # nothing half written is left


# -- summaries by Rouge-2 -----------------------------------------------------------------------

WORDS = re.findall(r"\w+", "a small package of tools that read and write files of many other kinds")
PAIRS = [(" ".join(WORDS[i:] + WORDS[:i]), " ".join(WORDS[i : i + 3])) for i in range(8)]


def test_a_change_is_of_the_same_texts_and_told_apart_beyond_two_standard_errors():
    change = Change.of([0.5, 0.2, 0.3], [0.4, 0.2, 0.1])
    assert change.mean == pytest.approx(0.1)
    assert change.error == pytest.approx(0.1 / 3**0.5)
    assert str(change) == "+0.1000 ± 0.0577"
    assert not change.told_apart
    assert Change.of([0.5, 0.4, 0.4], [0.2, 0.2, 0.1]).told_apart


def test_summaries_are_written_once_for_each_choice_of_bits(demo_lab):
    words = [edgemoe.RUNGS[name] for name in edgemoe.RUNGS] + ["lru", "hobbit", "swapmoe"]
    cases = [Case(who, "100%", on) for who in words for on in edgemoe.DEVICES]
    of_texts, of_pairs = Results("demo", ["a"], QUICK), Results("x", ["a"], QUICK, pairs=PAIRS)
    for results in (of_texts, of_pairs):
        known = {}
        for case in cases:
            results.note(case, settle(demo_lab, case), known)
    written = {of_pairs.scored_as(case) for case in cases}
    fixed = {case.strategy for case in written if case.device == "disk"}
    assert fixed == {"in_ram", "in_ram + 8 bit", "in_ram + 4 bit", edgemoe.BITS, "hobbit"}
    assert {case.device for case in written if case.strategy == "swapmoe"} == set(edgemoe.DEVICES)
    assert len({of_texts.scored_as(case) for case in cases}) == len(words) + 1


def test_paths_are_ranked_by_their_tokens_and_the_table_is_tried_on_others():
    common, rare = [[1, 2, 3]] * 97, [[1, 2, 4], [5, 6, 7], [0, 0, 0]]
    told = paths.shares(np.array([[1, 2, 3], [1, 2, 3], [5, 6, 7]]), np.array(common + rare), 8)
    assert (told["tokens"], told["distinct"], told["needed"]) == (100, 4, 3)
    assert (told["of_distinct"], told["of_possible"]) == (0.75, 3 / 8**3)
    assert (told["top"], told["top_unseen"], told["once"]) == (0.97, 0.97, 0.75)
    counted = np.array([[1, 2, 3], [4, 2, 5], [4, 2, 5]])
    rows = paths.foretold(counted, np.array([[1, 2, 3], [4, 2, 5], [9, 3, 5]]), 10)
    assert [row["layer"] for row in rows] == [1, 2]
    assert [row["table"] for row in rows] == pytest.approx([2 / 3, 1])  # layer 2 by what is known
    assert [row["frequencies"] for row in rows] == pytest.approx([2 / 3, 2 / 3])


INFO = {"top_k": 1, "all_experts_bytes": 96_000, "encoder_layers": 1}


def of_summaries() -> Results:
    """As if measured: each case's Rouge-2 by its memory, and paths of three kinds."""
    measured = Results("synopsis", ["a"], FULL, INFO, lambda _: 1000, chosen=PAIRS, pairs=PAIRS)
    run = runs(10)[0] | dict.fromkeys(("ttft_ms", "bytes_per_token", "budget_bytes"), 50.0)
    run |= dict.fromkeys(("tokens_above_budget", "stalls_in_prompt", "kl_mean"), 0)
    for case in [*edgemoe.cases(measured), *swapmoe.cases(measured)]:
        share = float(case.budget[:-1]) / 100 if case.budget.endswith("%") else 0.75
        measured.runs[case] = [run | {"peak_resident_bytes": int(96_000 * share)}] * 2
        each = [share / 4 + 0.01 * n * (share < 1) for n in range(len(PAIRS))]
        measured.scores[measured.scored_as(case)] = {"rouge2": sum(each) / len(each), "each": each}
    bits = {"tolerated": 0.02, "low": 2, "high": 4, "experts at low": 7, "calibrated loss": 0.01}
    both = {
        name: {"experts": experts, "rouge2": 0.1, "each": [x] * 7 + [0.2]}
        for name, experts, x in (("planned", [2, 1], 0.1), ("uniform", [1, 2], 0.05))
    }
    walked = {"encoder": np.eye(4, 3, dtype=int), "decoder": np.eye(3, dtype=int)}
    measured.found = {
        "edgemoe bits": bits,
        "plans": {"33%": both},
        "paths": [{"stack": s, **paths.shares(w, w, 4)} for s, w in walked.items()],
        "foretold": [{"stack": s, **r} for s, w in walked.items() for r in paths.foretold(w, w, 4)],
        "stale gate": 0.5,
    }
    return measured


def test_of_summaries_theirs_stand_beside_ours_with_errors():
    measured = of_summaries()
    reports = {section.NAME: section.report(measured) for section in suite.OF_SUMMARIES}
    ladder = reports[edgemoe.NAME].tables[0].frame.set_index("rung")
    assert ladder.loc["everything in RAM", edgemoe.AGAINST] == ""
    assert "±" in ladder.loc["+ bit assignment", edgemoe.AGAINST]
    assert "KL" not in ladder
    beside = {row.what: row.ours for report in reports.values() for row in report.versus}
    assert "Rouge-2 -0.0275 ± 0.0087" in beside["loss"]
    assert beside["against the whole model, budget 33%"].startswith("-67% memory, +0% latency, ")
    assert "against the whole model, budget 63%" in beside
    assert "15% " in beside["Rouge-2 over static pruning"]
    assert beside["Rouge-2 over an even split of the same memory"] == "33% +0.0438 ± 0.0062"
    assert beside["the most frequent 20 % of the paths, encoder"].startswith("cover 25.0%")
    done = suite.Suite(measured, reports, complete=True, circumstances=circumstances())
    text = done.markdown()
    assert "papers --model synopsis`: summaries to their end" in text
    assert f"Rouge-2 (F, stemmed) of {len(PAIRS)} greedy summaries" in text
    assert not re.search(r"\bnan\b", text.lower())
    json.loads(json.dumps(done.record()))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tiny_models.switch(
        tmp_path_factory.mktemp("switch"), num_experts=4, num_layers=4, num_decoder_layers=4,
        num_sparse_decoder_layers=2,
    )  # fmt: skip
    few = {"tried": 0, "every": (4,), "percent": (25, 50), "max_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "BY_ROUGE", {"edgemoe": {"max_tokens": 8}, "swapmoe": few})
        with pytest.raises(ValueError, match="says whose"):
            suite.papers(folder, quick=True, progress=False)
        return suite.papers(folder, pairs=(PAIRS[:2], PAIRS[2:]), quick=True, progress=False)


@pytest.mark.slow
def test_an_encoder_decoder_gets_the_two_papers_tables_by_rouge(written, tmp_path):
    assert list(written.reports) == [edgemoe.NAME, paths.NAME, swapmoe.NAME]
    assert written.complete
    ladder = frame(written, edgemoe.NAME).set_index("rung")
    assert list(ladder.index) == list(edgemoe.RUNGS)
    assert ladder["Rouge-2"].between(0, 1).all()
    lost = ladder[edgemoe.AGAINST]
    assert {rung for rung in ladder.index if not lost[rung]} == {"everything in RAM", "on demand"}
    assert lost.drop(["everything in RAM", "on demand"]).str.contains("±").all()
    assert {r for r in ladder.index if ladder["same text"][r] == "yes"} == set(edgemoe.SAME_BITS)
    walked = frame(written, paths.NAME).set_index("")
    assert walked.loc["encoder", "tokens"] > walked.loc["decoder", "tokens"] > 0
    assert (walked["20 % cover"] <= 1).all()
    assert len(frame(written, paths.NAME, 1)) == 2  # the second sparse layer of each
    swaps = frame(written, swapmoe.NAME).query("strategy == 'swapmoe'").set_index("budget")
    assert swaps["stalls a run"].tolist() == swaps["tokens above budget"].tolist() == [0, 0]
    assert swaps.loc["100%", "Rouge-2"] == ladder.loc["everything in RAM", "Rouge-2"]
    assert frame(written, swapmoe.NAME, 1)["planned over uniform"].str.contains("±").all()
    text, page = written.markdown(), tmp_path / "page.md"
    assert "Rouge-2 (F, stemmed) of 2 greedy summaries" in text
    assert not re.search(r"\bnan\b", text.lower())
    begin, end = suite.marks(written.results.model)
    page.write_text(f"{suite.BEGIN}\nthe demo's\n{suite.END}\n{begin}\n{end}\n")
    assert bench.Files(tables=page, picture=tmp_path / "p.svg").write(written) == [page]
    assert "the demo's" in page.read_text()
    assert "### EdgeMoE: few paths" in page.read_text()


# -- Ctrl-C, and what cannot be written ---------------------------------------------------------


def test_pieces_are_kept_for_the_same_question_only_and_a_complete_suite_removes_them(capsys):
    kept = Kept("songs", "demo", QUICK)
    assert kept.load() is None
    measured = Results("demo", ["a"], QUICK, runs={A: runs(1, 2)}, scores={A: {"kl_mean": 0.5}})
    measured.runs[A][0]["hits"] = np.int64(3)
    measured.answer(lambda: measured.found.update(asked=1))
    kept.save(measured.kept())
    assert Kept("songs", "demo", FULL).load() is None
    other = Results("demo", ["a"], QUICK)
    other.take(Kept("songs", "demo", QUICK).load())
    assert (other.runs, other.scores, other.pieces) == (measured.runs, measured.scores, 4)
    assert other.found == {"asked": 1}
    assert str(kept.path) in capsys.readouterr().err
    kept.path.write_text("[")
    assert kept.load() is None
    kept.complete()
    kept.complete()
    assert not kept.path.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_leaves_kept_tables_alone(
    demo_store, tmp_path, monkeypatch
):
    run = Results.run

    def stops_after_three(self: Results, case: Case) -> None:
        if len(self.runs) == 3:
            raise KeyboardInterrupt
        run(self, case)

    monkeypatch.setattr(Results, "run", stops_after_three)
    half = suite.papers(quick=True, progress=False)
    assert not half.complete
    readme = tmp_path / "README.md"
    readme.write_text(f"{suite.BEGIN}\nwas here before\n{suite.END}\n")
    files = bench.Files(tmp_path / "p.json", tmp_path / "p.md", readme, tmp_path / "p.svg")
    assert files.write(half) == [files.json, files.markdown]
    record = json.loads(files.json.read_text())
    assert record["complete"] is False
    assert len(record["cases"]) == 3
    assert "Stopped early" in files.markdown.read_text()
    assert "was here before" in readme.read_text()
    again: list[Case] = []
    monkeypatch.setattr(Results, "run", lambda self, case: again.append(case) or done(self))

    def done(self: Results) -> None:  # what was kept is there, and no run of it is made again
        assert self.runs == half.results.runs
        raise KeyboardInterrupt

    suite.papers(quick=True, progress=False)
    assert len(again) == 1
    assert again[0] not in half.results.runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--suite", "songs"],
            "unknown suite 'songs'; there are: papers, scheduler, rivals, ",
        ),
        (["--suite", "papers", "--budgets", "25%"], "leave them out"),
        (["--suite", "papers", "--tables", "plain.md"], "needs the lines <!-- measured: papers"),
        (["--suite", "papers", "--quick", "--tables", "plain.md"], "leave out --tables"),
        (["--suite", "papers", "--picture", "no/p.svg"], "cannot write no/p.svg"),
        (["--quick"], "belongs to a suite: papers, scheduler, rivals"),
        (["--suite", "papers", "--shape", "2x4"], "add --suite rivals"),
        (["--suite", "rivals", "--shape", "2x4"], "write 'layersxexperts top-active"),
        (["--suite", "scheduler", "--tables", "plain.md"], "add --suite papers"),
    ],
)
def test_what_a_suite_cannot_do_is_said_before_anything_is_measured(
    call, monkeypatch, tmp_path, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.md").write_text("no markers\n")
    code, _, err = call("bench", *words)
    assert code == 2
    assert message in err


def test_the_kept_tables_are_those_that_the_suite_writes():
    _, section, _ = re.split(f"{suite.BEGIN}|{suite.END}", TABLES.read_text("utf-8"))
    assert section.count("### ") == len(suite.SECTIONS)
    (picture,) = re.findall(r"\]\(([^)]+\.svg)\)", section)
    assert (TABLES.parent / picture).is_file()


# -- the figure ---------------------------------------------------------------------------------

DEVICES = {"nvme": "NVMe & co", "sd_card": "SD card"}


def point(strategy: str, speed: float, kl: float, device: str = "nvme") -> dict:
    return {"strategy": strategy, "device": device, "tokens/s": speed, "KL": kl}


POINTS = [point("lru", 40.0, 0.0), point("lfu", 60.0, 1e-12), point("hobbit", 90.0, 0.002)]
POINTS += [point("swapmoe", 120.0, 0.9), point("hobbit", 9.0, 0.002, "sd_card")]


def drawn(points=POINTS):
    return everyone.draw(points, "all <of> them", DEVICES)


def spots(axes) -> list[tuple[float, float]]:
    return [tuple(spot) for marks in axes.collections for spot in marks.get_offsets()]


def test_faster_is_further_right_better_is_lower_and_what_changes_nothing_lies_below():
    nvme, card, below, _ = drawn().axes
    assert spots(nvme) == [(120.0, 0.9), (90.0, 0.002)]
    assert spots(card) == [(9.0, 0.002)]
    assert nvme.get_ylim() == card.get_ylim()  # panels share the scale of KL
    assert nvme.get_ylim()[0] < nvme.get_ylim()[1]
    assert [x for x, _ in spots(below)] == [60.0, 40.0]  # the output as it is; the faster first
    assert [name.get_text() for name in below.texts] == ["lfu", "lru"]


def test_every_point_is_named_and_the_figure_reads_in_the_dark():
    text = everyone.scatter(POINTS, "all <of> them", DEVICES)
    root = ET.fromstring(text)
    words = ["".join(t.itertext()).strip() for t in root.iter(f"{SVG}text")]
    names = [p["strategy"] for p in POINTS]
    assert sorted(w for w in words if w in names) == sorted(names)
    assert {"NVMe & co", "SD card", "all <of> them"} <= set(words)
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    assert (root.get("role"), root.get("aria-label")) == ("img", "all <of> them")


def test_names_do_not_lie_on_one_another():
    crowd = [point(f"strategy_{i}", 50.0 + i, 0.01 + i / 1e3) for i in range(8)]
    boxes = [name.get_window_extent() for name in drawn(crowd).axes[0].texts]
    assert len(boxes) == 8
    assert all(boxes[i].count_overlaps(boxes[i + 1 :]) == 0 for i in range(8))
