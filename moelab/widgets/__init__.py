"""The live view of a lab; a picture of it (`Report`) outlives the kernel."""

from moelab.views.report import Report
from moelab.widgets.dashboard import Dashboard

__all__ = ["Dashboard", "Report"]
