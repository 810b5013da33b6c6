"""Experts that are no SwiGLU: the rules of families, and the kernels that compute them."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny_families
from moelab.engine import kernels
from moelab.models.adapter import expert_forward, find_moe
from moelab.models.gating import GELU, SWIGLU, Rule, rule_of, rule_of_all
from moelab.store.codecs import Layout, decode, encode
from test_kernels import ACTIVATION_ERROR, error, tokens

OSS = Rule(1.702, 0.0, 7.0, 1.0, 0, interleaved=True)
RULES = {
    "swiglu": SWIGLU,
    "gelu": Rule(*GELU),
    "limits": Rule(limit=0.5),
    "gpt_oss": OSS,
    "relu": Rule(power=1),
    "relu2": Rule(power=2),
}
FAMILIES = {
    "aria": SWIGLU,
    "beam": SWIGLU,
    "gemma4": Rule(*GELU),
    "deepseek_v4": Rule(limit=math.nan),  # its config's
    "gpt_oss": OSS,
    "hy_v4": Rule(limit=math.nan),
    "inkling2": None,
    "llama4": SWIGLU,
    "minimax_m3_vl": OSS._replace(interleaved=False),
    "nemotron_h": Rule(power=2),
    "nllb_moe": Rule(power=1),
    "olmoe": SWIGLU,
    "switch_transformers": Rule(power=1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_rule_is_found_by_asking_its_own_code(name):
    logging.disable(logging.WARNING)
    module = find_moe(tiny_families.build(name))[0].module
    logging.disable(logging.NOTSET)
    found, expected = rule_of(module), FAMILIES[name]
    if found and expected and math.isnan(expected.limit):
        own = module.limit if hasattr(module, "limit") else module.swiglu_limit
        expected = expected._replace(limit=float(own))
    assert found == expected


def test_code_that_does_something_else_or_cannot_be_asked_has_no_rule():
    def module(gate, **more):
        return SimpleNamespace(has_gate=True, _apply_gate=gate, **more)

    def clamped_late(h):
        gate, up = h.chunk(2, -1)
        return F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)

    def refuses(h):
        raise TypeError("two arguments are needed")

    assert rule_of(module(clamped_late, limit=7.0)) is None
    assert rule_of(module(lambda h: F.silu(h.chunk(2, -1)[0]))) is None
    assert rule_of(module(lambda h: h)) is None
    assert rule_of(module(refuses)) is None
    assert rule_of(SimpleNamespace(has_gate=False, act_fn=nn.Tanh())) is None
    assert rule_of(SimpleNamespace(has_gate=False, act_fn=nn.ReLU())) == Rule(power=1)


def an_expert(rule: Rule, biased: bool, turned: bool, half="bfloat16"):
    """(layout, tensors) of one expert as its family has it."""
    width, inner = 192, 128
    first = "up_proj" if rule.power else "gate_up_proj"
    shapes = {first: ((1 if rule.power else 2) * inner, width), "down_proj": (width, inner)}
    biases = {f"{name}_bias": (rows,) for name, (rows, _) in shapes.items()} if biased else {}
    own = {name: shape[::-1] if turned else shape for name, shape in shapes.items()}
    layout = Layout(tuple((own | biases).items()), half, turned=turned)
    draw = torch.Generator().manual_seed(0)
    return layout, {name: torch.randn(s, generator=draw) * 0.1 for name, s in layout.tensors}


def theirs(x, tensors, rule, turned):
    """The family's own forward on given weights."""
    module = SimpleNamespace(
        has_gate=not rule.power,
        is_transposed=turned,
        has_post_expert_norm=False,
        act_fn=rule,
        _apply_gate=rule,
    )
    return expert_forward(module, x, tensors)


@pytest.mark.parametrize("count", [1, 3, 13, 40])
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("name", RULES)
def test_the_kernels_compute_what_the_familys_own_code_does(name, biased, turned, count):
    rule = RULES[name]
    layout, tensors = an_expert(rule, biased, turned)
    facts = SimpleNamespace(has_post_norm=False, transposed=turned, has_bias=biased)
    assert kernels.supports(layout, facts, rule)
    x = torch.from_numpy(tokens(count, 192))
    for bits, most in ACTIVATION_ERROR.items():
        blob = encode(tensors, layout, bits)
        expected = theirs(x, decode(blob, layout, bits), rule, turned)
        found = kernels.compute_prefill(blob, bits, layout, x, rule)
        assert error(found.numpy(), expected.numpy()) < most, bits


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_experts_of_one_call_have_biases_of_their_own(half):
    layout, _ = an_expert(OSS, biased=True, turned=True, half=half)
    draw = torch.Generator().manual_seed(1)
    some = [
        {name: torch.randn(s, generator=draw) * 0.1 for name, s in layout.tensors} for _ in range(3)
    ]
    x, tiers = tokens(2, 192), (16, 8, 4)
    blobs = [encode(tensors, layout, bits) for tensors, bits in zip(some, tiers, strict=True)]
    out, gate = np.zeros((3, 2, 192), np.float32), np.array([[1, 2], [0, 3], [4, 0]], np.float32)
    kernels.compute_experts(
        np.array([blob.ctypes.data for blob in blobs], np.uintp),
        np.array(tiers, np.int64),
        x,
        gate,
        out,
        inner=128,
        half=half,
        rule=OSS,
        biased=True,
    )
    for blob, bits, got, weight in zip(blobs, tiers, out, gate, strict=True):
        expected = theirs(torch.from_numpy(x), decode(blob, layout, bits), OSS, True)
        expected = weight[:, None] * expected.numpy()
        assert error(got, expected) < ACTIVATION_ERROR[bits]


@pytest.mark.parametrize("limit", [7.0, 64.0, 500.0])
def test_a_limit_is_seen_however_far_off_it_is(limit):
    def gate(h):
        first, second = h.chunk(2, -1)
        return F.silu(first.clamp(max=limit)) * second.clamp(-limit, limit)

    module = SimpleNamespace(has_gate=True, _apply_gate=gate, limit=limit)
    assert rule_of(module) == Rule(limit=limit)
    plain = SimpleNamespace(has_gate=True, _apply_gate=SWIGLU)
    assert rule_of_all([module, module]) == Rule(limit=limit)
    assert rule_of_all([module, plain]) is None  # a store's kernel is one for all layers


@pytest.mark.parametrize("rule", [SWIGLU, OSS], ids=["swiglu", "gpt_oss"])
def test_nan_and_what_overflows_go_through_every_rule(rule):
    layout, tensors = an_expert(rule, biased=True, turned=True)
    blob = encode(tensors, layout, 16)
    x = torch.from_numpy(tokens(2, 192))
    x[0, 3], x[1] = math.nan, 1e30
    found = kernels.compute_prefill(blob, 16, layout, x, rule)
    expected = theirs(x, decode(blob, layout, 16), rule, True)
    assert found[0].isnan().all()
    assert torch.equal(found[1].isfinite(), expected[1].isfinite())


def test_a_turned_blob_is_the_same_bytes_as_one_whose_family_has_out_in():
    layout, tensors = an_expert(SWIGLU, biased=True, turned=True)
    plain, _ = an_expert(SWIGLU, biased=True, turned=False)
    straight = {n: t.t().contiguous() if t.ndim > 1 else t for n, t in tensors.items()}
    for bits in (16, 8, 4, 3, 2):
        blob = encode(tensors, layout, bits)
        assert np.array_equal(blob, encode(straight, plain, bits))
        assert all(t.is_contiguous() for t in decode(blob, layout, bits).values())
    back = decode(encode(tensors, layout, 16), layout, 16)
    assert all(torch.equal(back[name], tensors[name].bfloat16().float()) for name in tensors)


def test_supports_what_it_can_compute_and_nothing_else():
    plain = {"transposed": False, "has_bias": False, "has_post_norm": False}

    def ask(tensors, rule=SWIGLU, turned=False, **facts):
        layout = Layout(tensors, "bfloat16", turned=turned)
        return kernels.supports(layout, SimpleNamespace(**plain | facts), rule)

    swiglu = (("gate_up_proj", (256, 192)), ("down_proj", (192, 128)))
    turned = (("gate_up_proj", (192, 256)), ("down_proj", (128, 192)))
    biases = (("gate_up_proj_bias", (256,)), ("down_proj_bias", (192,)))
    relu = (("up_proj", (128, 192)), ("down_proj", (192, 128)))
    assert ask(swiglu)
    assert ask(swiglu, OSS)
    assert ask(turned, turned=True, transposed=True)
    assert ask((*swiglu, *biases), has_bias=True)
    assert ask(relu, Rule(power=1))
    assert not ask(swiglu, None)
    assert not ask(swiglu, Rule(power=1))
    assert not ask(relu)
    assert not ask(swiglu, transposed=True)
    assert not ask(turned, transposed=True)  # packed before blobs were turned
    assert not ask(turned)
    assert not ask(swiglu, has_bias=True)
    assert not ask((*swiglu, biases[1]), has_bias=True)
    assert not ask((*swiglu, *biases))
    assert not ask((*swiglu, biases[0], ("down_proj_bias", (128,))), has_bias=True)
    assert not ask(swiglu, has_post_norm=True)
    assert not ask((("gate_up_proj", (200, 192)), ("down_proj", (192, 100))))  # 100 % 64
