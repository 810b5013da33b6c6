"""The tier "mixed": each expert's gate, up and down matrix at bits of its own.

A *form* says which: 442 is gate and up at 4 bits, down at 2. An expert's bytes are its pieces one
behind the other, each as a tier of its bits has it (`codecs`): gate and up (the first and the last
half of the rows of ``gate_up_proj``) apart where their bits differ and else as one matrix, so 444
is the 4-bit tier to the byte; biases stay at 16 bit. Experts have different sizes, in whole pages.

The tier is made from the 16-bit one of a store, which it leaves as it is: a file beside it that
begins with a page saying of which store and forms it is, and ends with a checksum of every expert.
Which forms, is chosen by `moelab.calibration.mixed`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from moelab.scheduling.stream import FULL, MIXED, Shape
from moelab.store import codecs
from moelab.store.blobs import BlobFile
from moelab.store.codecs import PAGE, Layout, payload_bytes
from moelab.store.destination import sync
from moelab.store.manifest import StoreError, digest
from moelab.store.store import Store

BITS = (8, 4, 3, 2)
"""What a matrix may have."""
LEAST = 222
"""Forms are from here on; what is below is a tier's bits."""
FORMS = tuple(100 * g + 10 * u + d for g, u, d in itertools.product(BITS, repeat=3))
_MAGIC = b"moelab mixed\n\0\0\0"
_SUM = 16  # bytes of a checksum

Piece = tuple[str, tuple[int, ...], slice | None, int]
"""Of a tensor: its name, the piece's shape, which of its rows (None: all), bits."""


def forms_of(layout: Layout) -> tuple[int, ...]:
    """The forms that an expert can have: without a gate the first digits are alike.

    Raises
    ------
    ValueError
        Its matrices are others than ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
    """
    first, *others = (name for name, shape in layout.tensors if len(shape) > 1)
    if first not in ("gate_up_proj", "up_proj") or others != ["down_proj"]:
        raise ValueError(
            f"mixed bits are for experts of gate_up_proj and down_proj; these have {first}, "
            f"{', '.join(others)}"
        )
    gated = first == "gate_up_proj"
    return tuple(form for form in FORMS if gated or form // 100 == form // 10 % 10)


def pieces(layout: Layout, form: int) -> Iterator[Piece]:
    """The pieces of an expert of this form, in blob order."""
    gate, up, down = form // 100, form // 10 % 10, form % 10
    for name, shape in layout.tensors:
        if len(shape) == 1:
            yield name, shape, None, FULL
        elif name == "down_proj":
            yield name, shape, None, down
        elif gate == up:
            yield name, shape, None, gate
        else:
            rows, width = layout.rows(shape)
            half = layout.rows((rows // 2, width))
            yield name, half, slice(0, rows // 2), gate
            yield name, half, slice(rows // 2, rows), up


def nbytes(layout: Layout, form: int) -> int:
    """Bytes of an expert of a form, or at a tier, in whole pages."""
    if form < LEAST:
        return codecs.nbytes(layout, form)
    total = sum(payload_bytes(_alone(layout, piece), piece[3]) for piece in pieces(layout, form))
    return -(-total // PAGE) * PAGE


def encode_piece(tensor: torch.Tensor, layout: Layout, piece: Piece) -> np.ndarray:
    """A piece's bytes, uint8, out of the whole tensor."""
    name, _, rows, bits = piece
    if rows is not None:
        tensor = tensor[:, rows] if layout.turned else tensor[rows]
    own = _alone(layout, piece)
    return codecs.encode({name: tensor}, own, bits)[: payload_bytes(own, bits)]


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """An expert's blob from its pieces' bytes."""
    total = sum(map(len, parts))
    return np.concatenate([*parts, np.zeros(-total % PAGE, np.uint8)])


def decode(
    blob: np.ndarray, layout: Layout, form: int, *, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A blob of a form, or at a tier, as `moelab.store.codecs.decode`."""
    if form < LEAST:
        return codecs.decode(blob, layout, form, dtype=dtype)
    check_blob(blob, layout, form)
    found: dict[str, list[torch.Tensor]] = {}
    start = 0
    for piece in pieces(layout, form):
        own, bits = _alone(layout, piece), piece[3]
        size = payload_bytes(own, bits)
        padded = np.zeros(codecs.nbytes(own, bits), np.uint8)
        padded[:size] = blob[start : start + size]
        parts = codecs.decode(padded, own, bits, dtype=dtype)
        found.setdefault(piece[0], []).extend(parts.values())
        start += size
    along = int(layout.turned)
    return {name: torch.cat(p, along) if len(p) > 1 else p[0] for name, p in found.items()}


def check_blob(blob: np.ndarray, layout: Layout, form: int) -> None:
    """Raise ValueError unless `blob` has the dtype and size of an expert of this form."""
    if form < LEAST:
        return codecs.check_blob(blob, layout, form)
    expected = nbytes(layout, form)
    if blob.dtype != np.uint8 or blob.shape != (expected,):
        raise ValueError(f"blob is {blob.dtype} of shape {blob.shape}, {form} needs {expected}")
    return None


def _alone(layout: Layout, piece: Piece) -> Layout:
    """The layout of one piece."""
    return Layout((piece[:2],), layout.dtype, turned=layout.turned)


class MixedStore(Store):
    """A store and, beside it, a file with the tier "mixed".

    Raises
    ------
    StoreError
        The file is not of this store and these forms, or not whole.
    """

    def __init__(self, store: Store, forms: Sequence[int], file: Path) -> None:
        self.__dict__ |= store.__dict__
        self.forms = tuple(forms)
        self._sizes = tuple(nbytes(store.layout, form) for form in forms)
        self._starts = (PAGE, *accumulate(self._sizes, initial=PAGE))[1:]
        self._slots = {**store.slot_bytes, MIXED: max(self._sizes)}
        try:
            blobs, page = BlobFile(file), np.empty(PAGE, np.uint8)
            blobs.read_into(page, 0)
        except OSError as error:
            raise StoreError(f"{file} cannot be read ({error.strerror})") from error
        whole = self._starts[-1] + _trailer(len(forms))
        if page.tobytes() != header(store, forms) or blobs.nbytes != whole:
            raise StoreError(f"{file} is not whole, or of another store or choice; remove it")
        self.files = {**store.files, MIXED: blobs}

    @property
    def tiers(self) -> tuple[int, ...]:
        """The store's tiers and this one, highest first."""
        return tuple(sorted(self._slots, reverse=True))

    @property
    def shape(self) -> Shape:
        """What a scheduler must know of it."""
        return dataclasses.replace(super().shape, own={MIXED: self._sizes})

    def location(self, layer: int, expert: int, bits: int) -> tuple[Path, int, int]:
        """Where one expert lies: file, offset and length, both multiples of 4096."""
        if bits != MIXED:
            return super().location(layer, expert, bits)
        super().location(layer, expert, FULL)  # there is such an expert
        key = self._first[layer] + expert
        return self.files[MIXED].path, self._starts[key], self._sizes[key]

    def coded(self, layer: int, expert: int, bits: int) -> int:
        """What the bytes of an expert at a tier are: its bits, or the expert's own form."""
        return self.forms[self._first[layer] + expert] if bits == MIXED else bits

    def _verify_tier(self, bits: int, bar: tqdm) -> None:
        if bits != MIXED:
            return super()._verify_tier(bits, bar)
        sums = np.empty(_trailer(len(self.forms)), np.uint8)
        self.files[MIXED].read_into(sums, self._starts[-1])
        for key, known in enumerate(sums[: _SUM * len(self.forms)].reshape(-1, _SUM)):
            layer, expert = self.shape.place(key)
            if digest(self.read(layer, expert, MIXED).data) != known.tobytes().hex():
                raise StoreError(
                    f"{self.files[MIXED].path} is damaged: layer {layer} expert {expert}; remove it"
                )
            bar.update()
        return None


def header(store: Store, forms: Sequence[int]) -> bytes:
    """The first page of the file: of which store it is, and which forms."""
    chosen = bytes.fromhex(digest(repr(tuple(forms)).encode()))
    return (_MAGIC + bytes.fromhex(store.manifest.id) + chosen).ljust(PAGE, b"\0")


def _trailer(experts: int) -> int:
    return -(-_SUM * experts // PAGE) * PAGE


def write(store: Store, forms: Sequence[int], file: Path, *, progress: bool) -> None:
    """Make the tier's file from the store's 16-bit experts, under a temporary name first."""
    partial, sums = file.with_name(f".{file.name}.{os.getpid()}"), bytearray()
    places = [(at, e) for at, count in enumerate(store.experts_per_layer) for e in range(count)]
    try:
        with partial.open("wb") as stream:
            stream.write(header(store, forms))
            bar = tqdm(places, desc="mixed bits", unit="expert", disable=not progress)
            for place, form in zip(bar, forms, strict=True):
                tensors = codecs.decode(store.read(*place, FULL), store.layout, FULL)
                parts = (p for p in pieces(store.layout, form))
                blob = joined([encode_piece(tensors[p[0]], store.layout, p) for p in parts])
                stream.write(blob.data)
                sums += bytes.fromhex(digest(blob.data))
            stream.write(sums.ljust(_trailer(len(places)), b"\0"))
        sync(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
