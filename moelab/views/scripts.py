"""The views' scripts, ES modules joined into the one that a notebook or a page loads, and styles.

The files import each other by name, so that Node and editors read them as they are. Here each
file follows those it imports, its `import` lines and the word `export` are taken away, and all
share one scope: therefore no two files may declare the same name. Nothing is installed, and no
tool has to run before a change is seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

STATIC = Path(__file__).parent / "static"
STYLES = ("controls", "views", "history", "compare", "dashboard")
PAGE_STYLES = ("controls", "views", "history", "dashboard", "page")

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";\n', re.MULTILINE)
_TYPES = re.compile(r"^/\*\* @import .*\*/\n", re.MULTILINE)  # for editors and tsc alone
_EXPORT = re.compile(r"^export (?!default )", re.MULTILINE)
_DECLARED = re.compile(r"^(export )?(?:async )?(?:const|let|class|function) (\w+)", re.MULTILINE)


def script(entry: str, folder: Path = STATIC) -> str:
    """The module of this name with all it imports, as one text.

    Raises
    ------
    ValueError
        A file or a name that is imported is not there, files import each other in a circle, two
        declare one name, or an import reads otherwise than ``import { a } from "./b.js"``.
    """
    texts: dict[str, str] = {}
    graph: dict[str, set[str]] = {}
    todo = [entry]
    while todo:
        name = todo.pop()
        if name in texts:
            continue
        texts[name] = _read(folder, name, entry)
        graph[name] = {other for _, other in _IMPORT.findall(texts[name])}
        todo += graph[name]
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        circle = " -> ".join(f"{name}.js" for name in reversed(e.args[1]))
        raise ValueError(f"scripts import each other in a circle: {circle}") from None
    _check(texts)
    return "\n".join(_bare(texts[name]) for name in order)


def styles(names: Iterable[str]) -> str:
    """The style sheets of these names as one text, in this order."""
    return "\n".join((STATIC / f"{name}.css").read_text(encoding="utf-8") for name in names)


def _bare(text: str) -> str:
    """A script without what makes it a module."""
    for part in (_IMPORT, _TYPES, _EXPORT):
        text = part.sub("", text)
    return text


def _read(folder: Path, name: str, entry: str) -> str:
    path = folder / f"{name}.js"
    if not path.is_file():
        raise ValueError(f"{name}.js, which {entry}.js needs, is not in {folder}")
    return path.read_text(encoding="utf-8")


def _check(texts: dict[str, str]) -> None:
    """What is imported is exported, in the one way that is read here; no name comes twice."""
    declared = {name: _DECLARED.findall(text) for name, text in texts.items()}
    for name, text in texts.items():
        if other := re.search(r"^import .*", _IMPORT.sub("", text), re.MULTILINE):
            raise ValueError(f'{name}.js: {other[0]}; write import {{ a }} from "./b.js"')
        for wanted, source in _IMPORT.findall(text):
            exported = {declaration for word, declaration in declared[source] if word}
            if missing := {w for w in re.split(r"[,\s]+", wanted) if w} - exported:
                raise ValueError(f"{name}.js: {source}.js does not export {', '.join(missing)}")
    counts = Counter(declaration for found in declared.values() for _, declaration in found)
    if twice := [declaration for declaration, count in counts.items() if count > 1]:
        raise ValueError(f"declared in two scripts: {', '.join(twice)}; give one another name")
