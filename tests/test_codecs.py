"""What a store's reader may rely on: sizes, exactness at 16 bit, bounded errors below."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moelab.store import codecs
from moelab.store.codecs import GROUP, PAGE, TERNARY, Layout, decode, encode, nbytes, payload_bytes

TIERS = (*codecs.TIERS, TERNARY)
SWIGLU = Layout((("gate_up_proj", (256, 192)), ("down_proj", (192, 128))), "bfloat16")
BIASED = Layout(  # transposed, with biases, widths that 64 does not divide
    (
        ("gate_up_proj", (90, 100)),
        ("gate_up_proj_bias", (101,)),
        ("down_proj", (50, 90)),
        ("down_proj_bias", (90,)),
    ),
    "float16",
)
QUANTISED = TIERS[1:]


def random_expert(layout: Layout, *, seed: int = 0, scale: float = 0.05) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.dtype)
    return {
        name: (torch.randn(shape, generator=generator) * scale).to(dtype)
        for name, shape in layout.tensors
    }


def matrix(values: torch.Tensor, dtype: str = "float16") -> tuple[dict, Layout]:
    return {"w": values}, Layout((("w", tuple(values.shape)),), dtype)


def relative_error(layout: Layout, bits: int) -> float:
    expert = random_expert(layout)
    decoded = decode(encode(expert, layout, bits), layout, bits)
    wrong = sum((decoded[n] - w.float()).square().sum() for n, w in expert.items())
    return float((wrong / sum(w.float().square().sum() for w in expert.values())).sqrt())


@pytest.mark.parametrize("layout", [SWIGLU, BIASED], ids=["swiglu", "biased"])
def test_16_bit_is_the_checkpoints_own_bytes(layout):
    expert = random_expert(layout)
    blob = encode(expert, layout, 16)
    raw = b"".join(w.view(torch.int16).numpy().tobytes() for w in expert.values())
    assert blob.tobytes()[: len(raw)] == raw
    assert not blob[len(raw) :].any()
    decoded = decode(blob, layout, 16, dtype=getattr(torch, layout.dtype))
    assert list(decoded) == list(expert)
    assert all(torch.equal(decoded[name], w) for name, w in expert.items())
    upcast = decode(blob, layout, 16)
    assert all(torch.equal(upcast[name], w.float()) for name, w in expert.items())


@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("layout", [SWIGLU, BIASED], ids=["swiglu", "biased"])
def test_sizes_are_known_before_encoding(layout, bits):
    blob = encode(random_expert(layout), layout, bits)
    assert blob.dtype == np.uint8
    assert blob.shape == (nbytes(layout, bits),)
    assert nbytes(layout, bits) % PAGE == 0
    assert 0 <= nbytes(layout, bits) - payload_bytes(layout, bits) < PAGE
    assert not blob[payload_bytes(layout, bits) :].any()


def test_payload_counts_codes_and_one_pair_per_group():
    weights = 3 * 192 * 128
    for bits in QUANTISED[:-1]:
        assert payload_bytes(SWIGLU, bits) == weights * bits // 8 + weights // GROUP * 4
    assert payload_bytes(BIASED, 16) == 2 * (90 * 100 + 101 + 50 * 90 + 90)
    groups = 90 * 2 + 50 * 2
    assert payload_bytes(BIASED, 4) == groups * 36 + 2 * (101 + 90)


def test_error_shrinks_with_every_bit():
    errors = [relative_error(SWIGLU, bits) for bits in QUANTISED]
    assert errors == sorted(errors)
    limits = {8: 0.006, 4: 0.09, 3: 0.18, 2: 0.34, 1: 0.44}
    assert all(error < limits[b] for b, error in zip(QUANTISED, errors, strict=True))


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.97), (3, 0.92), (2, 0.8)])
def test_range_search_beats_rounding_between_min_and_max(bits, gain):
    groups = torch.randn(256, GROUP, generator=torch.Generator().manual_seed(1))
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    naive = ((groups - low) / step).round() * step + low
    expert, layout = matrix(groups, "bfloat16")
    ours = decode(encode(expert, layout, bits), layout, bits)["w"]
    assert (ours - groups).norm() < gain * (naive - groups).norm()


def test_8_bit_never_errs_by_more_than_half_a_step():
    values = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(2))
    expert, layout = matrix(values)
    decoded = decode(encode(expert, layout, 8), layout, 8)["w"]
    step = (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / 254
    assert ((decoded - values).abs() <= 0.505 * step).all()


@pytest.mark.parametrize("bits", QUANTISED)
def test_biases_stay_exact_and_odd_widths_keep_the_bound(bits):
    expert = random_expert(BIASED)
    decoded = decode(encode(expert, BIASED, bits), BIASED, bits)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        assert torch.equal(decoded[name], expert[name].float())
    assert {n: tuple(w.shape) for n, w in decoded.items()} == dict(BIASED.tensors)
    assert relative_error(BIASED, bits) <= relative_error(SWIGLU, bits) * 1.02


@pytest.mark.parametrize("bits", TIERS)
def test_zero_groups_decode_to_exact_zeros(bits):
    expert, layout = matrix(torch.zeros(4, 128))
    assert not decode(encode(expert, layout, bits), layout, bits)["w"].any()


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("value", [1.0, -0.037, 3e-7, 4e4, -65504.0])
def test_constant_groups_keep_their_value(bits, value):
    expert, layout = matrix(torch.full((2, 64), value))
    decoded = decode(encode(expert, layout, bits), layout, bits)["w"]
    assert torch.allclose(decoded, torch.full((2, 64), value), rtol=1e-3, atol=4e-8)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-7, 1e-6, 1e-5, 1e-3, 1.0, 1e3, 1e4])
def test_no_magnitude_gives_nan_or_leaves_its_range(bits, magnitude):
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)) * magnitude
    expert, layout = matrix(values, "bfloat16")
    decoded = decode(encode(expert, layout, bits), layout, bits)["w"]
    assert torch.isfinite(decoded).all()
    # Float16 keeps scales to 3e-8, and the outer codes multiply that.
    floor = 6e-8 if bits == 8 else 3e-8 * (2**bits / 2 + 1)
    limit = {8: 0.01, 4: 0.14, 3: 0.3, 2: 0.6, 1: 0.7}[bits] * values.abs().amax() + floor
    assert ((decoded - values).abs() <= limit).all()


@pytest.mark.parametrize("bits", QUANTISED)
def test_the_widest_group_float16_can_describe(bits):
    values = torch.linspace(-65504, 65504, 64).reshape(1, 64)
    expert, layout = matrix(values)
    decoded = decode(encode(expert, layout, bits), layout, bits)["w"]
    assert ((decoded - values).abs() <= 131008 / (2**bits - 1) * 0.7).all()


@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(bits, bad):
    expert = random_expert(SWIGLU)
    expert["down_proj"][3, 5] = bad
    with pytest.raises(ValueError, match="down_proj has NaN or infinite weights"):
        encode(expert, SWIGLU, bits)


def test_weights_beyond_float16_are_refused_but_fit_bfloat16():
    expert, layout = matrix(torch.full((1, 64), 2.0**20, dtype=torch.bfloat16), "bfloat16")
    assert torch.equal(decode(encode(expert, layout, 16), layout, 16)["w"], expert["w"].float())
    for bits in QUANTISED:
        with pytest.raises(ValueError, match="up to 1.05e.06.*at most 6.55e.04"):
            encode(expert, layout, bits)
    _, half = matrix(expert["w"], "float16")
    with pytest.raises(ValueError, match="up to 1.05e.06"):
        encode(expert, half, 16)


def test_decoded_tensors_survive_the_blob_being_overwritten():
    expert = random_expert(SWIGLU)
    for bits in TIERS:
        blob = encode(expert, SWIGLU, bits)
        decoded = decode(blob, SWIGLU, bits, dtype=torch.bfloat16)
        before = {name: w.clone() for name, w in decoded.items()}
        blob[:] = 255
        assert all(torch.equal(decoded[name], w) for name, w in before.items())


def test_a_read_only_blob_decodes():
    expert = random_expert(SWIGLU)
    for bits in TIERS:
        blob = np.frombuffer(encode(expert, SWIGLU, bits).tobytes(), np.uint8)
        again = decode(encode(expert, SWIGLU, bits), SWIGLU, bits)
        assert torch.equal(decode(blob, SWIGLU, bits)["down_proj"], again["down_proj"])


def test_encoding_does_not_depend_on_memory_order_or_input_dtype():
    expert = random_expert(SWIGLU)
    strided = {name: w.T.contiguous().T for name, w in expert.items()}
    wide = {name: w.double() for name, w in expert.items()}
    for bits in TIERS:
        blob = encode(expert, SWIGLU, bits)
        assert np.array_equal(blob, encode(strided, SWIGLU, bits))
        assert np.array_equal(blob, encode(wide, SWIGLU, bits))


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        ((("w", (2, 64)),), "float32", "'float32' is not a 16-bit dtype"),
        ((("w", (2, 64)), ("w", (64,))), "float16", "different names"),
        ((), "float16", "one or more"),
        ((("w", (0, 64)),), "float16", r"shape \(0, 64\)"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(tensors, dtype, message):
    with pytest.raises(ValueError, match=message):
        Layout(tensors, dtype)


def test_errors_name_the_value_and_the_limit():
    expert = random_expert(SWIGLU)
    with pytest.raises(
        ValueError, match=r"bits=5 is not a tier; use one of \(16, 12, 8, 4, 3, 2, 1\)"
    ):
        encode(expert, SWIGLU, 5)
    with pytest.raises(ValueError, match=r"shape \(100,\), 4 bit needs uint8 of shape \(45056,\)"):
        decode(np.zeros(100, np.uint8), SWIGLU, 4)
    with pytest.raises(ValueError, match=r"got tensors \['down_proj'\]"):
        encode({"down_proj": expert["down_proj"]}, SWIGLU, 4)
    with pytest.raises(ValueError, match=r"shape \(128, 192\), the layout says \(192, 128\)"):
        encode({**expert, "down_proj": expert["down_proj"].T}, SWIGLU, 4)


def test_a_rule_of_ones_own_chooses_the_ranges_below_8_bit():
    def whole_range(groups, top):
        low, high = groups.min(axis=1), groups.max(axis=1)
        return np.stack([(high - low) / top, low], axis=1)

    expert = random_expert(SWIGLU)
    for bits in (4, 2):
        own = encode(expert, SWIGLU, bits, fit=whole_range)
        assert (own != encode(expert, SWIGLU, bits)).any()
        decoded = decode(own, SWIGLU, bits)
        for name, weights in expert.items():
            rows = weights.float().reshape(-1, weights.shape[-1])
            step = (rows.amax() - rows.amin()) / (2**bits - 1)
            assert (decoded[name] - weights.float()).abs().max() <= 0.51 * step
    assert (encode(expert, SWIGLU, 8, fit=whole_range) == encode(expert, SWIGLU, 8)).all()
    with pytest.raises(ValueError, match=r"lambda.*finite \(scale, offset\)"):
        encode(expert, SWIGLU, 4, fit=lambda groups, top: whole_range(groups, top)[:1] * np.nan)
