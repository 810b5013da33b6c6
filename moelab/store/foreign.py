"""What a library raises over somebody else's file becomes a `StoreError` that names the file.

transformers, tokenizers, safetensors and jinja each have errors of their own, some of them panics
that are no `Exception`; a person who opened a store wants to know which file is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelab.store.manifest import StoreError, shortened


@contextmanager
def foreign(file: Path) -> Iterator[None]:
    """Inside, a library works on a file of a store; whatever it raises is said of that file.

    Raises
    ------
    StoreError
        With the library's words, shortened, and what to do.
    """
    try:
        yield
    except (StoreError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the panics of tokenizers are no `Exception`
        if isinstance(error, ValueError) and str(file.parent) in str(error):  # moelab's own words
            raise StoreError(shortened(error, 1000)) from error
        words = shortened(error) or type(error).__name__
        where = "" if str(file.parent) in words else f"{file}: "
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        mend = "repair the checkpoint and pack it again"
        raise StoreError(f"{where}{kind}{words}; {mend}") from error
