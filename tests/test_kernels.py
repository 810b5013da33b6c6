"""What the engine may rely on: kernels give torch's result, whatever the tier, shape or thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moelab.engine import kernels
from moelab.store import codecs
from moelab.store.codecs import TERNARY, Layout, decode, encode

TIERS = (*codecs.TIERS, TERNARY)
# Integer activations cost this much of the output's norm; float32 ones cost rounding only.
ACTIVATION_ERROR = {16: 2e-6, 8: 2e-4, 4: 0.03, 3: 0.03, 2: 0.03, 1: 0.03}
SHAPES = [(192, 128), (64, 320), (192, 192), (256, 64), (320, 448)]


def swiglu_layout(width: int, inner: int, half: str = "bfloat16") -> Layout:
    return Layout((("gate_up_proj", (2 * inner, width)), ("down_proj", (width, inner))), half)


def make_blobs(layout: Layout, tiers: list[int], *, seed: int = 0) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    experts = [
        {n: torch.randn(s, generator=generator) * 0.1 for n, s in layout.tensors} for _ in tiers
    ]
    return [encode(expert, layout, b) for expert, b in zip(experts, tiers, strict=True)]


def run(layout, blobs, tiers, x, gate, out=None):
    """Call the kernel on blobs; returns the sum of its outputs, ``[T, H]``."""
    out = np.zeros((len(blobs), *x.shape), np.float32) if out is None else out
    addresses = np.array([blob.ctypes.data for blob in blobs], np.uintp)
    kernels.compute_experts(
        addresses,
        np.array(tiers, np.int64),
        x,
        gate,
        out,
        inner=layout.tensors[1][1][1],
        half=layout.dtype,
    )
    return out.sum(0)


def reference(layout, blobs, tiers, x, gate):
    """The same in torch float32, from decoded weights."""
    x, total = torch.from_numpy(x), torch.zeros(x.shape)
    for blob, bits, weights in zip(blobs, tiers, gate, strict=True):
        expert = decode(blob, layout, bits)
        first, second = F.linear(x, expert["gate_up_proj"]).chunk(2, -1)
        served = F.linear(F.silu(first) * second, expert["down_proj"])
        total += torch.from_numpy(weights)[:, None] * served
    return total.numpy()


def tokens(count: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


def error(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def case(tiers, count=1, width=192, inner=128, half="bfloat16"):
    """What `run` and `reference` take: an expert of each tier, all chosen by every token."""
    layout, tiers = swiglu_layout(width, inner, half), list(tiers)
    gate = np.ones((len(tiers), count), np.float32)
    return layout, make_blobs(layout, tiers), tiers, tokens(count, width), gate


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize(("width", "inner"), SHAPES)
@pytest.mark.parametrize("bits", TIERS)
def test_every_tier_and_shape_matches_torch(bits, width, inner, half):
    given = case([bits], 3, width, inner, half)
    assert error(run(*given), reference(*given)) < ACTIVATION_ERROR[bits]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_16_bit_is_within_1e_5_of_upcast_weights_at_olmoe_size(half):
    given = case([16], 1, 2048, 1024, half)
    expected = reference(*given)
    assert np.abs(run(*given) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("count", range(1, 9))
def test_tiers_mix_in_one_call_for_any_number_of_tokens(count):
    layout, blobs, tiers, x, _ = case([4, 16, 2, 8, 3, 16, 8], count)
    gate = np.abs(tokens(len(tiers), count, seed=1))
    mixed = run(layout, blobs, tiers, x, gate)
    assert error(mixed, reference(layout, blobs, tiers, x, gate)) < 0.03
    alone = sum(
        run(layout, [blob], [bits], x, gate[e : e + 1])
        for e, (blob, bits) in enumerate(zip(blobs, tiers, strict=True))
    )
    np.testing.assert_allclose(mixed, alone, rtol=1e-4, atol=1e-5)


def test_each_expert_writes_its_own_place_and_only_where_it_is_chosen():
    layout, blobs, tiers, x, _ = case([16, 4], 2, 64, 64)
    gate, out = np.array([[0.5, 0], [0, 2]], np.float32), np.full((2, 2, 64), 7, np.float32)
    run(layout, blobs, tiers, x, gate, out)
    assert (out[[0, 1], [1, 0]] == 7).all()
    alone = run(layout, blobs[1:], [4], x, gate[1:])
    assert np.array_equal(out[1, 1], alone[1])
    assert error(out[0, :1], reference(layout, blobs[:1], [16], x[:1], gate[:1, :1])) < 1e-5


def test_no_experts_and_no_tokens_do_nothing():
    assert not run(*case([], 2)).any()
    assert run(*case([4], 0)).shape == (0, 192)


def test_a_zero_gate_weight_means_the_expert_is_not_touched():
    layout, blobs, tiers, x, _ = case([8, 2, 16], 4)
    gate = np.array([[1, 0, 0, 2], [0, 0, 3, 0], [0, 0, 0, 0]], np.float32)
    blobs[2][:] = 255  # would be NaN
    got = run(layout, blobs, tiers, x, gate)
    blobs[2][:] = 0
    assert error(got, reference(layout, blobs, tiers, x, gate)) < 0.03
    assert not got[1].any()


@pytest.mark.parametrize("bits", TIERS)
def test_a_token_does_not_depend_on_its_neighbours(bits):
    given = layout, blobs, tiers, x, gate = case([bits], 5)
    together = run(*given)
    for t in range(5):
        alone = run(layout, blobs, tiers, x[t : t + 1].copy(), gate[:, :1].copy())
        assert np.array_equal(alone[0], together[t])


@pytest.mark.parametrize("bits", TIERS)
def test_a_blob_may_start_anywhere(bits):
    given = layout, (blob,), tiers, x, gate = case([bits])
    shifted = np.concatenate([np.zeros(3, np.uint8), blob])[3:]
    assert np.array_equal(run(layout, [shifted], tiers, x, gate), run(*given))


@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e3])
def test_silu_has_its_limits_and_no_nan(bits, scale):
    layout, blobs, tiers, x, gate = case([bits], 2)
    got, expected = (f(layout, blobs, tiers, x * np.float32(scale), gate) for f in (run, reference))
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - expected) <= ACTIVATION_ERROR[bits] * np.linalg.norm(expected)


def test_silu_of_a_large_negative_gate_is_zero():
    layout = swiglu_layout(64, 64)
    expert = {"gate_up_proj": torch.ones(128, 64), "down_proj": torch.ones(64, 64)}
    expert["gate_up_proj"][:64] = -1
    x = np.full((1, 64), 1e4, np.float32)
    for bits in TIERS:
        got = run(layout, [encode(expert, layout, bits)], [bits], x, np.ones((1, 1), np.float32))
        assert not got.any()


@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_show_in_the_output(bits, bad):
    given = case([bits], 2)
    given[3][0, 7] = bad
    got = run(*given)
    assert not np.isfinite(got[0]).any()
    assert np.isfinite(got[1]).all()


@pytest.mark.parametrize("bits", TIERS)
def test_extreme_codes_do_not_saturate(bits):
    layout = swiglu_layout(128, 128)
    wave = torch.ones(128)
    wave[::2] = -1  # two levels: codes at both ends, activations at their largest
    for sign in (torch.ones(128), wave):
        expert = {"gate_up_proj": sign.repeat(256, 1), "down_proj": sign.repeat(128, 1)}
        x = sign.numpy()[None].astype(np.float32).copy()
        blobs, gate = [encode(expert, layout, bits)], np.ones((1, 1), np.float32)
        got, expected = (f(layout, blobs, [bits], x, gate) for f in (run, reference))
        scale = np.abs(x).sum() ** 2 * 128  # down_proj @ a cancels exactly for the wave
        assert np.abs(got - expected).max() < 1e-3 * scale


@pytest.mark.parametrize("count", [1, 11, kernels.KERNEL_TOKENS, kernels.KERNEL_TOKENS + 1])
@pytest.mark.parametrize("bits", TIERS)
def test_prefill_gives_what_single_tokens_give(bits, count):
    given = layout, (blob,), tiers, x, gate = case([bits], count)
    many = kernels.compute_prefill(blob, bits, layout, torch.from_numpy(x)).numpy()
    assert error(many, reference(*given)) < ACTIVATION_ERROR[bits]
    alone = [run(layout, [blob], tiers, x[t : t + 1].copy(), gate[:, :1]) for t in range(count)]
    # Sums in another order; an activation that rounds the other way moves a result by a code.
    assert error(np.concatenate(alone), many) < (1e-3 if bits < 8 else 2e-5)


def test_prefill_refuses_what_is_not_the_experts_blob():
    layout, (blob,), *_ = case([4])
    for count in (1, 40):
        with pytest.raises(ValueError, match="8 bit needs uint8"):
            kernels.compute_prefill(blob, 8, layout, torch.zeros(count, 192))


def test_threads_may_call_at_once():
    given = case(TIERS, 2)
    expected = run(*given)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: run(*given), range(200))
    assert all(np.array_equal(result, expected) for result in results)


def test_wrong_arrays_are_refused_before_memory_is_read():
    _, (blob,), tiers, x, gate = case([4], 2, 64, 64)
    good = {
        "addrs": np.array([blob.ctypes.data], np.uintp),
        "bits": np.array(tiers),
        "x": x,
        "gate": gate,
        "out": np.zeros((1, *x.shape), np.float32),
        "inner": 64,
        "half": "bfloat16",
    }
    frozen = np.zeros((1, *x.shape), np.float32)
    frozen.flags.writeable = False
    bad = [
        ("bits", np.array([5]), "expert 0 of the call has 5 bit"),
        ("addrs", np.zeros(1, np.uintp), "at address 0"),
        ("addrs", np.zeros(1, np.int64), "addrs is int64"),
        ("x", x.astype(np.float64), "x is float64"),
        ("x", np.asfortranarray(x), "C-contiguous float32"),
        ("gate", np.ones((2, 1), np.float32), r"gate is float32 of shape \(2, 1\)"),
        ("out", frozen, "writeable"),
        ("inner", 100, "I=100 must be multiples of 64"),
        ("half", "float32", "half='float32'"),
    ]
    for name, value, message in bad:
        with pytest.raises(ValueError, match=message):
            kernels.compute_experts(**{**good, name: value})
    assert not good["out"].any()
    kernels.compute_experts(**good)
    assert good["out"].any()


PROBE = """
import json, os, sys, time
import numba, pandas, pytest, torch, transformers  # once: each process is a fork of this one
for portable in "0101":
    if not (child := os.fork()):
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()
os.environ["MOELAB_PORTABLE"] = portable
if portable == "1":  # the others are compiled already
    numba.config.CACHE_DIR = {cache!r}
sys.path.insert(0, {tests!r})
import test_kernels as t
from moelab.engine import kernels
start = time.perf_counter()
kernels.warm_up()
warm = time.perf_counter() - start
rows = [t.run(*t.case([bits], 3)).tolist() for bits in t.TIERS]
print(json.dumps({{"avx2": kernels.AVX2, "warm": warm, "rows": rows}}))
"""


def probes(cache: str) -> list[dict]:
    """Run the kernels in four processes, one after the other: native, portable, and so again."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(tests=str(tests), cache=cache)],
        cwd=tests.parent,
        check=True,
        stdout=subprocess.PIPE,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def numba_cache(tmp_path_factory) -> str:
    """A cache of compiled kernels that begins empty: the portable ones are compiled once here."""
    return str(tmp_path_factory.mktemp("numba"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles all of them, on a machine that may be slow and shared
def test_kernels_are_cached_between_processes_and_portable_ones_apart(numba_cache, demo_store):
    first, portable, again, portable_again = probes(numba_cache)
    assert again["rows"] == first["rows"]
    np.testing.assert_allclose(portable_again["rows"], portable["rows"], rtol=1e-4, atol=1e-5)
    assert not portable["avx2"]
    assert not portable_again["avx2"]
    assert max(first["warm"], again["warm"]) < portable["warm"] / 2
    assert portable_again["warm"] < portable["warm"] / 2
    for bits, fast, plain in zip(TIERS, first["rows"], portable["rows"], strict=True):
        # One activation that rounds the other way moves the result by a code.
        limit = 1e-6 if bits == 16 else 1e-5 if bits == 8 else 1e-3
        assert error(np.array(plain), np.array(fast)) < limit


@pytest.mark.slow
@pytest.mark.skipif(not kernels.AVX2, reason="these already run the portable kernels")
def test_portable_kernels_pass_all_of_these_tests(numba_cache):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "not between_processes"],
        # Memory that is freed is filled with rubbish: nothing may be read there.
        env={
            **os.environ,
            "NUMBA_CACHE_DIR": numba_cache,
            "MOELAB_PORTABLE": "1",
            "MALLOC_PERTURB_": "165",
        },
        cwd=Path(__file__).parent.parent,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
