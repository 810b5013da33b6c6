"""Static pruning: who stays by each rule, within a layer and over the model, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tiny_models
from moelab import demo
from moelab.calibration.probes import soft_counts
from moelab.calibration.profile import SHIPPED
from moelab.calibration.router_change import router_change
from moelab.calibration.swapmoe import tables
from moelab.engine.generation import Stream
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Knobs, Shape
from moelab.strategies.static_pruning import static_pruning

B = 1600
SHAPE = Shape((4, 4), 1, {16: B})
PROFILE = {
    "norms": [[1, 2, 3, 4], [1, 2, 3, 4]],
    "counts": [[9, 8, 0, 0], [0, 0, 8, 9]],
    "soft": [[1, 5, 6, 2], [4, 3, 2, 1]],
    "importance": [[90, 80, 70, 60], [50, 4, 3, 2]],
    "change": [[-2, 0.1, -1, 0.3], [0, 0.2, -3, 0.4]],
}


def kept(slots: int, strategy, shape: Shape = SHAPE) -> list[list[int]]:
    """The experts of each layer that are there before the first token."""
    s = Scheduler(shape, strategy, Knobs(slots * B))
    s.begin()
    return [sorted(s.view.index_of[s.view.residents(at)].tolist()) for at in range(shape.layers)]


@pytest.mark.parametrize(
    ("by", "best"),
    [
        ("norm", [[2, 3], [2, 3]]),
        ("count", [[0, 1], [2, 3]]),
        ("soft", [[1, 2], [0, 1]]),
        ("importance", [[0, 1], [0, 1]]),
        ("change", [[1, 3], [1, 3]]),  # with its sign: a row that shrank goes first
    ],
)
def test_every_rule_keeps_the_experts_with_its_highest_numbers(by, best):
    assert kept(4, static_pruning(PROFILE, by=by)) == best


def test_over_the_whole_model_layers_keep_as_many_as_rank_high_and_never_fewer_than_top_k():
    over = static_pruning(PROFILE, by="importance", span="model")
    assert kept(4, over) == [[0, 1, 2], [0]]  # 90, 80, 70 of one layer; the other keeps top-1
    assert kept(6, over) == [[0, 1, 2, 3], [0, 1]]  # then 60, and 4 of the other layer
    two = Shape((4, 4), 2, {16: B})
    assert kept(5, over, two) == [[0, 1], [0, 1]]  # one slot is not dealt out, as by layer
    assert kept(6, over, two) == [[0, 1, 2, 3], [0, 1]]
    assert kept(8, over) == [[0, 1, 2, 3]] * 2


def test_a_change_of_rule_or_span_counts_at_once():
    s = Scheduler(SHAPE, static_pruning(PROFILE, by="importance"), Knobs(4 * B))
    s.begin()
    s.change(Knobs(4 * B), s.strategy.tuned(span="model"))
    s.begin()
    assert s.view.index_of[s.view.residents(0)].tolist() == [0, 1, 2]
    s.change(Knobs(4 * B), s.strategy.tuned(by="soft"))
    s.begin()
    assert s.view.index_of[s.view.residents(0)].tolist() == [1, 2]


def test_a_profile_of_an_older_version_goes_on_working_and_says_what_it_lacks():
    old = {name: PROFILE[name] for name in ("norms", "counts", "importance")}
    assert kept(4, static_pruning(old)) == [[2, 3], [2, 3]]
    for make in (
        lambda: static_pruning(old, by="soft"),
        lambda: static_pruning(old).tuned(by="soft"),
    ):
        with pytest.raises(ValueError, match=r"by='soft'.*calibrate\('swapmoe', again=True\)"):
            make()
    assert kept(4, static_pruning(by="soft", span="model")) == [[0, 1], [0, 1]]  # knows nothing


@pytest.mark.slow
def test_soft_counts_are_gate_probabilities_summed_over_all_tokens(demo_lab):
    text, tokens = "SCENE II. Another part of the wood.", 9
    found = np.array(soft_counts(demo_lab, [text], tokens=tokens))
    assert found.shape == (6, 16)
    assert found.sum(1) == pytest.approx([tokens] * 6, rel=1e-5)
    engine, inputs = demo_lab._engine, []
    router = engine.adapter.layers[0].router
    with engine.full_precision(heard=lambda at, x, _: inputs.append(x) if at == 0 else None):
        Stream(engine).forward(demo_lab._encode(text)[:tokens])
    with torch.inference_mode():
        by_hand = (inputs[0].float() @ router.weight.float().T).softmax(-1).sum(0)
    assert found[0] == pytest.approx(by_hand.numpy(), rel=1e-4)
    assert not router._forward_hooks


@pytest.mark.slow
def test_what_it_ranks_by_is_measured_alone_and_is_what_the_bundled_profile_has(demo_lab):
    shipped = json.loads((SHIPPED / "swapmoe.json").read_text())
    found = tables(demo_lab, tokens=shipped["made_from"]["max_tokens"])
    for name in ("norms", "counts", "soft", "importance"):
        assert np.array(found[name]) == pytest.approx(np.array(shipped["data"][name]), rel=1e-3)


@pytest.mark.slow
def test_pruned_for_a_task_a_model_keeps_what_that_task_needs(demo_lab):
    """Calibrated on one half of a domain's text, measured on the other."""
    code, novel = (demo.probes()[domain] for domain in ("code", "novel"))
    lost = []
    for text in (code, novel):
        known = tables(demo_lab, [text[: len(text) // 2]], tokens=96)
        pruned = static_pruning(known, by="importance")
        demo_lab.update(strategy=pruned, budget="50%", bits=16)
        lost.append(demo_lab.score(code[len(code) // 2 :], max_tokens=32, progress=False).kl_mean)
    assert 0 < lost[0] < lost[1]


def test_router_change_is_of_two_checkpoints_and_keeps_its_sign(tmp_path):
    before, norms = tiny_models.qwen3_moe(tmp_path / "before"), []

    def trained(tensors):
        for name, tensor in sorted(tensors.items()):
            if name.endswith("gate.weight"):
                norms.append(tensor.float().norm(dim=1).tolist())
                tensor[2] *= 1.5
                tensor[4] *= 0.5

    after = tiny_models.edit(before, tmp_path / "after", trained)
    found = router_change(before, after)
    assert np.shape(found) == (3, 6)
    for row, norm in zip(found, norms, strict=True):
        assert row[2] == pytest.approx(norm[2] / 2, rel=1e-2)  # of bfloat16
        assert row[4] == pytest.approx(-norm[4] / 2, rel=1e-2)
        assert [row[e] for e in (0, 1, 3, 5)] == [0, 0, 0, 0]
    assert router_change(before, before) == [[0.0] * 6] * 3
    other = tiny_models.qwen3_moe(tmp_path / "other", num_experts=4)
    with pytest.raises(ValueError, match="give one architecture's"):
        router_change(before, other)


def test_by_change_without_two_checkpoints_says_how_to_get_it(demo_lab):
    with pytest.raises(ValueError, match="router_change"):
        static_pruning({"norms": PROFILE["norms"]}, by="change")
    with pytest.raises(ValueError, match="router_change"):
        demo_lab.update(strategy="static_pruning", by="change")
