"""Rounding by inputs: a case by hand, never worse than plain rounding, and packing with texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moelab
import tiny_models
from moelab.models.adapter import load_skeleton
from moelab.models.checkpoint import ExpertReader
from moelab.store.codecs import Layout, decode, encode
from moelab.store.gptq import DAMPENING, feed_back
from moelab.store.inputs import FEW, PASS, Inputs
from moelab.store.manifest import StoreError
from moelab.store.store import Store

TEXTS = ["The ship sailed out of the harbour before dawn. " * 20, "Nobody saw it come back."]


def whole_numbers(groups: np.ndarray) -> np.ndarray:
    return np.repeat(np.float32([[1, 0]]), len(groups), axis=0)


def test_two_columns_by_hand():
    rows = np.zeros((2, 64), np.float32)
    rows[:, :2] = [[0.6, 0.6], [0.9, 0.1]]
    hessian = np.array([[1, 0.9], [0.9, 1]])
    moved, pairs = feed_back(rows, hessian, whole_numbers, 1)
    # 0.6 becomes 1. Of the 0.4 too much, 0.9 / 1.1 is taken off the second, which becomes 0: the
    # sum is 1 instead of 2, where it was 1.2.
    taken = 0.9 / (1 + DAMPENING)
    assert moved[0, :2] == pytest.approx([0.6, 0.6 - 0.4 * taken])
    assert moved[1, :2] == pytest.approx([0.9, 0.1 - 0.1 * taken])
    assert np.rint(moved[:, :2]).tolist() == [[1, 0], [1, 0]]
    assert not moved[:, 2:].any()
    assert (pairs == [1, 0]).all()


def test_a_row_that_would_lose_more_stays_plainly_rounded():
    rows = np.zeros((1, 64), np.float32)
    rows[0, :3] = 0.45, 0.3, 0.45
    h = np.eye(3) + 0.5
    moved, _ = feed_back(rows, h, whole_numbers, 1)
    found, plain = np.rint(moved[0, :3]) - rows[0, :3], np.rint(rows[0, :3]) - rows[0, :3]
    damped = h + DAMPENING * h.diagonal().mean() * np.eye(3)
    assert found @ damped @ found <= plain @ damped @ plain


def correlated(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    return rng.standard_normal((tokens, width // 8)) @ rng.standard_normal((width // 8, width))


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("width", [192, 100])
def test_outputs_on_correlated_inputs_err_less_than_by_plain_rounding(bits, turned, width):
    rng = np.random.default_rng(bits)
    w, x = torch.from_numpy(rng.standard_normal((80, width))), correlated(rng, 500, width)
    given = w.t().contiguous() if turned else w
    layout = Layout((("w", tuple(given.shape)),), "bfloat16", turned=turned)
    h = x.T @ x
    damped = h + DAMPENING * h.diagonal().mean() * np.eye(width)

    def error(**how):
        found = decode(encode({"w": given}, layout, bits, **how), layout, bits)["w"]
        e = (found.t() if turned else found).double().numpy() - w.numpy()
        return ((e @ damped) * e).sum(1), ((x @ e.T) ** 2).sum()

    (rows, total), (plain_rows, plain_total) = error(hessians={"w": h}), error()
    assert (rows <= plain_rows * (1 + 1e-4)).all()
    assert total < 0.6 * plain_total


@pytest.mark.parametrize("bits", [16, 8, 4, 2, 1])
def test_inputs_that_say_nothing_change_nothing(bits):
    generator = torch.Generator().manual_seed(0)
    given = {"w": torch.randn(40, 130, generator=generator)}
    layout = Layout((("w", (40, 130)),), "bfloat16")
    plain = encode(given, layout, bits)
    for h in (np.zeros((130, 130)), 3 * np.eye(130)):
        assert np.array_equal(encode(given, layout, bits, hessians={"w": h}), plain)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_inputs_are_those_of_the_models_own_experts(family, tmp_path):
    source = tiny_models.FAMILIES[family](tmp_path / "source")
    model = load_skeleton(source, dtype=torch.float32)
    reader = ExpertReader(model, source)
    inputs = Inputs(source, reader, TEXTS)
    assert inputs.tokens > PASS
    layer = reader.layers[1]
    place = max(range(layer.num_experts), key=lambda e: len(inputs.of(1, e)))
    tensors = reader(1, place)
    found = inputs.hessians(1, place, tensors)
    matrices = {name for name, tensor in tensors.items() if tensor.ndim > 1}
    assert set(found) == matrices
    assert {len(h) for h in found.values()} == {layer.hidden, layer.inner}
    x = inputs.of(1, place).double().numpy()
    first = next(name for name in found if name != "down_proj")
    assert found[first] == pytest.approx(x.T @ x, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny_models.qwen3_moe(tmp_path_factory.mktemp("qwen"))


def test_packing_rounds_by_the_inputs_of_the_texts(qwen, tmp_path):
    how = {"tiers": (16, 8, 2, 1), "progress": False}
    store = Store.open(moelab.pack(qwen, tmp_path / "own", calibrate=TEXTS, **how), verify=True)
    plain = Store.open(moelab.pack(qwen, tmp_path / "plain", **how))
    reader = ExpertReader(load_skeleton(qwen, dtype=torch.float32), qwen)
    inputs, few = Inputs(qwen, reader, TEXTS), 0
    for layer, count in enumerate(store.experts_per_layer):
        for expert in range(count):
            tensors = reader(layer, expert)
            seen = inputs.hessians(layer, expert, tensors)
            few += not seen
            assert (len(inputs.of(layer, expert)) < FEW) == (not seen)
            for bits in store.tiers:
                blob = store.read(layer, expert, bits)
                assert (blob == encode(tensors, store.layout, bits, hessians=seen)).all()
                same = (blob == plain.read(layer, expert, bits)).all()
                assert same == (bits >= 8 or not seen)
    note = f"rounded by GPTQ on {inputs.tokens} tokens; {few} of 18 experts were chosen by fewer"
    assert any(note in one for one in store.manifest.notes)
    made = store.path.stat().st_mtime_ns
    assert moelab.pack(qwen, store.path, calibrate=TEXTS, **how) == store.path  # done already
    assert store.path.stat().st_mtime_ns == made
    with pytest.raises(StoreError, match="holds the store"):
        moelab.pack(qwen, store.path, calibrate=TEXTS[1:], **how)


def test_texts_that_cannot_be_used_are_refused(qwen, tmp_path):
    for wrong in ("one text", [], ["", "a"]):
        with pytest.raises(ValueError, match="calibrate: a list of one or more texts"):
            moelab.pack(qwen, tmp_path / "s", tiers=(2,), calibrate=wrong, progress=False)
    with pytest.raises(ValueError, match="this model is measured on texts"):
        moelab.pack(qwen, tmp_path / "s", tiers=(2,), calibrate=[("a", "b")], progress=False)
    with pytest.raises(StoreError, match=r"calibrate rounds .* not 'qwen.*' at \(16, 8\)"):
        moelab.pack(qwen, tmp_path / "s", tiers=(16, 8), calibrate=TEXTS, progress=False)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("family", [tiny_models.switch, tiny_models.nllb])
def test_an_encoder_decoder_is_packed_on_pairs(family, tmp_path):
    source = family(tmp_path / "source")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[0][:300])]
    how = {"tiers": (16, 2), "progress": False}
    store = Store.open(moelab.pack(source, tmp_path / "own", calibrate=pairs, **how), verify=True)
    reader = ExpertReader(load_skeleton(source, dtype=torch.float32), source)
    inputs, seen = Inputs(source, reader, pairs), {True: 0, False: 0}
    for at in reader.layers:
        for expert in range(at.num_experts):
            tensors = reader(at.index, expert)
            given = inputs.hessians(at.index, expert, tensors)
            seen[at.encoder] += bool(given)
            blob = encode(tensors, store.layout, 2, hessians=given)
            assert (store.read(at.index, expert, 2) == blob).all()
    assert all(seen.values()), "experts of the encoder and of the decoder are rounded by inputs"
    with pytest.raises(ValueError, match=r"measured on \(source, target\) pairs of texts"):
        moelab.pack(source, tmp_path / "s", calibrate=TEXTS, **how)


def test_on_the_bundled_model_unseen_text_loses_less(tmp_path):
    halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in moelab.demo.probes().values()]
    seen, unseen = zip(*halves, strict=True)
    found = []
    for name, texts in (("plain", None), ("gptq", seen)):
        how = {"tiers": (16, 1), "progress": False, "calibrate": texts}
        store = moelab.pack(moelab.demo.checkpoint(), tmp_path / name, **how)
        with moelab.open(store, budget="100%", bits=1, measure_kl=False) as lab:
            found.append(lab.score(unseen[0], progress=False).kl_mean)
    assert found[1] < 0.75 * found[0]
