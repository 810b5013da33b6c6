"""A store's manifest: everything the engine needs to know without loading the model.

`manifest.json` holds the architecture, the layout of one expert, the sizes and names of all files
and a checksum of every expert at every tier; it ends with a checksum of itself. Each expert file
begins with a page that repeats the store's id and the tier, so that a file that was swapped or
comes from another store is told from its first bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from moelab.store.codecs import PAGE, TIERS, Layout, nbytes

FORMAT = 1
NAME = "manifest.json"
MODEL = "model"  # folder of the configuration, the tokenizer and the non-expert weights
_MAGIC = b"moelab experts\n\0"
OF_LAYER = (
    *("top_k", "hidden", "inner", "activation", "gating"),
    *("transposed", "has_bias", "has_post_norm"),
)
"""What a manifest says of an expert as `moelab.models.families.MoELayer` does; alike in all."""


class StoreError(ValueError):
    """A store that cannot be used or made: says which file, layer and expert, and what to do."""


_hash = partial(hashlib.blake2b, digest_size=16)


def digest(data: bytes | memoryview) -> str:
    """blake2b-128 as hex."""
    return _hash(data).hexdigest()


def digest_file(path: Path) -> str:
    """blake2b-128 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, _hash).hexdigest()


def experts_file(bits: int) -> str:
    """Name of the file that holds every expert at one tier."""
    return f"experts-{bits}.bin"


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes
    ----------
    id
        32 hex digits, made from the source's bytes and the tiers.
    architecture, model_type
        The transformers class and family.
    source, source_digest
        Folder name or hub id of the checkpoint, and blake2b-128 of its bytes.
    source_bytes
        Size of its safetensors files.
    created, transformers_version, notes
        UTC time, what packed it, and what packing changed (a float32 source, say).
    tiers
        Bits of the stored tiers, highest first.
    layout
        The tensors of one expert and the type of the 16-bit tier.
    layer_names
        Paths of the experts modules in the model; their number is the number of MoE layers.
    experts_per_layer
        E of every layer.
    top_k, hidden, inner
        K, the width of the model, the width of an expert.
    activation, gating, transposed, has_bias, has_post_norm
        What an expert computes, as in `moelab.models.families.MoELayer`.
    files
        {path inside the store: (bytes, blake2b-128 or "")}; empty where `checksums` covers it.
    checksums
        {bits: one blake2b-128 per expert, layer by layer}.
    """

    id: str
    architecture: str
    model_type: str
    source: str
    source_digest: str
    source_bytes: int
    created: str
    transformers_version: str
    notes: tuple[str, ...]
    tiers: tuple[int, ...]
    layout: Layout
    layer_names: tuple[str, ...]
    experts_per_layer: tuple[int, ...]
    top_k: int
    hidden: int
    inner: int
    activation: str
    gating: str
    transposed: bool
    has_bias: bool
    has_post_norm: bool
    files: dict[str, tuple[int, str]]
    checksums: dict[int, tuple[str, ...]]

    @property
    def slot_bytes(self) -> dict[int, int]:
        """Bytes of one expert at each tier: on disk, in memory and in the budget."""
        return {bits: nbytes(self.layout, bits) for bits in self.tiers}

    def header(self, bits: int) -> bytes:
        """The first page of an expert file."""
        head = _MAGIC + FORMAT.to_bytes(4, "little") + bits.to_bytes(4, "little")
        return (head + bytes.fromhex(self.id)).ljust(PAGE, b"\0")

    def to_json(self) -> str:
        """The text of `manifest.json`, with its own checksum."""
        data = {"format": FORMAT, **asdict(self)}
        data["checksums"] = {str(bits): list(sums) for bits, sums in self.checksums.items()}
        return json.dumps({**data, "checksum": _own_checksum(data)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of `manifest.json`.

        Raises
        ------
        StoreError
            It is not a manifest, was edited, or was written by another version of moelab.
        """
        try:
            data = json.loads(text)
            version, checksum = data.pop("format"), data.pop("checksum")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise StoreError(f"{NAME} is not a store's manifest ({error!r}); pack again") from error
        if version != FORMAT:
            raise StoreError(
                f"{NAME} has format {version}, this moelab reads {FORMAT}; pack the model again"
            )
        if checksum != _own_checksum({"format": version, **data}):
            raise StoreError(f"{NAME} was edited or damaged (checksum differs); pack again")
        try:
            return cls._checked(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"{NAME} makes no sense ({error}); pack again") from error

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> Manifest:
        data["layout"] = Layout(**data["layout"])
        data["checksums"] = {int(b): tuple(s) for b, s in data["checksums"].items()}
        data["files"] = {name: (int(size), str(s)) for name, (size, s) in data["files"].items()}
        lists = ("notes", "tiers", "layer_names", "experts_per_layer")
        data.update({k: tuple(data[k]) for k in lists})
        manifest = cls(**data)
        if len(bytes.fromhex(manifest.id)) != 16:
            raise ValueError(f"id {manifest.id!r} is not 32 hex digits")
        if not manifest.tiers or not set(manifest.tiers) <= set(TIERS):
            raise ValueError(f"tiers {manifest.tiers} are not among {TIERS}")
        if len(manifest.layer_names) != len(manifest.experts_per_layer):
            raise ValueError("layer_names and experts_per_layer differ in length")
        for name in manifest.files:
            check_inside(name)
        manifest._check_expert_files()
        return manifest

    def _check_expert_files(self) -> None:
        experts = sum(self.experts_per_layer)
        for bits, size in self.slot_bytes.items():
            found = self.files[experts_file(bits)][0]
            if found != PAGE + experts * size:
                raise ValueError(
                    f"{experts_file(bits)} has {found} bytes for {experts} experts of {size}"
                )
            if len(self.checksums[bits]) != experts:
                raise ValueError(f"{bits} bit has {len(self.checksums[bits])} checksums")


def check_inside(name: str) -> None:
    """Refuse a file name that is not `file` or `model/file`."""
    parts = PurePosixPath(name).parts
    plain = "\\" not in name and ".." not in parts and "/".join(parts) == name
    if not plain or len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != MODEL):
        raise ValueError(f"file name {name!r} leads out of the store")


def _own_checksum(data: dict[str, Any]) -> str:
    return digest(json.dumps(data, sort_keys=True).encode())
