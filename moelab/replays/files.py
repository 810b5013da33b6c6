"""Every kind of file that a trace can be read from; importing this is what makes them known."""

from __future__ import annotations

from moelab.replays import foreign, parquet
from moelab.scheduling.trace import Trace

__all__ = ["Trace", "foreign", "parquet"]
