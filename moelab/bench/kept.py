"""What a long suite has measured by now, in the cache folder: killed, it goes on where it was.

A file belongs to what was asked, to this version and to this machine's processor; a complete suite
removes its own. What it does not know: whether the machine was busier then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from typing import Any

from tqdm.auto import tqdm

import moelab
from moelab.bench.tables import circumstances
from moelab.scheduling.writing import write_atomically
from moelab.store.paths import cache_dir


class Kept:
    """The pieces of one suite.

    Parameters
    ----------
    suite
        Its name.
    asked
        All that decides what is measured; of another one nothing is taken.
    """

    def __init__(self, suite: str, *asked: Any) -> None:
        machine = circumstances()["machine"]
        said = repr((moelab.__version__, machine["processor"], machine["cores"], *asked))
        digest = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        self.path = cache_dir() / "bench" / f"{suite}-{digest}.json"

    def load(self) -> Any:
        """What was kept; None where there is nothing, or it is damaged."""
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        words = "goes on with what was measured before; to begin anew, delete"
        tqdm.write(f"moelab: {words} {self.path}", file=sys.stderr)
        return found

    def save(self, what: Any) -> None:
        """All that was measured by now, in place of what was kept before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(what, default=lambda one: one.item()).encode())

    def complete(self) -> None:
        """Nothing is to go on."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
