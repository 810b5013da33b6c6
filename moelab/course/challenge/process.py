"""Start the scoring process for one entry, pass its words on, and bring its answer back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moelab

KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "MOELAB_CACHE", "LD_LIBRARY_PATH")
"""What the process sees of the environment: where things lie, nothing that changes what they do."""
MOST_SECONDS = 900
_CODE = (  # of the caller's moelab, whichever is installed
    "import sys; sys.path.insert(0, sys.argv.pop()); "
    "from moelab.course.challenge.scoring import main; main()"
)


def scored(request: dict[str, Any], tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The answer of a fresh scoring process: ``figures``, ``made``, ``versions``, ``machine``.

    Parameters
    ----------
    request
        As `moelab.course.challenge.scoring.measure` takes it; plain values only.
    tell
        Called with a few words before each step.

    Raises
    ------
    ValueError
        The entry was refused; the message is the engine's own.
    RuntimeError
        The process ended without an answer, or took longer than a quarter of an hour.
    """
    home = str(Path(moelab.__file__).parent.parent)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as given, tempfile.TemporaryFile() as noise:
        json.dump(request, given)
        given.seek(0)
        with subprocess.Popen(  # noqa: S603, this Python and our own words
            [sys.executable, "-I", "-c", _CODE, home],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=environment,
            cwd=tempfile.gettempdir(),
            encoding="utf-8",
        ) as process:
            too_long = threading.Timer(MOST_SECONDS, process.kill)
            too_long.start()
            try:
                for line in process.stdout or ():
                    answer = json.loads(line)
                    if "step" in answer:
                        tell(answer["step"])
            finally:
                too_long.cancel()
                process.kill()
        noise.seek(0)
        last = noise.read()[-2000:].decode(errors="replace")
    if "error" in answer:
        raise ValueError(answer["error"])
    if "figures" not in answer:
        raise RuntimeError(f"the scoring process ended without an answer; it said: {last}")
    return answer
