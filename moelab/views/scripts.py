"""The views' scripts, ES modules joined into the one that a notebook or a page loads, and styles.

The files import each other by name, so that Node and editors read them as they are. Here each
file follows those it imports, its `import` lines (``import { a } from "./b.js"``) and the word
`export` are taken away, and all share one scope: no two files may declare the same name. Comments
stay behind, of styles those on lines of their own: every widget sends both. Nothing is installed,
and no tool has to run before a change is seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

STATIC = Path(__file__).parent / "static"
STYLES = ("controls", "views", "history", "compare", "dashboard")
PAGE_STYLES = ("controls", "views", "history", "dashboard", "page")

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)
_COMMENT = re.compile(r"^ *(?://.*|/\*\*(?s:.*?)\*/)\n", re.MULTILINE)
_BEHIND = re.compile(r"""(?<=[;,{}()\[\]]) +// [^"'`\n]*$""", re.MULTILINE)
_OF_STYLES = re.compile(r"^ */\*(?s:.*?)\*/\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?!default )", re.MULTILINE)


def script(entry: str, folder: Path = STATIC) -> str:
    """The module of this name with all it imports, as one text.

    Raises
    ------
    FileNotFoundError
        A file that is imported is not there.
    graphlib.CycleError
        Files import each other in a circle.
    """
    texts: dict[str, str] = {}
    graph: dict[str, set[str]] = {}
    todo = [entry]
    while todo:
        name = todo.pop()
        if name not in texts:
            texts[name] = (folder / f"{name}.js").read_text(encoding="utf-8")
            graph[name] = set(_IMPORT.findall(texts[name]))
            todo += graph[name]
    return "\n".join(_bare(texts[name]) for name in TopologicalSorter(graph).static_order())


def styles(names: Iterable[str]) -> str:
    """The style sheets of these names as one text, in this order."""
    texts = ((STATIC / f"{name}.css").read_text(encoding="utf-8") for name in names)
    return "\n".join(_OF_STYLES.sub("", text) for text in texts)


def _bare(text: str) -> str:
    """A script without what makes it a module, and without comments."""
    for part in (_IMPORT, _COMMENT, _BEHIND, _EXPORT):
        text = part.sub("", text)
    return text
