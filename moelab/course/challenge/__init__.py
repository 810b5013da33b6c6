"""Challenges: a memory limit, a loss limit and one figure to win by, scored by the real engine.

An entry is settings, never figures: they go as JSON to a fresh process, which opens the bundled
model on a fixed device, runs fixed prompts, and measures memory, loss and speed itself. So nothing
that was patched or edited in a notebook counts, and `verify` measures a whole board again.

>>> moelab.challenge("six megabytes")  # doctest: +ELLIPSIS
six megabytes: ...
"""

from moelab.course.challenge.board import Leaderboard, leaderboard, verify
from moelab.course.challenge.entering import Challenge, challenge
from moelab.course.challenge.entries import Entry
from moelab.course.challenge.tasks import TASKS, Task

__all__ = ["TASKS", "Challenge", "Entry", "Leaderboard", "Task"]
__all__ += ["challenge", "leaderboard", "verify"]
