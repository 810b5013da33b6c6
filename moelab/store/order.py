"""In which order a checkpoint is packed, what that takes, and how far it has come.

All shards of a folder are there at once: one step. Those of a hub come one by one: a step packs
what has all its tensors by then, and frees the shards that no later step needs. Of a GGUF file a
step packs a layer. A half-made store has a journal of the steps that are done.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch

from moelab.models.checkpoint import ExpertReader
from moelab.models.shards import DTYPES, SCALE, Checkpoint
from moelab.scheduling.budget import size
from moelab.store.destination import sync
from moelab.store.manifest import Manifest, StoreError

JOURNAL = "journal.json"


@dataclass(frozen=True)
class Step:
    """Shards to have, what is packed of them, and which are not needed afterwards."""

    shards: tuple[int, ...]
    rest: tuple[str, ...]
    experts: tuple[tuple[int, int], ...]
    free: tuple[int, ...]


def steps(reader: ExpertReader) -> list[Step]:
    """The steps of a checkpoint; a shard that holds nothing the model uses is in none."""
    remote, info = reader.checkpoint.remote, reader.checkpoint.info
    of_layer = {
        layer.index: [(layer.index, e) for e in range(layer.num_experts)] for layer in reader.layers
    }
    if not remote and reader.checkpoint.resumes:
        first_of_all = next(iter(of_layer))
        return [
            Step((), tuple(reader.found.rest) if layer == first_of_all else (), tuple(keys), ())
            for layer, keys in of_layer.items()
        ]
    rest = ((key, {info[key].shard}) for key in reader.found.rest)
    experts = ((key, reader.shards(*key)) for key in chain(*of_layer.values()))
    first, last, ready = {}, {}, {}
    for what, shards in chain(rest, experts):
        at = max(shards) if remote else 0
        ready.setdefault(at, []).append(what)
        for shard in shards:
            first[shard] = shard if remote else 0
            last[shard] = max(last.get(shard, 0), at)
    return [
        Step(
            tuple(s for s in sorted(first) if first[s] <= at <= last[s]),
            tuple(what for what in ready.get(at, ()) if isinstance(what, str)),
            tuple(what for what in ready.get(at, ()) if isinstance(what, tuple)),
            tuple(s for s in sorted(last) if last[s] == at),
        )
        for at in sorted(set(first.values()))
    ]


@dataclass(frozen=True)
class Sizes:
    """What packing a checkpoint takes, known from its headers alone.

    Attributes
    ----------
    source
        Name of the checkpoint.
    fetch_bytes, fetch_files
        To be fetched; 0 where all of it is here.
    store_bytes, shard_bytes
        On the disk: the finished store, and the most that fetched shards take at once.
    dense_bytes
        In memory: what is no expert, 2 bytes a weight that has 16 bits and 4 of any other type.
    expert_bytes
        {bits: bytes of one expert}, on the disk, in memory and in the budget.
    experts, top_k
        How many there are in all, and how many of one layer a token needs at once.
    """

    source: str
    fetch_bytes: int
    fetch_files: int
    store_bytes: int
    shard_bytes: int
    dense_bytes: int
    expert_bytes: dict[int, int]
    experts: int
    top_k: int

    @classmethod
    def of(cls, manifest: Manifest, reader: ExpertReader, order: Sequence[Step]) -> Sizes:
        """Of a checkpoint and the steps in which it is packed."""
        checkpoint, experts = reader.checkpoint, sum(manifest.experts_per_layer)
        info = [checkpoint.info[key] for key in reader.found.rest]
        wide = [
            i for key, i in zip(reader.found.rest, info, strict=True) if not key.endswith(SCALE)
        ]
        sizes = checkpoint.sizes if checkpoint.remote else [0] * len(checkpoint.files)
        used = {shard for step in order for shard in step.shards if sizes[shard]}
        return cls(
            manifest.source,
            sum(sizes[shard] for shard in used),
            len(used),
            sum(i.nbytes for i in info) + experts * sum(manifest.slot_bytes.values()),
            max(sum(sizes[shard] for shard in step.shards) for step in order),
            sum(math.prod(i.shape) * (2 if i.dtype in ("F16", "BF16") else 4) for i in wide),
            manifest.slot_bytes,
            experts,
            manifest.top_k,
        )

    @property
    def least_bytes(self) -> int:
        """Memory of the least budget: one layer's experts of a token, at the lowest tier."""
        return self.top_k * min(self.expert_bytes.values())

    def __str__(self) -> str:
        each = ", ".join(f"{size(n)} at {b} bit" for b, n in self.expert_bytes.items())
        return (
            f"{self.source}: {size(self.fetch_bytes)} to fetch in {self.fetch_files} files. Disk: "
            f"{size(self.store_bytes)} of store and at most {size(self.shard_bytes)} of shards at "
            f"once. Memory: {size(self.dense_bytes)} of dense weights and the budget, from "
            f"{size(self.least_bytes)} to all {self.experts} experts ({each})"
        )


class Rest:
    """The file of what is no expert: every tensor has its place before the first is written."""

    def __init__(self, stream: BinaryIO, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
        self.stream, self._checkpoint, self._starts = stream, checkpoint, {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in keys:
            info = checkpoint.info[key]
            self._starts[key], end = end, end + info.nbytes
            offsets = [self._starts[key], end]
            header[key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        stream.write(len(text).to_bytes(8, "little") + text)
        self._begin = stream.tell()

    def write(self, keys: Iterable[str]) -> None:
        """Copy some tensors byte by byte.

        Raises
        ------
        StoreError
            One holds what is no finite number; a router or a norm that does answers only NaN.
        """
        for key in keys:
            kind = DTYPES[self._checkpoint.info[key].dtype]
            self.stream.seek(self._begin + self._starts[key])
            for piece in self._checkpoint.chunks(key):
                values = torch.from_numpy(piece).view(kind)
                values = values.float() if kind.itemsize == 1 else values  # fp8 has no isfinite
                if not values.isfinite().all():
                    raise StoreError(
                        f"{self._checkpoint.path}: {key} has NaN or infinite weights; repair the "
                        "checkpoint first"
                    )
                self.stream.write(piece.data)


class Journal:
    """How far a half-made store has come: steps that are done, and what is known of their experts.

    Attributes
    ----------
    done
        Steps whose experts and other weights are on the disk.
    checksums
        {bits: one for each expert, empty where it is not packed}.
    coarse
        Layers whose weights are too small for float16 scales.
    squares
        What `moelab.store.rounding.Rounding` has measured.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._file, self.done, self.coarse = folder / JOURNAL, 0, set[int]()
        self.squares: dict[int, list[float]] = {}
        empty = [""] * sum(manifest.experts_per_layer)
        self.checksums = {bits: list(empty) for bits in manifest.tiers}
        with suppress(OSError, ValueError, KeyError, TypeError):  # none, or half-written
            said = json.loads(self._file.read_text("utf-8"))
            checksums = {bits: said["checksums"][str(bits)] for bits in manifest.tiers}
            squares = {int(bits): pair for bits, pair in said["squares"].items()}
            self.done, self.coarse = said["done"], set(said["coarse"])
            self.checksums, self.squares = checksums, squares

    def commit(self, done: int, files: Iterable[Path]) -> None:
        """Enter so many steps as done once these files are on the disk."""
        for file in files:
            sync(file)
        self.done = done
        said = {"done": done, "coarse": sorted(self.coarse), "checksums": self.checksums}
        said["squares"] = self.squares
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(said), encoding="utf-8")
        written.replace(self._file)
