"""An exported page: one HTML file that holds a recording and the views that draw it.

It works from disk, without network or kernel. The recording is the packed document (gzip) in
base64, in a script element that no browser runs; the scripts and styles are the dashboard's own.
Where scripts do not run the static picture stays.
"""

from __future__ import annotations

import base64
from html import escape

import moelab
from moelab.runs.schema import RECORDING, embedded
from moelab.views.scripts import PAGE_STYLES, script, styles

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""Of the page's contents: nothing can be fetched, whatever is inside."""

__all__ = ["embedded", "html"]

TOO_OLD = (
    "This browser cannot draw the recording: it needs Chrome 97, Firefox 113, Safari 16.4 or newer."
)


def html(packed: bytes, *, title: str, picture: str = "") -> str:
    """The whole page.

    Parameters
    ----------
    packed
        The recording's document, as JSON in gzip.
    title
        Of the page.
    picture
        HTML that is shown until the scripts have run, and where they cannot.

    Examples
    --------
    >>> embedded(html(b"packed", title="a run"))
    b'packed'
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="generator" content="moelab {moelab.__version__}">
<title>{escape(title)}</title>
<style>
{styles(PAGE_STYLES)}
</style>
</head>
<body class="moe-page">
<main id="moelab-page">
{picture}
<p id="moelab-note" role="status">{TOO_OLD}</p>
</main>
{RECORDING}{base64.b64encode(packed).decode()}</script>
<script type="module">
{script("page")}
</script>
</body>
</html>
"""
