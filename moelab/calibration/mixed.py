"""Bits of each projection of each expert: sensitivity is measured, forms are chosen within bytes.

``lab.calibrate("mixed")`` makes the tier "mixed" of a store (`moelab.store.mixed`) in three steps.

1. What a layer's projections cost: KL against 16 bit with one of gate, up and down of all its
   experts at 4, 3 or 2 bits, the others at 8, and every other layer at 16. Another forward pass
   for each, so L layers take 10 L of them.
2. How a layer's cost is shared among its experts: by the error of the layer's output, ``sum g^2
   |E(x) - E'(x)|^2`` over the tokens that chose the expert with gate weight g. An expert that
   nobody chose counts as one with the layer's average error of one token. The shares are scaled to
   the layer's KL; the error itself is on no scale that layers have in common.
3. The forms with the least sum of costs whose bytes fit, by dynamic programming: exact for the
   sizes in pages, as far as costs add up. They are only known one projection at a time.

Measured on the first three quarters of each text; ``held_out`` on the rest: KL of the tier, and of
the store's own. That experts bear few bits is MoQE's (arXiv 2310.02410), that their matrices bear
them unequally MxMoE's (arXiv 2505.05799); how costs are measured and shared is ours.

L layers, E experts, n experts of the model, P projections, F forms, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from moelab.calibration.edgemoe import COUNTED, split
from moelab.calibration.mixed_choice import UNITS, chosen_forms
from moelab.calibration.probes import Text, parted, read, texts_of
from moelab.calibration.profile import Kept, Profile, _folders, find_profile, once
from moelab.calibration.representations import logits
from moelab.engine.compute import Routed
from moelab.engine.generation import Ids, Stream
from moelab.models.adapter import expert_forward
from moelab.runs.quality import kl_divergence
from moelab.scheduling.stream import FULL, MIXED
from moelab.settings import parse_budget
from moelab.store import codecs
from moelab.store.destination import check_room
from moelab.store.manifest import digest
from moelab.store.mixed import (
    BITS,
    MixedStore,
    decode,
    encode_piece,
    forms_of,
    header,
    joined,
    nbytes,
    pieces,
    write,
)
from moelab.store.store import Store

if TYPE_CHECKING:
    from moelab.lab import Lab

Digits = tuple[int, ...]
"""Places of a form's digits that go together."""


# -- measuring ------------------------------------------------------------------------------------


class _Trial(Store):
    """A store whose mixed tier is one layer's experts in a form that changes."""

    def __init__(self, store: Store, layer: int) -> None:
        self.__dict__ |= store.__dict__
        self._layer, self._known = layer, dict[tuple, np.ndarray]()
        self.form = 888

    def coded(self, layer: int, expert: int, bits: int) -> int:
        return self.form if bits == MIXED else super().coded(layer, expert, bits)

    def location(self, layer: int, expert: int, bits: int) -> tuple[Path, int, int]:
        if bits != MIXED:
            return super().location(layer, expert, bits)
        return self.path, 0, nbytes(self.layout, self.form)

    def read(
        self, layer: int, expert: int, bits: int, *, into: np.ndarray | None = None
    ) -> np.ndarray:
        if bits != MIXED:
            return super().read(layer, expert, bits, into=into)
        blob = self.blob(expert, self.form)
        if into is not None:
            into[:] = blob
        return blob

    def exact(self, expert: int) -> dict[str, torch.Tensor]:
        """The expert's weights at 16 bit."""
        return codecs.decode(super().read(self._layer, expert, FULL), self.layout, FULL)

    def blob(self, expert: int, form: int) -> np.ndarray:
        """An expert in a form; each piece is rounded once."""
        parts, tensors = [], None
        for piece in pieces(self.layout, form):
            name = (expert, piece[0], str(piece[2]), piece[3])
            if name not in self._known:
                tensors = tensors or self.exact(expert)
                self._known[name] = encode_piece(tensors[piece[0]], self.layout, piece)
            parts.append(self._known[name])
        return joined(parts)


def _projections(lab: Lab) -> list[Digits]:
    """Gate, up and down; where gate and up cannot be told apart by halves, they are one."""
    apart = any(str(f)[0] != str(f)[1] for f in forms_of(lab._store.layout))
    apart = apart and not lab._engine.compute.rule.interleaved
    return [(0,), (1,), (2,)] if apart else [(0, 1), (2,)]


def _form(digits: Digits, bits: int) -> int:
    """8 bits everywhere but at these places."""
    return sum((bits if place in digits else 8) * 10 ** (2 - place) for place in range(3))


def sensitivity(
    lab: Lab, texts: Sequence[Text], max_tokens: int, kept: Kept, bar: tqdm
) -> dict[str, Any]:
    """Steps 1 and 2: ``kl [L][P][B]`` in nats a token, ``errors [L][E][P][B]`` by `BITS`."""
    ids = [read(lab, text, max_tokens) for text in texts]
    together, heard = _projections(lab), list[list[tuple[torch.Tensor, Routed]]]()
    heard += ([] for _ in lab._shape.experts)
    full = logits(lab, ids)
    with lab._engine.full_precision(lambda _: FULL, lambda at, x, to: heard[at].append((x, to))):
        for one in ids:
            Stream(lab._engine, one.source).forward(one)
    data: dict[str, Any] = {"projections": together, "kl": [], "errors": []}
    for layer, inputs in enumerate(heard):
        trial = _Trial(lab._store, layer)
        known = {}
        for digits, bits in [((), 8), *((d, b) for d in together for b in BITS[1:])]:
            trial.form = _form(digits, bits)
            known[trial.form] = once(
                kept, f"kl {layer} {trial.form}", partial(_kl, lab, ids, full, MIXED, trial, layer)
            )
            bar.update()
        base = known[888] / len(together)
        costs = [
            [base, *(base + max(0.0, known[_form(d, b)] - known[888]) for b in BITS[1:])]
            for d in together
        ]
        data["kl"].append(costs)
        measure = partial(_errors, lab, trial, layer, inputs, together)
        data["errors"].append(once(kept, f"errors {layer}", measure))
        bar.update()
    return data


def _kl(
    lab: Lab,
    ids: Sequence[Ids],
    full: torch.Tensor,
    bits: int,
    store: Store | None = None,
    layer: int | None = None,
) -> float:
    """KL in nats a token with all experts, or a layer's, at a tier; of another store perhaps."""
    lossy = logits(lab, ids, lambda at: bits if layer in (None, at[0]) else FULL, store)
    return float(kl_divergence(full, lossy).mean())


def _errors(
    lab: Lab,
    trial: _Trial,
    layer: int,
    inputs: Sequence[tuple[torch.Tensor, Routed]],
    together: Sequence[Digits],
) -> list[list[list[float]]]:
    """``sum g^2 |E(x) - E'(x)|^2`` with one projection at each of `BITS`: ``[E][P][B]``."""
    x = torch.cat([given for given, _ in inputs])
    idx, gates = (np.concatenate([getattr(to, n) for _, to in inputs]) for n in ("idx", "gates"))
    module = lab._engine.adapter.layers[layer].module
    count = lab._shape.experts[layer]
    found, tokens = np.zeros((count, len(together), len(BITS))), np.zeros(count)
    with torch.inference_mode():
        for e in range(count):
            gate = np.where(idx == e, gates, 0).sum(1)
            rows = np.flatnonzero(gate)
            tokens[e] = len(rows)
            if not len(rows):
                continue
            weight, own = torch.from_numpy(gate[rows]).square(), trial.exact(e)
            own = {name: tensor.to(x.dtype) for name, tensor in own.items()}
            y = expert_forward(module, x[rows], own)
            for p, digits in enumerate(together):
                for b, bits in enumerate(BITS):
                    form = _form(digits, bits)
                    rounded = decode(trial.blob(e, form), trial.layout, form, dtype=x.dtype)
                    lossy = own | _only(rounded, own, digits, turned=trial.layout.turned)
                    error = (expert_forward(module, x[rows], lossy) - y).float().square().sum(1)
                    found[e, p, b] = float((weight * error).sum())
    found[tokens == 0] = found.sum(0) / max(1.0, tokens.sum())
    return [[[float(f"{value:.5g}") for value in row] for row in one] for one in found.tolist()]


def _only(
    rounded: dict[str, torch.Tensor], own: dict[str, torch.Tensor], digits: Digits, *, turned: bool
) -> dict[str, torch.Tensor]:
    """The one tensor that these digits of a form round, the rest of it as it is."""
    first = next(iter(own))
    if digits == (2,):
        return {"down_proj": rounded["down_proj"]}
    if len(digits) == 2:
        return {first: rounded[first]}
    halves = list(own[first].chunk(2, int(turned)))
    halves[digits[0]] = rounded[first].chunk(2, int(turned))[digits[0]]
    return {first: torch.cat(halves, int(turned))}


# -- the calibration ------------------------------------------------------------------------------


def made_from(
    lab: Lab, *, within: int | str = 3, unit: str = "expert", max_tokens: int = 96
) -> dict[str, Any]:
    """What the profile depends on besides the texts.

    Parameters
    ----------
    within
        Bytes that all experts together may take: those of a tier (8, 4, 3 or 2), or a size as a
        budget is given, ``"40MB"``, ``"20%"``.
    unit
        Who has a form of its own: each ``"expert"``, each ``"layer"``, or the ``"model"``.
    max_tokens
        Tokens of each text that are measured on.

    Raises
    ------
    ValueError
        The store has no 16 bit, or experts of another kind; not even 2 bits everywhere fit.
    """
    store, shape = lab._store, lab._shape
    if FULL not in store.tiers:
        raise ValueError(f"mixed bits are made from {FULL} bit; this store has {store.tiers}")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: one of {', '.join(UNITS)}")
    of_tier = within in BITS and not isinstance(within, bool)
    room = shape.n * nbytes(store.layout, int(within)) if of_tier else parse_budget(within, shape)
    least = shape.n * min(nbytes(store.layout, form) for form in forms_of(store.layout))
    if room < least:
        raise ValueError(f"within={within!r} is {room} bytes, 2 bits everywhere take {least}")
    return {"counted": COUNTED, "room": room, "unit": unit, "max_tokens": max_tokens}


def make(
    lab: Lab, texts: Sequence[Text], made: dict[str, Any], kept: Kept, *, progress: bool
) -> dict[str, Any]:
    """The profile's data, see the module's first lines; the tier's file is written as well."""
    counted, held_out = parted(texts, 1 - COUNTED, split)
    max_tokens, store = made["max_tokens"], lab._store
    alike = {name: value for name, value in made.items() if name not in ("room", "unit")}
    total = lab._shape.layers * (2 + len(_projections(lab)) * (len(BITS) - 1))
    with tqdm(total=total, disable=not progress, desc="mixed") as bar:
        before = find_profile(store, "mixed")
        if before is not None and before.made_from == made:
            before = None  # it was there already: it is to be made again
        if before is not None and alike.items() <= before.made_from.items():
            data = {name: before.data[name] for name in ("projections", "kl", "errors")}
        else:
            data = sensitivity(lab, counted, max_tokens, kept, bar)
    forms = chosen_forms(lab._shape, store.layout, data, made["room"], made["unit"])
    mixed = MixedStore(store, forms, _file(store, forms, progress=progress))
    ids = [read(lab, text, max_tokens) for text in held_out]
    return data | {"forms": forms, "held_out": _held_out(lab, ids, mixed)}


def _held_out(lab: Lab, ids: Sequence[Ids], mixed: MixedStore) -> dict[str, float]:
    """KL of the tier, and of the store's own of `BITS`."""
    full = logits(lab, ids)
    of_tiers = sorted(set(BITS) & set(lab._store.tiers))
    found = {str(bits): _kl(lab, ids, full, bits) for bits in of_tiers}
    return found | {"mixed": _kl(lab, ids, full, MIXED, mixed)}


def _file(store: Store, forms: Sequence[int], *, progress: bool) -> Path:
    """The tier's file, beside the store or in the cache; made now if it is not there."""
    name = f"mixed-{digest(header(store, forms))[:16]}.bin"
    folders = list(_folders(store))
    for folder in folders:
        if (folder / name).is_file():
            with contextlib.suppress(ValueError):  # not whole: made again
                MixedStore(store, forms, folder / name)
                return folder / name
    failed = None
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            size = sum(nbytes(store.layout, form) for form in forms)
            check_room(folder / name, size, "the tier of mixed bits", "")
            write(store, forms, folder / name, progress=progress)
        except OSError as error:
            failed = error
            continue
        for other in folder.glob("mixed-*.bin"):
            if other.name != name:
                with contextlib.suppress(OSError):
                    other.unlink()
        return folder / name
    raise OSError(f"cannot write {name} beside {store.path} nor into the cache: {failed}")


def _profile(store: Store) -> Profile:
    profile = find_profile(store, "mixed")
    if profile is None:
        raise ValueError(
            'bits="mixed" needs a calibration of this model: run lab.calibrate("mixed") once'
        )
    return profile


def opened(store: Store, *, progress: bool = False) -> Store:
    """The store with its tier "mixed", as the calibration chose it.

    Raises
    ------
    ValueError
        There is no calibration, or one that cannot be of this model.
    """
    profile = _profile(store)
    if wrong := set(forms := profile.data["forms"]) - set(forms_of(store.layout)):
        raise ValueError(f"the profile of mixed bits has a form {wrong.pop()} for other experts")
    return MixedStore(store, forms, _file(store, forms, progress=progress))


# -- what it is worth ------------------------------------------------------------------------------


def compared(
    lab: Lab,
    within: Sequence[int] = (4, 3),
    units: Sequence[str] = UNITS,
    texts: Sequence[Text] | None = None,
    *,
    max_tokens: int = 96,
) -> pd.DataFrame:
    """Mixed tiers beside the tiers in whose bytes they are, on the held-out quarter of texts.

    Choices are made anew from the sensitivity that the calibration measured.

    Returns
    -------
    pandas.DataFrame
        By ``within`` and ``by`` (`UNITS`, and ``"plain"``): ``bits`` of a weight with scales and
        pages, ``bytes`` of all experts, ``KL`` in nats a token against 16 bit.

    Raises
    ------
    ValueError
        There is no calibration, or no text.
    RuntimeError
        The lab is at work.

    Examples
    --------
    >>> compared(moelab.open("demo"), within=(3,))  # doctest: +SKIP
    """
    store, shape = lab._store, lab._shape
    data = _profile(store).data
    held_out = parted(texts_of(lab, texts), 1 - COUNTED, split)[1]
    ids = [read(lab, text, max_tokens) for text in held_out]
    weights = shape.n * sum(math.prod(of) for _, of in store.layout.tensors if len(of) > 1)
    rows = []
    with lab._session.claimed():
        full = logits(lab, ids)
        for bits in within:
            room = shape.n * nbytes(store.layout, bits)
            rows.append((bits, "plain", room, _kl(lab, ids, full, bits)))
            for unit in units:
                forms = chosen_forms(shape, store.layout, data, room, unit)
                with tempfile.TemporaryDirectory() as folder:
                    write(store, forms, file := Path(folder) / "mixed.bin", progress=False)
                    kl = _kl(lab, ids, full, MIXED, mixed := MixedStore(store, forms, file))
                rows.append((bits, unit, mixed.shape.all_bytes(MIXED), kl))
    frame = pd.DataFrame(rows, columns=["within", "by", "bytes", "KL"])
    frame.insert(2, "bits", 8 * frame["bytes"] / weights)
    return frame
