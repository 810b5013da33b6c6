"""A policy of one's own as text: taken out of a notebook, and run as a file where it is measured.

The text is Python like any other. It may import what is installed, and it does what whoever runs it
may do; nothing looks through it first. So an entry's own code runs when its author enters it, and
in `verify` only where that is asked for.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import runpy
import sys
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import moelab

RIGHTS = "own code runs as it is, with the rights of whoever measures it"
"""What a person is told wherever own code is asked for, run or shown."""
MOST_CHARACTERS = 20_000


def source_of(part: type) -> str:
    """The text of a class with the names it uses from where it was written.

    Parameters
    ----------
    part
        A class of a notebook or a module; its base classes, functions and plain constants from
        the same place come along, what is installed is imported.

    Raises
    ------
    ValueError
        The text is not to be found, or it uses something that cannot come along.

    Examples
    --------
    >>> from moelab.strategies.basics import LRU
    >>> print(source_of(LRU).splitlines()[-1])
    from moelab.strategies.basics import LRU
    """
    found = {"": "from __future__ import annotations"}
    _collect(part.__name__, part, found)
    return _short("\n\n\n".join(found.values()))


def text_of(path: str | Path) -> str:
    """The text of a file with a policy.

    Raises
    ------
    ValueError
        The file cannot be read, or is too long.
    """
    try:
        return _short(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the policy {path}: {error}") from None


def _short(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the policy has {len(text)} characters; {MOST_CHARACTERS} at most")
    return text


def make(name: str, source: str) -> Any:
    """An object of the class ``name``; the text is run anew, so nothing is left of earlier objects.

    Raises
    ------
    ValueError
        The text fails, or has no such class.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "own_code.py"
        file.write_text(source, "utf-8")
        try:
            return runpy.run_path(str(file))[name]()
        except Exception as error:
            raise ValueError(f"own code: no {name} can be made of it: {error!r}") from error


# -- out of a notebook ----------------------------------------------------------------------------


def _collect(name: str, thing: Any, found: dict[str, str]) -> None:
    """Add the text that makes ``name``, after that of everything it needs."""
    if name in found:
        return
    module = isinstance(thing, ModuleType)
    real = getattr(thing, "__name__", "")
    home = real if module else str(getattr(thing, "__module__", ""))
    renamed = "" if real == name else f" as {name}"
    if getattr(moelab.strategies, real, found) is thing:
        found[name] = f"from moelab.strategies import {real}{renamed}"
    elif _installed(home) and (module or getattr(sys.modules.get(home), real, found) is thing):
        found[name] = f"import {real}{renamed}" if module else f"from {home} import {real}{renamed}"
    elif real and not module and callable(thing):
        text, space = _text(thing), vars(sys.modules[home]) if home in sys.modules else {}
        found[name] = ""  # so that a function may name itself
        for used in _names(text):
            if used in space:
                _collect(used, space[used], found)
        del found[name]  # it comes after what it uses
        found[name] = text
    else:
        try:
            ast.literal_eval(repr(thing))
        except (ValueError, SyntaxError):
            kind = type(thing).__name__
            raise ValueError(f"the policy uses {name}, a {kind}, which cannot come along") from None
        found[name] = f"{name} = {thing!r}"


def _installed(module: str) -> bool:
    """Whether the measuring process, which sees no folder of the user's, can import it."""
    top = module.partition(".")[0]
    return top in ("moelab", *sys.stdlib_module_names) or top in metadata.packages_distributions()


def _names(text: str) -> list[str]:
    """Names a text uses, in order, but for annotations, which need not be there when it runs."""
    tree = ast.parse(text)
    notes = [getattr(n, field, None) for n in ast.walk(tree) for field in ("annotation", "returns")]
    skipped = {id(n) for note in notes if isinstance(note, ast.AST) for n in ast.walk(note)}
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in skipped]
    return [name for name in dict.fromkeys(names) if not hasattr(builtins, name)]


def _text(thing: Any) -> str:
    """The text of a class or function; `linecache` has a notebook's cells too."""
    inside = (thing, *vars(thing).values())
    for code in (f.__code__ for f in inside if hasattr(f, "__code__")):
        lines = linecache.getlines(code.co_filename)
        for node in ast.walk(ast.parse("".join(lines))):
            if getattr(node, "name", "") == thing.__name__ and isinstance(
                node, (ast.ClassDef, ast.FunctionDef)
            ):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first <= code.co_firstlineno <= (node.end_lineno or first):
                    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip()
    raise ValueError(
        f"the text of {thing.__name__} is not to be found; write it into a file and give "
        f'"file.py:{thing.__name__}"'
    )
