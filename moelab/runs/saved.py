"""Pinned runs: any number, by name, kept as recordings; saved to a folder and loaded again."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.runs.compare import Comparison, recorded, unused
from moelab.runs.recording import SUFFIX, Recording

if TYPE_CHECKING:
    from moelab.runs.run import Run


class Pins(Mapping[str, Recording]):
    """Name -> recording, in the order pinned; ``lab.pins``.

    Attributes
    ----------
    version
        Grows with every change, for whoever shows them.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="25%")
    >>> run = lab.generate("The", max_new_tokens=4)
    >>> lab.pin(run, "a quarter")
    'a quarter'
    >>> list(lab.pins)
    ['a quarter']
    """

    def __init__(self) -> None:
        self._pinned: dict[str, tuple[Recording, Run | None]] = {}
        self._lock = threading.RLock()  # a view, a what-if and a cell may all pin at once
        self.version = 0

    def __getitem__(self, name: str) -> Recording:
        if name not in self._pinned:
            there = ", ".join(map(repr, self._pinned)) or "none yet"
            raise KeyError(f"no run is pinned as {name!r}; there are {there}")
        return self._pinned[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._pinned))

    def __len__(self) -> int:
        return len(self._pinned)

    def add(self, run: Run | Recording, name: str = "") -> str:
        """Pin a run as it stands now; returns its name, numbered where it was taken.

        A run that is pinned already keeps its name where no other is given.
        """
        recording = recorded(run)
        ids, short = recording.document["ids"], recording.document["settings"][0]["short"]
        with self._lock:
            mine = [
                n for n, (r, of) in self._pinned.items() if of is run and r.document["ids"] == ids
            ]
            if mine and not name:
                return mine[0]
            name = unused(name or short, self._pinned)
            self._pinned[name] = recording, None if recording is run else run  # pyright: ignore[reportArgumentType]
            self.version += 1
        return name

    def run(self, name: str) -> Run | None:
        """The run itself where it was made in this session, which ``lab.what_if`` needs."""
        _ = self[name]
        return self._pinned[name][1]

    def remove(self, name: str) -> None:
        """Unpin a run."""
        with self._lock:
            _ = self[name]
            del self._pinned[name]
            self.version += 1

    def rename(self, name: str, new: str) -> str:
        """Give a pinned run another name, in its place; returns it, numbered where it was taken."""
        new = new.strip()
        with self._lock:
            _ = self[name]
            if not new:
                raise ValueError("a pinned run needs a name")
            others = {n: p for n, p in self._pinned.items() if n != name}
            new = unused(new, others)
            self._pinned = {(new if n == name else n): p for n, p in self._pinned.items()}
            self.version += 1
        return new

    def compare(self) -> Comparison:
        """All of them beside each other."""
        return Comparison(dict(self))

    def save(self, folder: str | Path) -> list[Path]:
        """Write each to ``folder`` as ``NAME.moelab.json.gz``, replacing files of these names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        taken: dict[str, None] = {}
        for name in self:
            taken[unused(re.sub(r"[^\w.,%+()-]+", " ", name).strip() or "run", taken)] = None
        files = [folder / f"{stem}{SUFFIX}" for stem in taken]
        for recording, file in zip(self.values(), files, strict=True):
            recording.save(file)
        return files

    def load(self, folder: str | Path) -> list[str]:
        """Pin every recording of a folder, named by its file; returns the names.

        Raises
        ------
        ValueError
            There is none, or a file is not a recording; then none is pinned.
        """
        files = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not files:
            raise ValueError(f"no recording (*{SUFFIX}) in {folder}")
        found = [(Recording.load(file), file.name.removesuffix(SUFFIX)) for file in files]
        return [self.add(recording, name) for recording, name in found]
