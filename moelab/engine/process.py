"""The process that something belongs to: threads do not come along when it forks."""

from __future__ import annotations

import os


class Process:
    """The process this is made in; ``what`` belongs to it and to no child."""

    def __init__(self, what: str) -> None:
        self._id, self._what = os.getpid(), what

    @property
    def here(self) -> bool:
        """Whether it is this one, and not one that this is a fork of."""
        return os.getpid() == self._id

    def check(self) -> None:
        """Refuse to go on in a forked child, where whoever would answer does not exist.

        Raises
        ------
        RuntimeError
            This is another process.
        """
        if not self.here:
            raise RuntimeError(
                f"{self._what} in process {self._id} and this is {os.getpid()}, a fork of it "
                "without its threads; open a lab of its own here: moelab.open(...)"
            )
