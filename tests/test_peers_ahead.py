"""Rules of peers that look far ahead, against examples small enough to compute by hand."""

from __future__ import annotations

import json
from array import array

import numpy as np
import pytest
import torch

import moelab
from moelab.replays.replay import replay
from moelab.runs.prediction import approximate
from moelab.scheduling.cache import Cache
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Knobs, Shape, View
from moelab.scheduling.trace import Trace, unrecorded
from moelab.strategies import make
from moelab.strategies.finemoe import ExpertMaps, Rows, expert_probabilities, finemoe
from moelab.strategies.max_rank import max_rank
from toy_engine import NBYTES, decided, places

SHAPE = Shape((4, 4, 4, 4), 2, NBYTES)
SAY = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}


def view(shape: Shape = SHAPE) -> View:
    budget = shape.all_bytes(16)
    return View(shape, Knobs(budget), Cache(shape, budget))


def told(layer: int, *p: float, embedding=None) -> LayerInput:
    """A layer's input; the experts chosen are the two of the highest p."""
    best = tuple(int(e) for e in np.argsort(-np.array(p), kind="stable")[:2])
    vector = None if embedding is None else array("d", embedding)
    weights = tuple(p[e] for e in best)
    return LayerInput(layer, (best,), (weights,), probabilities=array("d", p), embedding=vector)


A = ((0.5, 0.5, 0, 0), (0, 0, 1, 0), (0.1, 0.2, 0.3, 0.4), (0.7, 0.1, 0.1, 0.1))
B = ((0, 0, 0.5, 0.5), (1, 0, 0, 0), (0.6, 0.4, 0, 0), (0, 0, 0.2, 0.8))


def passed(part: ExpertMaps, p, at: View, *, embedding=None, layers: int = 4) -> ExpertMaps:
    """Tell a part the first layers of one pass."""
    for layer, row in enumerate(p[:layers]):
        part.observe(told(layer, *row, embedding=embedding if layer == 0 else None), at)
    return part


# -- FineMoE: the search ---------------------------------------------------------------------------


def test_the_nearest_trajectory_is_by_cosine_over_all_layers_so_far():
    part, at = ExpertMaps(depth=1), view()
    passed(passed(part, A, at), B, at)
    part.observe(told(0, 1, 0, 0, 0), at)
    # (1 0 0 0) with (½ ½ 0 0): ½ / √½; with (0 0 ½ ½): 0
    assert part.trajectory() == pytest.approx([0.5**0.5, 0], abs=1e-6)
    part.observe(told(1, 1, 0, 0, 0), at)
    # eight numbers: with A ½ / (√2 · √1.5); with B 1 / (√2 · √1.5)
    assert part.trajectory() == pytest.approx([0.5 / 3**0.5, 1 / 3**0.5], abs=1e-6)
    # B's P of layer 2, δ = 1 - 0.577: the first alone has 0.6, but k are the least
    assert places(part.predict(1, (), at)) == [(2, 0), (2, 1)]


def test_the_first_d_layers_are_those_of_the_nearest_embedding():
    part, at = ExpertMaps(depth=3), view()
    passed(part, A, at, embedding=(1, 0, 1))
    passed(part, B, at, embedding=(0, 2, 0))
    part.observe(told(0, *A[0], embedding=(0, 1, 0)), at)  # routed like A, embedded like B
    found = part.predict(0, (), at)
    # layer 3 by trajectory, from A: p / 3; layers 1 and 2 by embedding, from B: p / 1 and p / 2
    assert places(found) == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert [g.weight for g in found] == pytest.approx([1, 0.6, 0.7, 0.4, 0.1])


def test_without_an_embedding_the_trajectory_tells_of_the_first_layers_too():
    part, at = passed(ExpertMaps(depth=2), A, view()), view()
    part.observe(told(0, *A[0]), at)
    # layer 1: p = 1 and no other; layer 2: 0.4 / 2 and 0.3 / 2
    assert places(part.predict(0, (), at)) == [(1, 2), (2, 3), (2, 2)]


@pytest.mark.parametrize(
    ("score", "most", "count"),
    [
        (0.9, 2, 2),  # δ = 0.1: the first has it, but k = 2
        (0.25, 2, 2),  # δ = 0.75: 0.5 + 0.3
        (0.15, 2, 3),  # δ = 0.85: 0.5 + 0.3 + 0.15
        (0.01, 2, 4),  # δ = 0.99
        (-0.7, 2, 4),  # δ is 1 at most
        (-0.7, 1, 2),  # not more than most times k
        (1.2, 2, 2),  # δ is 0 at least
    ],
)
def test_the_less_alike_a_map_is_the_more_of_it_is_fetched(score, most, count):
    part, row = ExpertMaps(most=most), np.tile(np.float32([0.15, 0.5, 0.05, 0.3]), 4)
    found = list(part._likely(2, row, score, view()))
    assert places(found) == [(2, 1), (2, 3), (2, 0), (2, 2)][:count]
    assert [g.score for g in found] == pytest.approx([0, 0.5, 0.8, 0.95][:count])


def test_nothing_is_guessed_before_a_map_is_known_or_in_a_pass_that_was_joined_late():
    part, at = ExpertMaps(depth=1), view()
    part.observe(told(0, *A[0]), at)
    assert part.predict(0, (), at) == []
    passed(part, A, at)
    part.observe(told(2, *A[2]), at)  # layers 0 and 1 were not told
    assert part.predict(2, (), at) == []
    part.observe(told(3, *A[3]), at)
    assert part._store.count == 1  # and it is no map


def test_a_full_store_gives_up_the_map_that_is_most_like_the_new_one():
    # the new one by embedding is A (1 and 0), by trajectory nearly B (0.24 / √(2.32 · 2.7) = 0.10
    # and 2.34 / 2.7 = 0.87)
    for depth, goes in ((1, 1), (3, 0)):  # d/L: a quarter or three of it is the embedding's
        part, at = ExpertMaps(depth=depth, maps=2), view()
        passed(part, A, at, embedding=(1, 0))
        passed(part, B, at, embedding=(0, 1))
        new = (*B[:3], (0, 0, 0.8, 0.2))
        passed(part, new, at, embedding=(1, 0))
        assert part._store.count == 2
        assert part._store.all[goes] == pytest.approx(np.concatenate(new))
        assert part._embeddings.all[goes] == pytest.approx([1, 0])


def test_fewer_maps_than_there_are_begin_with_the_next_pass():
    part, at = ExpertMaps(depth=1, maps=3), view()
    for p in (A, B, A):
        passed(part, p, at)
    part.maps = 1
    part.observe(told(0, *A[0]), at)
    assert len(part.trajectory()) == part._store.count == 1


def test_rows_that_never_came_are_zeros():
    rows = Rows(2)
    rows.put(np.ones(2), 20)
    assert rows.all.shape == (21, 2)
    assert rows.all.sum() == 2


# -- FineMoE: who leaves, and what it goes by ------------------------------------------------------


def test_the_lowest_product_of_probability_and_visits_leaves():
    part, at = ExpertMaps(depth=1), view()
    key = SHAPE.key(2, 3)
    for _ in range(3):
        at.cache.use(key, high=True)
    assert part.score(at)[key] == 3  # no map yet: visits alone
    passed(part, A, at)
    part.observe(told(0, *A[0]), at)
    terms = part.terms(at)
    assert terms["probability"][key] == pytest.approx(0.4)
    assert terms["visits"][key] == 3
    assert part.score(at)[key] == terms["priority"][key] == pytest.approx(1.2)


def test_without_probabilities_the_gate_weights_of_those_chosen_stand_for_them():
    given = LayerInput(0, ((0, 1), (1, 3)), ((0.6, 0.2), (0.5, 0.5)), prefill=True)
    assert expert_probabilities(given, 4) == pytest.approx([0.375, 0.375, 0, 0.25])
    steered = LayerInput(
        0, ((0, 1),), ((0.5, 0.5),), wanted=((3, 1),), wanted_weights=((0.9, 0.1),)
    )
    assert expert_probabilities(steered, 4) == pytest.approx([0, 0.1, 0, 0.9])
    assert expert_probabilities(told(0, 0.1, 0.2, 0.3, 0.4), 4) == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )


def test_the_second_pass_is_fetched_from_the_first_ones_map():
    s = Scheduler(SHAPE, finemoe(depth=1), Knobs(16 * 1600))
    for layer in range(4):
        s.step(told(layer, *A[layer]))
    s.end_of_token()
    assert not s.cache.held.any()
    for key in [key for key, _ in s.cache.items()]:
        s.cache.remove(key)
    plan = s.step(told(0, *A[0]))
    assert places(decided(plan, "prefetch")) == [(1, 2)]  # the others have p = 0
    assert places(decided(s.step(told(1, *A[1])), "prefetch")) == [(2, 3), (2, 2)]


@pytest.mark.parametrize(("name", "wrong"), [("depth", 4), ("maps", 0), ("most", 9)])
def test_a_parameter_out_of_range_is_refused(name, wrong):
    with pytest.raises(ValueError, match=name):
        finemoe(**{name: wrong})


# -- max-rank routing ------------------------------------------------------------------------------


def did(plan) -> list[tuple[str, int]]:
    return [(d.kind, d.expert) for d in decided(plan)]


def test_a_missing_expert_is_replaced_by_the_best_resident_one_of_the_first_ranks():
    shape = Shape((8,), 2, NBYTES)
    s = Scheduler(shape, max_rank(max_rank=2), Knobs(8 * 1600))
    s.cache.add(3, 16)
    s.cache.add(4, 16)
    ranking = (0.3, 0.2, 0.15, 0.13, 0.12, 0.05, 0.03, 0.02)  # 0 to 3 are good enough
    assert did(s.step(told(0, *ranking))) == [("substitute", 3), ("load", 0)]
    s.cache.remove(3)
    assert did(s.step(told(0, *ranking))) == [("hit", 0), ("load", 1)]  # 4 is no longer
    s.cache.add(3, 16)
    assert did(s.step(told(0, *ranking))) == [("hit", 0), ("hit", 1)]


def test_nobody_stands_in_for_two_and_nobody_without_probabilities_or_in_a_prompt():
    shape = Shape((8,), 3, NBYTES)
    ranking = array("d", (0.3, 0.2, 0.15, 0.13, 0.12, 0.05, 0.03, 0.02))
    row, weights = (0, 1, 2), (0.5, 0.3, 0.2)
    for prefill, p, kinds in (
        (False, ranking, ["substitute", "load", "load"]),
        (False, None, ["load"] * 3),
        (True, ranking, ["load"] * 3),
    ):
        s = Scheduler(shape, max_rank(), Knobs(8 * 1600))
        s.cache.add(4, 16)
        plan = s.step(LayerInput(0, (row,), (weights,), prefill, probabilities=p))
        assert [kind for kind, _ in did(plan)] == kinds


def test_max_rank_1_is_lru_live_and_more_replaces_and_loads_less(demo_lab):
    def run(strategy, **values):
        demo_lab.update(strategy="lru", budget="100%")
        demo_lab._engine.recover()
        demo_lab.update(strategy=strategy, budget="30%", **values)
        return demo_lab.generate("The king", **{**SAY, "max_new_tokens": 16})

    plain, one, four = run("lru"), run("max_rank", max_rank=1), run("max_rank", max_rank=4)
    assert one.tokens == plain.tokens
    later = [run.events[run.events.token > 0].kind for run in (plain, one, four)]
    loads = [(kinds == "load").sum() for kinds in later]
    assert loads[0] == loads[1] > loads[2]
    assert (later[2] == "substitute").any()


# -- what it is told -------------------------------------------------------------------------------


def test_the_gate_tells_of_all_experts_and_the_model_its_embedding(demo_lab, tmp_path):
    demo_lab.update(strategy="finemoe", budget="30%")
    run = demo_lab.generate("The king", **SAY)
    model = demo_lab._engine.model
    for step in run.trace.steps:
        assert (step.embedding is None) == (step.layer > 0)
        p = np.array(step.probabilities)
        assert p.sum() == pytest.approx(1, abs=1e-4)
        if not step.prefill:  # the chosen are the likeliest, by their weights
            (experts,), (weights,) = step.experts, step.weights
            assert set(experts) == set(np.argsort(-p)[:2].tolist())
            shares = p[list(experts)] / p[list(experts)].sum()
            assert shares == pytest.approx(np.array(weights) / sum(weights), abs=1e-4)
    ids = [int(i) for i in run.tokens]
    table = model.get_input_embeddings()
    first = next(s for s in run.trace.steps if not s.prefill)
    row = table(torch.tensor([[ids[0]]])).detach().float().reshape(-1).tolist()
    assert list(first.embedding) == pytest.approx(row, abs=1e-6)
    for file in ("a.json", "a.parquet"):
        again = Trace.load(run.trace.save(tmp_path / file))
        assert again.steps == run.trace.steps
    made = replay(run.trace).decisions
    assert replay(again, strategies={"finemoe": make("finemoe")}).decisions == made


def test_they_are_recorded_only_where_a_part_asks_and_who_lacks_them_says_so(demo_lab):
    demo_lab.update(strategy="lru", budget="30%")
    run = demo_lab.generate("The king", **SAY)
    steps = run.trace.steps
    assert all(s.probabilities is None and s.embedding is None for s in steps)
    assert unrecorded(run.trace, make("finemoe")) == ["embedding", "probabilities"]
    assert unrecorded(run.trace, make("lru")) == []
    grid = {"strategy": ["finemoe", "lru"], "budget": ["30%"]}
    table = moelab.sweep(run, grid, workers=0, progress=False)
    assert table.lacks.tolist() == ["embedding, probabilities", ""]
    assert table.approximate.tolist() == [True, False]
    demo_lab.update(strategy="finemoe")
    trace = demo_lab.generate("The king", **SAY).trace
    settings = demo_lab.settings
    assert not approximate(trace, settings, replay(trace))
    assert "what is not recorded: embedding" in approximate(run.trace, settings, replay(trace))


def test_a_steered_router_tells_what_it_would_say_unmasked(demo_lab):
    demo_lab.update(strategy="finemoe", budget="50%", route="static_pruning")
    steps = demo_lab.generate("The king", **SAY).trace.steps
    hidden = [s for s in steps if not s.prefill and s.layer == 2]
    assert all(min(s.probabilities) >= 0 and sum(s.probabilities) > 0.999 for s in hidden)
    best = [int(np.argmax(s.probabilities)) for s in hidden]
    assert any(e not in s.experts[0] for e, s in zip(best, hidden, strict=True))


# -- traces ----------------------------------------------------------------------------------------


def document(**change) -> dict:
    trace = Trace(Shape((4,), 2, NBYTES), [told(0, 0.4, 0.3, 0.2, 0.1, embedding=(1.5, -2.0))])
    found = trace.document()
    found["steps"][0][-2:] = [change.get(n, v) for n, v in zip(
        ("probabilities", "embedding"), found["steps"][0][-2:], strict=True)]  # fmt: skip
    return found


def loaded(found: dict, path) -> Trace:
    path.write_text(json.dumps(found))
    return Trace.load(path)


def test_a_trace_of_the_format_before_has_neither(tmp_path):
    found = document() | {"format": 4}
    found["steps"] = [row[:-2] for row in found["steps"]]
    (step,) = loaded(found, tmp_path / "t.json").steps
    assert step.experts == ((0, 1),)
    assert step.probabilities is step.embedding is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"probabilities": [0.5, 0.5]}, "probabilities of a step is 2"),
        ({"probabilities": [0.5, 0.5, 0, 1.5]}, "probability is 1.5"),
        ({"probabilities": [0.5, 0.5, 0, -0.1]}, "probability is -0.1"),
        ({"embedding": ["x"]}, "embedding is x"),
        ({"embedding": [float("nan")]}, "embedding is nan"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(tmp_path, change, said):
    assert loaded(document(), tmp_path / "t.json").steps[0].embedding == array("d", [1.5, -2.0])
    with pytest.raises(ValueError, match=said):
        loaded(document(**change), tmp_path / "t.json")
