"""Read safetensors checkpoints: one tensor, one row of a fused tensor, one expert at a time.

`Checkpoint` knows which shard holds which tensor and reads plain byte ranges: no mmap, whose
pages count as resident memory, and not safetensors' own "pread" backend, which reads a whole fused
tensor when one row of it is asked for. `ExpertReader` turns shards into experts in the layout
of the model's own module, by running transformers' weight converters on one expert instead of on
all. What it does not know: quantised formats other than mxfp4 and block-wise fp8.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moelab.engine.families import MoELayer, expert_parameter, find_moe

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
QUANTISED = ("mxfp4", "fp8")  # quant_method values whose experts can be read
SCALE = "_scale_inv"  # fp8: one scale per block beside each weight
_HEADER_LIMIT = 100 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its shard, type name, shape and byte range."""

    shard: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class LazyTensor:
    """A tensor that is read when it is indexed, as transformers' loader expects of a slice."""

    def __init__(self, checkpoint: "Checkpoint", key: str) -> None:
        self._checkpoint, self._key = checkpoint, key
        self.shape = torch.Size(checkpoint.info[key].shape)

    def get_shape(self) -> list[int]:
        """Shape as a list, the safetensors way."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Type name, the safetensors way ("BF16")."""
        return self._checkpoint.info[self._key].dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._checkpoint.weight(self._key)[index]


class Checkpoint:
    """The safetensors files of a folder as one mapping from tensor name to bytes.

    Any number of threads may read at once: each read opens the file for itself.

    Parameters
    ----------
    path
        Folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises
    ------
    ValueError
        No safetensors file (pickled weights are refused: loading one can run code), or a shard
        that is missing, truncated or not safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = _shards(self.path)
        self.info: dict[str, TensorInfo] = {}
        for number, file in enumerate(self.files):
            self.info |= _read_header(file, number)
        self._block = _block_size(self.path / "config.json")

    def __contains__(self, key: str) -> bool:
        return key in self.info

    def names(self) -> list[str]:
        """All tensor names, layers and experts in numerical order."""
        return sorted(self.info, key=dot_natural_key)

    def tensor(self, key: str) -> torch.Tensor:
        """Read one whole tensor."""
        info = self.info[key]
        return self._read(info, info.start, info.stop, info.shape)

    def weight(self, key: str) -> torch.Tensor:
        """Read one whole tensor, in bfloat16 if it is fp8 with scales beside it."""
        if key + SCALE not in self.info:
            return self.tensor(key)
        return _dequantise_fp8(self.tensor(key), self.tensor(key + SCALE), self._block)

    def row(self, key: str, index: int) -> torch.Tensor:
        """Read `tensor[index : index + 1]` of a tensor that holds all experts of a layer."""
        info = self.info[key]
        size = (info.stop - info.start) // info.shape[0]
        start = info.start + index * size
        return self._read(info, start, start + size, (1, *info.shape[1:]))

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the raw bytes of one tensor in pieces of at most 1 MiB."""
        info = self.info[key]
        for start in range(info.start, info.stop, _CHUNK):
            stop = min(start + _CHUNK, info.stop)
            buffer = np.empty(stop - start, dtype=np.uint8)
            self._fill(info.shard, buffer, start)
            yield buffer.tobytes()

    def _read(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        buffer = np.empty(stop - start, dtype=np.uint8)
        self._fill(info.shard, buffer, start)
        return torch.from_numpy(buffer).view(DTYPES[info.dtype]).reshape(shape)

    def _fill(self, shard: int, buffer: np.ndarray, offset: int) -> None:
        view, done = memoryview(buffer), 0
        with self.files[shard].open("rb", buffering=0) as stream:
            stream.seek(offset)
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise ValueError(
                        f"{self.files[shard]} ends at byte {offset + done}, {len(view) - done} "
                        "bytes too early: the file is truncated; download it again"
                    )
                done += got


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where there is one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [n for n in names if Path(n).name != n or not (path / n).is_file()]
        if missing:
            raise ValueError(
                f"{index} names {missing[0]!r}, which is not a file in {path} "
                f"({len(missing)} of {len(names)} shards missing); finish the download"
            )
        return [path / n for n in names]
    files = sorted(path.glob("*.safetensors"))
    if (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    if files:
        return files
    pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickled:
        raise ValueError(
            f"{path} holds pickled weights only ({pickled[0].name}), and loading a pickle can run "
            "code; convert it once where you trust it with model.save_pretrained(folder), which "
            "writes safetensors, and give that folder"
        )
    raise ValueError(f"{path} holds no *.safetensors file; give the folder of a checkpoint")


def _block_size(config: Path) -> tuple[int, int]:
    """Rows and columns that share one fp8 scale."""
    data = json.loads(config.read_text()) if config.is_file() else {}
    block = (data.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    return int(block[0]), int(block[1])


def _read_header(file: Path, shard: int) -> dict[str, TensorInfo]:
    """Parse one safetensors header and hold it against the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{file} is not a safetensors file or is truncated; download it again")
        try:
            entries = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} has an unreadable safetensors header: {error}") from error
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name} has type {entry['dtype']}; moelab reads {', '.join(DTYPES)}"
            )
        if not 0 <= start <= stop <= size:
            raise ValueError(
                f"{file} has {size} bytes but {name} ends at byte {stop}: the file is truncated; "
                "download it again"
            )
        found[name] = TensorInfo(shard, entry["dtype"], tuple(entry["shape"]), start, stop)
    return found


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
    """A checkpoint's tensors, told apart: experts, everything else the model uses, and neither."""

    experts: dict[int, dict[str, Source]]
    rest: tuple[str, ...]
    unused: tuple[str, ...]


def split(model: nn.Module, checkpoint: Checkpoint) -> Split:
    """Tell the experts' tensors from the others by the names transformers gives them.

    Parameters
    ----------
    model
        The model, its weights possibly on the meta device.
    checkpoint
        The checkpoint; the non-expert half of a store gives an empty `experts`.
    """
    layers = find_moe(model)
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
    rest, unused = [], []
    for key in checkpoint.names():
        target, pattern = rename(key.removesuffix(SCALE))
        place = expert_parameter(re.sub(r"_(blocks|scales)$", "", target), layers)
        if place is None:
            (rest if target in state else unused).append(key)
        elif not key.endswith(SCALE):
            layer, parameter = place
            converter = by_pattern.get(pattern) if pattern is not None else None
            source = experts.setdefault(layer.index, {}).setdefault(
                parameter, Source(f"{layer.name}.{parameter}", converter)
            )
            group = pattern or target.rpartition(".")[2]
            source.groups.setdefault(group, {})[_expert_number(key)] = key
    return Split(experts, tuple(rest), tuple(unused))


def _expert_number(key: str) -> int | None:
    match = re.search(r"expert(?:s\.expert)?s?[._](\d+)[._]", key)
    return int(match[1]) if match else None


class _OneExpert:
    """The model as converters see it that ask for the shape of their target."""

    def __init__(self, model: nn.Module) -> None:
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

    Raises
    ------
    ValueError
        The checkpoint misses an expert that the model has, or holds none at all.
    """

    def __init__(self, model: nn.Module, path: str | os.PathLike[str]) -> None:
        self.checkpoint = Checkpoint(path)
        self.layers = find_moe(model)
        self._model = _OneExpert(model)
        self._plan = split(model, self.checkpoint).experts
        for layer in self.layers:
            self._check(layer)

    def __call__(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Read one expert: its tensors by name."""
        found = {
            name: self._parameter(source, name, expert)
            for name, source in self._plan[layer].items()
        }
        return {name: found[name].contiguous() for name, _ in self.layers[layer].tensors}

    def dtype(self, layer: int) -> torch.dtype:
        """The type of a layer's expert weights as the reader gives them."""
        source = next(iter(self._plan[layer].values()))
        key = next(iter(next(iter(source.groups.values())).values()))
        stored = DTYPES[self.checkpoint.info[key].dtype]
        plain = (torch.float16, torch.float32, torch.float64)
        return stored if stored in plain else torch.bfloat16

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
        for source in plan.values():
            for pattern, keys in source.groups.items():
                missing = set() if None in keys else set(range(layer.num_experts)) - set(keys)
                if missing:
                    raise ValueError(
                        f"{self.checkpoint.path}: layer {layer.index} expert {min(missing)} has no "
                        f"{pattern!r}; the checkpoint is incomplete, download it again"
                    )

    def _parameter(self, source: Source, name: str, expert: int) -> torch.Tensor:
        pieces = {p: self._piece(keys, expert) for p, keys in source.groups.items()}
        if f"{name}_blocks" in pieces:
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            return convert_moe_packed_tensors(pieces[f"{name}_blocks"], pieces[f"{name}_scales"])[0]
        fused = None in next(iter(source.groups.values()))
        if source.converter is None:
            piece = next(iter(pieces.values()))
            return piece[0] if fused else piece
        converter = copy.deepcopy(source.converter)  # transformers' own operations, on one expert
        for pattern, piece in pieces.items():
            converter.add_tensor(source.target, "", pattern, piece)
        done = converter.convert(source.target, model=self._model, config=self._model.config)
        result = done[source.target]
        return (result[0] if isinstance(result, list) else result)[0]

    def _piece(self, keys: dict[int | None, str], expert: int) -> torch.Tensor:
        if None in keys:
            return self.checkpoint.row(keys[None], expert)
        return self.checkpoint.weight(keys[expert])


def _dequantise_fp8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """One scale per block; the last block of a row or column may be smaller."""
    e8m0 = scale.dtype == torch.uint8  # bare exponents
    factor = torch.exp2(scale.float() - 127) if e8m0 else scale.float()
    if factor.numel() == 1:
        return (weight.float() * factor.reshape(())).to(torch.bfloat16)
    rows, columns = weight.shape
    grid = tuple(factor.shape)
    if grid != (-(-rows // block[0]), -(-columns // block[1])):
        if rows % grid[0] or columns % grid[1]:
            raise ValueError(
                f"fp8 weight {rows} x {columns} has a {grid[0]} x {grid[1]} grid of scales, which "
                f"is not one per block of {block[0]} x {block[1]}; give the unquantised checkpoint"
            )
        block = rows // grid[0], columns // grid[1]
    spread = factor.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight.float() * spread[:rows, :columns]).to(torch.bfloat16)
