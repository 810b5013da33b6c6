"""The bench: everything it says was measured here and now, through the public API.

`bench` measures any strategy x budget x device; `papers` asks the questions of EdgeMoE, HOBBIT and
SwapMoE and puts the papers' own figures beside the answers; `deciding` times the scheduler alone;
`moelab.bench.papers.regimes` measures the papers on ghosts of their models' sizes.
"""

from moelab.bench.cases import PROMPT, Case, contender
from moelab.bench.grid import BUDGETS, DEVICES, STRATEGIES, bench, report
from moelab.bench.papers.suite import Files, Suite
from moelab.bench.scheduler import deciding, deciding_report
from moelab.bench.tables import as_json, as_markdown, as_record

__all__ = ["BUDGETS", "DEVICES", "PROMPT", "STRATEGIES", "Case", "Files", "Suite", "as_json"]
__all__ += ["as_markdown", "as_record", "bench", "contender", "deciding", "deciding_report"]
__all__ += ["report"]
