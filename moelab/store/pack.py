"""Turn a checkpoint into a store, one expert at a time.

Every expert is read from its shards, written at every tier, and forgotten, so memory holds about
two experts in float32 however large the model is; the other weights are copied byte by byte. All of
it goes into a folder beside the destination which takes the destination's name at the very end:
what is killed, cancelled or runs out of disk leaves nothing there, and packing starts over.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import GenerationConfig

from moelab.models.chat import load_tokenizer
from moelab.models.checkpoint import ExpertReader
from moelab.models.inventory import inventory
from moelab.models.shards import DTYPES, Checkpoint
from moelab.models.skeleton import blank_model
from moelab.store.blocks import KINDS
from moelab.store.codecs import TIERS, Fit, Layout, encode, nbytes
from moelab.store.destination import check_room, move, partial_folder, remove_stale, sync
from moelab.store.foreign import foreign
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
from moelab.store.rounding import Rounding
from moelab.store.source import fetch, kept, refuse_pointers
from moelab.store.store import Store

_COARSE = 1e-5  # where no weight is larger, float16 scales cost 8 bit half as much error again
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
        Folder of a transformers checkpoint in safetensors, a GGUF file, or a Hugging Face hub id.
    destination
        Folder to make. If it is already the store of this source at these tiers, nothing is done.
    tiers
        Bits to store every expert at, from 16, 8, 4, 3, 2. 16 is the checkpoint's own bytes
        (bfloat16 where the checkpoint is float32). Experts that a GGUF file has in blocks of Q8_0,
        Q4_0, Q4_1 or MXFP4 are copied to the tier of their bits, and those above it are left out.
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
    destination = Path(destination).expanduser().absolute()
    folder, name = fetch(source)
    with _PACKING:
        work = _Work(folder, name, tiers, progress, fit)
        if _is_done(destination, work, overwrite=overwrite):
            return destination
        _check_room(destination, work)
        remove_stale(destination)
        with partial_folder(destination) as partial:
            work.write(partial)
            move(partial, destination, overwrite=overwrite)
        Store.open(destination)  # what has the name now is whole
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
        self.kept = kept(folder)
        refuse_pointers([*self.kept, *folder.glob("*.safetensors")])
        with foreign(folder / "config.json"):
            model = blank_model(folder)
            self.reader = ExpertReader(model, folder)
        with foreign(folder / "tokenizer.json"):
            load_tokenizer(folder)
        with foreign(folder / "generation_config.json"):
            if (folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(folder)
        self.checkpoint = self.reader.checkpoint
        stored = self.reader.dtypes
        # Only bfloat16 has the range of every type; float16 is kept where there is nothing else.
        half = torch.float16 if stored == {torch.float16} else torch.bfloat16
        notes = [*inventory(model, self.reader.layers, self.checkpoint, self.reader.found)]
        info = self.checkpoint.info
        if blocks := {info[key].stored for key in self.reader.found.rest} - DTYPES.keys():
            kinds = ", ".join(sorted(blocks))
            notes.append(f"{kinds} blocks of the GGUF file are float16 where they are no expert's")
        if stored != {half}:
            kinds = " and ".join(sorted(map(_word, stored)))
            notes.append(f"experts are {kinds} in the source, stored as {_word(half)}")
        if fit is not None:
            notes.append(f"ranges by {getattr(fit, '__name__', fit)}")
        experts = of_model(model, self.reader.layers)
        blocks, tiers = _own_blocks(self.reader, tiers)
        if blocks:
            notes.append(f"{max(tiers)} bit are the {blocks} blocks of the GGUF file as they are")
        self.manifest = Manifest(
            id="",
            source=name,
            source_digest="",
            source_bytes=sum(file.stat().st_size for file in self.checkpoint.files),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            transformers_version=transformers.__version__,
            notes=tuple(notes),
            tiers=tiers,
            layout=Layout(
                experts.pop("tensors"), _word(half), blocks, bool(blocks) and experts["transposed"]
            ),
            files={},
            checksums={},
            **experts,
        )

    @property
    def store_bytes(self) -> int:
        """Size of the store, but for a page or two."""
        experts = sum(self.manifest.slot_bytes.values()) * sum(self.manifest.experts_per_layer)
        return experts + sum(self.checkpoint.info[key].nbytes for key in self.reader.found.rest)

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
        if self.manifest.layout.blocks:
            text += f" {self.manifest.layout.blocks}"
        return digest(text.encode()), source

    def write(self, partial: Path) -> None:
        """Write the whole store into an empty folder."""
        store_id, source_digest = self.identity
        self.manifest = replace(self.manifest, id=store_id, source_digest=source_digest)
        for note in self.manifest.notes:
            self._say(note)
        self._write_rest(partial / MODEL)
        checksums = self._write_experts(partial)
        files = {}
        for file in sorted((partial / MODEL).iterdir()):
            files[f"{MODEL}/{file.name}"] = (file.stat().st_size, digest_file(file))
        for bits in self.manifest.tiers:
            files[experts_file(bits)] = ((partial / experts_file(bits)).stat().st_size, "")
        manifest = replace(self.manifest, files=files, checksums=checksums)
        (partial / NAME).write_text(manifest.to_json(), encoding="utf-8")
        for name in (*files, NAME):
            sync(partial / name)

    def _say(self, note: str) -> None:
        if self.bars:
            tqdm.write(f"{self.manifest.source}: {note}")

    def _write_rest(self, folder: Path) -> None:
        """What is not an expert; before the experts, as it is sooner found to be spoilt."""
        self.tell("writing what is not an expert")
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", self.checkpoint, self.reader.found.rest)
        for file in self.kept:
            shutil.copyfile(file, folder / file.name)

    def _write_experts(self, partial: Path) -> dict[int, tuple[str, ...]]:
        tiers, layout = self.manifest.tiers, self.manifest.layout
        checksums: dict[int, list[str]] = {bits: [] for bits in tiers}
        coarse, again = set(), Rounding(self.reader.stored - DTYPES.keys(), layout)
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
            out = {b: stack.enter_context((partial / experts_file(b)).open("wb")) for b in tiers}
            for bits, stream in out.items():
                stream.write(self.manifest.header(bits))
            for done, (layer, expert) in enumerate(self._all_experts()):
                tensors = self.reader(layer, expert)
                given = dict.fromkeys(tiers, tensors)
                if layout.blocks:
                    given[KINDS[layout.blocks].bits] = self.reader(layer, expert, raw=True)
                blobs = {b: pool.submit(encode, given[b], layout, b, fit=self.fit) for b in tiers}
                matrices = (t for t in tensors.values() if t.ndim > 1 and min(tiers) < 16)
                if any(0 < float(t.abs().max()) < _COARSE for t in matrices):
                    coarse.add(layer)
                for bits, stream in out.items():
                    try:
                        blob = blobs.pop(bits).result()
                    except ValueError as error:
                        raise StoreError(f"layer {layer} expert {expert}: {error}") from error
                    stream.write(blob.data)
                    checksums[bits].append(digest(blob.data))
                    if done in self._sample:
                        again.measure(tensors, blob, bits)
        self._note(again.note(len(self._sample), sum(self.manifest.experts_per_layer)))
        if coarse:
            self._note(
                f"layers {', '.join(map(str, sorted(coarse)))} have matrices without a weight "
                f"above {_COARSE:g}: under 16 bit their float16 scales are coarse"
            )
        return {bits: tuple(sums) for bits, sums in checksums.items()}

    @property
    def _sample(self) -> set[int]:
        """Numbers of some experts: the first, the last and the one between."""
        last = sum(self.manifest.experts_per_layer) - 1
        return {0, last // 2, last}

    def _note(self, note: str) -> None:
        """Say what was found while packing, now and in the store."""
        if note:
            self._say(note)
            self.manifest = replace(self.manifest, notes=(*self.manifest.notes, note))

    def _all_experts(self) -> Iterator[tuple[int, int]]:
        counts = self.manifest.experts_per_layer
        every = [(layer, e) for layer, count in enumerate(counts) for e in range(count)]
        bar = tqdm(every, desc="packing", unit="expert", disable=not self.bars)
        for done, key in enumerate(bar):
            self.tell(f"packing the experts: {100 * done // len(every)} %")
            yield key


def write_safetensors(path: Path, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    """Copy some tensors of a checkpoint into one safetensors file, byte by byte.

    Raises
    ------
    StoreError
        One holds what is no finite number; a router or a norm that does answers nothing but NaN.
    """
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
            kind = DTYPES[checkpoint.info[key].dtype]
            for piece in checkpoint.chunks(key):
                values = torch.from_numpy(piece).view(kind)
                values = values.float() if kind.itemsize == 1 else values  # fp8 has no isfinite
                if not values.isfinite().all():
                    raise StoreError(
                        f"{checkpoint.path}: {key} has NaN or infinite weights; repair the "
                        "checkpoint first"
                    )
                stream.write(piece.data)


def _own_blocks(reader: ExpertReader, tiers: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The file's blocks where a tier can hold them, and the tiers: more bits would hold no more."""
    kinds = reader.stored & KINDS.keys()
    if len(reader.stored) != 1 or not kinds:
        return "", tiers
    blocks = kinds.pop()
    fewer = tuple(bits for bits in tiers if bits <= KINDS[blocks].bits)
    return (blocks, fewer) if KINDS[blocks].bits in fewer else ("", tiers)


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
