"""The live view of a lab, and the picture of it that outlives the kernel."""

from moelab.widgets.dashboard import Dashboard
from moelab.widgets.report import Report

__all__ = ["Dashboard", "Report"]
