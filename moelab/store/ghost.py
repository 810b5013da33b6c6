"""A ghost: a model at its real sizes with random weights, routed as a recorded run was.

    GHOST/ghost.json       name, tiers
    GHOST/routing.json     the trace it is routed by
    GHOST/experts.bin      random bytes; every expert of every tier lies somewhere in them
    GHOST/model/           config.json

To engine and scheduler it is a store: what loading, waiting, deciding and computing take is real.
The bytes are a sound expert at every tier (words that are small numbers as bfloat16 and as
float16). Experts lie one behind the other as in a store; where the file ends they go on at its
beginning, so the same bytes come again only after as many experts as the file holds, several layers
later. What it does not know: text, quality, and what its routers would choose.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moelab.models.config import read_json
from moelab.models.families import MoELayer
from moelab.models.random_weights import RandomWeights
from moelab.models.recorded import Recorded
from moelab.scheduling.trace import Trace
from moelab.store.architecture import Architecture
from moelab.store.blobs import BlobFile
from moelab.store.codecs import GROUP, PAGE
from moelab.store.destination import check_room, partial_folder, remove_stale, sync
from moelab.store.manifest import MODEL, Manifest, StoreError, digest, identity
from moelab.store.paths import cache_dir
from moelab.store.store import Store

NAME, ROUTING, EXPERTS = "ghost.json", "routing.json", "experts.bin"
CHUNK = 1 << 26
FREE, SMALL = 0x87FF, 0x3000
"""Random bits of a 16-bit word, and its exponent: 0.13 to 0.5 as float16, 5e-10 to 2e-5 as
bfloat16."""
GLYPH = "▪ "
"""In place of a token's text."""


class GhostStore(Store):
    """A ghost's folder, opened; see the module.

    Attributes
    ----------
    routing
        What takes the place of the routers' choice.
    """

    def __init__(self, path: Path) -> None:
        said = read_json(path / NAME)
        self.path, self._identity = path, identity(path / NAME)
        self._architecture = found = Architecture(path / MODEL, tiers=said["tiers"])
        trace = Trace.load(path / ROUTING)
        self.routing = routing = Recorded(trace)
        file = BlobFile(path / EXPERTS)
        self.files = dict.fromkeys(found.shape.nbytes, file)
        self._slots, self._first = dict(found.shape.nbytes), found.shape.offset
        described: dict[str, Any] = dict(found.described)
        family = described.pop("architecture").removesuffix("ForCausalLM")
        words = trace.lacks[0].removeprefix("a real run: ") if trace.lacks else "of a recorded run"
        kind = "modelled" if "modelled" in words else "recorded"
        ahead = any(step.look_ahead for step in trace.steps)
        asked = "" if ahead else "; no router was asked ahead"
        asked += f"; {found.lacking}" if found.lacking and kind == "modelled" else ""
        self.manifest = Manifest(
            id=digest(str(path).encode()),
            source=f"{said['name']} (ghost)",
            source_digest=digest(json.dumps(found.config, sort_keys=True).encode()),
            source_bytes=file.nbytes,
            created="",
            transformers_version="",
            tiers=tuple(found.shape.nbytes),
            layout=found.layout,
            files={},
            checksums={},
            notes=(
                "random weights: no text and no quality; all times are real",
                f"routing {words}{asked}",
                f"a prompt has {routing.prompt} tokens; {routing.decoded} more, then again",
                f"{found.shape.n} experts lie in {file.nbytes / 1e9:.3g} GB",
            ),
            architecture=f"{family} (random weights: no text; {kind} routing)",
            **described,
        )

    @property
    def checked_file(self) -> Path:
        """What tells this ghost from another one that took its name."""
        return self.path / NAME

    def location(self, layer: int, expert: int, bits: int) -> tuple[Path, int, int]:
        """Where one expert lies: file, offset and length, both multiples of 4096."""
        size, file = self._slots[bits], self.files[bits]
        return file.path, (self._first[layer] + expert) % (file.nbytes // size) * size, size

    def weights(self, bits: int = 16) -> RandomWeights:
        """Dense weights, to be kept at ``bits``."""
        dense = self._architecture.dense
        fewer = {n for n, (shape, half) in dense.items() if half and shape[-1] % GROUP == 0}
        shapes = {name: shape for name, (shape, _) in dense.items()}
        return RandomWeights(shapes, shared=fewer if bits < 16 else ())

    def tokenizer(self) -> Any:
        """Any text is as many tokens as the recorded prompt; any token is one mark."""
        assert self.routing is not None
        return NoText(self.routing.prompt)

    def check_model(self, model: Any, layers: Sequence[MoELayer]) -> None:
        """Nothing: its sizes were taken from that model."""

    def verify(self, *, progress: bool = False) -> None:
        """Nothing: there is no checksum of what means nothing."""

    def require_weights(self, what: str) -> None:
        """Refuse what only a trained model can answer.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            f"{what}: {self.manifest.source} has random weights and a recorded routing, so there "
            "is nothing to measure or to steer; open the model itself for that"
        )


def open_store(path: Path, *, verify: bool = False) -> Store:
    """A store or a ghost, as `Store.open`."""
    return GhostStore(path) if (path / NAME).is_file() else Store.open(path, verify=verify)


class NoText:
    """Stands in for the tokenizer of a model that has none."""

    eos_token_id = chat_template = None

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """As many ids as the recorded prompt has, whatever the text."""
        return {"input_ids": [0] * self._prompt}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """A mark for each."""
        return GLYPH * len(ids)


def make(
    architecture: Architecture, trace: Trace, disk_bytes: int, tell: Callable[[str], None]
) -> Path:
    """The folder of a ghost, made now if need be; its routing is this trace from now on.

    Raises
    ------
    ValueError
        The trace is of another shape, or ``disk_bytes`` hold fewer experts than a layer has.
    StoreError
        The disk has no room for them.
    """
    shape, best = architecture.shape, max(architecture.shape.nbytes.values())
    check_trace(trace, architecture)
    least, whole = max(shape.experts) * best, shape.n * best
    size = min(disk_bytes, whole) // PAGE * PAGE
    if size < least:
        raise ValueError(
            f"disk={disk_bytes / 1e9:.3g} GB: the experts of a layer take {least / 1e9:.3g} GB "
            f"at {max(shape.nbytes)} bit; give as much, or fewer tiers, as in tiers=(4,)"
        )
    said = {"name": architecture.name, "tiers": list(shape.nbytes)}
    mark = digest(repr((said, size, sorted(architecture.config.items()))).encode())[:12]
    folder = home() / f"{architecture.name}-{mark}"
    plain = replace(trace, changes=[], resident=[])
    if not (folder / NAME).is_file():
        remove_stale(folder)
        check_room(folder, size, f"a ghost of {architecture.name}", ", or give a smaller disk=")
        with partial_folder(folder) as partial:
            (partial / MODEL).mkdir()
            _write(partial / MODEL / "config.json", architecture.config)
            _write(partial / MODEL / "generation_config.json", {"eos_token_id": None})
            _write(partial / NAME, said)
            _fill(partial / EXPERTS, size, tell)
            partial.rename(folder)
    plain.save(folder / ROUTING)
    return folder


def check_trace(trace: Trace, architecture: Architecture) -> None:
    """Refuse a trace of another model's shape.

    Raises
    ------
    ValueError
        Says both shapes.
    """
    its, ours = trace.shape, architecture.shape
    if its.experts != ours.experts or its.top_k > ours.top_k:
        raise ValueError(
            f"this trace is of {its.layers} layers of {max(its.experts)} experts, top "
            f"{its.top_k}; {architecture.name} has {ours.layers} of {max(ours.experts)}, top "
            f"{ours.top_k}: give one of its own, or routing=None for a modelled one"
        )


def home() -> Path:
    """Where ghosts lie."""
    return cache_dir() / "ghosts"


def remove(folder: Path) -> None:
    """Remove a ghost, or all of them.

    Raises
    ------
    StoreError
        There is something else in that folder.
    """
    if folder != home() and not (folder / NAME).is_file():
        raise StoreError(f"{folder} is no ghost; those there are lie in {home()}")
    shutil.rmtree(folder, ignore_errors=True)


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _fill(file: Path, size: int, tell: Callable[[str], None]) -> None:
    """Random bytes that are small numbers; no two pages are alike."""
    rng = np.random.Generator(np.random.SFC64(0))
    drawn = rng.integers(0, 1 << 64, CHUNK // 8, np.uint64)
    free, small = (np.uint64(word * 0x0001_0001_0001_0001) for word in (FREE, SMALL))
    with file.open("wb") as stream:
        for start in range(0, size, CHUNK):
            tell(f"writing random experts: {100 * start // size} %")
            other = rng.integers(0, 1 << 64, dtype=np.uint64)
            words = (drawn ^ other) & free | small
            stream.write(words.view(np.uint8)[: size - start].data)
    sync(file)
