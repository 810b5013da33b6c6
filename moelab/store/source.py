"""The checkpoint that a store is made of: a folder or a download, and which of its files count.

What it does not know: what is in a weight's file (`moelab.models.shards`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from moelab.models.gguf_header import parts_of, unfold
from moelab.models.shards import GGUF, Checkpoint, weight_files
from moelab.store import hub
from moelab.store.destination import partial_folder, remove_stale
from moelab.store.foreign import foreign
from moelab.store.manifest import FORMAT, StoreError, digest
from moelab.store.paths import cache_dir

_KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*processor_config.json",
    "*.tiktoken",
    "*.model",
    "LICENSE*",
    "NOTICE*",
)
_POINTER = b"version https://git-lfs.github.com/spec/"


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether it is a text like ``org/name`` and no path of this machine; a `Path` is a path.

    ``org/name:file.gguf`` is one GGUF file of it.
    """
    named = isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+\.gguf)?", source)
    return bool(named) and not Path(source).exists()


def find(source: str | os.PathLike[str]) -> tuple[Path, str, Checkpoint | None]:
    """The checkpoint's folder, the name to remember it by, and its weights if they are not there.

    Of a hub what is small is fetched, and a GGUF file.

    Raises
    ------
    StoreError
        It is neither, or cannot be reached, or holds another format than safetensors.
    """
    if not is_hub_id(source):
        folder = Path(source).expanduser().resolve()
        if folder.is_file() and folder.suffix == ".gguf":
            return unfolded(folder), folder.stem, None
        refuse_formats(folder)
        if not folder.is_dir():
            raise StoreError(
                f"{source} is neither a folder nor a hub id such as 'allenai/OLMoE-1B-7B-0924'"
            )
        return folder, folder.name, None
    repo, _, file = str(source).partition(":")
    found, weights = (hub.gguf(repo, file, _KEPT), None) if file else hub.look(repo, _KEPT)
    return unfolded(found) if found.suffix == ".gguf" else found, str(source), weights


def kept(folder: Path) -> list[Path]:
    """The files that go along into a store as they are: configuration, tokenizer, licence."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [file for file in files if any(fnmatch(file.name, pattern) for pattern in _KEPT)]


def refuse_pointers(files: Iterable[Path]) -> None:
    """Refuse what Git LFS leaves in place of a file that was not fetched.

    Raises
    ------
    StoreError
        By the first such file's name.
    """
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise StoreError(
                    f"{file} is a pointer of Git LFS and not the file itself; run `git lfs pull` "
                    f"in {file.parent}"
                )


def state(folder: Path) -> list[tuple]:
    """Changes with every file that packing reads, also where size and time were kept.

    A file that is replaced or written to gets another time of change (`st_ctime`), which no
    program can set.
    """
    files = [(file, file.stat()) for file in (*weight_files(folder), *kept(folder))]
    return [(file.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in files]


def refuse_formats(path: Path) -> None:
    """Name what a model of another kind is, instead of what it lacks.

    Raises
    ------
    StoreError
        It is a folder with GGUF files and no safetensors.
    """
    gguf = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if gguf and not any(path.glob("*.safetensors")):
        raise StoreError(
            f"{path} holds GGUF files, the format of llama.cpp, and no safetensors; give one of "
            f"them by name, like {gguf[0]}"
        )


def unfolded(file: Path) -> Path:
    """The folder that stands for a GGUF file as a checkpoint: made in the cache, once a state.

    Raises
    ------
    StoreError
        It is damaged, or of an architecture that is not read.
    """
    with foreign(file):
        parts = [(str(part), part.stat()) for part in parts_of(file)]
    said = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in parts]
    name = digest(repr((said, FORMAT)).encode())[:16]
    made = cache_dir() / "gguf" / f"{file.stem.encode()[:100].decode(errors='ignore')}-{name}"
    if not (made / GGUF).is_file():
        remove_stale(made)
        with partial_folder(made) as partial:
            with foreign(file):
                unfold(file, partial)
            with suppress(OSError):  # somebody else has just made the same
                partial.rename(made)
    return made
