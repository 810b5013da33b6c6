"""The safetensors files of a checkpoint: any tensor, or one row of it, by its byte range.

Plain reads: no mmap, whose pages count as resident memory, and not safetensors' own "pread"
backend, which reads a whole fused tensor when one row of it is asked for. What it does not know:
which tensor is an expert's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import dot_natural_key

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
GGUF = "gguf.json"
"""In a checkpoint's folder: its weights are those of a GGUF file, see `moelab.models.gguf_file`."""
FP8 = ("F8_E4M3", "F8_E5M2")
SCALE = "_scale_inv"  # fp8: one scale per block beside each weight
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its shard, type name, shape and byte range."""

    shard: int
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.stop - self.start

    @property
    def stored(self) -> str:
        """Its type in the file."""
        return self.dtype


class LazyTensor:
    """A tensor that is read when it is indexed, as transformers' loader expects of a slice."""

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
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

    Attributes
    ----------
    files, info
        The shards, and where each tensor lies.
    checksums
        Of files whose checksum is known without reading them.
    remote, resumes
        Whether shards lie elsewhere until they are fetched; whether a half-made store is kept.

    Raises
    ------
    ValueError
        No safetensors file (pickled weights are refused: loading one can run code), or a shard
        that is missing, truncated or not safetensors.
    """

    checksums: Mapping[str, str] = {}
    remote = resumes = False
    random = False
    """Whether nobody trained them: what is missing is filled in."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = weight_files(self.path)
        self.info: dict[str, TensorInfo] = {}
        for number, file in enumerate(self.files):
            self.info |= read_header(file, number)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each shard."""
        return [file.stat().st_size for file in self.files]

    def fetch(self, shards: Iterable[int]) -> None:
        """Have these shards here; those of a folder are."""

    def free(self, shards: Iterable[int]) -> None:
        """Give up what `fetch` fetched of these; a folder's own stay."""

    @cached_property
    def quantisation(self) -> dict[str, Any]:
        """What `config.json` says of the weights' quantisation; empty where it says nothing."""
        config = self.path / "config.json"
        data = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        return data.get("quantization_config") or {}

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
        return self._scaled(self.tensor(key), self.tensor(key + SCALE))

    def raw(self, key: str) -> torch.Tensor:
        """Read one whole tensor; blocks stay as the file has them, uint8, row by row."""
        return self.tensor(key)

    def row(self, key: str, index: int, *, raw: bool = False) -> torch.Tensor:
        """Read `weight[index : index + 1]` of a tensor that holds all experts of a layer."""
        piece = self.rows(key, index, index + 1)
        scales = self.info.get(key + SCALE)
        if scales is None:
            return piece
        each = scales.shape[:1] == self.info[key].shape[:1]
        scale = self.rows(key + SCALE, index, index + 1)[0] if each else self.tensor(key + SCALE)
        return self._scaled(piece[0], scale)[None]

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Read `weight[first:last]` as it is stored."""
        info = self.info[key]
        size = info.nbytes // info.shape[0]
        last = min(last, info.shape[0])
        start, stop = info.start + first * size, info.start + last * size
        return self._read(info, start, stop, (last - first, *info.shape[1:]))

    def _scaled(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows, columns = self.quantisation.get("weight_block_size") or (128, 128)
        return _dequantise_fp8(weight, scale, (rows, columns))

    def chunks(self, key: str) -> Iterator[np.ndarray]:
        """Yield the bytes of one tensor, uint8, in pieces of at most 1 MiB."""
        info = self.info[key]
        for start in range(info.start, info.stop, _CHUNK):
            stop = min(start + _CHUNK, info.stop)
            buffer = np.empty(stop - start, dtype=np.uint8)
            self._fill(info.shard, buffer, start)
            yield buffer

    def _read(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        buffer = np.empty(stop - start, dtype=np.uint8)
        self._fill(info.shard, buffer, start)
        return torch.from_numpy(buffer).view(DTYPES[info.dtype]).reshape(shape)

    def _fill(self, shard: int, buffer: np.ndarray, offset: int) -> None:
        view, done = buffer.data, 0
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


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that transformers would load of a folder, in its order.

    Raises
    ------
    ValueError
        There is none, or the index is damaged or names what is not there.
    """
    if (path / GGUF).is_file():
        return [Path(file) for file in json.loads((path / GGUF).read_text("utf-8"))["files"]]
    if (path / "model.safetensors").is_file():  # before the index, which may be of older shards
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    files = sorted(path.glob("*.safetensors"))
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


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        missing = [n for n in names if Path(n).name != n or not (index.parent / n).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged: it has no readable weight_map ({error}); download it again"
        ) from error
    if missing:
        raise ValueError(
            f"{index} names {missing[0]!r}, which is not a file in {index.parent} "
            f"({len(missing)} of {len(names)} shards missing); finish the download"
        )
    return [index.parent / n for n in names]


def read_header(file: Path, shard: int) -> dict[str, TensorInfo]:
    """Where a file's tensors lie; safetensors itself holds the header against the file first."""
    try:
        with safe_open(file, "np"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({error}); download it again"
        ) from error
    entries.pop("__metadata__", None)
    return place(file, entries, shard, 8 + length)


def place(
    file: Path, entries: Mapping[str, Any], shard: int, begin: int = 0
) -> dict[str, TensorInfo]:
    """Where the tensors of a header lie in a file whose data begins at ``begin``."""
    found = {}
    for name, entry in entries.items():
        start, stop = (begin + offset for offset in entry["data_offsets"])
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name} has type {entry['dtype']}; moelab reads {', '.join(DTYPES)}"
            )
        found[name] = TensorInfo(shard, entry["dtype"], tuple(entry["shape"]), start, stop)
    return found


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
