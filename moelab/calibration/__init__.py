"""Calibrations: what a strategy has to know of a model, measured once and kept.

Each module here measures for one strategy: `made_from` says what the result depends on, `make`
measures it. `calibrate` finds, makes and saves; people call it as ``lab.calibrate(name)``.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moelab.calibration.profile import Partial, Profile, find_profile, model_of

if TYPE_CHECKING:
    from moelab.lab import Lab

NAMES = ("edgemoe", "hobbit", "swapmoe", "adapmoe")


def calibrate(
    lab: Lab, name: str, *, again: bool = False, progress: bool = True, **options: Any
) -> Profile:
    """The profile of a strategy for the lab's model: found, or measured and saved.

    Raises
    ------
    ValueError
        No such calibration.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} has no calibration; these have: {', '.join(NAMES)}")
    maker = import_module(f"moelab.calibration.{name}")
    made_from = json.loads(json.dumps(maker.made_from(lab, **options)))
    found = None if again else find_profile(lab._store, name, made_from)
    if found is not None:
        if find_profile(lab._store, name) != found:  # another one was current
            found.save(lab._store)
        return found
    partial = Partial(lab._store, name, made_from)
    try:
        data = maker.make(lab, progress=progress, partial=partial, **options)
    except BaseException:
        partial.save()
        raise
    profile = Profile(name, model_of(lab._store), made_from, data)
    profile.save(lab._store)
    partial.remove()
    return profile
