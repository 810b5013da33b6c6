"""What a 12-bit tier may be relied on for: the weights of 16 bit, bit for bit, everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moelab
import tiny_models
from moelab.catalogue import find_store
from moelab.engine import kernels
from moelab.models.gating import SWIGLU, Rule
from moelab.store.codecs import PAGE, Layout, decode, encode, matrices, nbytes, payload_bytes
from moelab.store.manifest import StoreError
from moelab.store.store import Store
from moelab.store.zipped import (
    COMMON,
    capacity,
    code_bytes,
    entropy_bits,
    table_bytes,
    unzip,
    unzip_words,
    zip_words,
)

LAYOUT = Layout((("gate_up_proj", (256, 192)), ("down_proj", (192, 128))), "bfloat16")
STRANGE = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F], np.uint16)
"""Zeros, infinities, NaN, and the smallest and largest denormal numbers."""


def again(words: np.ndarray) -> np.ndarray:
    return unzip_words(np.concatenate([p.reshape(-1) for p in zip_words("w", words)]), len(words))


def alike(rng: np.random.Generator, count: int) -> np.ndarray:
    """Words with 15 high bytes of any kind."""
    highs = rng.choice(256, COMMON, replace=False).astype(np.uint16) << 8
    return rng.choice(highs, count) | rng.integers(0, 256, count, dtype=np.uint16)


def expert(layout: Layout, *, strange: bool = True) -> dict[str, torch.Tensor]:
    """Random weights; of every matrix some are 0, -0, denormal or far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    found = {n: (torch.randn(s, generator=generator) * 0.1) for n, s in layout.tensors}
    for tensor in found.values() if strange else ():
        flat = tensor.view(-1)
        flat[[0, len(flat) // 3, -65, -1]] = torch.tensor([0.0, -0.0, 1e-40, 3e30])
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def test_the_bytes_of_a_group_are_as_documented():
    words = np.repeat(np.arange(16, dtype=np.uint16) + 0x30 << 8, 4) | np.arange(
        64, dtype=np.uint16
    )
    words[63] = 0x3001  # 0x30 to 0x3E four times or more, 0x3F three times: the exceptions
    codes, table = zip_words("w", words)
    assert codes[0, :64].tolist() == [*range(63), 1]  # the low bytes
    assert codes[0, 64:].tolist() == [j // 4 | (8 + j // 4) << 4 for j in range(31)] + [0x07]
    assert table[:30].view(np.uint16).tolist() == [0x3000 + 0x100 * k for k in range(15)]
    assert table[32 : 32 + 4 * 4].view(np.uint32).tolist() == [60, 61, 62, 2**32 - 1]
    assert table[32 + 4 * 8 :].view(np.uint16).tolist() == [0x3F3C, 0x3F3D, 0x3F3E, 0, 0, 0, 0, 0]
    assert (again(words) == words).all()


def test_ten_thousand_random_matrices_come_back_bit_for_bit():
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        count = int(rng.integers(1, 700))
        words = alike(rng, count)
        at = rng.integers(0, count, rng.integers(0, capacity(count) + 1))
        words[at] = rng.integers(0, 1 << 16, len(at))  # any bits whatever, to a full table
        words[at[:3]] = rng.choice(STRANGE, len(at[:3]))
        assert (again(words) == words).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [64, 65, 4096])
def test_exceptions_are_exact_at_both_ends_and_in_a_full_table(seed, count):
    words, room = alike(np.random.default_rng(seed), count), capacity(count)
    words[: room // 2] = np.resize(STRANGE, room // 2)
    words[-(room - room // 2) :] = np.resize(STRANGE[::-1], room - room // 2)
    assert (again(words) == words).all()


def test_one_exception_more_than_there_is_room_for_is_refused_with_the_numbers():
    words = np.resize(np.arange(0x3000, 0x3F00, 16, dtype=np.uint16), 4096)
    words[: capacity(4096)] = 0
    assert (again(words) == words).all()
    words[capacity(4096)] = 0
    with pytest.raises(
        ValueError, match=r"up has 17 of 4096 weights whose high byte.*room for 16; leave"
    ):
        zip_words("up", words)


def test_a_part_of_a_matrix_takes_its_own_exceptions():
    words = alike(np.random.default_rng(2), 64 * 60)
    words[[63, 64, 127, 128, 3839]] = STRANGE[:5]
    codes, table = zip_words("w", words)
    for g in range(60):
        found = np.empty(64, np.uint16)
        unzip(codes[g], table, 64 * g, found)
        assert (found == words[64 * g : 64 * (g + 1)]).all()


def test_a_table_of_rubbish_writes_nothing_outside():
    rng = np.random.default_rng(3)
    for _ in range(200):
        codes = rng.integers(0, 256, code_bytes(128), dtype=np.uint8)
        table = rng.integers(0, 256, table_bytes(1 << 14), dtype=np.uint8)
        table[32 : 32 + 4 * capacity(1 << 14)].view(np.uint32)[:] %= 300
        around = np.full(3 * 128, 7, np.uint16)
        unzip(codes, table, int(rng.integers(0, 300)), around[128:256])
        assert (around[:128] == 7).all()
        assert (around[256:] == 7).all()


@pytest.mark.parametrize("turned", [False, True])
def test_an_expert_decodes_to_its_own_weights(turned):
    tensors = (("up", (90, 101)), ("bias", (101,)), ("down", (50, 90)))
    layout = Layout(tensors[:1] + tensors[2:] if turned else tensors, "bfloat16", turned=turned)
    given = expert(layout)
    decoded = decode(encode(given, layout, 12), layout, 12, dtype=torch.bfloat16)
    for name, weights in given.items():
        assert torch.equal(decoded[name].view(torch.int16), weights.view(torch.int16))


def test_it_takes_three_quarters_of_16_bit_and_a_table():
    weights = 3 * 192 * 128
    rooms = capacity(256 * 192) + capacity(192 * 128)
    assert payload_bytes(LAYOUT, 12) == weights * 3 // 2 + 6 * rooms + 2 * 32
    assert nbytes(LAYOUT, 12) == -(-payload_bytes(LAYOUT, 12) // PAGE) * PAGE
    large = Layout((("gate_up_proj", (2048, 2048)), ("down_proj", (2048, 1024))), "bfloat16")
    assert nbytes(large, 12) / nbytes(large, 16) == pytest.approx(0.756, abs=0.0005)


def test_what_12_bit_cannot_hold_is_refused_with_the_reason():
    half = Layout(LAYOUT.tensors, "float16")
    with pytest.raises(ValueError, match="12 bit holds bfloat16.*these are float16.*leave out"):
        nbytes(half, 12)
    given = expert(LAYOUT)
    given["down_proj"][3] = 2.0 ** torch.arange(-60, 68)
    with pytest.raises(ValueError, match="down_proj has 1.. of 24576 weights.*room for 56; leave"):
        encode(given, LAYOUT, 12)
    given["down_proj"][3, 5] = float("inf")
    with pytest.raises(ValueError, match="down_proj has NaN or infinite weights"):
        encode(given, LAYOUT, 12)


def served(blob, bits, layout, x, rule=SWIGLU, start=0):
    """What the kernels make of one expert, ``[T, H]``."""
    moved = np.concatenate([np.zeros(start, np.uint8), blob])[start:]
    out = np.zeros((1, *x.shape), np.float32)
    kernels.compute_experts(
        np.array([moved.ctypes.data], np.uintp),
        np.array([bits]),
        x,
        np.ones((1, len(x)), np.float32),
        out,
        inner=layout.tensors[1][1][1],
        half="bfloat16",
        rule=rule,
        biased=len(layout.tensors) > 2,
    )
    return out[0]


RULES = {
    "swiglu": (LAYOUT.tensors, SWIGLU),
    "relu, no gate": ((("up_proj", (128, 192)), ("down_proj", (192, 128))), Rule(power=1)),
    "biases, interleaved": (
        (
            *LAYOUT.tensors,
            ("gate_up_proj_bias", (256,)),
            ("down_proj_bias", (192,)),
        ),
        Rule(1.702, 0.0, 7.0, 1.0, 0, True),
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [1, 5, 11, kernels.KERNEL_TOKENS + 1])
def test_kernels_give_what_they_give_at_16_bit_bit_for_bit(name, count):
    tensors, rule = RULES[name]
    layout = Layout(tensors, "bfloat16")
    given = expert(layout)
    x = np.random.default_rng(0).standard_normal((count, 192), dtype=np.float32)
    blobs = {bits: encode(given, layout, bits) for bits in (16, 12)}
    results = [served(blob, bits, layout, x, rule) for bits, blob in blobs.items()]
    results.append(served(blobs[12], 12, layout, x, rule, start=3))
    for found in results[1:]:
        assert np.array_equal(found, results[0])
    many = [
        kernels.compute_prefill(blob, bits, layout, torch.from_numpy(x), rule)
        for bits, blob in blobs.items()
    ]
    assert torch.equal(*many)


def test_tiers_mix_in_one_call():
    given = expert(LAYOUT, strange=False)
    blobs = {bits: encode(given, LAYOUT, bits) for bits in (4, 12, 16, 8)}
    x = np.random.default_rng(0).standard_normal((3, 192), dtype=np.float32)
    out = np.zeros((4, 3, 192), np.float32)
    kernels.compute_experts(
        np.array([blob.ctypes.data for blob in blobs.values()], np.uintp),
        np.array(list(blobs)),
        x,
        np.ones((4, 3), np.float32),
        out,
        inner=128,
        half="bfloat16",
    )
    for found, (bits, blob) in zip(out, blobs.items(), strict=True):
        assert np.array_equal(found, served(blob, bits, LAYOUT, x))
    assert np.array_equal(out[1], out[2])


@pytest.fixture(scope="module")
def demo(demo_store):
    return find_store("demo", tiers=(16, 12, 4), progress=False)


def test_a_model_at_12_bit_says_and_scores_what_it_does_at_16(demo):
    text = "The little ship sailed out of the harbour and"
    found = {}
    with moelab.open(demo, budget="40%", measure_kl=True, progress=False) as lab:
        for bits in (16, 12, 4):
            lab.update(bits=bits)
            run = lab.generate(text, max_new_tokens=12)
            score = lab.score(text, progress=False)
            found[bits] = (run.text, run.per_token["kl"].dropna().tolist(), score)
        assert found[12] == found[16]
        assert found[4][2].kl_mean > 100 * found[12][2].kl_mean
        with pytest.raises(ValueError, match="low_bits=12: 12 bit are the same weights as 16"):
            lab.update(strategy="hobbit", bits=16, low_bits=12)
        lab.update(strategy="hobbit", bits=12, low_bits=4)
    assert lab._shape.nbytes[12] / lab._shape.nbytes[16] < 0.76


def test_the_bundled_models_entropy_and_exceptions_are_as_documented(demo):
    store = Store.open(demo)
    tensors, most = [], 0.0
    for layer, count in enumerate(store.experts_per_layer):
        for e in range(count):
            tensors += matrices(store.read(layer, e, 16), store.layout, 16)
    for tensor in tensors:
        counts = np.bincount(tensor.view(torch.int16).numpy().view(np.uint16).reshape(-1) >> 8)
        most = max(most, 1 - np.sort(counts)[-COMMON:].sum() / tensor.numel())
    assert entropy_bits(tensors) == pytest.approx((2.57, 7.97), abs=0.005)
    assert 1 / 4000 < most < 1 / 2000


def test_where_16_bit_is_not_packed_12_is_full_precision(demo, tmp_path):
    text = "Once there was a garden"
    with moelab.open("demo", tiers=(12, 4), budget="100%", progress=False) as lab:
        assert lab.settings.bits == 12
        low = lab.score(text, progress=False)
    with moelab.open(demo, budget="100%", progress=False) as lab:
        assert lab.score(text, progress=False) == low
        assert low.kl_mean < 1e-9


def test_packing_refuses_by_name(tmp_path):
    source = tiny_models.qwen3_moe(tmp_path / "source")

    def to_half(tensors):
        tensors |= {name: tensor.half() for name, tensor in tensors.items()}

    half = tiny_models.edit(source, tmp_path / "half", to_half)
    with pytest.raises(ValueError, match="12 bit holds bfloat16"):
        moelab.pack(half, tmp_path / "store", tiers=(16, 12), progress=False)
    assert not (tmp_path / "store").exists()

    def spread(tensors):
        tensors["model.layers.1.mlp.experts.4.down_proj.weight"][:2] = 2.0 ** torch.arange(-60, 68)

    wide = tiny_models.edit(source, tmp_path / "wide", spread)
    with pytest.raises(StoreError, match=r"layer 1 expert 4: down_proj has 2.. of 24576 weights"):
        moelab.pack(wide, tmp_path / "store", tiers=(16, 12), progress=False)
    assert not (tmp_path / "store").exists()


def test_entropy_is_that_of_exponents_and_of_the_rest():
    ones = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert entropy_bits([ones]) == (0.0, 1.0)
    assert entropy_bits([ones, 4 * ones]) == (1.0, 1.0)
    assert entropy_bits([torch.tensor([[1.0, 2.0], [4.0, 8.0]])]) == (2.0, 0.0)
