"""Load a transformers model from safetensors, all but its experts.

`from_pretrained` itself does the work, with a state dict that lacks the experts and reads every
other weight when asked; the one thing changed is that missing experts stay on the meta device
instead of being filled with random numbers. Anything else that is missing is an error here. What
it does not know: what becomes of the experts (`adapter`).
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from moelab.models.checkpoint import QUANTISED, split
from moelab.models.config import make_config, read_json
from moelab.models.families import MoELayer, expert_parameter, find_moe, text_only
from moelab.models.inventory import no_bars, refuse_incomplete
from moelab.models.shards import DTYPES, SCALE, Checkpoint, LazyTensor

LARGE = 1 << 16
"""Weights from which a linear layer keeps its 16 bits; a smaller one is faster in float32."""


def load_skeleton(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    check: Callable[[PreTrainedModel, list[MoELayer]], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> PreTrainedModel:
    """Load a stock transformers model from safetensors, all but its experts.

    No expert byte is read: the experts' parameters stay on the meta device. Code that comes with a
    checkpoint is never run.

    Parameters
    ----------
    path
        Checkpoint folder, or `Store.checkpoint_dir`, which holds no experts at all.
    dtype
        Type to compute in; what a family keeps in float32 stays in float32. With float32, large
        linear layers and embeddings that are no router's keep the 16 bits of the checkpoint: they
        are computed by `moelab.engine.dense`.
    check
        Called with the model on the meta device and its MoE layers before a weight is read.
    checkpoint
        Where the weights are, if they are not in that folder.

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
    if check is not None:
        check(blank, layers)
    checkpoint = checkpoint or Checkpoint(path)
    rest = split(blank, layers, checkpoint).rest
    _refuse_larger(blank, layers, checkpoint, rest)
    weights = {key: LazyTensor(checkpoint, key) for key in rest if not key.endswith(SCALE)}
    plan: dict[str, torch.dtype] = {}
    if dtype == torch.float32:
        stored: dict[str, set[torch.dtype]] = {}
        for key in weights:
            stored.setdefault(rest[key], set()).add(DTYPES[checkpoint.info[key].dtype])
        plan = {f"^{re.escape(name)}$": kind for name, kind in half_plan(blank, layers, stored)}
    with _quiet(family.__name__):
        loaded: Any = _skeleton_class(family, layers, plan).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    model.__class__ = family
    missing = () if checkpoint.random else report["missing_keys"]
    refuse_incomplete(missing, report["mismatched_keys"], layers, path)
    model.config.name_or_path = model.name_or_path = str(path)
    if (path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def _refuse_larger(
    blank: PreTrainedModel,
    layers: Sequence[MoELayer],
    checkpoint: Checkpoint,
    rest: Mapping[str, str],
) -> None:
    """Refuse a configuration that would fill the memory with weights that no file holds."""
    own = [p for n, p in blank.named_parameters() if expert_parameter(n, layers) is None]
    asked = sum(p.numel() for p in own)
    held = sum(math.prod(checkpoint.info[key].shape) for key in rest)
    if asked > 2 * held:
        raise ValueError(
            f"{checkpoint.path / 'config.json'} asks for {asked} weights besides the experts, the "
            f"files hold {held}; give the config.json that belongs to them"
        )


def blank_model(path: str | os.PathLike[str]) -> PreTrainedModel:
    """Make the model of a checkpoint's `config.json`, all of it on the meta device."""
    return blank_of(read_config(Path(path)))


def blank_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Make what reads and writes text of a configuration's model, all on the meta device."""
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    text_only(model)
    return model


LOCAL: dict[str, bool] = {"local_files_only": True, "trust_remote_code": False}


def read_config(path: Path) -> PreTrainedConfig:
    """Read `config.json`, and refuse quantisation formats whose experts cannot be read.

    Raises
    ------
    ValueError
        It is missing or damaged, asks for a model that transformers itself does not have, or for
        weights of another format.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} has no config.json; give the folder of a transformers checkpoint")
    data = read_json(file)
    mlx = data.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise ValueError(
            f"{path} is quantised to {mlx['bits']} bit by MLX; moelab reads the checkpoint that it "
            "was made of: give that one"
        )
    try:
        config = make_config(data)
    except Exception as error:
        if "auto_map" in data:
            raise ValueError(
                f"{path} needs code of its own (auto_map in config.json), and moelab "
                "never runs code that comes with a checkpoint; give a model that transformers has"
            ) from error
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{file} is not understood by transformers {transformers.__version__} ({reason})"
        ) from error
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
        delattr(config, "quantization_config")
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a configuration asks for."""
    for name in config.architectures or ():
        family = getattr(transformers, name, None)
        if family is not None and name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            return family
    try:
        family: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise ValueError(
            f"transformers {transformers.__version__} has no generating model for "
            f"{config.model_type!r} ({', '.join(config.architectures or ['no architecture'])})"
        ) from error
    return family


def half_plan(
    model: PreTrainedModel, layers: Sequence[MoELayer], stored: Mapping[str, set[torch.dtype]]
) -> Iterator[tuple[str, torch.dtype]]:
    """Names of the weights that stay at 16 bit, because that is what the checkpoint holds.

    ``stored``: the types a weight has in the files. A tied weight does where all modules that share
    it can compute with it.
    """
    routers = {id(m) for at in layers if at.router is not None for m in at.router.modules()}
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter, weight in module.named_parameters(name, recurse=False):
            owners.setdefault(id(weight), []).append((parameter, module))
    for shared in owners.values():
        weight: Any = shared[0][1].get_parameter(shared[0][0].rpartition(".")[2])
        kinds = set().union(*(stored.get(name, set()) for name, _ in shared))
        half = kinds in ({torch.bfloat16}, {torch.float16}) and weight.numel() >= LARGE
        ours = all(type(m) in (nn.Linear, nn.Embedding) for _, m in shared)
        if half and ours and weight.ndim == 2 and not any(id(m) in routers for _, m in shared):
            (kind,) = kinds
            yield from ((name, kind) for name, _ in shared)


def _skeleton_class(
    family: type[PreTrainedModel], layers: Sequence[MoELayer], plan: dict[str, torch.dtype]
) -> type[PreTrainedModel]:
    """The family's class, but missing experts stay on meta, and weights of `plan` in its dtype."""

    class Skeleton(family):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            text_only(self)

        def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
            parent: Any = super()
            return parent._get_dtype_plan(dtype) | plan

        def _move_missing_keys_from_meta_to_device(
            self, missing_keys: Any, *args: Any, **kwargs: Any
        ) -> None:
            rest = {key for key in missing_keys if expert_parameter(key, layers) is None}
            parent: Any = super()
            parent._move_missing_keys_from_meta_to_device(rest, *args, **kwargs)

    Skeleton.__name__, Skeleton.__qualname__ = family.__name__, family.__qualname__
    Skeleton.__module__ = family.__module__
    return Skeleton


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
    logger.addFilter(keep)
    try:
        with no_bars():
            yield
    except RuntimeError as error:
        details = "\n".join(reports)
        raise ValueError(f"transformers could not load {name}: {error}\n{details}") from error
    finally:
        logger.removeFilter(keep)
