"""A store's manifest: everything the engine needs to know without loading the model.

`manifest.json` holds the architecture, the layout of one expert, the sizes and names of all files
and a checksum of every expert at every tier; it ends with a checksum of itself. Each expert file
begins with a page that repeats the store's id and the tier, so that a file that was swapped or
comes from another store is told from its first bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from moelab.models.families import MoELayer
from moelab.store.codecs import KNOWN_TIERS, PAGE, Layout, nbytes

FORMAT = 1
NAME = "manifest.json"
MOST_BYTES = 32 << 20  # of a manifest: 160,000 experts at five tiers
LONGEST_NAME, LONGEST_TEXT = 255, 10_000
MODEL = "model"  # folder of the configuration, the tokenizer and the non-expert weights
_MAGIC = b"moelab experts\n\0"
OF_LAYER = (
    *("top_k", "hidden", "inner", "activation", "gating"),
    *("transposed", "has_bias", "has_post_norm"),
)
"""What a manifest says of an expert as `moelab.models.families.MoELayer` does; alike in all."""
TEXTS = ("id", "architecture", "model_type", "source", "source_digest", "created")
TEXTS += ("transformers_version", "activation", "gating")
COUNTS = ("source_bytes", "top_k", "hidden", "inner")
LISTS = {"notes": str, "tiers": int, "layer_names": str, "experts_per_layer": int}
SWITCHES = ("transposed", "has_bias", "has_post_norm")


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
    encoder_layers
        How many of the layers, the first ones, are an encoder's.
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
    encoder_layers: int = 0

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
        if not (
            self.layout.blocks or self.layout.turned
        ):  # then the layout is one that every version reads
            del data["layout"]["blocks"], data["layout"]["turned"]
        if not self.encoder_layers:
            del data["encoder_layers"]
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
            own = _own_checksum({"format": version, **data})
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise StoreError(
                f"{NAME} is not a store's manifest ({shortened(error)}); pack again"
            ) from error
        if version != FORMAT:
            raise StoreError(
                f"{NAME} has format {shortened(version)}, this moelab reads {FORMAT}; "
                "pack the model again"
            )
        if checksum != own:
            raise StoreError(f"{NAME} was edited or damaged (checksum differs); pack again")
        try:
            return cls._checked(data)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise StoreError(f"{NAME} makes no sense ({shortened(error)}); pack again") from error

    @classmethod
    def _checked(cls, data: dict[str, Any]) -> Manifest:
        _check_types(data)
        data["layout"] = Layout(**data["layout"])
        data["checksums"] = {int(b): tuple(s) for b, s in data["checksums"].items()}
        data["files"] = {name: (int(size), str(s)) for name, (size, s) in data["files"].items()}
        data.update({k: tuple(data[k]) for k in LISTS})
        manifest = cls(**data)
        if len(bytes.fromhex(manifest.id)) != 16:
            raise ValueError(f"id {manifest.id!r} is not 32 hex digits")
        known = tuple(bits for bits in KNOWN_TIERS if bits in manifest.tiers)
        if not known or manifest.tiers != known:
            raise ValueError(f"tiers {manifest.tiers} are not among {KNOWN_TIERS}, highest first")
        if len(manifest.layer_names) != len(manifest.experts_per_layer):
            raise ValueError("layer_names and experts_per_layer differ in length")
        own = manifest.encoder_layers
        if type(own) is not int or not 0 <= own < len(manifest.layer_names):
            raise ValueError(f"encoder_layers={shortened(own)} of {len(manifest.layer_names)}")
        if not manifest.experts_per_layer or min(manifest.experts_per_layer) < manifest.top_k:
            raise ValueError(f"a layer has fewer than top_k={manifest.top_k} experts")
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


def of_model(model: Any, layers: Sequence[MoELayer]) -> dict[str, Any]:
    """What a manifest says of a model's experts, derived from the model alone.

    Raises
    ------
    StoreError
        The experts differ from layer to layer, or are all of an encoder.
    """

    def kind(layer: MoELayer) -> dict[str, Any]:
        return {"tensors": layer.tensors} | {name: getattr(layer, name) for name in OF_LAYER}

    first = layers[0]
    for layer in layers:
        if kind(layer) != kind(first):
            raise StoreError(
                f"experts of layer {layer.index} ({layer.name}) are {kind(layer)}, those of layer "
                f"0 are {kind(first)}; a store holds experts of one shape only"
            )
    if all(layer.encoder for layer in layers):
        raise StoreError("all experts are the encoder's: no token that is written asks for one")
    return {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "layer_names": tuple(layer.name for layer in layers),
        "experts_per_layer": tuple(layer.num_experts for layer in layers),
        "encoder_layers": sum(layer.encoder for layer in layers),
        **kind(first),
    }


def read_manifest(folder: Path) -> tuple[Manifest, tuple[int, ...]]:
    """The manifest of a store, and what tells its file from another of that name later.

    Raises
    ------
    StoreError
        The folder is no store, or its manifest cannot be used.
    """
    path = folder / NAME
    if not path.is_file():
        raise StoreError(
            f"{folder} has no {NAME}, so it is not a store; make one with "
            f"moelab.pack(checkpoint, {str(folder)!r})"
        )
    refuse_link(folder, NAME)
    if path.stat().st_size > MOST_BYTES:
        raise StoreError(f"{path} is longer than {MOST_BYTES >> 20} MiB; pack again")
    try:
        found = identity(path)
        return Manifest.from_json(path.read_text(encoding="utf-8")), found
    except (StoreError, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{folder}: {shortened(error)}") from error


def identity(path: Path) -> tuple[int, ...]:
    """What tells a file from one that took its name, or was written into it; () if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def refuse_link(folder: Path, name: str) -> None:
    """Refuse a file of a store that is a link to outside of it."""
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{folder / name} is a link that leads out of the store; pack again")


def shortened(what: object, most: int = 300) -> str:
    """A value or an error in words that fit a message, whatever a file made it say."""
    text = str(what) if isinstance(what, BaseException) else repr(what)
    return text if len(text) <= most else f"{text[:most]}..."


def _check_types(data: dict[str, Any]) -> None:
    """Every field is of its type, and no count below 1: they become sizes and places."""
    of = {
        **dict.fromkeys(TEXTS, str),
        **dict.fromkeys(COUNTS, int),
        **dict.fromkeys(SWITCHES, bool),
        **dict.fromkeys(LISTS, list),
        **dict.fromkeys(("files", "checksums"), dict),
    }
    for name, kind in of.items():
        value = data[name]
        entries = value if type(value) is list else [value]
        if type(value) is not kind or any(type(e) is not LISTS.get(name, kind) for e in entries):
            raise ValueError(f"{name}={shortened(value)} is not what it has to be")
        for entry in entries:
            if type(entry) is int and not 0 < entry < 2**48:
                raise ValueError(f"{name}={shortened(value)} has a number that cannot be")
            if type(entry) is str and len(entry) > LONGEST_TEXT:
                raise ValueError(f"{name} has a text of {len(entry)} characters")


def check_inside(name: str) -> None:
    """Refuse a file name that is not `file` or `model/file`."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"file name {shortened(name, 60)} is too long or cannot be printed")
    parts = PurePosixPath(name).parts
    plain = "\\" not in name and ".." not in parts and "/".join(parts) == name
    if not plain or len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != MODEL):
        raise ValueError(f"file name {name!r} leads out of the store")


def _own_checksum(data: dict[str, Any]) -> str:
    return digest(json.dumps(data, sort_keys=True).encode())
