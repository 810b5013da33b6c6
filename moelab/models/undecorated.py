"""Five families whose experts modules lack transformers' decorator, described by hand.

Each sets what the decorator would have set (`describe`), says how to read the router's output
(`choice`), and which forward to replace so that the layer can be served (`forward`). Switch and
NLLB bound how many tokens an expert takes, so that a batch in training is even. transformers does
so outside training as well: of a prompt whose tokens like one expert, those above its capacity get
none. Here no token is dropped (`infer`): what becomes of it must not depend on the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

if TYPE_CHECKING:
    from moelab.models.families import MoELayer

Run = Callable[..., torch.Tensor]
Choice = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Undecorated:
    """What the decorator would have set, the forward that serves, the router's choice.

    ``infer`` takes training's ways from a router; ``note`` tells a person of it. ``logits`` is the
    place of the router's logits in what it returns.
    """

    describe: Callable[[Any], None]
    choice: Callable[[MoELayer, Any], Choice]
    forward: Callable[[MoELayer, Run], tuple[nn.Module, Run]]
    top_k: int | None = None  # where no attribute says it
    per_expert: Callable[[Any], nn.Module] | None = None
    infer: Callable[[Any], None] = lambda _: None
    note: str = ""
    logits: int = 2
    free: Callable[[Any], int] = lambda _: 0  # experts without weights, see `MoELayer.free`


def _describe_single_modules(module: Any) -> None:
    one = module["expert_0"]
    module.is_transposed = module.has_gate = module.has_post_expert_norm = False
    module.has_bias = getattr(one, "fc1", None) is not None
    module.__dict__["act_fn"] = one.act  # not as a submodule: the model must not change


def _switch_choice(_: MoELayer, output: Any) -> Choice:
    hot, probability = output[:2]  # one-hot [B, S, E], all zero where an expert was full
    hot = hot.reshape(-1, hot.shape[-1])
    share = probability.reshape(-1, 1) * hot.sum(-1, keepdim=True).to(probability.dtype)
    return hot.argmax(-1, keepdim=True), share


def _nllb_choice(layer: MoELayer, output: Any) -> Choice:
    weights, idx = output[1].topk(2, -1)  # the gates of both experts, [T, E]
    return idx, weights * (1 - layer.module.moe_token_dropout)


def _switch_infer(router: Any) -> None:
    router.expert_capacity = sys.maxsize


def _nllb_infer(router: Any) -> None:
    router.moe_eval_capacity_token_fraction = 1.0  # an expert may take every token


def _forward(layer: MoELayer, run: Run) -> tuple[nn.Module, Run]:
    # transformers' own forward of NLLB reads a one-hot mask as expert numbers and so only ever runs
    # experts 0 and 1; here the two experts that the router chose are run.
    def forward(x: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
        choice = layer.choice(routed)
        assert choice is not None
        return run(x, *choice, False)

    return layer.module, forward


def _describe_llama4(module: Any) -> None:
    module.is_transposed = module.has_gate = True
    module.has_bias = module.has_post_expert_norm = False
    module.__dict__["_apply_gate"] = lambda h: _default_apply_gate(module, h)


def _llama4_choice(layer: MoELayer, output: Any) -> Choice:
    weights, idx = output[0].topk(layer.top_k, -1)
    return idx, weights


def _llama4_forward(layer: MoELayer, run: Run) -> tuple[nn.Module, Run]:
    block = layer.block

    def forward(hidden: torch.Tensor) -> Any:  # (output, logits)
        x = hidden.reshape(-1, block.hidden_dim)
        output = block.router(x)
        routed = run(x, *_llama4_choice(layer, output), True)
        return block.shared_expert(x).add_(routed), output[1]

    return block, forward


def _describe_longcat(module: Any) -> None:
    _describe_llama4(module)
    module.is_transposed = False
    module.num_experts = module.num_routed_experts


def _describe_step(module: Any) -> None:
    module.has_gate = True
    module.is_transposed = module.has_bias = module.has_post_expert_norm = False


UNDECORATED = {
    "SwitchTransformersExperts": Undecorated(
        *(_describe_single_modules, _switch_choice, _forward, 1, lambda m: m["expert_0"]),
        *(_switch_infer, "no token is dropped, whatever expert_capacity says"),
    ),
    "NllbMoeExperts": Undecorated(
        *(_describe_single_modules, _nllb_choice, _forward, 2, lambda m: m["expert_0"]),
        *(_nllb_infer, "both experts of a token are computed; transformers runs experts 0 and 1"),
    ),
    "Llama4TextExperts": Undecorated(_describe_llama4, _llama4_choice, _llama4_forward, logits=1),
    "Step3p7Experts": Undecorated(
        _describe_step,
        lambda _, output: (output[2], output[1]),
        lambda layer, run: (layer.module, run),
        logits=0,
    ),
    "LongcatFlashExperts": Undecorated(
        _describe_longcat,
        lambda _, output: (output[2], output[1]),
        lambda layer, run: (layer.module, run),
        free=lambda module: module.zero_expert_num,
    ),
}
