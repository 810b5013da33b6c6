"""One adapter serves every family: equal to transformers, masks hold, look-ahead answers.

The reference for NLLB-MoE is a plain sum over its experts, because transformers' own forward only
ever runs experts 0 and 1 of it.
"""

from __future__ import annotations

import copy
import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import reference
import tiny_families
import tiny_models
from moelab.engine import dense
from moelab.models import skeleton
from moelab.models.adapter import MoELayer, find_moe
from moelab.models.checkpoint import ExpertReader
from moelab.models.inventory import inventory
from moelab.models.skeleton import blank_model

IDS = torch.tensor([[3, 17, 99, 4, 250, 31, 77]])
NO_LOOK_AHEAD = {"flint", "jamba", "nemotron_h"}  # tiny, they have one MoE layer only
ASKED_PER_TOKEN = {"deepseek_v4", "nllb_moe", "zaya"}  # routers with more inputs than one
SILENT = {
    "diffusion_gemma": "it denoises a block of tokens at once; it does not generate token by token",
    "openai_privacy_filter": "a token classifier: it does not generate",
    "vitpose_backbone": "it finds poses in pictures",
}
NOT_SERVED = {
    "dbrx": "its experts are rows of matrices that all of them share, and no router chooses",
    "doge": "an expert is one row of a table, and tens of thousands are looked up as words are",
    "jetmoe": "heads of its attention are experts too, run in two halves around the keys",
}


def nllb_forward(self: nn.ModuleDict, x: torch.Tensor, _: torch.Tensor, gates: torch.Tensor):
    share = gates * (1 - self.moe_token_dropout)
    return sum(self[f"expert_{e}"](x) * share[:, e, None] for e in range(self.num_experts))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(IDS, use_cache=False, **extra).logits


class Served(reference.Served):
    def __init__(self, folder: Path) -> None:
        self.calls: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ahead: dict[int, list] = {}
        self.whole: dict[int, dict] = {}
        self.asked: dict[int, tuple] = {}  # what each layer's router was given
        super().__init__(folder)
        for layer in self.adapter.layers:
            if layer.router is not None:
                hook = partial(self.ask, layer.index)
                layer.router.register_forward_pre_hook(hook, with_kwargs=True)

    def ask(self, layer, _, args, kwargs):
        self.asked[layer] = args[0].clone(), args[1:], kwargs

    def seen(self, layer, idx, weights):
        self.calls[layer] = idx.clone(), weights.clone()
        self.ahead[layer] = self.adapter.look_ahead(layer, 1)
        observes = frozenset({"probabilities", "embedding"})
        self.whole[layer] = self.adapter.observed(layer, observes)


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@torch.no_grad()
def saved(name: str, folder: Path) -> nn.Module:
    """A tiny random model of a family, whose checkpoint of 16 bits has the same numbers."""
    theirs = tiny_families.build(name).float().eval()
    tiny_models.randomise(theirs)
    for weight in theirs.parameters():
        weight.copy_(weight.bfloat16())
    for name_of, buffer in theirs.named_buffers():
        if buffer.is_floating_point() and name_of in theirs.state_dict():
            buffer.copy_(buffer.bfloat16())
    half = copy.deepcopy(theirs).bfloat16()
    half.save_pretrained(folder)
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_families.names())
def test_family_is_served_exactly_also_with_dense_weights_at_16_bit(name, tmp_path, monkeypatch):
    if name in SILENT:
        pytest.skip(SILENT[name])
    theirs = saved(name, tmp_path)
    monkeypatch.setattr(skeleton, "LARGE", 1 << 40)  # all dense weights as float32 at first
    if name == "nllb_moe":
        experts = type(find_moe(theirs)[0].module)
        monkeypatch.setattr(experts, "forward", nllb_forward)
    blank = blank_model(tmp_path)
    reader = ExpertReader(blank, tmp_path)
    notes = inventory(blank, reader.layers, reader.checkpoint, reader.found)
    assert ["pictures" in note for note in notes] == [True] * bool(blank.left_out)
    served = Served(tmp_path)
    expected, got = logits(theirs), logits(served.model)
    assert (got - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    check_look_ahead(served, name)
    check_whole(served)
    check_masks(served)
    monkeypatch.setattr(skeleton, "LARGE", 1)
    served = Served(tmp_path)
    assert len(dense.serve(served.model)) > 1
    off, limit = (logits(served.model) - expected).abs().max(), 1e-4 * max(1, expected.abs().max())
    assert off <= limit or off <= 2 * shaken(theirs, expected)


def test_no_family_with_experts_is_forgotten():
    root = Path(transformers.models.__path__[0])
    sources = {file.parent.name: file.read_text() for file in root.glob("*/modeling_*.py")}
    experts = re.compile(r"^class \w+(Experts|MoE|Moe)\(", re.MULTILINE)
    found = {name for name, source in sources.items() if experts.search(source)}
    assert found == {*tiny_families.names(), *SILENT, *NOT_SERVED}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_served_is_refused(name):
    with pytest.raises(LookupError, match="no experts that moelab knows how to serve"):
        tiny_families.build(name)


def shaken(model: nn.Module, expected: torch.Tensor) -> float:
    """How far logits move where the last bit of every dense layer's outputs is rounded otherwise.

    Two families, random and this small, make of it up to 6e-4.
    """

    def shake(_module, _args, out):
        return out * (1 + 2**-23 * (2 * torch.rand_like(out) - 1))

    torch.manual_seed(0)
    hooks = [m.register_forward_hook(shake) for m in model.modules() if type(m) is nn.Linear]
    moved = max(float((logits(model) - expected).abs().max()) for _ in range(3))
    for hook in hooks:
        hook.remove()
    return moved


def check_look_ahead(served: Served, name: str) -> None:
    """From the second pass on, consecutive MoE layers answer with what they would choose."""
    logits(served.model)
    answers = [(layer, later) for layer, ahead in served.ahead.items() for later in ahead]
    assert bool(answers) != (name in NO_LOOK_AHEAD)
    for layer, (later, idx, weights) in answers:
        assert idx.shape == weights.shape == served.calls[later][0].shape
        assert torch.isfinite(weights).all()
        if name not in ASKED_PER_TOKEN:
            facts = served.adapter.layers[later]
            x, (_, *more) = served.asked[layer][0], served.asked[later]
            expected = ask_router(facts, x, *more)
            assert torch.equal(idx, expected[0])
            assert torch.equal(weights, expected[1])


def check_whole(served: Served) -> None:
    """The gate's probabilities are of all experts; the decoder's first layer has the embedding."""
    first = next(at.index for at in served.adapter.layers if not at.encoder)
    for layer, told in served.whole.items():
        facts, p = served.adapter.layers[layer], told["probabilities"]
        assert (told["embedding"] is None) == (layer != first)
        if p is None:
            assert facts.router is None or facts.special is not None
            continue
        assert len(p) == facts.num_experts
        assert min(p) >= 0
        assert sum(p) <= 1 + 1e-4  # the rest is a router's "no expert"


@torch.no_grad()
def ask_router(layer: MoELayer, x: torch.Tensor, args: tuple, kwargs: dict):
    """The answer of the router's own class, without the adapter."""
    return layer.choice(type(layer.router).forward(layer.router, x, *args, **kwargs))


def check_masks(served: Served) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        allowed = {}
        for layer in served.adapter.layers:
            mask = torch.zeros(layer.num_experts, dtype=torch.bool)
            mask[torch.randperm(layer.num_experts, generator=generator)[: layer.top_k]] = True
            allowed[layer.index] = mask
            served.adapter.steer(layer.index, mask)
        assert torch.isfinite(logits(served.model)).all()
        for index, (idx, weights) in served.calls.items():
            active = (idx >= 0) & (idx < len(allowed[index])) & (weights != 0)
            assert allowed[index][idx[active]].all()
