"""Pairs of a Debian package's description and its one-line synopsis, split by source package.

A description is read with the package's name before it, ``name: description``, as Debian shows it:
the name says what the description often does not (``-dev``, ``-doc``, ``lib...-perl``).

They are read from apt's own lists (`Packages` and `Translation-en` of Debian 12, main), which
`apt-get -o Acquire::Languages=en update` brings.  Sources that differ in a version only (gcc-11,
gcc-12) are one group; a group gives at most eight pairs, and so does a text that differs from
others in names only.  Whole groups are held out: 2 % for validation, 3 % for test.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.store.paths import cache_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 8192
PAD, END = "<pad>", "</s>"
PER_GROUP = 8
LONGEST = 1200
"""Characters of a description; 2 % of them are longer, and left out."""
HELD_OUT = {"validation": 0.02, "test": 0.03}
HINT = "run `apt-get -o Acquire::Languages=en update` on a Debian 12 system or container first"


@dataclass(frozen=True)
class Pair:
    """One package: what it is called, where it belongs, and the two texts.

    ``text`` is the description, with the name before it once the pairs are `split`.
    """

    package: str
    source: str
    section: str
    text: str
    synopsis: str


def _list(kind: str) -> Iterator[str]:
    """The paragraphs of one of apt's lists of Debian 12's main part."""
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"apt-get is not here: {HINT}")
    filters = [f"Created-By: {kind}", "Codename: bookworm", "Component: main"]
    english = ["-o", "Acquire::Languages=en"]
    command = ["apt-get", *english, "indextargets", "--format", "$(FILENAME)", *filters]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    names = [name for name in done.stdout.split("\n") if name]
    if not names:
        raise RuntimeError(f"apt has no list of {kind}: {HINT}")
    read = ["/usr/lib/apt/apt-helper", "cat-file", names[0]]
    text = subprocess.run(read, capture_output=True, text=True, check=True).stdout  # noqa: S603
    yield from text.split("\n\n")


def flowing(long: str) -> str:
    """A control file's long description as text: wrapped lines joined, a line per paragraph.

    Lines indented further (lists, examples) stay lines.
    """
    parts: list[str] = []
    for line in long.split("\n"):
        if line.strip() == ".":
            parts.append("\n")
        else:
            parts.append(("\n" if line.startswith("  ") else " ") + line.strip())
    return re.sub(r"\s*\n\s*", "\n", "".join(parts)).strip()


def pairs() -> list[Pair]:
    """All pairs of the lists whose description is not too long, in the lists' order."""
    field = re.compile(r"^(Package|Source|Section): (\S+)", re.MULTILINE)
    about = {f["Package"]: f for part in _list("Packages") if (f := dict(field.findall(part)))}
    english = re.compile(r"^Package: (\S+)$(?s:.)*^Description-en: (.*)\n((?s:.*))", re.MULTILINE)
    found: dict[tuple[str, str], Pair] = {}
    for paragraph in _list("Translations"):
        match = english.search(paragraph)
        if match is None or match[1] not in about:
            continue
        package, synopsis, text = match[1], match[2].strip(), flowing(match[3].rstrip())
        source = about[package].get("Source", package)
        if len(text) <= LONGEST and len(synopsis) >= 8:
            pair = Pair(package, source, about[package].get("Section", ""), text, synopsis)
            found.setdefault((source, text), pair)
    return list(found.values())


def lead(text: str, words: int = 16) -> str:
    """What the first sentence says that it is: ``foo is a tool that ...`` → ``tool``.

    The model learns to write these first: a summary begins near the beginning of its source, and
    what it repeats it repeats in order. (Zhu et al. 2021, arXiv 1912.11602, pretrain on predicting
    the lead from the rest of an article; here it stays in the source.)
    """
    first = re.split(r"(?<=[.!?])\s", unnamed(text))[0]
    says = re.match(
        r".{0,60}?\b(?:is|are|provides|contains|implements)\s+(?:an?\s|the\s)?(.+)",
        first,
        re.DOTALL,
    )
    first = says[1] if says else first
    first = re.split(r"\b(?:that|which|who)\b|[,;:.(]", first)[0].strip() or first
    return " ".join(first.split()[:words])


def group(source: str) -> str:
    """A source package without its version: ``gcc-12-cross`` → ``gcc``."""
    return re.split(r"[-.]?\d", source)[0] or source


def _number(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split(rows: list[Pair]) -> dict[str, list[Pair]]:
    """Training, validation and test pairs, by group; at most `PER_GROUP` of a group or template."""
    parts: dict[str, list[Pair]] = {"train": [], **{name: [] for name in HELD_OUT}}
    counts: Counter[str] = Counter()
    for pair in sorted(rows, key=lambda row: _number(row.package)):
        names = group(pair.source), re.sub(r"\S*[-_.:/\d]\S*", "#", pair.text)
        if any(counts[name] >= PER_GROUP for name in names):
            continue
        counts.update(names)
        at, where = _number(names[0]), "train"
        for name, share in HELD_OUT.items():
            if at < share:
                where = name
                break
            at -= share
        parts[where].append(pair)
    seen = {pair.text for pair in parts["train"]}
    for name in HELD_OUT:
        parts[name] = [pair for pair in parts[name] if pair.text not in seen]
    return {
        name: [replace(p, text=f"{p.package}: {p.text}") for p in parts[name]] for name in parts
    }


def unnamed(text: str) -> str:
    """A description without the package's name before it."""
    return re.sub(r"^[a-z0-9][a-z0-9+.-]+: ", "", text)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE learnt on the training pairs; digits one by one; ends a text with `END`.

    A text begins as after a space, so that its first word is the same token as anywhere.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(True), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, 1)]
    )
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """The pairs by part, and their tokens: (source ids, target ids), both ending with `END`.

    ``leads``: of the training part, `lead` in place of the target.
    """

    parts: dict[str, list[Pair]]
    tokens: dict[str, list[tuple[list[int], list[int]]]]
    leads: list[list[int]]
    folder: Path


def prepare(folder: Path | None = None) -> Corpus:
    """Read, split and tokenise into `folder` (user cache); what was made before is read again.

    Raises
    ------
    ValueError
        What is there was made by a version that read descriptions without names.
    RuntimeError
        apt or its lists are not here.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = folder or cache_dir() / "synopsis" / "corpus"
    kept = folder / "pairs.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts = split(pairs())
        texts = [text for pair in parts["train"] for text in (pair.text, pair.synopsis)]
        PreTrainedTokenizerFast(
            tokenizer_object=train_tokenizer(texts),
            eos_token=END,
            pad_token=PAD,
            clean_up_tokenization_spaces=False,
            model_max_length=512,
        ).save_pretrained(str(folder / "tokenizer"))
        raw: dict[str, Any] = {name: [asdict(p) for p in rows] for name, rows in parts.items()}
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(raw, indent=1) + "\n")
        partial.replace(kept)
    raw = json.loads(kept.read_text())
    parts = {name: [Pair(**row) for row in rows] for name, rows in raw.items()}
    if unnamed(parts["train"][0].text) == parts["train"][0].text:
        raise ValueError(f"{kept} has descriptions without their package's name: delete {folder}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokens = {
        name: list(
            zip(
                (e.ids for e in tokenizer.encode_batch([p.text for p in rows])),
                (e.ids for e in tokenizer.encode_batch([p.synopsis for p in rows])),
                strict=True,
            )
        )
        for name, rows in parts.items()
    }
    leads = [e.ids for e in tokenizer.encode_batch([lead(p.text) for p in parts["train"]])]
    return Corpus(parts, tokens, leads, folder)
