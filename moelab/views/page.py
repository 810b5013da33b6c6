"""An exported page: one HTML file that holds a recording and the views that draw it.

It works from disk, without network or kernel. The recording is the packed document (gzip) in
base64, in a script element that no browser runs; the scripts and styles are the dashboard's own.
Where scripts do not run the static picture stays.
"""

from __future__ import annotations

import base64
import binascii
import re
from html import escape

import moelab
from moelab.views.scripts import PAGE_STYLES, script, styles

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""Of the page's contents: nothing can be fetched, whatever is inside."""

RECORDING = '<script id="moelab-recording" type="application/gzip;base64">'
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


def embedded(text: str) -> bytes | None:
    """The packed document inside an exported page; None where there is none.

    Raises
    ------
    ValueError
        It is there, but is not base64: the file is damaged.
    """
    found = re.search(re.escape(RECORDING) + r"([^<]*)</script>", text)
    if found is None:
        return None
    try:
        return base64.b64decode(found[1], validate=True)
    except binascii.Error as e:
        raise ValueError(f"the recording inside the page is damaged: {e}") from e
