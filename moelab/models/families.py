"""Every Mixture-of-Experts family of transformers as a list of `MoELayer`.

transformers marks its experts modules with a decorator that sets attributes (`is_transposed`,
`has_gate`, ...), and gives them fused parameters [E, ...]; that is all `find_moe` looks for, so a
new family needs no code here. `undecorated` describes five families that lack the decorator. What
it does not know: where weights come from, and who serves an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2CLS
from transformers.integrations.moe import _default_apply_gate

from moelab.models.undecorated import UNDECORATED, Choice, Undecorated

# T tokens, E experts, K active experts per token, D model width, F expert width.

_TOP_K = ("top_k", "topk", "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "moe_k")
_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One layer of experts: where it is in the model and what its experts compute.

    Attributes
    ----------
    index
        Position among the MoE layers in forward order (dense layers are not counted).
    name
        Path of the experts module in the model.
    module, router, block
        The experts module, the router (None where a family has no module for it) and their parent.
    num_experts, top_k
        E and K.
    encoder
        Whether it is of an encoder, which only a prompt runs through.
    activation
        "silu", "gelu", ... or "custom".
    gating
        "concatenated": act(gate) * up with [gate; up] stacked; "custom": the family's own rule
        (clamps, interleaving); "none": no gate.
    transposed
        Weights are [in, out] instead of [out, in].
    has_bias, has_post_norm
        Biases in the two projections; a norm after the second.
    tensors
        (name, shape) of one expert's tensors, in the order in which a store keeps them.
    special
        What is known of a family without the decorator, else None.
    free
        Experts without weights that the router may choose as well, numbered from E on: each gives
        its input back (zero-computation experts of LongCat-Flash, copy experts of MoE++).
    """

    index: int
    name: str
    module: Any = field(repr=False)
    router: Any = field(repr=False)
    block: Any = field(repr=False)
    num_experts: int
    top_k: int
    encoder: bool
    activation: str
    gating: str
    transposed: bool
    has_bias: bool
    has_post_norm: bool
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    special: Undecorated | None = field(repr=False)
    free: int = 0

    @property
    def hidden(self) -> int:
        """D, the width of the model."""
        shape = dict(self.tensors)["down_proj"]
        return shape[1] if self.transposed else shape[0]

    @property
    def inner(self) -> int:
        """F, the width of one expert."""
        shape = dict(self.tensors)["down_proj"]
        return shape[0] if self.transposed else shape[1]

    def choice(self, output: Any) -> Choice | None:
        """Read (experts [T, K], weights [T, K]) from what the router returned, or None."""
        return self.special.choice(self, output) if self.special else _read_choice(output)

    def logits(self, output: Any) -> torch.Tensor | None:
        """The router's logits of all experts ``[..., E]`` in what it returned, or None."""
        if isinstance(output, (tuple, list)):
            output = output[self.special.logits if self.special else 0]
        wide = isinstance(output, torch.Tensor) and output.shape[-1] >= self.num_experts
        return output if wide else None


def find_moe(model: nn.Module) -> list[MoELayer]:
    """List the MoE layers of a model in forward order.

    Parameters
    ----------
    model
        Any transformers model; its weights may be on the meta device.

    Raises
    ------
    ValueError
        The model has no experts, or fewer than it is to activate.
    """
    layers: list[MoELayer] = []
    encoder = encoder_of(model)
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    for name, module in model.named_modules():
        special = UNDECORATED.get(type(module).__name__)
        if special is not None and not hasattr(module, "is_transposed"):
            special.describe(module)
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            at, own = len(layers), id(module) in inside
            layers.append(_describe(model, name, module, special, index=at, encoder=own))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no experts that moelab knows how to serve; "
            "give a Mixture-of-Experts model of a transformers family with fused experts"
        )
    return layers


def expert_parameter(target: str, layers: Sequence[MoELayer]) -> tuple[MoELayer, str] | None:
    """The layer and parameter that a model-side weight name belongs to, or None."""
    owner, _, parameter = target.rpartition(".")
    for layer in layers:
        if owner == layer.name:
            return (layer, parameter) if parameter in dict(layer.tensors) else None
        if owner.startswith(layer.name + ".expert_"):
            return layer, _per_expert_name(target)
    return None


def expert_forward(module: Any, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run one expert on its tokens: the slow path that is right for every family.

    Parameters
    ----------
    module
        The layer's experts module (`MoELayer.module`); its own weights are not used.
    x
        Input, [T, D].
    tensors
        One expert's weights by name; they are cast to the type of `x`.

    Returns
    -------
    Tensor
        [T, D], before the router's weight is applied.
    """
    h = _linear(expert_hidden(module, x, tensors), tensors, "down_proj", module.is_transposed)
    return module.post_expert_norm(h) if module.has_post_expert_norm else h


def expert_hidden(module: Any, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What goes into an expert's second product, [T, F]; see `expert_forward`."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    h = _linear(x, tensors, first, module.is_transposed)
    return module._apply_gate(h) if module.has_gate else module.act_fn(h)


def _linear(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str, transposed: bool
) -> torch.Tensor:
    weight, bias = tensors[name].to(x.dtype), tensors.get(f"{name}_bias")
    bias = None if bias is None else bias.to(x.dtype)
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


def _describe(
    model: nn.Module,
    name: str,
    module: Any,
    special: Undecorated | None,
    *,
    index: int,
    encoder: bool,
) -> MoELayer:
    block = model.get_submodule(name.rpartition(".")[0])
    router = next(
        (r for a in ("gate", "router") if isinstance(r := getattr(block, a, None), nn.Module)), None
    )
    top_k = special.top_k if special and special.top_k else _top_k(router, block, module)
    if top_k > module.num_experts:
        raise ValueError(
            f"layer {index} ({name}) has {module.num_experts} experts and is to activate {top_k} "
            "for a token; correct config.json"
        )
    return MoELayer(
        index=index,
        name=name,
        module=module,
        router=router,
        block=block,
        num_experts=module.num_experts,
        top_k=top_k,
        encoder=encoder,
        activation=_activation(getattr(module, "act_fn", None)),
        gating=_gating(module),
        transposed=module.is_transposed,
        has_bias=module.has_bias,
        has_post_norm=module.has_post_expert_norm,
        tensors=_tensors(module, special),
        special=special,
        free=special.free(module) if special else 0,
    )


def _tensors(module: Any, special: Undecorated | None) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if special is not None and special.per_expert is not None:
        one = special.per_expert(module)
        found = {_per_expert_name(k): tuple(p.shape) for k, p in one.named_parameters()}
    else:
        parameters = module.named_parameters(recurse=False)
        found = {k: tuple(p.shape[1:]) for k, p in parameters}
    names = [n + suffix for suffix in ("", "_bias") for n in _PARAMETERS]
    return tuple((n, found[n]) for n in names if n in found)


def _per_expert_name(key: str) -> str:
    """`expert_3.fc1.bias` -> `up_proj_bias`: the fused names for families of single modules."""
    linear, kind = key.split(".")[-2:]
    name = "up_proj" if linear in ("wi", "fc1") else "down_proj"
    return name if kind == "weight" else f"{name}_bias"


def _top_k(router: nn.Module | None, block: nn.Module, module: Any) -> int:
    config = getattr(module, "config", None)
    for owner in (router, block, config, getattr(router, "config", None)):
        for name in _TOP_K:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    raise ValueError(
        f"cannot tell how many experts {type(block).__name__} activates per token: none of "
        f"{', '.join(_TOP_K)} is set on its router, block or config"
    )


def _activation(function: Any) -> str:
    if function is None:
        return "custom"
    if function is F.silu or isinstance(function, nn.SiLU):
        return "silu"
    for name, known in ACT2CLS.items():
        if type(function) is (known[0] if isinstance(known, tuple) else known):
            return name
    return "custom"


def _gating(module: Any) -> str:
    if not module.has_gate:
        return "none"
    own = getattr(type(module), "_apply_gate", _default_apply_gate)
    default = own is _default_apply_gate and getattr(module, "is_concatenated", True)
    return "concatenated" if default else "custom"


def _read_choice(output: Any) -> Choice | None:
    """Routers return (logits, weights, experts, ...): the experts are told by their type."""
    if not isinstance(output, (tuple, list)):
        return None
    tensors = [t for t in output if isinstance(t, torch.Tensor)]
    at = next((i for i, t in enumerate(tensors) if t.dtype in (torch.int64, torch.int32)), None)
    if at is None:
        return None
    idx = tensors[at].reshape(-1, tensors[at].shape[-1]).to(torch.int64)
    weights = [t for t in tensors[:at] if t.is_floating_point() and t.numel() == idx.numel()]
    return (idx, weights[-1].reshape(idx.shape)) if weights else None


def encoder_of(model: Any) -> Any:
    """The encoder of an encoder-decoder; None of any other model."""
    whole = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return model.get_encoder() if whole else None


def text_only(model: Any) -> None:
    """Take from a model what no text uses; its `left_out` then begins the names of that.

    It is what lies beside the decoder, for pictures and sound, and ERNIE's experts of pictures.
    """
    model.left_out = ()
    used = {id(m) for m in (*model.get_decoder().modules(), model.get_output_embeddings())}
    for name, parent in () if encoder_of(model) is not None else model.named_modules():
        for child, module in [*parent.named_children()]:
            path = f"{name}.{child}.".lstrip(".")
            beside = not any(id(m) in used for m in module.modules())
            weights = any(True for _ in module.parameters())
            if (beside and weights) or path.endswith(".vision_moe.experts."):
                setattr(parent, child, None)
                model.left_out += (path,)


def positions(model: nn.Module) -> int | None:
    """Tokens of prompt and text the model was made for; None where its config does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)
