"""What every test stands on: a private cache, one thread, and the bundled model packed once."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before torch and moelab are first imported: nothing of a test lands in the user's own cache, no
# model is fetched, and figures do not depend on how many cores the machine has.
_KEPT = os.environ.get("MOELAB_TEST_CACHE")
CACHE = Path(_KEPT or tempfile.mkdtemp(prefix="moelab-tests-"))
os.environ["MOELAB_CACHE"] = str(CACHE)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"


# Started in the background, a process ignores Ctrl-C and so do its children; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    if not _KEPT:
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def demo_store() -> Path:
    """The bundled model as a store, packed once for the whole session."""
    from moelab.models import find_store

    return find_store("demo", progress=False)


@pytest.fixture
def demo_lab(demo_store):
    """The bundled model, freshly opened at 25 % of its experts, KL off."""
    import moelab

    with moelab.open("demo", budget="25%", measure_kl=False, progress=False) as lab:
        yield lab
