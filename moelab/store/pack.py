"""Turn a checkpoint into a store, one expert at a time.

Every expert is read from its shards, written at every tier, and forgotten, so memory holds about
two experts in float32 however large the model is; the other weights are copied byte by byte. All of
it goes into a folder beside the destination which takes the destination's name at the very end:
what is killed, cancelled or runs out of disk leaves nothing there, and packing starts over. A hub's
model comes shard by shard, and its half-made store is kept, as that of a GGUF file is: the next
call goes on in it.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
import transformers
from tqdm.auto import tqdm
from transformers import GenerationConfig

from moelab.models.chat import Text, load_tokenizer
from moelab.models.checkpoint import ExpertReader
from moelab.models.inventory import inventory
from moelab.models.shards import DTYPES, Checkpoint
from moelab.models.skeleton import blank_model
from moelab.store.blocks import KINDS, own_blocks
from moelab.store.codecs import KNOWN_TIERS, PAGE, TIERS, ZIPPED, Fit, Layout, encode
from moelab.store.destination import (
    check_room,
    grown,
    move,
    partial_folder,
    partial_path,
    remove_stale,
    sync,
)
from moelab.store.foreign import foreign
from moelab.store.hub import SHARDS, HubCheckpoint
from moelab.store.inputs import Inputs
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
from moelab.store.order import JOURNAL, Journal, Rest, Sizes, steps
from moelab.store.rounding import Rounding
from moelab.store.rows import fingerprint
from moelab.store.source import find, kept, refuse_pointers
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
    calibrate: Sequence[Text] | None = None,
    overwrite: bool = False,
    progress: bool | Callable[[str], None] = True,
    check: Callable[[Sizes], None] | None = None,
) -> Path:
    """Pack a Mixture-of-Experts checkpoint into a store.

    Parameters
    ----------
    source
        Folder of a transformers checkpoint in safetensors, a GGUF file, or a Hugging Face hub id,
        also ``"org/name:file.gguf"``.
    destination
        Folder to make. If it is already the store of this source at these tiers, nothing is done.
    tiers
        Bits to store every expert at, from 16, 12, 8, 4, 3, 2, 1. 16 is the checkpoint's own bytes
        (bfloat16 where the checkpoint is float32), 12 the same weights if they are bfloat16 and
        their exponents alike (`moelab.store.zipped`), 1 ternary weights (1.6 bit and scales).
        Experts that a GGUF file has in blocks of Q8_0, Q4_0, Q4_1 or MXFP4 are copied to the tier
        of their bits; those above are left out.
    fit
        A codec's rule of your own: how the range of 64 weights is chosen at 4, 3 and 2 bits, see
        `moelab.store.codecs.Fit`. Size and kernels stay as they are.
    calibrate
        Texts, a few thousand words, or an encoder-decoder's (source, target) pairs: tiers below 8
        bit are rounded by GPTQ so that outputs on these change least (`moelab.store.gptq`).
    overwrite
        Replace another store at the destination. Folders that are not stores are never replaced.
    progress
        Show a progress bar, or call this with what is being done; if it raises, nothing is left, of
        a hub's model or a GGUF file but what is finished.
    check
        Called with all sizes before a weight is fetched or written; what it raises stops packing.

    Returns
    -------
    Path
        The destination.

    Raises
    ------
    StoreError
        The destination is taken, the disk is too small, the experts differ in shape, or
        ``calibrate`` is given for a hub's model, a GGUF file or tiers that it does not change.
    ValueError
        The source is no usable checkpoint.

    Examples
    --------
    >>> pack("path/to/checkpoint", "stores/mine", tiers=(16, 4))  # doctest: +SKIP
    """
    tiers = _check_tiers(tiers)
    destination = Path(destination).expanduser().absolute()
    with _PACKING:
        work = _Work(*find(source), tiers, progress, fit, calibrate)
        if _is_done(destination, work, overwrite=overwrite):
            return destination
        work.consider(check)
        _check_room(destination, work)
        remove_stale(destination, but=work.key)
        with partial_folder(destination, key=work.key) as partial:
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
        checkpoint: Checkpoint | None,
        tiers: tuple[int, ...],
        progress: bool | Callable[[str], None],
        fit: Fit | None = None,
        calibrate: Sequence[Text] | None = None,
    ) -> None:
        self.folder, self.fit, self.texts, self.inputs = folder, fit, calibrate, None
        self.bars, self.tell = progress is True, progress if callable(progress) else lambda _: None
        self.kept = kept(folder)
        refuse_pointers([*self.kept, *folder.glob("*.safetensors")])
        with foreign(folder / "config.json"):
            model = blank_model(folder)
            self.reader = ExpertReader(model, folder, checkpoint)
        with foreign(folder / "tokenizer.json"):
            load_tokenizer(folder)
        with foreign(folder / "generation_config.json"):
            if (folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(folder)
        self.checkpoint = self.reader.checkpoint
        if calibrate is not None and (self.checkpoint.resumes or min(tiers) >= 8):
            raise StoreError(
                f"calibrate rounds a folder's safetensors below 8 bit, not {name!r} at {tiers}; "
                "download the checkpoint to a folder, or add tiers 4, 3, 2 or 1"
            )
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
        blocks, tiers = own_blocks(self.reader.stored, tiers)
        if blocks:
            notes.append(f"{max(tiers)} bit are the {blocks} blocks of the GGUF file as they are")
        self.manifest = Manifest(
            id="",
            source=name,
            source_digest="",
            source_bytes=sum(self.checkpoint.sizes),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            transformers_version=transformers.__version__,
            notes=tuple(notes),
            tiers=tiers,
            layout=Layout(experts.pop("tensors"), _word(half), blocks, experts["transposed"]),
            files={},
            checksums={},
            **experts,
        )
        self.steps = steps(self.reader)
        self.sizes = Sizes.of(self.manifest, self.reader, self.steps)
        last = self.sizes.experts - 1
        self._sample = {0, last // 2, last}  # the numbers of the experts that are measured

    @cached_property
    def identity(self) -> tuple[str, str]:
        """(id of the store, digest of the source): reads every byte of a folder once."""
        files = [*self.checkpoint.files, *self.kept]
        bar = tqdm(files, desc="reading the source", unit="file", disable=not self.bars)
        self.tell("reading the source")
        known = self.checkpoint.checksums
        lines = (f"{file.name} {known.get(file.name) or digest_file(file)}" for file in bar)
        source = digest("\n".join(lines).encode())
        text = f"{FORMAT} {self.manifest.tiers} {source}"
        if self.fit is not None:
            text += f" {digest(fingerprint(self.fit).encode())}"
        if self.texts is not None:
            text += f" {digest(repr([*self.texts]).encode())}"
        if self.manifest.layout.turned:
            text += " turned"
        if self.manifest.layout.blocks:
            text += f" {self.manifest.layout.blocks}"
        return digest(text.encode()), source

    @property
    def key(self) -> str:
        """By what a half-made store is found again; empty where it begins anew."""
        return self.identity[0] if self.checkpoint.resumes else ""

    def consider(self, check: Callable[[Sizes], None] | None) -> None:
        """Say what it will take before it begins."""
        if self.sizes.fetch_files:
            self.tell(str(self.sizes))
            self._say(self.sizes)
        if check is not None:
            check(self.sizes)

    def write(self, partial: Path) -> None:
        """Write the whole store into a folder, or what is not in there yet."""
        store_id, source_digest = self.identity
        self.manifest = replace(self.manifest, id=store_id, source_digest=source_digest)
        for note in self.manifest.notes:
            self._say(f"{self.manifest.source}: {note}")
        if self.texts is not None:
            self.tell("running the model over the texts")
            self.inputs = Inputs(self.folder, self.reader, self.texts)
            self._note(self.inputs.note())
        (partial / MODEL).mkdir(exist_ok=True)
        for file in self.kept:
            shutil.copyfile(file, partial / MODEL / file.name)
        journal = Journal(partial, self.manifest)
        rounded = self.reader.stored - DTYPES.keys()
        self._again = Rounding(rounded, self.manifest.layout, journal.squares)
        self._write_steps(partial, journal)
        shutil.rmtree(partial / SHARDS, ignore_errors=True)
        (partial / JOURNAL).unlink()
        self._note(self._again.note(len(self._sample), self.sizes.experts))
        if journal.coarse:
            self._note(
                f"layers {', '.join(map(str, sorted(journal.coarse)))} have matrices without a "
                f"weight above {_COARSE:g}: under 16 bit their float16 scales are coarse"
            )
        files = {}
        for file in sorted((partial / MODEL).iterdir()):
            files[f"{MODEL}/{file.name}"] = (file.stat().st_size, digest_file(file))
        for bits in self.manifest.tiers:
            files[experts_file(bits)] = ((partial / experts_file(bits)).stat().st_size, "")
        checksums = {bits: tuple(sums) for bits, sums in journal.checksums.items()}
        manifest = replace(self.manifest, files=files, checksums=checksums)
        (partial / NAME).write_text(manifest.to_json(), encoding="utf-8")
        for name in (*files, NAME):
            sync(partial / name)

    def _say(self, words: object) -> None:
        if self.bars:
            tqdm.write(str(words))

    def _note(self, note: str) -> None:
        """Say what was found while packing, now and in the store."""
        if note:
            self._say(f"{self.manifest.source}: {note}")
            self.manifest = replace(self.manifest, notes=(*self.manifest.notes, note))

    def _write_steps(self, partial: Path, journal: Journal) -> None:
        """Pack step after step; within one what is no expert first, as it is sooner seen spoilt."""
        files = {bits: partial / experts_file(bits) for bits in self.manifest.tiers}
        dense = partial / MODEL / "model.safetensors"
        if isinstance(self.checkpoint, HubCheckpoint):
            self.checkpoint.into(partial / SHARDS, self.tell, bars=self.bars)
        done = sum(len(step.experts) for step in self.steps[: journal.done])
        every, source = self.sizes.experts, self.manifest.source
        if done:
            self._say(f"{source}: {done} of {every} experts are packed already")
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(_WORKERS))
            out = {bits: stack.enter_context(grown(file)) for bits, file in files.items()}
            for bits, stream in out.items():
                stream.write(self.manifest.header(bits))
            rest = Rest(stack.enter_context(grown(dense)), self.checkpoint, self.reader.found.rest)
            bar = tqdm(
                desc="packing", total=every, initial=done, unit="expert", disable=not self.bars
            )
            stack.enter_context(bar)
            for number, step in enumerate(self.steps):
                if number >= journal.done:
                    self.checkpoint.fetch(step.shards)
                    self.tell("writing what is not an expert")
                    rest.write(step.rest)
                    for key in step.experts:
                        self.tell(f"packing the experts: {100 * done // every} %")
                        self._write_expert(key, pool, out, journal)
                        done += 1
                        bar.update()
                    for stream in (*out.values(), rest.stream):
                        stream.flush()
                    journal.commit(number + 1, (*files.values(), dense))
                self.checkpoint.free(step.free)

    def _write_expert(
        self,
        key: tuple[int, int],
        pool: ThreadPoolExecutor,
        out: dict[int, BinaryIO],
        journal: Journal,
    ) -> None:
        layout, (layer, expert) = self.manifest.layout, key
        index = sum(self.manifest.experts_per_layer[:layer]) + expert
        tensors = self.reader(layer, expert)
        given = dict.fromkeys(out, tensors)
        if layout.blocks:
            given[KINDS[layout.blocks].bits] = self.reader(layer, expert, raw=True)
        seen = self.inputs.hessians(layer, expert, tensors) if self.inputs else {}
        blobs = {
            b: pool.submit(encode, given[b], layout, b, fit=self.fit, hessians=seen) for b in out
        }
        matrices = (t for t in tensors.values() if t.ndim > 1 and min(out) < ZIPPED)
        if any(0 < float(t.abs().max()) < _COARSE for t in matrices):
            journal.coarse.add(layer)
        for bits, stream in out.items():
            try:
                blob = blobs.pop(bits).result()
            except ValueError as error:
                raise StoreError(f"layer {layer} expert {expert}: {error}") from error
            stream.seek(PAGE + index * self.manifest.slot_bytes[bits])
            stream.write(blob.data)
            journal.checksums[bits][index] = digest(blob.data)
            if index in self._sample:
                self._again.measure(tensors, blob, bits)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tiers(tiers: Sequence[int]) -> tuple[int, ...]:
    wrong = [bits for bits in tiers if bits not in KNOWN_TIERS]
    if wrong or not tiers:
        raise StoreError(f"tiers={tuple(tiers)} must be one or more of {KNOWN_TIERS}")
    return tuple(sorted(set(tiers), reverse=True))


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
    sizes, taken = work.sizes, 0
    if work.key:
        for file in partial_path(destination, work.key).rglob("*"):
            with suppress(OSError):  # another process may be at it
                stat = file.stat()
                taken += min(stat.st_size, getattr(stat, "st_blocks", sys.maxsize) * 512)
    needed = sizes.store_bytes + sizes.shard_bytes - taken
    what = "the store with its shards on the way" if sizes.shard_bytes else "the store"
    fewer = f" or store fewer tiers (bytes per expert: {sizes.expert_bytes})"
    check_room(destination, needed, what, fewer)
