"""A chat template within bounds: it is a program that somebody else wrote.

transformers renders it in a sandbox, which keeps it from the machine but not from running for ever
or filling the memory. Here it has a time, an amount of memory and a length of what it writes; and
it may not multiply so that a single step of it would be too much.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

try:
    import resource
except ImportError:  # Windows: the memory of a template is not watched there, its time is
    resource = None

MOST_SOURCE = 1 << 18  # characters
MOST_OUTPUT = 500_000  # characters: some 128,000 tokens
MOST_TIMES = 100  # what a product may multiply by: '=' * 80
SECONDS, MOST_BYTES = 5.0, 1 << 29
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


@contextmanager
def within_bounds(source: str) -> Iterator[None]:
    """Inside, transformers renders this template, in this thread, as far as its bounds let it.

    Raises
    ------
    ValueError
        The template goes beyond a bound, or cannot be read or rendered at all.
    """
    before, begun, peak = sys.gettrace(), time.monotonic(), _peak_bytes()

    def watch(frame: FrameType, _event: str, _argument: Any) -> Any:
        """Called for each line of the template, of nothing else."""
        if frame.f_code.co_filename != "<template>":
            return None
        if time.monotonic() - begun > SECONDS:
            raise TimeoutError(f"it runs for more than {SECONDS:g} s")
        if _peak_bytes() - peak > MOST_BYTES:
            raise MemoryError(f"it takes more than {MOST_BYTES >> 20} MiB")
        return watch

    try:
        _check_source(source)
        environment: Any = _compile_jinja_template(source).environment
        environment.concat = _concat
        sys.settrace(watch)
        yield
    except Exception as error:
        words = str(error).strip()[:300] or type(error).__name__
        raise ValueError(f"this model's chat template cannot be used: {words}") from error
    finally:
        sys.settrace(before)


def _check_source(source: str) -> None:
    if len(source) > MOST_SOURCE:
        raise ValueError(f"it is {len(source)} characters long, at most {MOST_SOURCE} are read")
    parsed = _compile_jinja_template("").environment.parse(source)
    small = [
        any(isinstance(s, nodes.Const) and s.value in range(MOST_TIMES + 1) for s in sides)
        and not any(isinstance(s, nodes.Mul) for s in sides)
        for sides in ((product.left, product.right) for product in parsed.find_all(nodes.Mul))
    ]
    if not all(small) or parsed.find(nodes.Pow) is not None:
        raise ValueError(f"it multiplies by something else than a number up to {MOST_TIMES}")


def _concat(pieces: Iterable[str]) -> str:
    """What a template writes, joined; jinja asks for it piece by piece."""
    found, length = [], 0
    for piece in pieces:
        found.append(piece)
        length += len(piece)
        if length > MOST_OUTPUT:
            raise OverflowError(f"it writes more than {MOST_OUTPUT} characters")
    return "".join(found)


def _peak_bytes() -> int:
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT
