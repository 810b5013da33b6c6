"""The one way in which moelab writes a file: whole or not at all."""

from __future__ import annotations

import uuid
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a failed writing leaves what was there.

    Nothing is synced: a process that is killed loses nothing, a machine without power may.

    Raises
    ------
    OSError
        The folder is missing, cannot be written, or is full; the error names the file.
    """
    # No two writers share a temporary, in whatever process, container or machine they are.
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write it: {error.strerror or error}", str(path)
        ) from error
    finally:
        part.unlink(missing_ok=True)
