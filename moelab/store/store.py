"""A packed model on disk: where every expert of every tier lies, and whether it is still intact.

    DEST/manifest.json       what is in the store, with checksums
    DEST/experts-{bits}.bin  one page that names store and tier, then every expert, layer by layer
    DEST/model/              configuration, tokenizer and the weights that are not experts'

All experts of a tier have one size, a multiple of 4096 bytes, so an expert's place is arithmetic
and every read is aligned for O_DIRECT. Opening checks the manifest, every file's size and first
page, and the small files' checksums; `verify` reads everything. A store may come from anybody: that
its checksums are right says that it is whole, not that it makes sense (`check_model`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from moelab.models.chat import load_tokenizer
from moelab.models.families import MoELayer
from moelab.models.recorded import Recorded
from moelab.models.shards import Checkpoint
from moelab.scheduling.stream import Shape
from moelab.store.blobs import BlobFile
from moelab.store.codecs import PAGE, Layout
from moelab.store.manifest import (
    MODEL,
    NAME,
    StoreError,
    digest,
    digest_file,
    experts_file,
    identity,
    of_model,
    read_manifest,
    refuse_link,
    shortened,
)

__all__ = ["Store", "StoreError"]

_LARGEST = 1 << 28  # of what libraries read whole: configuration, tokenizer
_SMALL = 1 << 20  # files up to this size are checked against their checksum when opening


class Store:
    """An opened store; make one with `moelab.pack`, open it with `Store.open`.

    Reading is safe from any number of threads.

    Attributes
    ----------
    path
        The store's folder.
    manifest
        What it holds.
    files
        {bits: the tier's file}, held open: reads are of the files that were checked, whatever
        becomes of their names.
    routing
        What takes the place of the routers' choice: only a ghost has it.
    """

    routing: Recorded | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest, self._identity = read_manifest(path)
        self.files: dict[int, BlobFile] = {}
        self._first = (0, *accumulate(self.manifest.experts_per_layer))
        self._slots = self.manifest.slot_bytes

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Store:
        """Open a store and check what can be checked at once.

        Parameters
        ----------
        path
            The store's folder.
        verify
            Also read every byte and hold it against the checksums.

        Raises
        ------
        StoreError
            Not a store, or one with a truncated, edited, missing or foreign file; names the file
            and, where `verify` finds it, layer and expert.

        Examples
        --------
        >>> store = Store.open("stores/demo")  # doctest: +SKIP
        >>> store.read(layer=0, expert=3, bits=4).nbytes == store.slot_bytes[4]  # doctest: +SKIP
        True
        """
        store = cls(Path(path).expanduser().absolute())  # wherever the process works later
        store._check_files()
        if verify:
            store.verify()
        return store

    @property
    def tiers(self) -> tuple[int, ...]:
        """Bits of the stored tiers, highest first."""
        return self.manifest.tiers

    @property
    def layout(self) -> Layout:
        """The tensors of one expert."""
        return self.manifest.layout

    @property
    def slot_bytes(self) -> dict[int, int]:
        """Bytes of one expert at each tier: on disk, in memory and in the budget."""
        return dict(self._slots)

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.manifest.layer_names)

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return self.manifest.experts_per_layer

    @property
    def top_k(self) -> int:
        """Experts that a router activates per token."""
        return self.manifest.top_k

    @property
    def shape(self) -> Shape:
        """What a scheduler must know of it."""
        own = self.manifest
        return Shape(own.experts_per_layer, own.top_k, self.slot_bytes, own.encoder_layers)

    @property
    def checked_file(self) -> Path:
        """What tells this store from another one that took its name."""
        return self.path / NAME

    def weights(self, bits: int = 16) -> Checkpoint:
        """Dense weights, to be kept at ``bits``."""
        return Checkpoint(self.checkpoint_dir)

    def tokenizer(self) -> Any:
        """The model's own."""
        return load_tokenizer(self.checkpoint_dir)

    def require_weights(self, what: str) -> None:
        """Refuse what only a trained model can answer, where this is none."""

    @property
    def checkpoint_dir(self) -> Path:
        """Folder with configuration, tokenizer and non-expert weights, for `load_skeleton`."""
        return self.path / MODEL

    def location(self, layer: int, expert: int, bits: int) -> tuple[Path, int, int]:
        """Where one expert lies: file, offset and length, both multiples of 4096.

        Raises
        ------
        StoreError
            There is no such layer, expert or tier.
        """
        if bits not in self._slots:
            raise StoreError(f"{self.path} has no {bits}-bit tier; it has {self.tiers}")
        if not 0 <= layer < self.num_layers:
            raise StoreError(f"{self.path} has no layer {layer}; it has 0 to {self.num_layers - 1}")
        if not 0 <= expert < self.experts_per_layer[layer]:
            raise StoreError(
                f"layer {layer} of {self.path} has no expert {expert}; "
                f"it has 0 to {self.experts_per_layer[layer] - 1}"
            )
        size = self._slots[bits]
        offset = PAGE + (self._first[layer] + expert) * size
        return self.path / experts_file(bits), offset, size

    def coded(self, layer: int, expert: int, bits: int) -> int:
        """What the bytes of an expert at a tier are: its bits (`moelab.store.mixed` has others)."""
        return bits

    def read(
        self, layer: int, expert: int, bits: int, *, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Read one expert as uint8 through the page cache, ``into`` memory of its size if given.

        Raises
        ------
        StoreError
            There is no such expert, or its file was cut short or written to; names the file.
        """
        path, offset, size = self.location(layer, expert, bits)
        blob = np.empty(size, np.uint8) if into is None else into
        try:
            self.files[bits].read_into(blob, offset)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read at layer {layer} expert {expert}: {error.strerror}; open "
                "the store again, or pack the model again"
            ) from error
        return blob

    def check_model(self, model: Any, layers: Sequence[MoELayer]) -> None:
        """Hold the manifest against the model that the store's config.json makes.

        Raises
        ------
        StoreError
            They differ: sizes that become addresses would not be those of the experts.
        """
        for name, made in of_model(model, layers).items():
            found = self.layout.tensors if name == "tensors" else getattr(self.manifest, name)
            if found != made:
                raise StoreError(
                    f"{self.path / NAME} says {name}={shortened(found)}, its model/config.json "
                    f"makes {shortened(made)}; pack the model again"
                )

    def check_in_place(self) -> None:
        """Refuse to go on where another store has taken this one's name.

        Raises
        ------
        StoreError
            What would be read by name is not what was opened.
        """
        if identity(self.checked_file) != self._identity:
            raise StoreError(
                f"{self.path} was replaced or removed since it was opened; close the lab and open "
                "it again"
            )

    def verify(self, *, progress: bool = False) -> None:
        """Read every byte and hold it against the manifest.

        Raises
        ------
        StoreError
            Names the first file that differs, with layer and expert where it holds experts.
        """
        total = len(self.tiers) * self._first[-1]
        with tqdm(total=total, desc="verifying", unit="expert", disable=not progress) as bar:
            for bits in self.tiers:
                self._verify_tier(bits, bar)
        for name, (_, checksum) in self.manifest.files.items():
            if checksum:
                self._check_sum(name, checksum)

    def _verify_tier(self, bits: int, bar: tqdm) -> None:
        sums = self.manifest.checksums[bits]
        for layer, count in enumerate(self.experts_per_layer):
            for expert in range(count):
                found = digest(self.read(layer, expert, bits).data)
                if found != sums[self._first[layer] + expert]:
                    raise StoreError(
                        f"{self.path / experts_file(bits)} is damaged or edited: layer {layer} "
                        f"expert {expert} at {bits} bit differs from its checksum; "
                        "pack the model again"
                    )
                bar.update()

    def _check_files(self) -> None:
        for name, (size, checksum) in self.manifest.files.items():
            file = self.path / name
            refuse_link(self.path, name)
            if not file.is_file():
                raise StoreError(f"{file} is missing; pack the model again")
            found = file.stat().st_size
            if found != size:
                word = "truncated" if found < size else "longer than it was"
                raise StoreError(
                    f"{file} is {word}: {found} bytes, the manifest says {size}; "
                    "pack the model again"
                )
            if size > _LARGEST and not name.endswith((".bin", ".safetensors")):
                raise StoreError(f"{file} has {size} bytes, more than a file of its kind needs")
            if checksum and size <= _SMALL:
                self._check_sum(name, checksum)
        for bits in self.tiers:
            self._check_header(bits)
        self._refuse_unknown_files()

    def _check_header(self, bits: int) -> None:
        path, page = self.path / experts_file(bits), np.empty(PAGE, np.uint8)
        try:
            self.files[bits] = file = BlobFile(path)
            file.read_into(page, 0)
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); pack again") from error
        if page.tobytes() != self.manifest.header(bits):
            raise StoreError(
                f"{path} is not this store's {bits}-bit file: its first page names another "
                "store or tier; put the right file back or pack again"
            )
        if file.nbytes != self.manifest.files[path.name][0]:
            raise StoreError(f"{path} was replaced while it was opened; open the store again")

    def _check_sum(self, name: str, checksum: str) -> None:
        if digest_file(self.path / name) != checksum:
            raise StoreError(
                f"{self.path / name} is damaged or edited: it differs from its checksum; "
                "pack the model again"
            )

    def _refuse_unknown_files(self) -> None:
        """A file that packing did not write could change what is loaded."""
        known = set(self.manifest.files)
        for file in sorted(self.checkpoint_dir.iterdir()):
            if f"{MODEL}/{file.name}" not in known:
                raise StoreError(f"{file} does not belong to the store; remove it or pack again")
