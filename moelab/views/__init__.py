"""Draws a recording: scripts, page, report, picture, charts."""
