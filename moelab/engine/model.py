"""The transformers adapter: load a model without its experts, and serve the experts from elsewhere.

`load_skeleton` gives a stock transformers model whose experts stay on the meta device; `attach`
makes every MoE layer of it call one function with the router's choice. Everything else (attention,
cache, shared experts, generation) is transformers' own. `families` says what a MoE layer is and
`routing` what happens around the router; this module joins them.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging as transformers_logging

from moelab.engine.families import (
    Choice,
    MoELayer,
    expert_forward,
    expert_parameter,
    find_moe,
    replacement_forward,
    run_experts,
)
from moelab.engine.routing import RouterTap
from moelab.store.checkpoint import QUANTISED, SCALE, Checkpoint, LazyTensor, split

__all__ = [
    "Adapter",
    "MoELayer",
    "attach",
    "expert_forward",
    "find_moe",
    "load_skeleton",
    "run_experts",
]

# T tokens, E experts, K active experts per token, D model width.

RunLayer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def load_skeleton(path: str | os.PathLike[str], *, dtype: torch.dtype) -> nn.Module:
    """Load a stock transformers model from safetensors, all but its experts.

    No expert byte is read: the experts' parameters stay on the meta device. Code that comes with a
    checkpoint is never run.

    Parameters
    ----------
    path
        Checkpoint folder, or `Store.checkpoint_dir`, which holds no experts at all.
    dtype
        Type to compute in; what a family keeps in float32 stays in float32.

    Raises
    ------
    ValueError
        A weight that is not an expert's is missing or has the wrong shape, the checkpoint is
        pickled or quantised in a way moelab cannot read, or the model has no experts.

    Examples
    --------
    >>> model = load_skeleton("checkpoint", dtype=torch.float32)  # doctest: +SKIP
    >>> adapter = attach(model, run_layer)  # doctest: +SKIP
    """
    path = Path(path)
    blank = blank_model(path)
    family, config, layers = type(blank), blank.config, find_moe(blank)
    checkpoint = Checkpoint(path)
    rest = split(blank, checkpoint).rest
    weights = {key: LazyTensor(checkpoint, key) for key in rest if not key.endswith(SCALE)}
    with _quiet(family.__name__):
        model, report = _skeleton_class(family).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model.__class__ = family
    _refuse_incomplete(report, layers, path)
    model.config.name_or_path = model.name_or_path = str(path)
    if (path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def blank_model(path: str | os.PathLike[str]) -> nn.Module:
    """Make the model of a checkpoint's `config.json`, all of it on the meta device."""
    config = read_config(Path(path))
    with torch.device("meta"):
        return model_class(config)._from_config(config)


def read_config(path: Path) -> PreTrainedConfig:
    """Read `config.json`, and refuse quantisation formats whose experts cannot be read."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the folder of a transformers checkpoint")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    quantisation = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    method = quantisation.get("quant_method")
    if quantisation and method not in QUANTISED:
        raise ValueError(
            f"{path} is quantised with {method!r}; moelab reads bf16, fp16, fp32 and "
            f"{', '.join(QUANTISED)} checkpoints: give the unquantised one"
        )
    if quantisation:  # `Checkpoint` and `ExpertReader` decode these themselves
        del config.quantization_config
    return config


def model_class(config: PreTrainedConfig) -> type:
    """The transformers class that a configuration asks for."""
    for name in config.architectures or ():
        family = getattr(transformers, name, None)
        if family is not None and name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            return family
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ValueError(
            f"transformers {transformers.__version__} has no generating model for "
            f"{config.model_type!r} ({', '.join(config.architectures or ['no architecture'])})"
        ) from error


def _skeleton_class(family: type) -> type:
    """The family's class, except that missing experts stay on meta instead of being filled."""

    class Skeleton(family):
        def _move_missing_keys_from_meta_to_device(
            self, missing_keys: set[str], *args: Any, **kwargs: Any
        ) -> None:
            layers = find_moe(self)
            rest = {key for key in missing_keys if expert_parameter(key, layers) is None}
            super()._move_missing_keys_from_meta_to_device(rest, *args, **kwargs)

    Skeleton.__name__, Skeleton.__qualname__ = family.__name__, family.__qualname__
    Skeleton.__module__ = family.__module__
    return Skeleton


def _refuse_incomplete(report: dict, layers: list[MoELayer], path: Path) -> None:
    missing = sorted(k for k in report["missing_keys"] if expert_parameter(k, layers) is None)
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights besides the experts, first {missing[0]!r}; "
            "the checkpoint is incomplete or not of this architecture"
        )
    for key, found, wanted in report["mismatched_keys"]:
        raise ValueError(
            f"{path}: {key!r} has shape {tuple(found)}, its config.json asks for {tuple(wanted)}"
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep transformers' load report and bar to this thread; show the report with an error."""
    thread, reports = threading.get_ident(), []

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != thread:
            return True
        reports.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    bar = transformers_logging.is_progress_bar_enabled()
    logger.addFilter(keep)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except RuntimeError as error:
        details = "\n".join(reports)
        raise ValueError(f"transformers could not load {name}: {error}\n{details}") from error
    finally:
        logger.removeFilter(keep)
        if bar:
            transformers_logging.enable_progress_bar()


class Adapter:
    """A model whose experts are served by `run_layer`; made by `attach`.

    Attributes
    ----------
    model
        The model.
    layers
        Its MoE layers in forward order.
    """

    def __init__(self, model: nn.Module, run_layer: RunLayer) -> None:
        self.model = model
        self.layers = find_moe(model)
        self._run_layer = run_layer
        self._last: RouterTap | None = None
        self._replaced: list[nn.Module] = []
        self._before = getattr(model.config, "_experts_implementation", None)
        self._taps = {
            layer.index: RouterTap(layer, seen=self._remember)
            for layer in self.layers
            if layer.router is not None
        }
        for layer in self.layers:
            self._serve(layer)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("moelab")

    def set_mask(self, layer: int, allowed: torch.Tensor | None) -> None:
        """Let a layer's router choose only among some experts, from its next call on.

        Parameters
        ----------
        layer
            MoE layer index.
        allowed
            Bool [E], or None for all.

        Raises
        ------
        ValueError
            Fewer experts than the router picks, a wrong length, or a layer without a router.
        """
        facts, tap = self.layers[layer], self._taps.get(layer)
        if tap is None:
            raise ValueError(f"layer {layer} ({facts.name}) has no router module to mask")
        if allowed is not None:
            allowed = torch.as_tensor(allowed, dtype=torch.bool)
            if allowed.shape != (facts.num_experts,):
                raise ValueError(
                    f"mask of layer {layer} has shape {tuple(allowed.shape)}; "
                    f"it needs one entry for each of {facts.num_experts} experts"
                )
            if int(allowed.sum()) < facts.top_k:
                raise ValueError(
                    f"mask of layer {layer} allows {int(allowed.sum())} experts, its router picks "
                    f"{facts.top_k}; allow at least {facts.top_k}"
                )
        tap.mask = allowed

    def look_ahead(
        self, layer: int, depth: int = 1
    ) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Ask the routers of the next layers with this layer's router input.

        To be called while `layer` is served. The answers are the routers' own, under their masks.

        Returns
        -------
        list of (layer, idx [T, K], weights [T, K])
            For `layer + 1` up to `layer + depth`, fewer at the end of the model. Layers whose
            router cannot be asked are left out: no router module, or one that needs arguments
            which it only gets when its own turn comes (some families, on the first pass).
        """
        tap = self._taps.get(layer)
        if tap is None or tap is not self._last:
            return []
        found = []
        for later in range(layer + 1, min(layer + depth, len(self.layers) - 1) + 1):
            ahead = self._taps.get(later)
            choice = ahead.predict(tap) if ahead is not None else None
            if choice is not None:
                found.append((later, *choice))
        return found

    def wanted(self, layer: int) -> Choice | None:
        """What the router would have chosen without its mask: (idx [T, K], weights [T, K]).

        To be called while `layer` is served; None where no mask applies.
        """
        tap = self._taps.get(layer)
        if tap is None or tap.mask is None or tap is not self._last:
            return None
        return tap.unmasked()

    def detach(self) -> None:
        """Give the model its own forwards back. Its experts are still on meta."""
        for tap in self._taps.values():
            tap.remove()
        for layer in self.layers:
            vars(layer.module).pop("_moelab_run", None)
        for module in self._replaced:
            vars(module).pop("forward", None)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation(self._before or "eager")
        self._taps, self._replaced, self._last = {}, [], None

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
            out = self._run_layer(layer.index, flat, idx, weights, scale_input)
            return out.view(x.shape)

        replaced = replacement_forward(layer, run)
        if replaced is None:
            vars(layer.module)["_moelab_run"] = run
        else:
            module, forward = replaced
            module.forward = forward
            self._replaced.append(module)


def attach(model: nn.Module, run_layer: RunLayer) -> Adapter:
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
    if any("_moelab_run" in vars(layer.module) for layer in find_moe(model)):
        raise ValueError("this model is attached already; call detach() on its adapter first")
    return Adapter(model, run_layer)


def _forward(
    module: nn.Module, hidden_states: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return vars(module)["_moelab_run"](hidden_states, idx, weights)


ALL_EXPERTS_FUNCTIONS.register("moelab", _forward)
