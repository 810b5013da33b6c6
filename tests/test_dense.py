"""Dense weights at 16 bit through the kernels, and all cores: the same logits, to the last bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, MistralConfig

import moelab
import tiny_models
from moelab.engine import dense, kernels, small_ops
from moelab.engine.chunks import quantise
from moelab.models import skeleton
from moelab.store.codecs import Layout, decode, encode, nbytes


@pytest.fixture
def cores():
    """Restores how many cores compute."""
    before = kernels.POOL.threads
    yield kernels.POOL
    kernels.POOL.threads = before


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(200, 96), (64, 64), (1, 130), (130, 37)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_16_bit_linear_layer_is_float32s_on_the_same_values(half, rows, width, tokens, bias):
    torch.manual_seed(0)
    module = nn.Linear(width, rows, bias=bias).requires_grad_(False)
    module.weight.data = module.weight.data.to(half)
    x = torch.randn(2, tokens, width)
    expected = F.linear(x, module.weight.float(), module.bias)
    dense.serve(module)
    assert module.weight.dtype == torch.float32, "families cast by the dtype of a weight"
    assert torch.equal(module.weight + 0, module.weight.held[:])
    assert (module(x) - expected).abs().max() <= 2e-6 * width**0.5
    assert (F.linear(x, module.weight, module.bias) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_quantised_matrix_is_multiplied_where_it_lies(bits):
    rng = np.random.default_rng(0)
    layout = Layout((("weight", (150, 192)),), "bfloat16")
    weight = torch.from_numpy(rng.standard_normal((150, 192)).astype(np.float32))
    blob = encode({"weight": weight}, layout, bits)
    x = rng.standard_normal((3, 192)).astype(np.float32)
    got = kernels.linear(blob.ctypes.data, bits, "bfloat16", x, 150)
    expected = x @ decode(blob, layout, bits)["weight"].numpy().T
    assert np.abs(got - expected).max() <= (0.001 if bits == 8 else 0.02) * np.abs(expected).max()


def test_what_cannot_be_multiplied_is_refused():
    x = np.zeros((1, 100), np.float32)
    with pytest.raises(ValueError, match="rows of 100 at 4 bit"):
        kernels.linear(x.ctypes.data, 4, "bfloat16", x, 1)
    with pytest.raises(ValueError, match="x is float64"):
        kernels.linear(x.ctypes.data, 16, "bfloat16", x.astype(np.float64), 1)
    with pytest.raises(ValueError, match="threads=0: 1 to 64"):
        kernels.POOL.threads = 0


WIDTH, INNER = 256, 192
LAYOUT = Layout((("gate_up_proj", (2 * INNER, WIDTH)), ("down_proj", (WIDTH, INNER))), "bfloat16")


def experts() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(1)
    bits = np.array([16, 8, 4, 3, 2, 4])

    def expert() -> dict[str, torch.Tensor]:
        return {n: torch.from_numpy(rng.standard_normal(s)).float() for n, s in LAYOUT.tensors}

    return [encode(expert(), LAYOUT, tier) for tier in bits], bits


def served(blobs: list[np.ndarray], bits: np.ndarray, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, WIDTH)).astype(np.float32)
    gate = rng.random((len(bits), tokens)).astype(np.float32)
    gate[rng.random(gate.shape) < 0.3] = 0
    out = np.zeros((len(bits), tokens, WIDTH), np.float32)
    at = np.array([blob.ctypes.data for blob in blobs], np.uintp)
    kernels.compute_experts(at, bits, x, gate, out, inner=INNER, half="bfloat16")
    return out


@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_are_the_same_to_the_last_bit_on_any_number_of_cores(tokens, cores):
    blobs, bits = experts()
    assert [blob.nbytes for blob in blobs] == [nbytes(LAYOUT, tier) for tier in bits]
    cores.threads = 1
    expected = served(blobs, bits, tokens)
    for count in (2, 3, 8, 1):
        cores.threads = count
        for _ in range(50):
            assert np.array_equal(served(blobs, bits, tokens), expected)


def test_callers_at_once_do_not_wait_for_each_other_nor_mix(cores):
    blobs, bits = experts()
    cores.threads = 2
    expected = [served(blobs, bits, tokens) for tokens in range(1, 5)]
    wrong = []

    def call(tokens: int) -> None:
        found = (served(blobs, bits, tokens) for _ in range(100))
        wrong.extend(tokens for out in found if not np.array_equal(out, expected[tokens - 1]))

    callers = [threading.Thread(target=call, args=(tokens,)) for tokens in range(1, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("bits", [8, 4])
def test_an_activation_has_one_code_wherever_its_buffers_lie(bits):
    """Loops over arrays that may overlap are other instructions than loops over ones that do not.

    With division as multiplication they rounded differently, where the heap put one behind the
    other: one code of one token, while callers at once kept it so.
    """
    width = 3 * 64
    arena = np.zeros(1 << 15, np.uint8)
    arena = arena[-arena.ctypes.data % 64 :]
    rng, ends = np.random.default_rng(0), 8192 + 4 * width
    for _ in range(20):
        x = arena[8192:ends].view(np.float32)
        x[:] = 300 * rng.standard_normal(width)
        for group in range(3):
            found = set()
            for at in [*range(8192 - 4 * width, 8193 - 2 * width, 16), *range(ends, 10000, 16)]:
                codes, pairs = arena[at : at + 2 * width].view(np.int16), np.zeros((3, 2), "f4")
                codes[:] = 0
                quantise(x, group, group + 1, bits, codes, pairs)
                found.add(codes.tobytes() + pairs.tobytes())
            assert len(found) == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_dense_bits_take_less_memory_and_full_precision_stays_the_checkpoints(
    tmp_path, monkeypatch, bits, tied
):
    monkeypatch.setattr(skeleton, "LARGE", 1)
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    source = tiny_models.qwen3_moe(tmp_path / "model", tie_word_embeddings=tied)
    found = {}
    for dense_bits in (16, bits):
        with moelab.open(source, budget="100%", dense_bits=dense_bits, progress=False) as lab:
            run = lab.generate("a b c", max_new_tokens=8, measure_kl=True, ignore_eos=True)
            kls = run.per_token.kl
            full = [likeliest.full for likeliest in run.likeliest]
            found[dense_bits] = kls.max(), lab.info()["dense_bytes"], full[0]
            told = moelab.compare(this=run).code("this")
            assert (f"dense_bits={bits}" in told) == (dense_bits < 16)
    assert found[16][0] == 0
    assert 1e-7 < found[bits][0] < 0.5
    assert found[bits][1] < (0.62 if bits == 8 else 0.36) * found[16][1]
    for (token, share), (theirs, exact) in zip(found[bits][2], found[16][2], strict=True):
        assert token == theirs  # what full precision says of the first token
        assert share == pytest.approx(exact, rel=1e-5)


def test_dense_bits_that_do_not_exist_are_refused():
    for asked in ({"dense_bits": 5}, {"dense_bits": 4, "dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"dense_bits=\d: one of \(16, 8, 4\)"):
            moelab.open("demo", **asked)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_one_token_and_many_are_computed_alike_from_the_same_dense_weight(bits):
    torch.manual_seed(0)
    half = torch.randn(200, 128).bfloat16()
    held = dense.Weight(half, bits, lambda first, last: half[first:last], lambda: False)
    held.step = 7
    x = torch.randn(20, 128)
    many, one = held.times(x), torch.cat([held.times(row[None]) for row in x])
    assert (many - one).abs().max() < {16: 1e-4, 8: 5e-3, 4: 0.5}[bits]
    rows = torch.cat([held[:3], held[3:200]])
    assert torch.equal(held.lookup(torch.tensor([[5, 199]]))[0], rows[[5, 199]])
    assert (rows - half.float()).abs().max() < {16: 1e-9, 8: 0.03, 4: 0.5}[bits]


class Norm(nn.Module):
    """A root mean square norm; with ``plus`` it multiplies by one more than its weight."""

    def __init__(self, plus: float, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(96).to(kind), requires_grad=False)
        self.variance_epsilon, self.plus = 1e-6, plus

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.plus) * (x * scale)


class PlainRMSNorm(Norm):
    pass


def test_a_norm_is_replaced_only_where_ours_computes_the_same():
    model = nn.ModuleList([PlainRMSNorm(0), PlainRMSNorm(1), Norm(0), PlainRMSNorm(0, torch.half)])
    x = torch.randn(2, 3, 96)
    before = [module(x) for module in model]
    assert small_ops.serve_norms(model) == 1
    assert isinstance(model[0].forward, small_ops.RootMeanSquare)
    for module, was in zip(model, before, strict=True):
        torch.testing.assert_close(module(x), was, rtol=1e-6, atol=1e-6)
    assert model[0](x.double()).dtype == torch.float64  # by the module's own
    torch.testing.assert_close(model[0](x.mT.contiguous().mT), before[0])  # of another memory order


def test_a_growing_cache_holds_what_a_concatenated_one_does():
    theirs, ours = DynamicCache(), small_ops.GrowingLayer()
    for count in (5, 1, 1, 7, 30, 1):
        new = torch.randn(2, 1, 3, count, 8)
        want, got = theirs.update(*new, 0), ours.update(*new)
        assert all(map(torch.equal, want, got))
    assert ours.get_seq_length() == theirs.get_seq_length() == 45
    assert ours._room[0].shape[-2] <= 2 * 45
    sliding = MistralConfig(num_hidden_layers=2, sliding_window=4)
    kinds = [type(layer) for layer in DynamicCache(config=sliding).layers]
    assert [type(layer) for layer in small_ops.growing(sliding).layers] == kinds
