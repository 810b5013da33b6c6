"""Profiles: what was measured of a model for a strategy, kept beside its store.

A profile says what it was made from: the model, the texts and the options. It is used as long as
that is the same, and made again otherwise. The bundled demo brings its own.
"""

from __future__ import annotations

import json
import time
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moelab.calibration.checks import MOST_BYTES, check
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.writing import write_atomically
from moelab.store.paths import cache_dir
from moelab.store.store import Store
from moelab.strategies import CALIBRATED, NEEDS_CALIBRATION, make, maker

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "demo" / "profiles"
SAVE_EVERY_S = 1.0
Kept = MutableMapping[str, Any]
"""Measurements by name: a `Partial`, or a plain dictionary."""


@dataclass(frozen=True, repr=False)
class Profile:
    """What a calibration measured.

    Attributes
    ----------
    name
        The strategy it is for.
    model
        What tells the model and its tiers from others, see `model_of`.
    made_from
        Everything else the result depends on: texts, options.
    data
        The result, plain JSON.
    """

    name: str
    model: dict[str, Any]
    made_from: dict[str, Any]
    data: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Profile of {self.name}: {', '.join(self.data)}>"

    def save(self, store: Store) -> Path:
        """Write it beside the store, or into the user's cache where that is not allowed.

        Raises
        ------
        OSError
            Neither folder can be written.
        """
        return _write(store, f"{self.name}.json", asdict(self))


def model_of(store: Store) -> dict[str, Any]:
    """What a profile has to fit: the checkpoint's bytes and the stored tiers."""
    return {"checkpoint": store.manifest.source_digest, "tiers": sorted(store.manifest.tiers)}


def _fits(name: str, model: Any, store: Store) -> bool:
    """Whether a profile is of this model; "mixed" hangs on no tier but the checkpoint's own."""
    own = model_of(store)
    if name == "mixed" and isinstance(model, dict):
        model = model | {"tiers": own["tiers"]}
    return model == own


def find_profile(
    store: Store, name: str, made_from: dict[str, Any] | None = None
) -> Profile | None:
    """A strategy's profile that fits the model, the user's own before a shipped one; or None.

    ``made_from``: accept only one that was made from exactly this.

    Raises
    ------
    ValueError
        It is of this model, but cannot be used on it; the message names the file.
    """
    for folder in (*_folders(store), SHIPPED):
        doc = _read(folder / f"{name}.json", {f.name for f in fields(Profile)})
        if doc and _fits(name, doc["model"], store) and made_from in (None, doc["made_from"]):
            try:
                check(name, doc["data"], store.shape)
            except ValueError as error:
                again = f"lab.calibrate({name!r}, again=True) makes it anew"
                file = folder / f"{name}.json"
                raise ValueError(f"the profile {file} is damaged: {error}; {again}") from None
            return Profile(**doc)
    return None


class Partial(UserDict):
    """What an unfinished calibration has measured so far; survives an interruption.

    A mapping from a measurement's name to plain JSON, on disk within a second or so and at `save`.
    What was begun from something else is forgotten.
    """

    def __init__(self, store: Store, name: str, made_from: dict[str, Any]) -> None:
        self._store, self._name = store, f"{name}.partial.json"
        self._head = {"model": model_of(store), "made_from": made_from}
        self._saved = time.monotonic()
        docs = (_read(folder / self._name, {*self._head, "values"}) for folder in _folders(store))
        docs = (d for d in docs if d and isinstance(d["values"], dict))
        same = (d for d in docs if all(d[k] == v for k, v in self._head.items()))
        super().__init__(next(same, {"values": {}})["values"])

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write what there is."""
        _write(self._store, self._name, self._head | {"values": self.data})
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The calibration is finished."""
        for folder in _folders(self._store):
            (folder / self._name).unlink(missing_ok=True)


def once(kept: Kept, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured under a name, or is measured and kept now."""
    if name not in kept:
        kept[name] = measure()
    return kept[name]


class Strategies:
    """Strategies by name for one store, with the calibrations there are."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._made: dict[str, Strategy] = {}
        self._outdated: set[str] = set()

    def __call__(self, name: str, using: Strategy | None = None, role: str = "") -> Strategy:
        """A strategy of that name.

        Parameters
        ----------
        using
            A strategy in force: where it has parts of an earlier strategy of that name, that one
            is given again, so that parts which belong together stay together; and it itself where
            it is what was asked for, so that it goes on with what it has learnt.
        role
            The only decision that is wanted of it; ``""`` for all.

        Raises
        ------
        ValueError
            The name is not known, or the strategy cannot be used before a calibration.
        """
        name = maker(name).__name__
        if using is not None and using.name == name and not role and name not in self._outdated:
            return using
        made = self._made.get(name)
        if made is not None and using is not None and made.shares(using):
            return made
        wanted = CALIBRATED.get(name)
        profile = find_profile(self._store, wanted) if wanted else None
        if profile is None and name in NEEDS_CALIBRATION and role in ("", NEEDS_CALIBRATION[name]):
            raise ValueError(
                f"strategy {name!r} needs a calibration of this model: run "
                f"lab.calibrate({name!r}) once"
            )
        self._made[name] = made = make(name, profile and profile.data)
        self._outdated.discard(name)
        return made

    def renew(self, calibration: str) -> None:
        """A calibration was made: strategies that use it are made anew when next asked for."""
        for name, used in CALIBRATED.items():
            if used == calibration:
                self._made.pop(name, None)
                self._outdated.add(name)


def _folders(store: Store) -> Iterator[Path]:
    """Where profiles of a store lie: beside it, or in the cache where that cannot be written."""
    yield store.path.with_name(store.path.name + ".profiles")
    yield cache_dir() / "profiles" / store.manifest.id


def _read(file: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """A document's fields of these names; None where there is none, or one that cannot be used."""
    try:
        if file.stat().st_size > MOST_BYTES:
            return None
        doc = json.loads(file.read_text(encoding="utf-8"))
        return {name: doc[name] for name in names} if doc["format"] == FORMAT else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
    ):  # another document, or a broken one
        return None


def written(doc: dict[str, Any]) -> str:
    """The text of a document."""
    return json.dumps({"format": FORMAT} | doc, separators=(",", ":"))


def _write(store: Store, name: str, doc: dict[str, Any]) -> Path:
    failed = None
    for folder in _folders(store):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, written(doc).encode())
            return folder / name
        except OSError as error:
            failed = error
    raise OSError(f"cannot write {name} beside {store.path} nor into the cache: {failed}")
