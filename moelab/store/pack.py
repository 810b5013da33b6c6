"""Turn a checkpoint into a store, one expert at a time.

Every expert is read from its shards, written at every tier, and forgotten, so memory holds about
two experts in float32 however large the model is; the other weights are copied byte by byte. All of
it goes into a folder beside the destination which takes the destination's name at the very end:
what is killed, cancelled or runs out of disk leaves nothing there, and packing starts over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from moelab.models.checkpoint import ExpertReader
from moelab.models.shards import Checkpoint
from moelab.models.skeleton import blank_model
from moelab.store.codecs import TIERS, Fit, Layout, encode, nbytes
from moelab.store.destination import check_room, move, partial_folder, remove_stale, sync
from moelab.store.manifest import (
    FORMAT,
    MODEL,
    NAME,
    Manifest,
    StoreError,
    digest,
    digest_file,
    experts_file,
    of_model,
)
from moelab.store.store import Store

_KEEP = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*processor_config.json",
    "*.tiktoken",
    "*.model",
    "LICENSE*",
    "NOTICE*",
)
_WORKERS = min(2, os.cpu_count() or 1)  # each holds a float32 copy of one matrix
_PACKING = threading.Lock()  # two threads with one destination: the second finds it done


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    tiers: Sequence[int] = TIERS,
    fit: Fit | None = None,
    overwrite: bool = False,
    progress: bool | Callable[[str], None] = True,
) -> Path:
    """Pack a Mixture-of-Experts checkpoint into a store.

    Parameters
    ----------
    source
        Folder of a transformers checkpoint in safetensors, or a Hugging Face hub id.
    destination
        Folder to make. If it is already the store of this source at these tiers, nothing is done.
    tiers
        Bits to store every expert at, from 16, 8, 4, 3, 2. 16 is the checkpoint's own bytes
        (bfloat16 where the checkpoint is float32).
    fit
        A codec's rule of your own: how the range of 64 weights is chosen at 4, 3 and 2 bits, see
        `moelab.store.codecs.Fit`. Size and kernels stay as they are.
    overwrite
        Replace another store at the destination. Folders that are not stores are never replaced.
    progress
        Show a progress bar, or call this with what is being done; if it raises, nothing is left.

    Returns
    -------
    Path
        The destination.

    Raises
    ------
    StoreError
        The destination is taken, the disk is too small, or the experts differ in shape.
    ValueError
        The source is no usable checkpoint.

    Examples
    --------
    >>> pack("path/to/checkpoint", "stores/mine", tiers=(16, 4))  # doctest: +SKIP
    """
    tiers = _check_tiers(tiers)
    destination = Path(destination).absolute()
    folder, name = _fetch(source)
    with _PACKING:
        work = _Work(folder, name, tiers, progress, fit)
        if _is_done(destination, work, overwrite=overwrite):
            return destination
        _check_room(destination, work)
        remove_stale(destination)
        with partial_folder(destination) as partial:
            work.write(partial)
            move(partial, destination, overwrite=overwrite)
    return destination


class _Work:
    """One checkpoint on its way into a store; its manifest, as far as it is known by now."""

    def __init__(
        self,
        folder: Path,
        name: str,
        tiers: tuple[int, ...],
        progress: bool | Callable[[str], None],
        fit: Fit | None = None,
    ) -> None:
        self.folder, self.fit = folder, fit
        self.bars, self.tell = progress is True, progress if callable(progress) else lambda _: None
        model = blank_model(folder)
        self.reader = ExpertReader(model, folder)
        self.checkpoint = self.reader.checkpoint
        stored = self.reader.dtype(0)
        self.half = stored if stored == torch.float16 else torch.bfloat16
        self.kept = [f for f in sorted(folder.iterdir()) if f.is_file() and _is_kept(f.name)]
        notes = []
        if stored in (torch.float32, torch.float64):
            notes.append(f"experts are {_word(stored)} in the source, stored as bfloat16")
        if fit is not None:
            notes.append(f"ranges by {getattr(fit, '__name__', fit)}")
        experts = of_model(model, self.reader.layers)
        self.manifest = Manifest(
            id="",
            source=name,
            source_digest="",
            source_bytes=sum(file.stat().st_size for file in self.checkpoint.files),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            transformers_version=transformers.__version__,
            notes=tuple(notes),
            tiers=tiers,
            layout=Layout(experts.pop("tensors"), _word(self.half)),
            files={},
            checksums={},
            **experts,
        )

    @property
    def store_bytes(self) -> int:
        """Size of the store, but for a page or two."""
        experts = sum(self.manifest.slot_bytes.values()) * sum(self.manifest.experts_per_layer)
        return experts + sum(self.checkpoint.info[key].nbytes for key in self.reader.rest)

    @cached_property
    def identity(self) -> tuple[str, str]:
        """(id of the store, digest of the source): reads every byte of the source once."""
        files = [*self.checkpoint.files, *self.kept]
        bar = tqdm(files, desc="reading the source", unit="file", disable=not self.bars)
        self.tell("reading the source")
        source = digest("\n".join(f"{file.name} {digest_file(file)}" for file in bar).encode())
        text = f"{FORMAT} {self.manifest.tiers} {source}"
        if self.fit is not None:
            text += f" {_fingerprint(self.fit)}"
        return digest(text.encode()), source

    def write(self, partial: Path) -> None:
        """Write the whole store into an empty folder."""
        store_id, source_digest = self.identity
        self.manifest = replace(self.manifest, id=store_id, source_digest=source_digest)
        if self.bars:
            for note in self.manifest.notes:
                tqdm.write(f"{self.manifest.source}: {note}")
        checksums = self._write_experts(partial)
        self.tell("writing what is not an expert")
        (partial / MODEL).mkdir()
        write_safetensors(partial / MODEL / "model.safetensors", self.checkpoint, self.reader.rest)
        for file in self.kept:
            shutil.copyfile(file, partial / MODEL / file.name)
        files = {}
        for file in sorted((partial / MODEL).iterdir()):
            files[f"{MODEL}/{file.name}"] = (file.stat().st_size, digest_file(file))
        for bits in self.manifest.tiers:
            files[experts_file(bits)] = ((partial / experts_file(bits)).stat().st_size, "")
        manifest = replace(self.manifest, files=files, checksums=checksums)
        (partial / NAME).write_text(manifest.to_json(), encoding="utf-8")
        for name in (*files, NAME):
            sync(partial / name)

    def _write_experts(self, partial: Path) -> dict[int, tuple[str, ...]]:
        tiers, layout = self.manifest.tiers, self.manifest.layout
        checksums: dict[int, list[str]] = {bits: [] for bits in tiers}
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
            out = {b: stack.enter_context((partial / experts_file(b)).open("wb")) for b in tiers}
            for bits, stream in out.items():
                stream.write(self.manifest.header(bits))
            for layer, expert in self._all_experts():
                tensors = {k: t.to(self.half) for k, t in self.reader(layer, expert).items()}
                blobs = {b: pool.submit(encode, tensors, layout, b, fit=self.fit) for b in tiers}
                for bits, stream in out.items():
                    try:
                        blob = blobs.pop(bits).result().data
                    except ValueError as error:
                        raise StoreError(f"layer {layer} expert {expert}: {error}") from error
                    stream.write(blob)
                    checksums[bits].append(digest(blob))
        return {bits: tuple(sums) for bits, sums in checksums.items()}

    def _all_experts(self) -> Iterator[tuple[int, int]]:
        counts = self.manifest.experts_per_layer
        every = [(layer, e) for layer, count in enumerate(counts) for e in range(count)]
        bar = tqdm(every, desc="packing", unit="expert", disable=not self.bars)
        for done, key in enumerate(bar):
            self.tell(f"packing the experts: {100 * done // len(every)} %")
            yield key


def write_safetensors(path: Path, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    """Copy some tensors of a checkpoint into one safetensors file, byte by byte."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    keys, end = list(keys), 0
    for key in keys:
        info = checkpoint.info[key]
        start, end = end, end + info.nbytes
        header[key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            for piece in checkpoint.chunks(key):
                stream.write(piece)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tiers(tiers: Sequence[int]) -> tuple[int, ...]:
    wrong = [bits for bits in tiers if bits not in TIERS]
    if wrong or not tiers:
        raise StoreError(f"tiers={tuple(tiers)} must be one or more of {TIERS}")
    return tuple(sorted(set(tiers), reverse=True))


def _fingerprint(fit: Fit) -> str:
    """What tells one rule from another: its name and compiled code."""
    rule = getattr(fit, "__name__", str(fit)), _portable(getattr(fit, "__code__", None))
    return digest(repr(rule).encode())


def _portable(constant: Any) -> Any:
    """A constant of compiled code without what differs from one process to the next."""
    if isinstance(constant, CodeType):
        return constant.co_code, constant.co_names, [_portable(c) for c in constant.co_consts]
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


def _is_kept(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _KEEP)


def _fetch(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """The checkpoint's folder, downloaded if need be, and the name to remember it by."""
    folder = Path(source)
    if folder.is_dir():
        return folder.resolve(), folder.resolve().name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or folder.exists():
        raise StoreError(
            f"{source} is neither a folder nor a hub id such as 'allenai/OLMoE-1B-7B-0924'"
        )
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            str(source),
            allow_patterns=["*.safetensors", "*.json", *_KEEP],
            ignore_patterns=["*/*", "consolidated*"],  # the same weights in other formats
        )
    except Exception as error:
        raise StoreError(
            f"{source} is no folder here and could not be downloaded ({error}); "
            "check the name and the network, or give the folder of a checkpoint"
        ) from error
    return Path(path), str(source)


def _is_done(destination: Path, work: _Work, *, overwrite: bool) -> bool:
    """Whether the destination is this very store; refuse whatever else is in the way."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    if not (destination / NAME).is_file():
        raise StoreError(f"{destination} exists and is not a store; choose another destination")
    try:
        old = Store.open(destination).manifest
        same = (old.tiers, old.source_bytes) == (work.manifest.tiers, work.manifest.source_bytes)
        if same and old.id == work.identity[0]:
            return True
        what = f"the store of {old.source!r} at {old.tiers} bit"
    except StoreError as error:
        what = f"a damaged store ({error})"
    if not overwrite:
        raise StoreError(
            f"{destination} holds {what}; pass overwrite=True to replace it, or choose another"
        )
    return False


def _check_room(destination: Path, work: _Work) -> None:
    sizes = {b: nbytes(work.manifest.layout, b) for b in work.manifest.tiers}
    fewer = f" or store fewer tiers (bytes per expert: {sizes})"
    check_room(destination, work.store_bytes, "the store", fewer)
