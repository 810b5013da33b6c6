"""Whether a tokenizer.json can be used, tried in a process of its own.

It holds regular expressions and chains of rules that its maker chose. Some never come to an end,
some fill the memory, and nothing stops them from within the process that asked. What this does not
know: texts that are worse than those it tries.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MOST_BYTES = 256 << 20
SECONDS, MEMORY = 10, 4 << 30
TEXTS = (
    "Hello, world! It's 12,345.67 o'clock.\n\n\tif (x == 0) { return 'äöü ß 日本語 😀'; }",
    *(piece * 3000 for piece in ("a", " ", "1", "!", "\n", "aA", "é")),
    *(piece * 1000 + "!" for piece in ("a", "a ", "ab1")),
)


def try_tokenizer(file: Path) -> None:
    """Read a tokenizer.json and encode some texts, elsewhere and with a limit.

    Raises
    ------
    ValueError
        That fails, or takes too long or too much memory.
    """
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{file} has {size} bytes, at most {MOST_BYTES} are read")
    command = [sys.executable, "-I", __file__, str(file)]
    try:
        done = subprocess.run(  # noqa: S603, our own words
            command, capture_output=True, text=True, check=False, timeout=4 * SECONDS
        )
        reason = done.stderr.strip().rpartition("\n")[2][:300] if done.returncode else ""
        if done.returncode < 0:  # by a signal
            reason = f"it takes more than {SECONDS} s or {MEMORY >> 30} GiB"
    except subprocess.TimeoutExpired:
        reason = f"it was not done after {4 * SECONDS} s"
    if reason:
        raise ValueError(f"{file} cannot be used ({reason}); repair it and pack again")


def _main(file: str) -> None:
    try:
        import resource
    except ImportError:  # Windows: there the time alone has a limit
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # seconds of processor time
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        if len(ids) > 100 * len(text) + 100:
            raise SystemExit(f"it makes {len(ids)} tokens of {len(text)} characters")
        tokenizer.decode(ids)


if __name__ == "__main__":
    _main(sys.argv[1])
