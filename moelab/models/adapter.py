"""The transformers adapter: serve a model's experts from elsewhere.

`load_skeleton` gives a stock transformers model whose experts stay on the meta device; `attach`
makes every MoE layer of it call one function with the router's choice. Everything else (attention,
cache, shared experts, generation) is transformers' own. `families` says what a MoE layer is,
`routing` what happens around the router; this module joins them and is what the engine imports.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moelab.models.families import MoELayer, encoder_of, expert_forward, find_moe
from moelab.models.recorded import Step, ahead, choice
from moelab.models.routing import RouterTap
from moelab.models.skeleton import load_skeleton
from moelab.models.undecorated import Choice

__all__ = ["Adapter", "MoELayer", "attach", "expert_forward", "find_moe", "load_skeleton"]

# T tokens, E experts, K active experts per token, D model width.

RunLayer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
DECIMALS = 6
"""Of what `Adapter.observed` gives: a trace in JSON is a third as long."""


class Adapter:
    """A model whose experts are served by `run_layer`; made by `attach`.

    Attributes
    ----------
    model
        The model.
    layers
        Its MoE layers in forward order.
    recorded
        Where it is set, routers are asked all the same, and what it says is taken instead.
    """

    recorded: Step | None = None

    def __init__(self, model: PreTrainedModel, layers: list[MoELayer], run_layer: RunLayer) -> None:
        self.model, self.layers = model, layers
        self._run_layer = run_layer
        self._last: RouterTap | None = None
        self._replaced: list[nn.Module] = []
        self._before = getattr(model.config, "_experts_implementation", None)
        self._embedded: torch.Tensor | None = None  # until the first MoE layer of a pass is over
        two = encoder_of(model) is not None
        table: Any = (model.get_decoder() if two else model).get_input_embeddings()
        self._hook = table.register_forward_hook(self._embed)
        self._first = next((at.index for at in layers if not at.encoder), 0)
        self._taps = {
            layer.index: RouterTap(layer, seen=self._remember)
            for layer in self.layers
            if layer.router is not None
        }
        for layer in self.layers:
            self._serve(layer)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("moelab")

    @contextlib.contextmanager
    def served_by(self, run_layer: RunLayer) -> Iterator[None]:
        """Inside, MoE layers call ``run_layer`` instead."""
        own, self._run_layer = self._run_layer, run_layer
        try:
            yield
        finally:
            self._run_layer = own

    def steer(
        self,
        layer: int,
        allowed: Sequence | np.ndarray | None = None,
        bias: Sequence | np.ndarray | None = None,
    ) -> None:
        """Let a layer's router choose among some experts and prefer some, from its next call on.

        What is in force already costs nothing to state again.

        Parameters
        ----------
        layer
            MoE layer index.
        allowed
            Bool [E], or None for all.
        bias
            Float [E], see `moelab.models.routing.SteeredRouting`; None for no preference.

        Raises
        ------
        ValueError
            Fewer experts than the router picks, a wrong length, or a layer without a router.
        """
        at, tap = self.layers[layer], self._taps.get(layer)
        wish = None if allowed is None else tuple(allowed), None if bias is None else tuple(bias)
        if wish == (tap.steering if tap else (None, None)):
            return
        if tap is None:
            raise ValueError(f"layer {layer} ({at.name}) has no router module to steer")
        for what, values in zip(("mask", "bias"), wish, strict=True):
            if values is not None and len(values) != at.num_experts:
                raise ValueError(
                    f"{what} of layer {layer} has length {len(values)}; "
                    f"it needs one entry for each of {at.num_experts} experts"
                )
        if wish[0] is not None and sum(wish[0]) < at.top_k:
            raise ValueError(
                f"mask of layer {layer} allows {int(sum(wish[0]))} experts, its router picks "
                f"{at.top_k}; allow at least {at.top_k}"
            )
        tap.steer(*wish)

    def steers(self, layer: int) -> bool:
        """Whether a mask or a bias applies to the layer."""
        return layer in self._taps and self._taps[layer].steered

    def release(self) -> None:
        """Every router as it is."""
        for layer in self._taps:
            self.steer(layer)

    def look_ahead(
        self, layer: int, depth: int = 1
    ) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Ask the routers of the next layers with this layer's router input.

        To be called while `layer` is served. The answers are the routers' own, under their masks.

        Returns
        -------
        list of (layer, idx [T, K], weights [T, K])
            For `layer + 1` up to `layer + depth`, fewer at the end of an encoder or of the model:
            the tokens of an encoder are not those of its decoder. Layers whose
            router cannot be asked are left out: no router module, or one that needs arguments
            which it only gets when its own turn comes (some families, on the first pass).
        """
        tap = self._taps.get(layer)
        if tap is None or tap is not self._last:
            return []
        found = []
        for later in range(layer + 1, min(layer + depth, len(self.layers) - 1) + 1):
            coming = self._taps.get(later)
            if self.layers[later].encoder != self.layers[layer].encoder:
                break
            guess = coming.predict(tap) if coming is not None else None
            if guess is not None:
                found.append((later, *guess))
        return found if self.recorded is None else ahead(self.recorded(layer), layer + depth)

    def wanted(self, layer: int) -> Choice | None:
        """What the router would have chosen by itself: (idx [T, K], weights [T, K]).

        To be called while `layer` is served; None where no mask or bias applies.
        """
        tap = self._taps.get(layer)
        return tap.unmasked() if tap is not None and tap.steered and tap is self._last else None

    def observed(self, layer: int, observes: frozenset[str]) -> dict[str, Any]:
        """Of ``"probabilities"`` and ``"embedding"`` what is asked for; see `LayerInput`.

        To be called while `layer` is served. Of a recorded run it is what was recorded.
        """
        found: dict[str, Any] = {}  # arrays of float, or None
        for name in observes & {"probabilities", "embedding"}:
            if self.recorded is not None:
                found[name] = getattr(self.recorded(layer), name)
            elif name == "embedding":
                found[name] = _mean(self._embedded) if layer == self._first else None
            else:
                tap = self._taps.get(layer)
                said = tap.probabilities() if tap is not None and tap is self._last else None
                found[name] = _mean(said)
        return found

    def detach(self) -> None:
        """Give the model its own forwards back. Its experts are still on meta."""
        self._hook.remove()
        for tap in self._taps.values():
            tap.remove()
        for layer in self.layers:
            vars(layer.module).pop("_moelab_run", None)
        for module in self._replaced:
            vars(module).pop("forward", None)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation(self._before or "eager")
        self._taps, self._replaced, self._last = {}, [], None

    def _embed(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._embedded = output

    def _remember(self, tap: RouterTap) -> None:
        if self._last is not None and self._last is not tap:
            self._last.forget()
        self._last = tap

    def _serve(self, layer: MoELayer) -> None:
        """Make one layer call `run_layer`, by registration or by replacing a forward."""

        def run(
            x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, scale_input: bool = False
        ) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            if self.recorded is not None:
                idx, weights = choice(self.recorded(layer.index), len(flat))
            out = self._run_layer(layer.index, flat, idx, weights, scale_input)
            if layer.free:
                kept = (idx >= layer.num_experts).to(weights.dtype)
                out = out + flat * (weights * kept).sum(-1, keepdim=True).to(out.dtype)
            self._embedded = None  # a prompt's are megabytes
            return out.view(x.shape)

        if layer.special is None:
            vars(layer.module)["_moelab_run"] = run
        else:
            layer.special.infer(layer.router)
            module, forward = layer.special.forward(layer, run)
            module.forward = forward
            self._replaced.append(module)


def attach(model: PreTrainedModel, run_layer: RunLayer) -> Adapter:
    """Make every MoE layer of a model call `run_layer` instead of using its own experts.

    Parameters
    ----------
    model
        What `load_skeleton` gave; attach it once.
    run_layer
        `run_layer(layer, x [T, D], idx [T, K] int64, weights [T, K], scale_input) -> [T, D]`.
        `idx` may hold values outside 0..E-1 and weights may be 0 (an expert over its capacity, a
        router's "no expert"): these activations must load nothing and add nothing. With
        `scale_input` the weight multiplies the expert's input instead of its output (Llama 4).

    Raises
    ------
    ValueError
        The model is attached already.
    """
    layers = find_moe(model)
    if any("_moelab_run" in vars(layer.module) for layer in layers):
        raise ValueError("this model is attached already; call detach() on its adapter first")
    return Adapter(model, layers, run_layer)


@torch.no_grad()
def _mean(rows: torch.Tensor | None) -> array[float] | None:
    """Mean of the rows of ``[..., D]``."""
    if rows is None:
        return None
    mean = rows.reshape(-1, rows.shape[-1]).double().mean(0)
    return array("d", mean.round(decimals=DECIMALS).tolist())


def _forward(
    module: nn.Module, hidden_states: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return vars(module)["_moelab_run"](hidden_states, idx, weights)


ALL_EXPERTS_FUNCTIONS.register("moelab", _forward)
