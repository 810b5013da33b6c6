"""Every tensor of a checkpoint is used, known to be ignorable, or refused by name.

So is every weight that the model needs: transformers itself fills the model, on the meta device and
with names and shapes only, and says what is missing or left over. What it does not know: values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from moelab.models.checkpoint import Split
from moelab.models.families import MoELayer, expert_parameter
from moelab.models.shards import DTYPES, FP8, SCALE, Checkpoint

_PREDICTS = re.compile(r"^(.*\.layers\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\.")
_MTP = re.compile(r"(^|\.)mtp[._]")
_SPEAKS = re.compile(r"^(talker|code2wav)\.")
_ACTIVATIONS = re.compile(r"\.(activation_scale|input_scale|kv_scale|[kv]_scale)$")


def inventory(
    model: PreTrainedModel, layers: Sequence[MoELayer], checkpoint: Checkpoint, found: Split
) -> tuple[str, ...]:
    """Hold the names and shapes of a checkpoint against its model; no tensor is read.

    Parameters
    ----------
    model
        What `blank_model` made of the checkpoint's `config.json`; its weights stay on meta.
    layers, checkpoint, found
        Its MoE layers, its files, and what `split` said of them.

    Returns
    -------
    tuple of str
        What is ignored, in words: one sentence for each kind.

    Raises
    ------
    ValueError
        A weight is missing, has the wrong shape or lacks its scale, or a tensor has no place in
        the model; each by name.
    """
    path, info = checkpoint.path, checkpoint.info
    shapes = {
        key: torch.empty(info[key].shape, dtype=DTYPES[info[key].dtype], device="meta")
        for key in found.rest
        if not key.endswith(SCALE)
    }
    mapping: Any = get_model_conversion_mapping(model)
    loading = LoadStateDictConfig(
        device_map={"": "meta"},
        weight_mapping=mapping,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    with no_bars():
        report, _ = convert_and_load_state_dict_in_model(model, shapes, loading)
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    report.unexpected_keys = set(found.unused.values())
    model._adjust_missing_and_unexpected_keys(report)
    refuse_incomplete(report.missing_keys, report.mismatched_keys, layers, path)
    _refuse_unscaled(checkpoint, found)
    return _ignored(model, found, report.unexpected_keys, path)


def of_senses(model: PreTrainedModel, found: Split) -> set[str]:
    """The tensors of the parts for pictures and sound, which no text uses."""
    left_out: Any = model.left_out  # see `families.text_only`
    unused = found.unused.items()
    return {key for key, target in unused if target.startswith(left_out) or _SPEAKS.match(key)}


def refuse_incomplete(
    missing: Iterable[str], mismatched: Iterable[tuple], layers: Sequence[MoELayer], path: Path
) -> None:
    """Raise a ValueError where transformers found a weight missing or of another shape."""
    lost = sorted(k for k in missing if expert_parameter(k, layers) is None)
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} weights besides the experts, first {lost[0]!r}; "
            "the checkpoint is incomplete or not of this architecture"
        )
    for key, shape, wanted in sorted(mismatched):
        raise ValueError(
            f"{path}: {key!r} has shape {tuple(shape)}, its config.json asks for {tuple(wanted)}"
        )


def _refuse_unscaled(checkpoint: Checkpoint, found: Split) -> None:
    """In a checkpoint that says it is quantised, a weight in fp8 means nothing without a scale."""
    if not checkpoint.quantisation:
        return
    for key in (*found.rest, *found.expert_keys):
        if checkpoint.info[key].dtype in FP8 and key + SCALE not in checkpoint.info:
            raise ValueError(
                f"{checkpoint.path}: {key!r} is fp8 and has no {key + SCALE!r} beside it; "
                "the checkpoint is incomplete, download it again"
            )


def _ignored(
    model: PreTrainedModel, found: Split, unexpected: set[str], path: Path
) -> tuple[str, ...]:
    """What has no place and needs none, by kind; a ValueError for the rest."""
    predicting = {m[1] for key in found.unused if (m := _PREDICTS.match(key))}
    kinds: dict[str, list[str]] = {}
    senses = of_senses(model, found)
    for key, target in found.unused.items():
        if _MTP.search(key) or key.startswith(tuple(predicting)):
            kind = "layers that predict several tokens at once"
        elif _ACTIVATIONS.search(key):
            kind = "scales of activations and of the attention's cache"
        elif key in senses:
            kind = "parts for pictures and sound, which no text uses"
        else:
            kind = "" if target in unexpected else "what transformers leaves out too"
        kinds.setdefault(kind, []).append(key)
    strange = kinds.pop("", [])
    if strange:
        layers = dict.fromkeys(re.findall(r"\.layers\.(\d+)\.", "\n".join(strange)))
        where = f" in layers {', '.join(layers)}" if layers else ""
        raise ValueError(
            f"{path} holds {len(strange)} tensors{where} that its config.json has no place for: "
            f"{', '.join(strange[:3])[:300]}; {type(model).__name__} would run without them. Give "
            "the config.json that belongs to the weights, or remove them"
        )
    return tuple(
        f"ignored: {kind} ({len(keys)} tensors, first {keys[0][:100]})"
        for kind, keys in kinds.items()
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
