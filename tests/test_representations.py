"""Forms of a matrix that are no tier: cases by hand, and in which order they lose."""

from __future__ import annotations

import pytest
import torch

from moelab.calibration.representations import losses
from moelab.store.codecs import Layout, decode, encode
from moelab.store.representations import REPRESENTATIONS, grouped, per_channel, ternary


def test_a_scale_a_row_rounds_to_multiples_of_it():
    w = torch.tensor([[3.0, 1.0, -2.0, -3.0], [0.3, 0.0, 0.16, -0.05]])
    # Two bits, first row: scale 2, codes -2 to 1; 1.5 is rounded to even and cut off at 1.
    assert per_channel(w, 2)[0].tolist() == [2.0, 0.0, -2.0, -4.0]
    scale = float(torch.tensor(0.2).half())
    assert per_channel(w, 2)[1].tolist() == pytest.approx([scale, 0.0, scale, 0.0])
    fours = torch.tensor([[7.5, 4.4, -7.5, 0.4]])  # scale 1, codes -8 to 7
    assert per_channel(fours, 4).tolist() == [[7.0, 4.0, -8.0, 0.0]]
    assert not per_channel(torch.zeros(2, 3), 4).any()


def test_ternary_rows_keep_their_ends_and_nothing_below_half_of_them():
    w = torch.tensor([[4.0, 2.5, 1.5, 0.0, -0.5, -0.9, -1.5], [1.0, 0.5, 0.25, 0.75, 1.0, 0, 0]])
    assert ternary(w)[0].tolist() == [4.0, 4.0, 0.0, 0.0, 0.0, -1.5, -1.5]
    assert ternary(w)[1].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]  # no negative level
    assert len(ternary(torch.randn(1, 500)).unique()) == 3


def test_groups_are_the_stores_own_tier():
    w = torch.randn(8, 192, generator=torch.Generator().manual_seed(0))
    layout = Layout((("w", (8, 192)),), "bfloat16")
    assert torch.equal(grouped(w, 4), decode(encode({"w": w}, layout, 4), layout, 4)["w"])


def test_bits_a_weight_count_scales_and_padding():
    bits = {name: form.bits(192) for name, form in REPRESENTATIONS.items()}
    assert bits["4 bit, groups"] == 4.5
    assert bits["2 bit, groups"] == 2.5
    assert bits["4 bit, rows"] == 4 + 16 / 192
    assert bits["2 bit, rows"] == 2 + 16 / 192
    assert bits["ternary, rows"] == (39 * 8 + 32) / 192  # 39 bytes for 192 weights, two halves
    assert bits["ternary, groups"] == 1.875
    assert REPRESENTATIONS["ternary, groups"].bits(65) == 2 * (13 * 8 + 16) / 65
    assert REPRESENTATIONS["4 bit, groups"].bits(65) == 2 * (64 * 4 + 32) / 65


def test_what_costs_more_bits_loses_less():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    of = {name: float((form.through(w) - w).norm()) for name, form in REPRESENTATIONS.items()}
    assert of["4 bit, groups"] < of["4 bit, rows"] < of["2 bit, groups"]
    assert of["2 bit, groups"] < min(of["2 bit, rows"], of["ternary, groups"])
    assert of["ternary, groups"] < of["ternary, rows"]


def test_losses_on_the_bundled_model_rank_as_the_errors_do(demo_lab):
    text = "The little ship sailed out of the harbour, and nobody saw it come back."
    before = demo_lab.score(text, progress=False)
    names = ["4 bit, groups", "4 bit, rows", "2 bit, groups", "ternary, groups", "ternary, rows", 4]
    found = losses(demo_lab, names, texts=[text])
    kl = [one.kl_mean for one in found[:-1]]
    assert kl == sorted(kl)
    assert found[0].bits == found[-1].bits == 4.5
    assert found[-1].name == "4 bit"
    # A form is rounded to bfloat16 again.
    assert found[-1].kl_mean == pytest.approx(found[0].kl_mean, rel=0.1)
    assert demo_lab.score(text, progress=False) == before  # the store is as it was
    with pytest.raises(ValueError, match="'9 bit' is no form; choose of 4 bit, groups"):
        losses(demo_lab, ["9 bit"], [text])
