"""The bench: everything it says was measured here and now, through the public API.

`bench` measures any strategy x budget x device; `papers` asks the questions of EdgeMoE, HOBBIT and
SwapMoE and puts the papers' own figures beside the answers.
"""

from moelab.bench.grid import BUDGETS, DEVICES, PROMPT, STRATEGIES, Case, bench, report
from moelab.bench.papers.contenders import contender
from moelab.bench.papers.suite import Files, Suite
from moelab.bench.papers.tables import as_markdown, as_record

__all__ = [
    "BUDGETS",
    "DEVICES",
    "PROMPT",
    "STRATEGIES",
    "Case",
    "Files",
    "Suite",
    "as_markdown",
    "as_record",
    "bench",
    "contender",
    "report",
]
