"""What every test stands on: a private cache, one thread, and the bundled model packed once.

`make test` shares the files of tests among workers (pytest-xdist); all of them use one cache.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import tempfile
from functools import cache
from pathlib import Path

import pytest

if (Path(__file__).parent / "browser.py").is_file():  # one Chromium for all files
    from browser import chromium, jupyter, live_page, page  # noqa: F401 fixtures

# Before torch and moelab are first imported: nothing of a test lands in the user's own cache, no
# model is fetched, and figures do not depend on how many cores the machine has.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
_KEPT = os.environ.get("MOELAB_TEST_CACHE")
CACHE = Path(_KEPT or tempfile.mkdtemp(prefix="moelab-tests-"))
os.environ["MOELAB_CACHE"] = os.environ["MOELAB_TEST_CACHE"] = str(CACHE)  # workers use the same
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"

# What the scheduler, which knows no marks, reads of a file: tests that run alone, and whether all
# that is in it drives the live lab in JupyterLab.
ALONE = re.compile(r"@pytest\.mark\.alone\b.*?def (test_\w+)", re.DOTALL)
LIVE = "from browser import kernel"
TIMED = ("alone", "browser")


# Started in the background, a process ignores Ctrl-C and so do its children; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    if not _KEPT:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What hangs on a clock or a browser may be asked twice; with workers, the order of tests.

    On a machine that others use too, a second JupyterLab or a time may come too late once. A second
    failure stands, and the report counts every rerun. Long work begins first: the live lab, then
    slow files; `alone` is last.
    """
    for item in items:
        if LIVE in text_of(item.path) or any(map(item.get_closest_marker, TIMED)):
            item.add_marker(pytest.mark.flaky(reruns=1))
    if not WORKER:
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> tuple[bool, bool, bool]:
        alone = item.get_closest_marker("alone") is not None
        return alone, LIVE not in text_of(item.path), item.path not in slow

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A worker takes a file at a time; notebooks one by one, and all of the live lab as one piece.

    Files have fixtures of their own; the live lab's files share one Chromium and one JupyterLab.
    Tests marked `alone` are one piece too: each stops the other workers until they are idle.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, *_, test = nodeid.split("::")
            text = text_of(config.rootpath / file)
            if test.partition("[")[0] in ALONE.findall(text):
                return "alone"
            if file.endswith("test_notebooks.py"):
                return nodeid
            return "live" if LIVE in text else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@cache
def text_of(file: Path) -> str:
    return file.read_text("utf-8")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Beside a test marked `alone`, no other worker runs one."""
    if not WORKER:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with (CACHE / "queue").open("w") as queue, (CACHE / "floor").open("w") as floor:
        fcntl.flock(queue, fcntl.LOCK_EX)  # first come, first served: `alone` need not starve
        fcntl.flock(floor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(scope="session")
def demo_store() -> Path:
    """The bundled model as a store, packed once for the whole session, as kernels are compiled."""
    from filelock import FileLock

    from moelab.catalogue import find_store
    from moelab.engine import kernels

    with FileLock(CACHE / "kernels.lock"):
        kernels.warm_up()
    return find_store("demo", progress=False)


@pytest.fixture
def demo_lab(demo_store):
    """The bundled model, freshly opened at 25 % of its experts, KL off."""
    import moelab

    with moelab.open("demo", budget="25%", measure_kl=False, progress=False) as lab:
        yield lab


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process: (exit code, output, errors)."""
    from moelab import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moelab", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run
