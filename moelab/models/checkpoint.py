"""Experts of a checkpoint, one at a time, in the layout of the model's own module.

`split` tells a checkpoint's expert tensors from the others by the names transformers gives them;
`ExpertReader` runs transformers' own weight converters on one expert instead of on all. What it
does not know: quantised formats other than mxfp4 and block-wise fp8, and how tensors lie in files
(`shards`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from moelab.models.families import MoELayer, expert_parameter, find_moe
from moelab.models.gguf_file import GgufCheckpoint
from moelab.models.shards import DTYPES, GGUF, SCALE, Checkpoint

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

QUANTISED = ("mxfp4", "fp8")  # quant_method values whose experts can be read


@dataclass
class Source:
    """The checkpoint tensors that make one parameter of one layer's experts.

    `groups` maps a converter's source pattern to {expert: tensor name}; the expert is None where
    one tensor holds all experts.
    """

    target: str
    converter: WeightConverter | None
    groups: dict[str, dict[int | None, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """A checkpoint's tensors, told apart: experts, everything else the model uses, and neither.

    `rest` maps a tensor's name to the model's name for the weight it becomes, or is a part of.
    """

    experts: dict[int, dict[str, Source]]
    rest: dict[str, str]
    unused: dict[str, str]  # to the name in the model that transformers would look for

    @property
    def expert_keys(self) -> list[str]:
        """Names of all tensors that belong to experts, but for their scales."""
        sources = chain.from_iterable(plan.values() for plan in self.experts.values())
        groups = chain.from_iterable(source.groups.values() for source in sources)
        return list(chain.from_iterable(group.values() for group in groups))


def split(model: PreTrainedModel, layers: Sequence[MoELayer], checkpoint: Checkpoint) -> Split:
    """Tell the experts' tensors from the others by the names transformers gives them.

    Parameters
    ----------
    model
        The model, its weights possibly on the meta device.
    layers
        What `find_moe` found in it.
    checkpoint
        The checkpoint; the non-expert half of a store gives an empty `experts`.
    """
    state = model.state_dict()
    maps = get_model_conversion_mapping(model)
    renamings = [m for m in maps if isinstance(m, WeightRenaming)]
    converters = [m for m in maps if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix

    def rename(key: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        return target, pattern

    experts: dict[int, dict[str, Source]] = {}
    rest: dict[str, str] = {}
    unused: dict[str, str] = {}
    for key in checkpoint.names():
        weight = key.removesuffix(SCALE)
        target, pattern = rename(weight)
        place = expert_parameter(re.sub(r"_(blocks|scales)$", "", target), layers)
        if weight not in checkpoint.info or (place is None and target not in state):
            unused[key] = target
        elif place is None:
            rest[key] = target
        elif key == weight:  # its scale is read along with it
            layer, parameter = place
            converter = by_pattern.get(pattern) if pattern is not None else None
            number, targets = _expert_number(key), converter.target_patterns if converter else []
            if len(targets) == 2 and (number or 0) >= layer.num_experts:  # ERNIE's, of pictures
                of_text, of_pictures = targets
                unused[key] = target.replace(of_text, of_pictures)
                continue
            source = experts.setdefault(layer.index, {}).setdefault(
                parameter, Source(f"{layer.name}.{parameter}", converter)
            )
            group = pattern or target.rpartition(".")[2]
            source.groups.setdefault(group, {})[number] = key
    return Split(experts, rest, unused)


def _expert_number(key: str) -> int | None:
    match = re.search(r"expert(?:s\.expert)?s?[._](\d+)[._]", key)
    return int(match[1]) if match else None


class _OneExpert:
    """The model as converters see it that ask for the shape of their target."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        """One expert's share of a parameter [E, ...]."""
        return self._model.get_parameter(name)[:1]


class ExpertReader:
    """Experts straight from the shards of a checkpoint, in the layout of the model's own module.

    `reader(layer, expert)` gives {name: tensor} with the names and shapes of `MoELayer.tensors`
    (`gate_up_proj` [2F, D] and `down_proj` [D, F] in most families) and the checkpoint's own dtype;
    mxfp4 and fp8 come as bfloat16. Threads may call it at once.

    Parameters
    ----------
    model
        What `load_skeleton` gave.
    path
        Checkpoint folder.
    checkpoint
        Its files, where they are not in the folder.

    Attributes
    ----------
    checkpoint, layers
        The files, and the model's MoE layers.
    found
        Which tensors are experts', which the model uses besides, and which it does not.

    Raises
    ------
    ValueError
        The checkpoint misses an expert that the model has, or holds none at all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str | os.PathLike[str],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        folder = Path(path)
        kind = GgufCheckpoint if (folder / GGUF).is_file() else Checkpoint
        self.checkpoint, self.layers = checkpoint or kind(folder), find_moe(model)
        self._model = _OneExpert(model)
        found = split(model, self.layers, self.checkpoint)
        self.found, self._plan = found, found.experts
        for layer in self.layers:
            self._check(layer)

    def __call__(self, layer: int, expert: int, *, raw: bool = False) -> dict[str, torch.Tensor]:
        """Read one expert: its tensors by name; ``raw``: blocks as bytes, see `Checkpoint.raw`."""
        found = {
            name: self._parameter(source, name, expert, raw)
            for name, source in self._plan[layer].items()
        }
        return {name: found[name].contiguous() for name, _ in self.layers[layer].tensors}

    def shards(self, layer: int, expert: int) -> set[int]:
        """Which shards hold the tensors of one expert."""
        groups = [g for source in self._plan[layer].values() for g in source.groups.values()]
        keys = [group.get(None) or group[expert] for group in groups]
        info = self.checkpoint.info
        return {info[k].shard for key in keys for k in (key, key + SCALE) if k in info}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types of the expert weights, over all layers, as the reader gives them."""
        stored = {DTYPES[self.checkpoint.info[key].dtype] for key in self.found.expert_keys}
        plain = {torch.float16, torch.float32, torch.float64}
        return {kind if kind in plain else torch.bfloat16 for kind in stored}

    def _check(self, layer: MoELayer) -> None:
        """Every expert of a layer must be there before anything is promised."""
        plan = self._plan.get(layer.index, {})
        wanted = {name for name, _ in layer.tensors}
        if not plan:
            raise ValueError(
                f"{self.checkpoint.path} holds no expert of layer {layer.index} ({layer.name}); "
                "give the original checkpoint, not the model/ folder of a store"
            )
        if wanted != set(plan):
            raise ValueError(
                f"{self.checkpoint.path}: layer {layer.index} ({layer.name}) has "
                f"{', '.join(sorted(plan))}, the model needs {', '.join(sorted(wanted))}"
            )
        for name, source in plan.items():
            self._check_groups(layer, name, source)

    def _check_groups(self, layer: MoELayer, name: str, source: Source) -> None:
        """All that makes a parameter is there, for just as many experts as the model has."""
        path, where = self.checkpoint.path, f"layer {layer.index}"
        got, needed = source.groups.keys(), {f"{name}_blocks", f"{name}_scales"}  # mxfp4
        if source.converter is not None:
            needed = set(source.converter.source_patterns)
        elif not needed & got:
            needed = set(list(got)[:1])
        if got != needed:
            raise ValueError(
                f"{path}: {where} brings {' and '.join(sorted(got))} for {name}, the model makes "
                f"it of {' and '.join(sorted(needed))}; the checkpoint is incomplete or of another "
                "architecture"
            )
        for pattern, keys in source.groups.items():
            count = layer.num_experts
            if None in keys:
                found = set(range(self.checkpoint.info[keys[None]].shape[0]))
            else:
                found = {expert for expert in keys if expert is not None}
            if missing := set(range(count)) - found:
                raise ValueError(
                    f"{path}: {where} expert {min(missing)} has no {pattern!r}; the checkpoint is "
                    "incomplete, download it again"
                )
            # transformers writes rows for experts without weights, which nothing reads.
            if more := found - set(range(count + layer.free)):
                raise ValueError(
                    f"{path}: {where} holds an expert {max(more)}, its config.json says "
                    f"{count} experts; give the config.json that belongs to the weights"
                )

    @property
    def stored(self) -> set[str]:
        """The types of the expert matrices in the files."""
        matrices = {name for name, shape in self.layers[0].tensors if len(shape) > 1}
        sources = (s for plan in self._plan.values() for n, s in plan.items() if n in matrices)
        groups = chain.from_iterable(source.groups.values() for source in sources)
        return {self.checkpoint.info[key].stored for group in groups for key in group.values()}

    def _parameter(self, source: Source, name: str, expert: int, raw: bool) -> torch.Tensor:
        pieces = {p: self._piece(keys, expert, raw) for p, keys in source.groups.items()}
        if f"{name}_blocks" in pieces:
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            return convert_moe_packed_tensors(pieces[f"{name}_blocks"], pieces[f"{name}_scales"])[0]
        fused = None in next(iter(source.groups.values()))
        if source.converter is None:
            piece = next(iter(pieces.values()))
            return piece[0] if fused else piece
        # transformers' own operations, on one expert; a converter keeps what it was given
        converter: Any = copy.deepcopy(source.converter)
        del converter.target_patterns[1:]
        for pattern, piece in pieces.items():
            converter.add_tensor(source.target, "", pattern, piece)
        done = converter.convert(source.target, model=self._model, config=self._model.config)
        result = done[source.target]
        return (result[0] if isinstance(result, list) else result)[0]

    def _piece(self, keys: dict[int | None, str], expert: int, raw: bool) -> torch.Tensor:
        if None in keys:
            return self.checkpoint.row(keys[None], expert, raw=raw)
        return (self.checkpoint.raw if raw else self.checkpoint.weight)(keys[expert])
