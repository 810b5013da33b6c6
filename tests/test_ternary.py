"""What a ternary tier may be relied on for: its bytes, its scales, and a place among the tiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moelab
import tiny_models
from moelab.scheduling.budget import BudgetError
from moelab.store.codecs import PAGE, Layout, decode, encode, nbytes, payload_bytes
from moelab.store.groups import code_bytes, fit_scales, pack_codes, unpack_codes
from moelab.store.manifest import StoreError, experts_file
from moelab.store.store import Store

LAYOUT = Layout((("gate_up_proj", (256, 192)), ("down_proj", (192, 128))), "bfloat16")
BIASED = Layout((("up", (90, 101)), ("bias", (90,)), ("down", (50, 90))), "float16", turned=False)


def packed(codes: np.ndarray) -> np.ndarray:
    """Groups of codes 0 to 2 as bytes."""
    pairs = np.repeat(np.array([[1, -1]], np.float32), len(codes), axis=0)
    out = np.empty((len(codes), 13), np.uint8)
    pack_codes(codes.astype(np.float32) - 1, pairs, 1, out)
    return out


def test_the_bytes_of_a_group_are_as_documented():
    codes = np.zeros((1, 64), np.int64)
    assert code_bytes(1) == 13
    assert not packed(codes).any()
    codes[0, [0, 13, 26, 39, 52]] = 2, 1, 0, 2, 1  # the five digits of byte 0
    codes[0, 51] = 2  # the fourth digit of byte 12, whose fifth is nothing
    number = 2 * 81 + 1 * 27 + 0 * 9 + 2 * 3 + 1
    assert packed(codes)[0].tolist() == [-(-256 * number // 243), *[0] * 11, -(-256 * 6 // 243)]


def test_all_243_bytes_and_any_other_are_read_as_codes():
    every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 13, axis=1)
    found = np.empty((256, 64), np.float32)
    unpack_codes(every, np.tile(np.float32([1, 0]), (256, 1)), 1, found, np.empty(0, np.uint8))
    assert set(found.ravel()) == {0, 1, 2}
    written = [-(-256 * n // 243) for n in range(243)]
    weights = [sum(int(found[b, 13 * d]) * 3 ** (4 - d) for d in range(5)) for b in written]
    assert weights == list(range(243))


def test_ten_thousand_random_ternary_rows_come_back_bit_for_bit():
    rng = np.random.default_rng(0)
    scales = rng.uniform(1e-3, 100, (10_000, 3, 1)).astype(np.float16).astype(np.float32)
    likely = rng.dirichlet((1, 1, 1), 10_000)
    signs = np.array([rng.choice(3, 192, p=p) for p in likely]).reshape(-1, 3, 64) - 1
    w = torch.from_numpy((scales * signs).astype(np.float32).reshape(-1, 192))
    layout = Layout((("w", (10_000, 192)),), "bfloat16")
    blob = encode({"w": w}, layout, 1)
    assert torch.equal(decode(blob, layout, 1)["w"], w)
    assert np.array_equal(encode(decode(blob, layout, 1), layout, 1), blob)


def test_an_expert_is_encoded_once_and_for_all():
    generator = torch.Generator().manual_seed(0)
    for layout in (LAYOUT, BIASED):
        given = {n: torch.randn(s, generator=generator).half() for n, s in layout.tensors}
        found = decode(encode(given, layout, 1), layout, 1)
        again = decode(encode(found, layout, 1), layout, 1)
        assert all(torch.equal(found[name], again[name]) for name in given)
        matrix = found[layout.tensors[0][0]][0, :64]
        assert len(matrix.abs().unique()) <= 2


def test_a_weight_takes_1_6_bits_and_its_share_of_a_scale():
    groups = 3 * 192 * 128 // 64
    assert payload_bytes(LAYOUT, 1) == groups * (13 + 2)  # 120 bits of 64 weights: 1.875
    assert nbytes(LAYOUT, 1) == -(-groups * 15 // PAGE) * PAGE
    assert payload_bytes(LAYOUT, 1) / payload_bytes(LAYOUT, 2) == 15 / 20
    assert payload_bytes(BIASED, 1) == (90 + 50) * 2 * 15 + 2 * 90  # two groups a row


def test_no_scale_loses_less():
    groups = np.random.default_rng(1).standard_t(4, (200, 64)).astype(np.float32)
    own = fit_scales(groups)[:, None]

    def lost(scales):
        return ((scales * (groups / scales).round().clip(-1, 1) - groups) ** 2).sum(1)

    for share in np.linspace(0.3, 3, 100, dtype=np.float32):
        assert (lost(own) <= lost(share * own) + 1e-3).all()
    assert fit_scales(np.float32([[3, -3, 0.5, 0]])) == [3]
    assert fit_scales(np.zeros((1, 64), np.float32)) == [0]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("ternary")
    source = tiny_models.qwen3_moe(folder / "source")
    return Store.open(moelab.pack(source, folder / "store", tiers=(16, 2, 1), progress=False))


def test_the_budget_counts_its_bytes(store):
    each, top_k = store.slot_bytes[1], store.top_k
    assert store.slot_bytes == {16: 147456, 2: 24576, 1: 20480}
    with moelab.open(store.path, budget=each * 4, bits=1, measure_kl=False) as lab:
        run = lab.generate("ab", max_new_tokens=8, ignore_eos=True)
        assert run.summary()["peak_resident_bytes"] == each * 4
        loads = run.events.query("kind == 'load'")
        assert set(loads["bits"]) == {1}
        assert set(loads["bytes"]) == {each}
        with pytest.raises(BudgetError):
            lab.update(budget=each * top_k - 1)


def test_strategies_take_it_as_their_low_tier(store):
    with moelab.open(store.path, budget="50%", strategy="hobbit", low_bits=1) as lab:
        assert lab.settings.low_bits == 1
        lab.update(t1=0.0, t2=1.0)
        run = lab.generate("ab", max_new_tokens=8, ignore_eos=True)
        assert 1 in set(run.events["bits"])
        assert run.summary()["peak_resident_bytes"] <= lab.settings.budget_bytes


def test_a_damaged_byte_is_told_by_file_layer_and_expert(store, tmp_path):
    file, at = store.path / experts_file(1), PAGE + 8 * store.slot_bytes[1] + 5  # layer 1, expert 2
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError, match=r"experts-1\.bin.*layer 1.*expert 2"):
            Store.open(store.path, verify=True)
        file.write_bytes(whole[:-1])
        with pytest.raises(StoreError, match=r"experts-1\.bin"):
            Store.open(store.path)
    finally:
        file.write_bytes(whole)
