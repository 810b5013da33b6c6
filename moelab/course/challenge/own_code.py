"""A policy of one's own as text: taken out of a notebook, looked through, made again elsewhere.

`source_of` collects a class and whatever of the notebook it uses. `make` runs that text in the
scoring process, after `check` has seen that it is a policy and nothing else: imports from a short
list, no names with underscores at both ends, nothing assigned outside of ``self``.

That is a fence against accidents and easy tricks, not a prison. Python cannot be fenced in by
looking at its text: own code runs with the rights of whoever runs it, and one who means harm gets
over the fence, to the stopwatch and to your files. Run code only of people you trust.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import linecache
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHOLE = ("math", "itertools", "heapq")
"""Modules that may be imported as they are; they keep nothing from one run to the next."""
NAMES_OF = (*WHOLE, "__future__", "collections", "collections.abc")
"""Modules whose public names may be imported, as may those of strategies."""
FEW_OF = {
    "functools": ("cache", "lru_cache", "partial", "reduce"),
    "random": ("Random",),
    "typing": ("Any", "ClassVar", "Final", "Literal", "NamedTuple", "Protocol", "Self"),
}
"""Modules of which only these: no shared generator, nothing that evaluates text or writes."""
OURS = (
    "moelab.strategies",
    *(f"moelab.scheduling.{part}" for part in ("parts", "requests", "strategy", "stream", "trace")),
)
PLACES = ("moelab.strategies", "moelab.scheduling.strategy", "collections.abc", "typing")
"""Where a name is looked for that does not say where it is from."""
DOUBLE = ("__init__", "__getitem__", "__contains__", "__len__")
"""The only names with two underscores."""
BARRED = frozenset(
    {"open", "exec", "eval", "compile", "input", "breakpoint", "help", "globals", "locals", "vars"}
    | {"getattr", "setattr", "delattr", "memoryview", "exit", "quit", "type"}
)
FRAMES = frozenset(
    {"gi_frame", "gi_code", "gi_yieldfrom", "f_back", "f_builtins", "f_globals", "f_locals"}
    | {"tb_frame", "tb_next"}
)
"""Attributes that lead out of a policy into the program around it."""
OWN = ("self", "cls")
DECORATORS = ("property", "staticmethod", "classmethod", "cache", "lru_cache")
MOST_CHARACTERS = 20_000
_PLAIN = (int, float, str, bool, tuple, frozenset, type(None))


def source_of(part: type) -> str:
    """The text of a class with the names it uses from where it was written.

    Parameters
    ----------
    part
        A class of a notebook or a module; its base classes, functions and plain constants from
        the same place come along.

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
    text = "\n\n\n".join(found.values())
    check(text)
    return text


def read(path: str | Path) -> str:
    """The text of a file with a policy.

    Raises
    ------
    ValueError
        The file is missing, or more than a policy.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the policy {path}: {error}") from None
    check(text)
    return text


def make(name: str, source: str) -> Any:
    """An object of the class ``name`` that the text defines.

    Raises
    ------
    ValueError
        The text is refused, fails, or has no such class.
    """
    check(source)
    space: dict[str, Any] = {"__name__": "challenge_entry", "__builtins__": _builtins()}
    try:
        exec(compile(source, "<challenge entry>", "exec"), space)  # noqa: S102
        return space[name]()
    except Exception as error:
        raise ValueError(f"the entry's class {name} cannot be made: {error!r}") from error


def check(source: str) -> None:
    """Refuse text that is more than a policy; the message names the line.

    Raises
    ------
    ValueError
        It does not parse, or holds something that a policy has no use for.
    """
    if len(source) > MOST_CHARACTERS:
        raise ValueError(f"the policy has {len(source)} characters; {MOST_CHARACTERS} at most")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the policy is not Python: {error}") from None
    for node in tree.body:
        if not isinstance(node, _TOP) and not _is_text(node):
            raise _refusal(node, "only imports, classes, functions and constants")
    for node in ast.walk(tree):
        if reason := _reason(node):
            raise _refusal(node, reason)
    _check_self(tree)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            _check_assignments(function)


_TOP = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _reason(node: ast.AST) -> str:
    """Why a node may not stand in a policy, or nothing."""
    reason = _REASONS.get(type(node))
    return reason(node) if reason else ""


def _whole_reason(node: ast.Import) -> str:
    barred = [a.name for a in node.names if a.name not in WHOLE]
    return f"import {barred[0]}: only {', '.join(WHOLE)} come whole" if barred else ""


def _name_reason(node: ast.Name) -> str:
    return f"the name {node.id}" if node.id in BARRED or _is_hidden(node.id) else ""


def _attribute_reason(node: ast.Attribute) -> str:
    own = isinstance(node.value, ast.Name) and node.value.id in OWN
    if node.attr in DOUBLE:
        return ""
    if _is_hidden(node.attr) or node.attr in FRAMES:
        return f"the attribute {node.attr}"
    if node.attr.startswith("_") and not own:
        return f"{node.attr} of anything but self"
    if isinstance(node.ctx, (ast.Store, ast.Del)) and not own:
        return "assigning to attributes of anything but self"
    return ""


def _function_reason(node: ast.FunctionDef) -> str:
    hidden = _is_hidden(node.name) and node.name not in DOUBLE
    return f"the method {node.name}" if hidden else ""


def _import_reason(node: ast.ImportFrom) -> str:
    module = node.module or ""
    if node.level or not (module in NAMES_OF or module in FEW_OF or _is_ours(module)):
        return f"import from {module or '.'}: only {', '.join((*NAMES_OF, *FEW_OF, *OURS))}"
    if module in FEW_OF:
        barred = [a.name for a in node.names if a.name not in FEW_OF[module]]
        few = ", ".join(FEW_OF[module])
        return f"import {barred[0]} from {module}: only {few}" if barred else ""
    try:
        there = importlib.import_module(module)
    except ImportError:
        return f"import from {module}: there is no such module"
    for name in (alias.name for alias in node.names):
        thing = getattr(there, name, None)
        public = _is_ours(getattr(thing, "__module__", "")) or name in getattr(there, "__all__", ())
        if not public or name.startswith("_") or isinstance(thing, type(sys)):
            return f"import {name} from {module}"
    return ""


def _is_ours(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in OURS)


def _check_self(tree: ast.Module) -> None:
    """``self`` is the first argument of a method and nothing else, and methods get no other one.

    For the fence lets a policy write into ``self``: whatever else could be put there, it could
    write into.
    """
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {id(m): m for c in classes for m in c.body if isinstance(m, ast.FunctionDef)}
    names = {method.name for method in methods.values()}
    known = {c.name for c in classes}
    first = {
        id(arg)
        for method in methods.values()
        for arg in [*method.args.posonlyargs, *method.args.args][:1]
        if "staticmethod" not in [ast.unparse(d) for d in method.decorator_list]
    }
    for node in ast.walk(tree):
        if any(word in OWN for word in _bound(node)) and id(node) not in first:
            raise _refusal(node, "self and cls as anything but a method's first argument")
        of = node.value if isinstance(node, ast.Attribute) and node.attr in names else None
        if isinstance(of, ast.Name) and of.id in known:
            raise _refusal(node, f"{ast.unparse(node)}: call it on self or super()")
    for part in classes:
        if part.keywords:
            raise _refusal(part, "a metaclass or keywords of a class")
        for node in [*part.body, *part.decorator_list]:
            if isinstance(node, ast.FunctionDef):
                _check_decorators(node)
            elif any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node)):
                raise _refusal(node, "a method as a value")


def _bound(node: ast.AST) -> list[str]:
    """Names that a node makes or makes anew."""
    if isinstance(node, (ast.Attribute, ast.Constant, ast.keyword)):
        return []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return []
    return [value for _, value in ast.iter_fields(node) if isinstance(value, str)]


def _check_decorators(method: ast.FunctionDef) -> None:
    for node in method.decorator_list:
        name = node.func if isinstance(node, ast.Call) else node
        setter = isinstance(name, ast.Attribute) and name.attr in ("setter", "deleter")
        if not setter and not (isinstance(name, ast.Name) and name.id in DECORATORS):
            raise _refusal(method, f"the decorator {ast.unparse(name)}")


def _check_assignments(function: ast.FunctionDef) -> None:
    """What a method was handed, besides itself, it may read and not write."""
    given = {a.arg for a in [*function.args.posonlyargs, *function.args.args]} - {"self"}
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            root = node.value
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if isinstance(root, ast.Name) and root.id in given:
                raise _refusal(node, f"writing into {root.id}")


def _refusal(node: ast.AST, reason: str) -> ValueError:
    line = getattr(node, "lineno", 0)
    return ValueError(f"line {line} of the policy: {reason}; a challenge takes a policy only")


_REASONS: dict[type, Callable[[Any], str]] = {
    ast.Import: _whole_reason,
    ast.ImportFrom: _import_reason,
    ast.Name: _name_reason,
    ast.Attribute: _attribute_reason,
    ast.FunctionDef: _function_reason,
    **{
        kind: lambda node: type(node).__name__.lower()
        for kind in (ast.Global, ast.AsyncFunctionDef, ast.Await, ast.Match)
    },
}


def _is_hidden(name: str) -> bool:
    return name.startswith("__")


def _builtins() -> dict[str, Any]:
    known = {n: v for n, v in vars(builtins).items() if n not in BARRED}
    return {n: v for n, v in known.items() if not n.startswith("_")} | {
        "__import__": builtins.__import__,
        "__build_class__": builtins.__build_class__,
    }


# -- out of a notebook ----------------------------------------------------------------------------


def _collect(name: str, thing: Any, found: dict[str, str]) -> None:
    """Add the text that makes ``name``, after that of everything it needs."""
    if name in found:
        return
    home = getattr(thing, "__module__", None)
    for place in PLACES:
        if getattr(importlib.import_module(place), name, found) is thing:
            found[name] = f"from {place} import {name}"
            return
    if isinstance(thing, type(sys)) and thing.__name__ in WHOLE:
        found[name] = f"import {thing.__name__}" + _renamed(thing.__name__, name)
    elif home in NAMES_OF or home in FEW_OF or _is_ours(str(home)):
        found[name] = f"from {home} import {thing.__name__}" + _renamed(thing.__name__, name)
    elif callable(thing) and hasattr(thing, "__name__"):
        text = _text(thing)
        space = vars(sys.modules[home]) if home in sys.modules else {}
        found[name] = ""  # its place is kept, and a function may name itself
        for used in _names(text):
            if used in space and not used.startswith("__"):
                _collect(used, space[used], found)
        del found[name]
        found[name] = text
    elif isinstance(thing, _PLAIN):
        found[name] = f"{name} = {thing!r}"
    else:
        raise ValueError(
            f"the policy uses {name}, a {type(thing).__name__}, which cannot come along"
        )


def _renamed(real: str, name: str) -> str:
    return "" if real == name else f" as {name}"


def _names(text: str) -> list[str]:
    """Names a text uses, in order; those of its own arguments and variables do no harm."""
    nodes = ast.walk(ast.parse(text))
    names = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    return [name for name in dict.fromkeys(names) if not hasattr(builtins, name)]


def _text(thing: Any) -> str:
    """The text of a class or function; a notebook's cells are in `linecache` too."""
    kind = ast.ClassDef if isinstance(thing, type) else ast.FunctionDef
    inside = [thing, *vars(thing).values()] if isinstance(thing, type) else [thing]
    codes = [f.__code__ for f in inside if hasattr(f, "__code__")]
    for code in codes:
        lines = linecache.getlines(code.co_filename)
        tree = ast.parse("".join(lines)) if lines else ast.Module([], [])
        for node in ast.walk(tree):
            if isinstance(node, kind) and node.name == thing.__name__:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first <= code.co_firstlineno <= (node.end_lineno or first):
                    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip()
    raise ValueError(
        f"the text of {thing.__name__} is not to be found; write it into a file and give "
        f'"file.py:{thing.__name__}"'
    )
