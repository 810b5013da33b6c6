"""What people wrote of a run's source, where it is a held-out text, and how near the run came.

Rouge is worked out once, when the run has ended, so that it takes no time from its tokens.
"""

from __future__ import annotations

from typing import Any

from moelab.catalogue import reference


class Reference:
    """Of one run of the model of this name."""

    def __init__(self, name: str, run: Any) -> None:
        self._run, self._known, self._figures = run, reference(name, run.prompt), ""

    def told(self, *, running: bool) -> str:
        """In words; empty where nobody wrote one, as of a text that was edited."""
        if not self._known:
            return ""
        if not (running or self._figures) and self._run.error is None:
            from moelab.runs.rouge import rouge

            found = rouge([self._run.text], [self._known])
            self._figures = " (Rouge-1, 2, L: {:.2f}, {:.2f}, {:.2f})".format(*found)
        return f"Reference: {self._known}{self._figures}"
