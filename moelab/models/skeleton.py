"""Load a transformers model from safetensors, all but its experts.

`from_pretrained` itself does the work, with a state dict that lacks the experts and reads every
other weight when asked; the one thing changed is that missing experts stay on the meta device
instead of being filled with random numbers. Anything else that is missing is an error here. What
it does not know: what becomes of the experts (`adapter`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from moelab.models.checkpoint import QUANTISED, split
from moelab.models.families import MoELayer, expert_parameter, find_moe
from moelab.models.shards import SCALE, Checkpoint, LazyTensor


def load_skeleton(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    check: Callable[[PreTrainedModel, list[MoELayer]], None] | None = None,
) -> PreTrainedModel:
    """Load a stock transformers model from safetensors, all but its experts.

    No expert byte is read: the experts' parameters stay on the meta device. Code that comes with a
    checkpoint is never run.

    Parameters
    ----------
    path
        Checkpoint folder, or `Store.checkpoint_dir`, which holds no experts at all.
    dtype
        Type to compute in; what a family keeps in float32 stays in float32.
    check
        Called with the model on the meta device and its MoE layers before a weight is read.

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
    checkpoint = Checkpoint(path)
    rest = split(blank, layers, checkpoint).rest
    weights = {key: LazyTensor(checkpoint, key) for key in rest if not key.endswith(SCALE)}
    with _quiet(family.__name__):
        loaded: Any = _skeleton_class(family, layers).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    model.__class__ = family
    _refuse_incomplete(report, layers, path)
    model.config.name_or_path = model.name_or_path = str(path)
    if (path / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def blank_model(path: str | os.PathLike[str]) -> PreTrainedModel:
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


def _skeleton_class(
    family: type[PreTrainedModel], layers: Sequence[MoELayer]
) -> type[PreTrainedModel]:
    """The family's class, except that missing experts stay on meta instead of being filled."""

    class Skeleton(family):
        def _move_missing_keys_from_meta_to_device(
            self, missing_keys: Any, *args: Any, **kwargs: Any
        ) -> None:
            rest = {key for key in missing_keys if expert_parameter(key, layers) is None}
            parent: Any = super()
            parent._move_missing_keys_from_meta_to_device(rest, *args, **kwargs)

    Skeleton.__name__, Skeleton.__qualname__ = family.__name__, family.__qualname__
    Skeleton.__module__ = family.__module__
    return Skeleton


def _refuse_incomplete(report: dict, layers: Sequence[MoELayer], path: Path) -> None:
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
