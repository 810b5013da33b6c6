"""Calibrations: what a strategy has to know of a model, measured once and kept.

Each of the modules in `NAMES` measures for one strategy, or for the tier "mixed", by two functions:

    made_from(lab, **options)                     the options, checked: what the result depends on
    make(lab, texts, made, kept, *, progress)     the result, plain JSON, from texts and `made`

`kept` holds single measurements by name (`Partial`): what is in there is not measured again.
`calibrate` finds, makes and saves; people call it as ``lab.calibrate(name)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moelab.calibration.probes import Text, digest_of, texts_of
from moelab.calibration.profile import Partial, Profile, find_profile, model_of
from moelab.settings import refuse_unknown

if TYPE_CHECKING:
    from moelab.lab import Lab

NAMES = ("edgemoe", "hobbit", "swapmoe", "adapmoe", "flashmoe", "mixed")


def calibrate(
    lab: Lab,
    name: str,
    *,
    again: bool = False,
    progress: bool = True,
    texts: Sequence[Text] | None = None,
    **options: Any,
) -> Profile:
    """The profile of a strategy for the lab's model: found, or measured and saved.

    Parameters
    ----------
    lab
        Its model is measured, whatever its settings are.
    name
        One of `NAMES`.
    again
        Make it anew whatever there is.
    progress
        Show a bar.
    texts
        To measure on; default the model's own probes.
    options
        Of that calibration's `made_from`; all have ``max_tokens``, taken of each text.

    Raises
    ------
    ValueError
        No such calibration, an option is refused, or there is no text to measure on.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} has no calibration; these have: {', '.join(NAMES)}")
    maker = import_module(f"moelab.calibration.{name}")
    besides = ("texts", "again", "progress")
    refuse_unknown(f"lab.calibrate({name!r})", options, maker.made_from, besides=besides)
    (store := lab._store).require_weights(f"a calibration for {name!r}")
    used = texts_of(lab, texts)
    made_from = {"texts": digest_of(used), **maker.made_from(lab, **options)}
    made_from = json.loads(json.dumps(made_from))
    found = None if again else find_profile(store, name, made_from)
    if found is not None:
        if find_profile(store, name) != found:  # another one was current
            found.save(store)
        return found
    kept = Partial(store, name, made_from)
    try:
        data = maker.make(lab, used, made_from, kept, progress=progress)
    except BaseException:
        kept.save()
        raise
    profile = Profile(name, model_of(store), made_from, data)
    profile.save(store)
    kept.remove()
    return profile
