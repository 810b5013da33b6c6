"""A repository of a Hugging Face hub as a checkpoint whose shards come when they are needed.

What is small (configuration, tokenizer) goes into the hub's own cache, as for any other program;
the weights' headers are read where they lie, and each shard is fetched into the half-made store,
held against the hub's checksum, and removed when all that it holds is packed. What it does not
know: which tensor is an expert's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash
from tqdm.auto import tqdm

from moelab.models.gguf_header import parts_of
from moelab.models.shards import Checkpoint, place, read_header, weight_files
from moelab.store.destination import check_room, make_folder
from moelab.store.manifest import StoreError, shortened

_HEADERS_AT_ONCE = 8
_FAILS = (*HfHubHTTPError.__bases__, ValueError)  # all of httpx, which is httpx2 in some versions
SHARDS = "shards"  # folder of a half-made store
INDEX = "model.safetensors.index.json"


class HubCheckpoint(Checkpoint):
    """The safetensors files of one revision of a repository.

    Parameters
    ----------
    folder
        Of the revision in the hub's cache, which has its name.
    repo, weights
        The repository, and which of its files to read.
    """

    remote = resumes = True

    def __init__(self, folder: Path, repo: str, weights: Sequence[RepoSibling]) -> None:
        self.path, self._repo, self._weights = folder, repo, weights
        self.files = [folder / w.rfilename for w in weights]
        self.checksums = {w.rfilename: _told_checksum(w) for w in weights}
        self.info, self._settled, self._told = {}, set(), None
        api = HfApi()

        def header(name: str) -> dict[str, dict]:
            found = api.parse_safetensors_file_metadata(repo, name, revision=folder.name)
            return {key: vars(tensor) for key, tensor in found.tensors.items()}

        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            for shard, entries in enumerate(pool.map(header, (w.rfilename for w in weights))):
                self.info |= place(self.files[shard], entries, shard)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each shard, as the hub says."""
        return [int(w.size or 0) for w in self._weights]

    def into(self, folder: Path, tell: Callable[[str], None], *, bars: bool) -> None:
        """Let shards lie in this folder from now on, and say how far each has come."""
        make_folder(folder)
        self.files = [folder / file.name for file in self.files]
        self._told = _bar(tell, shown=bars)

    def fetch(self, shards: Iterable[int]) -> None:
        """Have these shards here, whole and as the hub has them.

        Raises
        ------
        StoreError
            One cannot be fetched, or is not what the hub says; what was fetched of it is kept in
            the first case and removed in the second.
        """
        for shard in shards:
            file = self.files[shard]
            if not file.is_file():
                self._fetch(file, self.sizes[shard])
            if shard not in self._settled:
                self._settle(file, shard)

    def _fetch(self, file: Path, size: int) -> None:
        part = file.with_suffix(".part")
        url = huggingface_hub.hf_hub_url(
            *(self._repo, file.name), revision=self.path.name, endpoint=constants.ENDPOINT
        )
        with asking(self._repo, _FAILS), part.open("ab") as stream:
            file_download.http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=file.name,
                tqdm_class=self._told,
            )
        _verify(self._repo, part, self.checksums[file.name])
        part.rename(file)

    def _settle(self, file: Path, shard: int) -> None:
        """Now that it is here, its tensors' places are those of the file itself."""
        found = read_header(file, shard)
        told = {key: i for key, i in self.info.items() if i.shard == shard}
        if {k: (i.dtype, i.shape) for k, i in found.items()} != {
            k: (i.dtype, i.shape) for k, i in told.items()
        }:
            raise StoreError(
                f"{self._repo}: the header of {file.name} is another one than the hub showed "
                "before; open the model again"
            )
        self.info |= found
        self._settled.add(shard)

    def free(self, shards: Iterable[int]) -> None:
        """Remove these shards from the disk."""
        for shard in shards:
            self.files[shard].unlink(missing_ok=True)


def look(repo: str, kept: Sequence[str]) -> tuple[Path, HubCheckpoint | None]:
    """A repository's folder in the hub's cache, and its weights where they are not in there.

    Where it holds one GGUF file and no safetensors, that file.

    Raises
    ------
    StoreError
        It cannot be reached, or holds no weights that are read.
    """
    with asking(repo):
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=[*kept, INDEX], ignore_patterns=["*/*"]
        )
        path = Path(folder)
        with suppress(ValueError):
            if weight_files(path):  # another program has fetched all of it
                return path, None
        listed = HfApi().model_info(repo, revision=path.name, files_metadata=True).siblings or []
        weights = _weights(path, repo, listed)
        if weights[0].rfilename.endswith(".gguf"):
            return gguf(repo, weights[0].rfilename, kept), None
        return path, HubCheckpoint(path, repo, weights)


def _weights(folder: Path, repo: str, listed: Sequence[RepoSibling]) -> list[RepoSibling]:
    """The files that `weight_files` would choose, had it all of them; else the one GGUF file."""
    by_name = {f.rfilename: f for f in listed}
    index = folder / INDEX
    if "model.safetensors" in by_name:
        return [by_name["model.safetensors"]]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if missing := [name for name in names if name not in by_name or "/" in name]:
            raise StoreError(
                f"{repo} names {missing[0]!r} in its index and does not hold it beside that; "
                "choose another model"
            )
        return [by_name[name] for name in names]
    plain = (f for f in listed if "/" not in f.rfilename and f.rfilename[:12] != "consolidated")
    if found := [f for f in plain if f.rfilename.endswith(".safetensors")]:
        return found
    found = [
        f for f in listed if re.search(r"(?<!-of-\d{5})\.gguf$|-00001-of-\d+\.gguf$", f.rfilename)
    ]
    if len(found) != 1:
        raise StoreError(
            f"{repo} holds no safetensors; "
            + (
                f"give one of its {len(found)} GGUF files by name, like "
                f"'{repo}:{found[0].rfilename}'"
                if found
                else "other weights than these and GGUF files are not read: a pickle can run code"
            )
        )
    return found


def gguf(repo: str, name: str, kept: Sequence[str]) -> Path:
    """A GGUF file of a repository, with all its parts, in the hub's cache; there it stays.

    Raises
    ------
    StoreError
        It is not there, cannot be fetched, is not what the hub says, or the disk is too small.
    """
    patterns = [re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", name), *kept]
    with suppress(Exception):
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=patterns, local_files_only=True
        )
        if parts_of(Path(folder, name))[0].is_file():
            return Path(folder, name)
    with asking(repo):
        info = HfApi().model_info(repo, files_metadata=True)
        parts = [f for f in info.siblings or [] if fnmatch(f.rfilename, patterns[0])]
        if name not in (f.rfilename for f in parts):
            raise StoreError(f"{repo} holds no file {name!r}; choose one that it does hold")
        room = sum(int(f.size or 0) for f in parts)
        check_room(Path(constants.HF_HUB_CACHE) / name, room, f"{repo}:{name}")
        folder = huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=patterns)
        for part in parts:
            _verify(repo, Path(folder, part.rfilename), _told_checksum(part))
    return Path(folder, name)


@contextmanager
def asking(repo: str, fails: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Inside, a hub is asked; how it or the network fails is said of the repository.

    Raises
    ------
    StoreError
        With its words, and what to do.
    """
    try:
        yield
    except StoreError:
        raise
    except fails as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        words = shortened(error, 600)
        raise StoreError(
            f"{repo} is no folder here and could not be downloaded ({words}); check the name and "
            "the network, or give the folder of a checkpoint. What has come is kept"
        ) from error


def _told_checksum(file: RepoSibling) -> str:
    return file.lfs.sha256 if file.lfs else str(file.blob_id)


def _verify(repo: str, file: Path, told: str) -> None:
    """Hold a file against the hub's checksum: sha256 of a large one, git's own of a small one."""
    with file.open("rb") as stream:
        if len(told) == 64:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        else:
            found = git_hash(stream.read())
    if found != told:
        file.resolve().unlink()
        raise StoreError(
            f"{repo}: {file.name} came with the checksum {found}, the hub says {told}; it was "
            "removed. Open the model again: this file is fetched anew, what is packed is kept"
        )


def _bar(tell: Callable[[str], None], *, shown: bool) -> type[tqdm]:
    """A bar of one download that also tells how far it is; what that raises stops it."""

    class Bar(tqdm):
        def __init__(self, name: str | None = None, **options: Any) -> None:
            self.come, self.whole = options.get("initial") or 0, options.get("total")
            self.what = options.get("desc")
            options["disable"] = not shown
            super().__init__(**options)

        def update(self, n: float | None = 1) -> bool | None:
            self.come += n or 0
            tell(f"fetching {self.what}: {100 * self.come // (self.whole or 1)} %")
            return super().update(n)

    return Bar
