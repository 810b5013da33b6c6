"""The runs that a person keeps beside each other in a lab, by name."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.runs.compare import Comparison, recorded, settings_of, unused
from moelab.runs.recording import SUFFIX, Recording

if TYPE_CHECKING:
    from moelab.runs.run import Run


class SavedRuns(Mapping[str, Recording]):
    """Name -> recording, in the order saved; ``lab.saved``.

    Attributes
    ----------
    version
        Grows with every change, for whoever shows them.

    Examples
    --------
    >>> import moelab
    >>> lab = moelab.open("demo", budget="25%")
    >>> run = lab.generate("The", max_new_tokens=4)
    >>> lab.save_run(run, "a quarter")
    'a quarter'
    >>> list(lab.saved)
    ['a quarter']
    """

    def __init__(self) -> None:
        self._saved: dict[str, tuple[Recording, Run | None]] = {}
        self._lock = threading.RLock()  # a view, a what-if and a cell may all save at once
        self.version = 0

    def __getitem__(self, name: str) -> Recording:
        return self._entry(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._saved))

    def __len__(self) -> int:
        return len(self._saved)

    def add(self, run: Run | Recording | None, name: str = "") -> str:
        """Save a run as it stands now; returns its name, numbered where it was taken.

        A run that is saved already keeps its name where no other is given, and is saved as it
        stands now: it may have been repeated since.

        Raises
        ------
        ValueError
            There is no run.
        """
        if run is None:
            raise ValueError("there is no run to save yet; lab.generate(prompt) makes one")
        recording = recorded(run)
        ids, short = recording.document["ids"], settings_of(recording.document)
        with self._lock:
            mine = (
                n for n, (r, of) in self._saved.items() if of is run and r.document["ids"] == ids
            )
            known = None if name else next(mine, None)
            name = known or unused(name or short, self._saved)
            self._saved[name] = recording, None if recording is run else run  # pyright: ignore[reportArgumentType]
            self.version += 1
        return name

    def run(self, name: str) -> Run | None:
        """The run itself where it was made in this session, which ``lab.what_if`` needs."""
        return self._entry(name)[1]

    def remove(self, name: str) -> None:
        """Remove a run."""
        with self._lock:
            self._entry(name)
            del self._saved[name]
            self.version += 1

    def rename(self, name: str, new: str) -> str:
        """Give a saved run another name, in its place; returns it, numbered where it was taken."""
        new = new.strip()
        with self._lock:
            self._entry(name)
            if not new:
                raise ValueError("a saved run needs a name")
            new = unused(new, {n: p for n, p in self._saved.items() if n != name})
            self._saved = {(new if n == name else n): p for n, p in self._saved.items()}
            self.version += 1
        return new

    def take_over(self, former: SavedRuns) -> None:
        """Add what a former lab has saved, before its own; of two of a name its own stays."""
        if former is not self:
            with self._lock:
                self._saved = former._saved | self._saved
                self.version += 1

    def compare(self) -> Comparison:
        """All of them beside each other."""
        return Comparison(dict(self))

    def save(self, folder: str | Path) -> list[Path]:
        """Write each to ``folder`` as ``NAME.moelab.json.gz``, replacing files of these names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        taken: dict[str, Path] = {}
        for name, recording in self.items():
            stem = unused(re.sub(r"[^\w.,%+()→-]+", " ", name).strip() or "run", taken)
            taken[stem] = recording.save(folder / f"{stem}{SUFFIX}")
        return list(taken.values())

    def load(self, folder: str | Path) -> list[str]:
        """Add every recording of a folder, named by its file; returns the names.

        Raises
        ------
        ValueError
            There is none, or a file is not a recording; then none is added.
        """
        files = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not files:
            raise ValueError(f"no recording (*{SUFFIX}) in {folder}")
        found = [(Recording.load(file), file.name.removesuffix(SUFFIX)) for file in files]
        return [self.add(recording, name) for recording, name in found]

    def _entry(self, name: str) -> tuple[Recording, Run | None]:
        if name not in self._saved:
            there = ", ".join(map(repr, self._saved)) or "none yet"
            raise KeyError(f"no run is saved as {name!r}; there are {there}")
        return self._saved[name]
