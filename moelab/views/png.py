"""A picture as PNG: resvg draws the SVG, with fonts that moelab brings.

A machine without fonts, as a container often is, draws the same picture as any other. Only text
beyond Latin, Greek and Cyrillic needs fonts of the machine's own.
"""

from __future__ import annotations

from pathlib import Path

FONTS = Path(__file__).parent / "fonts"
ZOOM = 2.0
_OWN = (*range(0x500), *range(0x2010, 0x2800), 0xFFFD)
"""Characters that the fonts have, but for a few symbols."""


def png(svg: str) -> bytes:
    """The picture at twice its size in pixels.

    Raises
    ------
    ImportError
        resvg-py is not installed; the message has the command that installs it.
    """
    try:
        import resvg_py
    except ImportError as e:
        raise ImportError("a PNG needs resvg-py: pip install resvg-py; or png=False") from e
    own = set(map(ord, svg)) <= set(_OWN)
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg,
            zoom=ZOOM,
            skip_system_fonts=own,
            font_files=[str(path) for path in sorted(FONTS.glob("*.ttf"))],
            font_family="DejaVu Sans",
            sans_serif_family="DejaVu Sans",
            monospace_family="DejaVu Sans Mono",
        )
    )
