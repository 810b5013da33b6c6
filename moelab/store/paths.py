"""Where moelab keeps what it can always make again (packed stores, compiled kernels).

One folder per user, named by the platform; the environment variable `MOELAB_CACHE` moves it.
Deleting it loses nothing but the time to fill it.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """Return moelab's cache folder, which need not exist yet.

    Returns
    -------
    Path
        `MOELAB_CACHE` where it is set, otherwise the platform's cache folder for this user.

    Examples
    --------
    >>> cache_dir().is_absolute()
    True
    """
    chosen = os.environ.get("MOELAB_CACHE")
    folder = Path(chosen) if chosen else Path(platformdirs.user_cache_dir("moelab"))
    return folder.expanduser().absolute()
