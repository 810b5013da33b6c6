"""What one may rely on when a dense model is turned into a mixture: on a tiny random Llama."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moelab
import tiny_models
from moelab.demo.mixture import stock
from moelab.training.moefy import (
    Course,
    Shape,
    card,
    compare,
    load_delta,
    materialise,
    moefy,
    routing,
    save_delta,
)
from moelab.training.moefy.calibrate import calibrated, low_rank_map
from moelab.training.moefy.distillation import Targets, divergence
from moelab.training.moefy.grouping import group_neurons
from moelab.training.moefy.student import route, set_top_k
from moelab.training.moefy.texts import windows

SHAPE = Shape(experts=4, shared=64, ranks=(2, 4, 8))
COURSE = Course(tokens=192, batch=2, accumulate=1, top_ks=(1, 2), learning_rate=2e-3)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (12, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def student(dense, ids):
    return calibrated(dense, ids, SHAPE, top_ks=(1, 2), progress=False)


def logits(student, ids, top_k):
    set_top_k(student, top_k)
    with torch.no_grad():
        return student.logits(student(ids))


def seen(folder):
    """Tokens that a folder's checkpoint has seen."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])["seen"]


def test_every_neuron_has_one_place_and_groups_are_of_one_size(student):
    for mixture in student.mixtures:
        assert sorted(mixture.order.tolist()) == list(range(320))
        assert mixture.width == 64


def test_the_shared_neurons_are_those_that_add_most():
    torch.manual_seed(0)
    x, gate, up, down = (torch.randn(n, 8) for n in (200, 24, 24, 24))
    down[:4] *= 50
    order = group_neurons(x, gate, up, down.T, shared=4, experts=5, top_k=2)
    assert set(order[:4].tolist()) == {0, 1, 2, 3}


def test_neurons_that_open_together_are_grouped_together():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    belongs = torch.arange(32) % 4
    gate = 5 * directions[belongs] + 0.05 * torch.randn(32, 16)
    x = torch.randn(500, 16)
    ones = torch.ones(32, 16)
    order = group_neurons(x, gate, ones, ones.T, shared=0, experts=4, top_k=1)
    groups = belongs[order].view(4, 8)
    assert (groups == groups[:, :1]).all()


def test_with_all_experts_and_even_gates_the_student_is_the_dense_model(dense, ids):
    student = calibrated(dense, ids, SHAPE, top_ks=(4,), progress=False)
    with torch.no_grad():
        for mixture in student.mixtures:
            mixture.router.zero_()
            mixture.down.b.zero_()
        expected = dense(ids).logits
    assert torch.allclose(logits(student, ids, 4), expected, atol=1e-4)


def test_gate_weights_are_those_of_glm4_moe():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.2]])
    bias = torch.tensor([0.0, 0.7, 0.0, 0.0])  # makes expert 1 the second choice
    gates = route(scores, bias, 2)
    assert torch.allclose(gates, torch.tensor([[1.8, 0.2, 0.0, 0.0]]))


def test_each_sequence_may_have_its_own_number_of_experts():
    scores = torch.rand(3, 5, 6)
    mixed = route(scores, torch.zeros(6), torch.tensor([1, 6, 3]))
    assert ((mixed > 0).sum(-1) == torch.tensor([[1], [6], [3]])).all()
    assert torch.allclose(mixed[2], route(scores, torch.zeros(6), 3)[2])


def test_experts_that_were_not_chosen_feel_a_gradient():
    scores = torch.tensor([[0.52, 0.50, 0.1]], requires_grad=True)
    route(scores, torch.zeros(3), 1)[0, 1].backward()
    assert scores.grad[0, 1] > 0


def test_the_low_rank_map_finds_a_low_rank_truth():
    torch.manual_seed(0)
    x = torch.randn(600, 20) * torch.logspace(-2, 2, 20)
    truth = torch.randn(20, 3) @ torch.randn(3, 10) / torch.logspace(-2, 2, 20)[:, None]
    a, b = low_rank_map(x, x @ truth, 3)
    error = (x @ a.T @ b.T - x @ truth).square().sum() / (x @ truth).square().sum()
    assert error < 0.01


def test_the_divergence_is_zero_for_the_teacher_and_positive_for_others():
    torch.manual_seed(0)
    theirs = torch.randn(5, 300).log_softmax(-1)
    top = theirs.topk(64, -1)
    assert divergence(theirs, top.indices, top.values).abs() < 1e-5
    assert divergence(torch.randn(5, 300), top.indices, top.values) > 0


def test_transformers_own_model_computes_what_the_student_does(dense, student, ids):
    for top_k in (1, 2):
        with torch.no_grad():
            theirs = stock(dense, student, top_k=top_k)(ids).logits
        assert torch.allclose(theirs, logits(student, ids, top_k), atol=1e-4)


def test_a_delta_gives_the_student_back_and_is_smaller_than_the_model(
    dense, student, ids, tmp_path
):
    size = save_delta(student, tmp_path / "delta.safetensors", facts={"made": "here"})
    again, facts = load_delta(dense, tmp_path / "delta.safetensors")
    assert facts == {"made": "here"}
    assert size < 4 * sum(p.numel() for p in dense.parameters())
    difference = logits(again, ids, 4) - logits(student, ids, 4)
    assert difference.abs().mean() < 0.05 * logits(student, ids, 4).std()


def test_a_delta_of_another_model_is_refused(dense, student, tmp_path):
    save_delta(student, tmp_path / "delta.safetensors")
    config = LlamaConfig(**{**dense.config.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="another model than this one of 3 layers"):
        load_delta(LlamaForCausalLM(config), tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="another model"):  # of the same size
        load_delta(LlamaForCausalLM(dense.config).eval(), tmp_path / "delta.safetensors")


def test_training_goes_on_where_it_was_stopped(dense, ids, tmp_path):
    whole = moefy(dense, ids, tmp_path / "a", shape=SHAPE, course=COURSE, progress=False)
    moefy(dense, ids, tmp_path / "b", shape=SHAPE, course=COURSE, seconds=0, progress=False)
    assert (tmp_path / "b" / "checkpoint.safetensors").is_file()
    again = moefy(dense, ids, tmp_path / "b", shape=SHAPE, course=COURSE, progress=False)
    for (name, one), (_, other) in zip(whole.trained(), again.trained(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


def test_ctrl_c_saves_what_was_learnt_and_reaches_the_caller(dense, ids, tmp_path, monkeypatch):
    def pressed(student, active):
        signal.raise_signal(signal.SIGINT)
        set_top_k(student, active)

    with monkeypatch.context() as patch:
        patch.setattr("moelab.training.moefy.distillation.set_top_k", pressed)
        with pytest.raises(KeyboardInterrupt, match="stopped after 32 tokens"):
            moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, progress=False)
    assert seen(tmp_path) == 32
    moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, progress=False)
    assert seen(tmp_path) == COURSE.tokens


def test_distillation_brings_the_student_nearer_to_its_teacher(dense, ids, tmp_path):
    course = Course(tokens=12 * 16 * 8, batch=4, accumulate=1, top_ks=(2,), learning_rate=2e-3)
    before = calibrated(dense, ids, SHAPE, top_ks=(2,), progress=False)
    after = moefy(dense, ids, tmp_path, shape=SHAPE, course=course, progress=False)
    kl = [compare(dense, s, {"text": ids}, top_ks=(2,)).kl[0] for s in (before, after)]
    assert kl[1] < 0.9 * kl[0]
    assert after.model.lm_head.weight.equal(dense.lm_head.weight), "what is frozen stays"


def test_a_second_epoch_asks_the_teacher_nothing(dense, ids, tmp_path):
    rows = np.array([1, 4])
    first = Targets(dense, ids, tmp_path / "targets.bin")[rows]
    second = Targets(None, ids, tmp_path / "targets.bin")[rows]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_comparison_counts_active_neurons_and_the_routing_adds_up(dense, student, ids):
    table = compare(dense, student, {"one": ids[:6], "two": ids[6:]}, top_ks=(1, 2))
    assert list(table.domain) == ["one", "one", "two", "two"]
    assert table.active.tolist() == pytest.approx([0.4, 0.6, 0.4, 0.6])
    assert (table.kl > 0).all()
    each = {str(i): ids[i : i + 1] for i in range(6)}  # a window alone has a ratio and no error
    alone = compare(dense, student, each, top_ks=(1,))
    logs = np.log(alone.ratio)
    assert table.ratio[0] == pytest.approx(np.exp(logs.mean()), rel=1e-4)
    assert table.error[0] == pytest.approx(table.ratio[0] * logs.std() / 6**0.5, rel=1e-3)
    assert alone.error.isna().all()
    assert routing(student, ids, top_k=2).sum(1).tolist() == pytest.approx([2.0, 2.0])


class Words:
    """A tokenizer of the tiny model: a character is a token."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [ord(c) % 97 for c in text]})


def test_windows_hold_every_document_in_random_order():
    cut = windows(["abcdefg", "hijk"], Words(), length=4)
    assert sorted(cut.flatten().tolist()) == sorted([*Words()("abcdefghijk").input_ids, 0])
    assert windows(["abcdefg"] * 9, Words(), length=4, most=3).shape == (3, 4)
    with pytest.raises(ValueError, match="3 tokens of text do not fill one window of 4"):
        windows(["ab"], Words(), length=4)


def test_the_card_holds_what_was_measured(dense, student, ids):
    table = compare(dense, student, {"one": ids}, top_ks=(1, 2))
    text = card(
        "tiny",
        SHAPE,
        table,
        shares={2: routing(student, ids, top_k=2)},
        samples=pd.DataFrame([{"prompt": "Hi?", "dense": "Yes.", "2 of 4": "Yes, yes."}]),
        offloading=pd.DataFrame(
            [
                {"setting": "8 bit", "kl": 0.01, "same_top1": 0.9, "ratio": 1.1, "Hi?": "Yes."},
                {"setting": "2 bit", "kl": 0.3, "same_top1": 0.5, "ratio": 1.9, "Hi?": "Y y"},
                {"setting": "HOBBIT, 50 %", "kl": 0.2, "same_top1": 0.6, "ratio": 1.5, "Hi?": ""},
                {"setting": "HOBBIT, 25 %", "kl": 0.1, "same_top1": 0.6, "ratio": 1.5, "Hi?": ""},
            ]
        ),
        notes="## Tried",
        facts={"licence": "none"},
    )
    assert text.startswith("# tiny\n")
    assert "- **licence**: none" in text
    assert f"{table.perplexity[1]:.1f} | {table.ratio[1]:.3f} ± {table.error[1]:.3f}" in text
    assert "| 2 | 50 % |" in text
    assert "- *2 of 4*: Yes, yes." in text
    assert "| 2 bit | 0.3000 | 50 % | 1.900 |" in text
    assert "Fewer bits: the divergence rises from row to row." in text
    assert "HOBBIT: the divergence does not rise from row to row." in text
    assert text.endswith("## Tried\n")


def test_moelab_opens_what_was_made(dense, student, ids, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    words = {"tokenizer": tiny_models.tokenizer(), "dtype": torch.float32}
    folder = materialise(dense, student, tmp_path / "moe", top_k=2, **words)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded).__name__ == "Glm4MoeForCausalLM"
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, logits(student, ids, 2), atol=1e-4)
    assert moelab.moefy is moefy
    store = moelab.pack(folder, tmp_path / "store", tiers=(16, 4), progress=False)
    assert moelab.Store.open(store).manifest.experts_per_layer == (4, 4)


def another(kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_biases_and_norms_of_other_kinds_go_along(kind, ids, tmp_path):
    dense = another(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    student = moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, seconds=0, progress=False)
    folder = materialise(dense, student, tmp_path / "moe", top_k=2, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, logits(student, ids, 2), atol=1e-4)
        for mixture in student.mixtures:  # all experts, evenly: nothing but the dense model is left
            mixture.router.zero_()
            mixture.down.b.zero_()
        assert torch.allclose(logits(student, ids, 4), dense(ids).logits, atol=1e-4)


def test_a_model_the_mixture_cannot_compute_exactly_is_refused_by_name(dense, ids, tmp_path):
    def refused(model, match):
        with pytest.raises(ValueError, match=match):
            moefy(model, ids, tmp_path, shape=SHAPE, course=COURSE)

    refused(another("granite"), "kinds llama, mistral, qwen2, qwen3, not 'granite'")
    refused(another("mistral", sliding_window=8), "sliding window")
    refused(another("llama", mlp_bias=True), "llama with model.layers.0.mlp.gate_proj.bias")
    refused(another("llama", hidden_act="gelu"), "llama with gelu")
    refused(another("llama").bfloat16(), "dtype=torch.float32")
    refused(another("llama", attn_implementation="eager"), "with eager attention")


def test_a_shape_is_found_for_any_width():
    assert Shape.of(1536) == Shape()
    for neurons in (320, 3072, 4864, 5632, 8192, 11008, 14336):
        shape = Shape.of(neurons)
        assert shape.width(neurons) % 64 == 0
        assert 0.2 < shape.shared / neurons < 0.5
    assert Shape.of(100).width(100)
    with pytest.raises(ValueError, match=r"Shape\(experts=21, shared=2816, .* fits"):
        Shape().width(8192 + 1 - 1)


def test_all_numbers_of_active_experts_take_their_turn(dense, ids, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "moelab.training.moefy.distillation.set_top_k",
        lambda student, active: (seen.append(active.tolist()), set_top_k(student, active)),
    )
    course = Course(tokens=64, batch=2, accumulate=1, top_ks=(1, 2, 3))
    moefy(dense, ids, tmp_path, shape=SHAPE, course=course, progress=False)
    assert seen == [[1, 2], [3, 1]]


def test_a_resumed_course_may_have_another_rate(dense, ids, tmp_path):
    moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, seconds=0, progress=False)
    still = replace(COURSE, learning_rate=0.0, router_rate=0.0)
    begun = load_delta(dense, tmp_path / "calibrated.safetensors")[0]
    again = moefy(dense, ids, tmp_path, shape=SHAPE, course=still, progress=False)
    for (name, one), (_, other) in zip(begun.trained(), again.trained(), strict=True):
        assert torch.allclose(one, other, atol=2e-3), name


def test_a_gradient_that_is_not_finite_leaves_the_checkpoint(dense, ids, tmp_path):
    moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, seconds=0, progress=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    targets = Targets(dense, ids, tmp_path / "targets.bin")
    targets._kept["known"], targets._kept["answers"]["logs"] = 1, np.nan
    with pytest.raises(FloatingPointError, match="not finite after 0 tokens"):
        moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, progress=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_targets_hold_ids_of_any_vocabulary(tmp_path):
    class Wide:
        def __call__(self, ids, **_):
            logits = torch.zeros(*ids.shape, 70_000)
            logits[..., 69_999] = 5.0
            return type("Output", (), {"logits": logits})

    ids = torch.zeros(1, 4, dtype=torch.int64)
    tokens, logs = Targets(Wide(), ids, tmp_path / "targets.bin")[np.array([0])]
    assert (tokens[..., 0] == 69_999).all()
    assert (logs[..., 0] < 0).all()


def test_a_damaged_file_is_refused_with_its_name(dense, student, ids, tmp_path):
    save_delta(student, tmp_path / "delta.safetensors")
    whole = (tmp_path / "delta.safetensors").read_bytes()
    (tmp_path / "delta.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="delta.safetensors is damaged"):
        load_delta(dense, tmp_path / "delta.safetensors")
    moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, seconds=0, progress=False)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint.safetensors is no checkpoint, or damaged"):
        moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, progress=False)
    with torch.no_grad():
        broken = load_delta_of(dense, student, tmp_path)
        broken.mixtures[0].router[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"mlp\.router holds values that are not finite"):
        save_delta(broken, tmp_path / "delta.safetensors")


def load_delta_of(dense, student, folder):
    save_delta(student, folder / "copy.safetensors")
    return load_delta(dense, folder / "copy.safetensors")[0]


def test_what_is_rounded_is_what_the_checkpoint_holds(dense, student, ids, tmp_path):
    rounded = load_delta_of(dense, student, tmp_path)
    folder = materialise(dense, rounded, tmp_path / "moe", top_k=2)
    rounded.rounded(torch.bfloat16)
    with pytest.raises(ValueError, match="was rounded has no delta"):
        rounded.delta()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_top_k(rounded, 2)
    router = loaded.state_dict()["model.layers.0.mlp.gate.weight"]
    with torch.no_grad():
        ours = rounded.logits(rounded(ids))
        assert not torch.allclose(router, router.bfloat16().float()), "routers keep float32"
        assert torch.allclose(loaded(ids).logits, ours, atol=1e-4)


def test_what_cannot_be_a_mixture_is_refused(dense, student, ids, tmp_path):
    with pytest.raises(ValueError, match="do not split into 60 shared"):
        moefy(dense, ids, tmp_path, shape=Shape(experts=4, shared=60))
    moefy(dense, ids, tmp_path / "a", shape=SHAPE, course=COURSE, seconds=0, progress=False)
    with pytest.raises(ValueError, match=r"other text, \[12, 16\] and not \[11, 16\] windows"):
        moefy(dense, ids[1:], tmp_path / "a", shape=SHAPE, course=COURSE)
    with pytest.raises(ValueError, match="batch=2 and calibration_windows=0"):
        moefy(dense, ids, tmp_path, shape=SHAPE, course=COURSE, calibration_windows=0)
    with pytest.raises(ValueError, match="the model has tokens 0 to 96"):
        moefy(dense, ids + 90, tmp_path, shape=SHAPE, course=COURSE)
    with pytest.raises(ValueError, match="ranks=\\(2, 4, 65\\) must not exceed the width, 64"):
        moefy(dense, ids, tmp_path, shape=Shape(4, 64, (2, 4, 65)), course=COURSE)
    with pytest.raises(ValueError, match="must be 1 to 4 experts"):
        moefy(dense, ids, tmp_path, shape=SHAPE, course=Course(top_ks=(5,)))
    with pytest.raises(ValueError, match=r"pass token ids \[windows, length\]"):
        moefy(dense, ids[0], tmp_path, shape=SHAPE, course=COURSE)
    with pytest.raises(ValueError, match="choose 1 to 4"):
        materialise(dense, student, tmp_path, top_k=9)


def test_a_disk_too_small_for_the_checkpoint_is_refused_before_anything_is_written(
    dense, student, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="the checkpoint needs 0.00 GB and .* make room"):
        materialise(dense, student, tmp_path / "moe", top_k=2)
    assert list(tmp_path.iterdir()) == []
