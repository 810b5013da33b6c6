"""Checkpoints rewritten by an idea: formulas by hand; stock transformers loads the results."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moelab
import tiny_models
from moelab.models.shards import Checkpoint
from moelab.transforms import IDEAS, Merge, Puzzle, ResMoE, Slim, compare, transform
from moelab.transforms.activations import Seen, activations
from moelab.transforms.assignment import assignment, matched
from moelab.transforms.layers import Layers, Size
from moelab.transforms.merge import by_outputs, by_weights, grouped
from moelab.transforms.puzzle import merged
from moelab.transforms.resmoe import barycentre
from test_lab_families import omni

TEXT = "It was the best of times, it was the worst of times."


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    top = tmp_path_factory.mktemp("checkpoints")
    return {name: make(top / name) for name, make in tiny_models.FAMILIES.items()}


def points(experts: int = 4, neurons: int = 6, width: int = 9) -> torch.Tensor:
    return torch.randn(experts, neurons, width, generator=torch.Generator().manual_seed(0))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.tensor([list(TEXT.encode())])).logits


# -- formulas, by hand -----------------------------------------------------------------------


def test_an_assignment_by_hand_and_against_every_permutation():
    cost = np.array([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]])
    assert assignment(cost).tolist() == [1, 0, 2]  # 1 + 2 + 2
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=(6, 6))
        best = min(sum(cost[range(6), p]) for p in itertools.permutations(range(6)))
        found = assignment(cost)
        assert sorted(found) == list(range(6))
        assert cost[range(6), found].sum() == pytest.approx(best)


def test_neurons_in_another_order_are_found_again():
    expert = points()[0]
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert torch.equal(expert[order][matched(expert, expert[order])], expert)


def test_a_pair_is_merged_as_by_hand():
    """Similar at D = 0.2 and 0; of the others, at 0.6, the one with the larger A stays."""
    one, other = torch.tensor([1.0, -4, 2, 0.5]), torch.tensor([1.5, 1, -8, -0.5])
    plain = torch.ones(4)
    first, second = merged(one, other, plain, plain, 0.4)
    assert first.tolist() == [1.25, -4, 0, 0.5]
    assert second.tolist() == [1.25, 0, -8, -0.5]
    heavy = torch.tensor([1.0, 10, 1, 1])  # 1 * 10 against 4 * 1
    first, second = merged(one, other, plain, heavy, 0.4)
    assert first.tolist() == [1.25, 0, 0, 0.5]
    assert second.tolist() == [1.25, 1, -8, -0.5]
    tiny, _ = merged(torch.tensor([1e-9]), torch.tensor([1e-9]), plain[:1], plain[:1], 0.4)
    assert tiny.item() == 2**-15


def test_pairs_are_drawn_by_the_seed_and_an_odd_expert_stays_as_it_is():
    pairs = list(Puzzle().pairs(5, 0))
    assert pairs == list(Puzzle().pairs(5, 0))
    assert len({*itertools.chain(*pairs)}) == 4
    before = points(5)
    after, _ = Puzzle()(before, None, 0)
    (alone,) = {*range(5)} - {*itertools.chain(*pairs)}
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert [e for e, kept in enumerate(same) if kept] == [alone]


def test_activations_weigh_the_magnitudes_that_a_pair_keeps():
    seen = Seen(torch.tensor([[1.0, 2]]), torch.tensor([[3.0, 4, 5]]), torch.zeros(0, 2), torch.abs)
    assert seen.scale(6)[0].tolist() == [[1, 2, 1, 2, n, n] for n in (3, 4, 5)]


def test_a_barycentre_and_its_largest_difference_by_hand():
    """The second expert's neurons are the first's in another order, and a little larger."""
    layer = torch.tensor([[[1.0, 0], [0, 2]], [[0, 2.4], [1.2, 0]]])
    centre, ordered = barycentre(layer, 9)
    assert torch.allclose(centre, torch.tensor([[1.1, 0], [0, 2.2]]))
    assert ordered[1].tolist() == layer[1].flip(0).tolist()
    made, _ = ResMoE(density=0.25)(layer, None, 0)  # one of four differences
    assert torch.allclose(made[0], torch.tensor([[1.1, 0], [0, 2.0]]))
    assert torch.allclose(made[1], torch.tensor([[1.1, 0], [0, 2.4]]))
    whole, _ = ResMoE(density=1.0)(layer, None, 0)
    assert torch.allclose(whole, ordered)


def test_experts_are_alike_whatever_the_order_of_their_neurons():
    layer = points()
    layer[1] = layer[0].flip(0)
    assert by_weights(layer)[0, 1] == pytest.approx(1)
    assert by_weights(layer)[0, 2] < 0.9
    outputs = torch.stack([points()[0], 3 * points()[0] + 1, points()[1]])
    assert by_outputs(outputs)[0, 1] == pytest.approx(1)
    assert by_outputs(outputs)[0, 2] < 0.9


def test_the_most_similar_experts_are_grouped_and_averaged():
    alike = torch.tensor([[1.0, 0.1, 0.9, 0.2], [0.1, 1, 0.3, 0.6], [0.9, 0.3, 1, 0.1]])
    alike = torch.cat([alike, torch.tensor([[0.2, 0.6, 0.1, 1]])])
    assert grouped(alike, 3) == [[0, 2], [1], [3]]
    assert grouped(alike, 2) == [[0, 2], [1, 3]]
    layer = points()
    layer[2] = layer[0].flip(0) + 0.02
    made, groups = Merge(keep=0.75)(layer, None, 0)
    assert groups == [[0, 2], [1], [3]]
    assert torch.allclose(made[0], layer[0] + 0.01, atol=1e-6)
    plain, _ = Merge(keep=0.75, align=False)(layer, None, 0)
    assert torch.allclose(plain[0], (layer[0] + layer[2]) / 2)


def test_slimming_keeps_the_heaviest_neurons_in_their_order():
    layer = torch.tensor([[[1.0, 0, 1], [9, 0, 1], [0, 0, 2], [5, 5, 0]]])  # D = 1
    made, _ = Slim(keep=0.5)(layer, None, 0)
    assert made[0].tolist() == layer[0, [1, 3]].tolist()
    hidden = torch.tensor([[1.0, 2, 3, 99]])  # what is added: 1, 2, 6 and 0
    seen = Seen(torch.ones(1, 1), hidden, torch.zeros(0, 1), torch.nn.functional.silu)
    made, _ = Slim(keep=0.5)(layer, seen, 0)
    assert made[0].tolist() == layer[0, [1, 2]].tolist()


def test_bytes_that_each_idea_needs_by_hand():
    shape = Size(4, 6, 30, 2)  # 720 weights, 1440 bytes at 16 bit
    assert Puzzle().needed_bytes(shape) == 720
    assert Puzzle().needed_bytes(Size(5, 6, 30, 2)) == 3 * 360
    assert ResMoE(density=0.5).needed_bytes(shape) == 360 + 4 * (180 + 23)  # 180 bits are 23 bytes
    assert Merge(keep=0.5).needed_bytes(shape) == 720
    assert Slim(keep=1 / 3).needed_bytes(shape) == 480


@pytest.mark.parametrize("name", IDEAS)
@pytest.mark.parametrize("bits", [16, 8.5, 4.5, 3.5, 2.5])
def test_an_idea_set_to_a_number_of_bits_needs_no_more(name, bits):
    size = Size(16, 192, 576, 2)
    idea = IDEAS[name].at_bits(bits, size)
    if idea is None:
        assert name == "puzzle"
        assert bits < 8
    else:
        assert 8 * idea.needed_bytes(size) / size.weights <= bits * (1 + 1e-4)
        assert idea.left(size)[0] >= 2


# -- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("puzzle", {}),
        ("resmoe", {"density": 0.2, "turns": 3}),
        ("merge", {"keep": 0.5}),
        ("slim", {"keep": 0.5}),
    ],
)
def test_stock_transformers_loads_the_result_and_speaks(
    checkpoints, tmp_path, family, how, options
):
    source = checkpoints[family]
    made = transform(source, how, tmp_path / "made", progress=False, **options)
    model, before = load(made), Layers(source)
    said = logits(model)
    assert said.isfinite().all()
    assert not torch.allclose(said, logits(load(source)), atol=1e-4)
    ids = AutoTokenizer.from_pretrained(made)(TEXT, return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    sizes = IDEAS[how](**options).left(before.size(0))
    after = Layers(made)
    assert (after.moe[0].num_experts, after.moe[0].inner) == sizes
    want, groups = IDEAS[how](**options)(before.points(2), None, 2)
    assert torch.equal(after.points(2), want.bfloat16().float())
    own, theirs = after.checkpoint, before.checkpoint
    (router,) = before.router(2)
    rows = theirs.tensor(router)
    if groups:
        rows = torch.stack([rows[g].float().mean(0) for g in groups]).to(rows.dtype)
    assert torch.equal(own.tensor(router), rows)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(own.tensor(name), theirs.tensor(name))
    note = json.loads((made / "transform.json").read_text())
    assert note["how"] == how
    assert note["source_bytes"] == 2 * 3 * before.points(0).numel()
    assert note["bits_per_weight"] == pytest.approx(
        16 * note["needed_bytes"] / note["source_bytes"], abs=1e-4
    )


@pytest.mark.parametrize(("how", "options"), [("merge", {"keep": 1.0}), ("slim", {"keep": 1.0})])
def test_what_leaves_nothing_out_changes_no_weight(checkpoints, tmp_path, how, options):
    source = checkpoints["olmoe"]
    made = transform(source, how, tmp_path / "made", progress=False, **options)
    before, after = Checkpoint(source), Checkpoint(made)
    assert before.info.keys() == after.info.keys()
    assert all(torch.equal(before.tensor(k), after.tensor(k)) for k in before.info)


def test_all_differences_kept_compute_the_same_model(checkpoints, tmp_path):
    source = checkpoints["qwen3_moe"]
    made = transform(source, "resmoe", tmp_path / "made", density=1.0, turns=2, progress=False)
    # W_c and what differs are added in float32, and rounded once to the bfloat16 they came from
    assert torch.allclose(logits(load(made)), logits(load(source)), atol=0.02)


@pytest.mark.slow
def test_a_merged_checkpoint_opens_as_any_model(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    made = transform(checkpoints["qwen3_moe"], "merge", progress=False, texts=[TEXT])
    assert made.parent == tmp_path / "cache" / "transforms"
    with moelab.open(made, budget="100%", progress=False) as lab:
        assert lab.info()["experts_per_layer"] == 3
        assert lab.generate(TEXT, max_new_tokens=3, ignore_eos=True).text


def test_activations_are_those_of_the_tokens_that_each_expert_was_given(checkpoints):
    folder = checkpoints["qwen3_moe"]
    layers, model, inputs = Layers(folder), load(folder), []
    model.model.layers[0].mlp.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    model(AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"])
    seen = activations(layers, [TEXT], 256)[0]
    x = inputs[0][0].detach()  # [T, D]
    chosen = (x @ model.model.layers[0].mlp.gate.weight.T).topk(2).indices
    for expert in set(chosen.flatten().tolist()):
        own = x[(chosen == expert).any(1)]
        assert torch.allclose(seen.inputs[expert], own.norm(dim=0), rtol=1e-3)
        gate, up, _ = layers.expert(0, expert).chunk(3, 1)
        h = torch.nn.functional.silu(own @ gate.T) * (own @ up.T)
        assert torch.allclose(seen.hidden[expert], h.norm(dim=0), rtol=1e-3)
    assert torch.allclose(seen.tokens, x, atol=1e-5)


@pytest.mark.parametrize("how", ["puzzle", "merge", "slim"])
def test_sample_text_changes_what_is_kept(checkpoints, tmp_path, how):
    source = checkpoints["mixtral"]
    plain = transform(source, how, tmp_path / "plain", progress=False)
    heard = transform(source, how, tmp_path / "heard", texts=[TEXT], progress=False)
    assert logits(load(heard)).isfinite().all()
    assert not torch.equal(Layers(plain).points(1), Layers(heard).points(1))


# -- stopped, repeated, refused ---------------------------------------------------------------


def test_a_stopped_writer_leaves_nothing_and_the_same_call_goes_on(checkpoints, tmp_path):
    source, to = checkpoints["olmoe"], tmp_path / "made"

    def stop(what: str) -> None:
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transform(source, "slim", to, progress=stop)
    assert not to.exists()
    (half,) = tmp_path.glob("made.partial-*")
    (done,) = half.glob("*.safetensors")
    before = done.stat().st_mtime_ns
    made = transform(source, "slim", to, progress=False)
    assert (made / done.name).stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [to]
    assert logits(load(made)).isfinite().all()


def test_the_same_call_finds_it_done_and_another_one_refuses_the_folder(checkpoints, tmp_path):
    source, to = checkpoints["olmoe"], tmp_path / "made"
    said = []
    for _ in range(2):
        transform(source, "slim", to, progress=said.append)
    assert said == ["layer 0", "layer 1", "layer 2", *["other weights"] * 3]
    with pytest.raises(ValueError, match="holds something else"):
        transform(source, "slim", to, keep=0.25, progress=False)


def test_what_cannot_be_rewritten_is_refused_by_name(checkpoints, tmp_path):
    to = tmp_path / "made"
    refused = [
        ((checkpoints["gpt_oss"], "puzzle"), {}, r"gpt_oss\) keeps the experts of a layer in one"),
        ((checkpoints["deepseek_v3"], "slim"), {}, "deepseek_v3 cannot have .*shared_experts"),
        ((checkpoints["deepseek_v3"], "merge"), {}, "deepseek_v3 routes by groups"),
        ((checkpoints["olmoe"], "merge"), {"keep": 0.3}, "leaves 2 of 6 experts.*picks 3"),
        ((checkpoints["olmoe"], "merge"), {"keep": 2}, "keep=2: above 0, at most 1"),
        ((checkpoints["olmoe"], "resmoe"), {"texts": [TEXT]}, "leave texts out"),
        ((checkpoints["olmoe"], "resmoe"), {"density": -1}, "density=-1"),
        ((checkpoints["olmoe"], "slim"), {"texts": [""]}, "none of them empty"),
        ((checkpoints["olmoe"], "prune"), {}, "how='prune': one of puzzle"),
        (("org/model", "slim"), {}, "hub id.*hf download org/model"),
        ((tmp_path, "slim"), {}, "no config.json"),
    ]
    for (model, how), options, match in refused:
        with pytest.raises(ValueError, match=match):
            transform(model, how, to, progress=False, **options)
    with pytest.raises(TypeError, match="no 'tua'; 'tau'"):
        transform(checkpoints["olmoe"], "puzzle", to, tua=1)
    assert not to.exists()


def test_deepseek_keeps_its_sizes_under_puzzle(checkpoints, tmp_path):
    made = transform(checkpoints["deepseek_v3"], "puzzle", tmp_path / "made", progress=False)
    assert logits(load(made)).isfinite().all()
    tensors = {k: v for f in made.glob("*.safetensors") for k, v in load_file(f).items()}
    assert tensors.keys() == Checkpoint(checkpoints["deepseek_v3"]).info.keys()


def test_parts_for_pictures_and_sound_are_copied(tmp_path):
    source = omni(tmp_path / "omni")
    made = transform(source, "puzzle", tmp_path / "made", progress=False)
    before, after = Checkpoint(source), Checkpoint(made)
    assert after.info.keys() == before.info.keys()
    beside = ("thinker.visual.", "thinker.audio_tower.", "talker.")
    parts = [key for key in before.info if key.startswith(beside)]
    assert len(parts) > 10
    assert all(torch.equal(before.tensor(key), after.tensor(key)) for key in parts)


@pytest.mark.slow
def test_ideas_are_compared_at_the_bytes_of_a_tier(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    model = checkpoints["qwen3_moe"]
    table = compare(model, ("puzzle", "slim"), bits=(8, 4), texts=[TEXT], progress=False)
    assert [*zip(table["how"], table["tier"], strict=True)] == [
        ("plain", 8), ("puzzle", 8), ("slim", 8), ("plain", 4), ("slim", 4)
    ]  # fmt: skip
    for _, rows in table.groupby("tier"):
        plain = rows[rows["how"] == "plain"].iloc[0]
        assert (rows["bytes"] <= plain["bytes"]).all()
        assert (rows["kl"] >= plain["kl"]).all()  # of random weights none can be spared
