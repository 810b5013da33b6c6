"""From a model's name to a packed store on this machine, and what `lab.info` says of it.

``"demo"``, ``"smollm2-moe"``, ``"synopsis"``, a store, a checkpoint folder or a hub id; checkpoints
are packed once into the user's cache and found there the next time.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from moelab import demo
from moelab.demo import smollm2, synopsis
from moelab.engine.spare import Machine
from moelab.models.chat import Text
from moelab.models.families import positions
from moelab.runs.speculation import drafts
from moelab.scheduling.budget import minimum_budget, size
from moelab.store.codecs import TIERS
from moelab.store.ghost import NAME as GHOST
from moelab.store.paths import cache_dir
from moelab.store.source import is_hub_id, refuse_formats, state, unfolded
from moelab.store.store import Store, StoreError

if TYPE_CHECKING:
    from moelab.engine.engine import Engine
    from moelab.settings import Settings
    from moelab.store.order import Sizes

CHEAP_BYTES = 256 * 2**20
"""Below this a model is small: float32, and compared with full precision by default."""

SMOLLM2, SYNOPSIS = smollm2.NAME, synopsis.NAME

Progress = bool | Callable[[str], None]


def offered() -> dict[str, str]:
    """By name of the model what keeps it from being opened here, in words; empty if nothing."""
    found = {"demo": ""}
    if smollm2.DELTA.is_file():
        built = smollm2.is_built(smollm2.folder(smollm2.DELTA, smollm2.TOP_K))
        found[SMOLLM2] = "" if built else smollm2.missing()
    return found | {SYNOPSIS: ""}


def known() -> list[str]:
    """Names of models whose configuration is here, for `moelab.fit` and `moelab.ghost`."""
    from moelab.store.architecture import KNOWN

    return list(KNOWN)


def bundled(model: str | Path, progress: Progress = True) -> Path | None:
    """The checkpoint of the model that goes by this name here, made now if it has to be."""
    made: dict[str, Callable[[], Path]] = {
        "demo": demo.checkpoint,
        SMOLLM2: partial(smollm2.build, progress=progress),
        SYNOPSIS: synopsis.checkpoint,
    }
    return made[model]() if isinstance(model, str) and model in made else None


def bundled_prompts(name: str) -> dict[str, list[str]]:
    """The prompts by domain that a model is offered with."""
    if name == SMOLLM2:
        return deepcopy(smollm2.PROMPTS)
    if name == SYNOPSIS:
        return synopsis.prompts()
    return demo.prompts() if name == "demo" else {}


def bundled_probes(name: str) -> dict[str, Text]:
    """The held-out texts by domain that a model is measured on."""
    if name == SYNOPSIS:
        return {**synopsis.probes()}
    return {**demo.probes()} if name in ("demo", SMOLLM2) else {}


def reference(name: str, prompt: str) -> str:
    """What people wrote of a held-out text that the model is to put short; else empty."""
    return synopsis.references().get(prompt.strip(), "") if name == SYNOPSIS else ""


def find_store(
    model: str | Path,
    *,
    tiers: Sequence[int] = TIERS,
    progress: Progress = True,
    dense_bits: int = 16,
) -> Path:
    """The store of ``model``, packed now if it has to be; `progress`: bars, or called with words.

    Raises
    ------
    ValueError
        The name is no store, no checkpoint and no hub id; the message says what would be.
    StoreError
        Disk or memory are too small for it, of which ``dense_bits`` is a part.
    ImportError, FileNotFoundError
        A bundled model needs a package, or weights, that are not here; the message says what to do.
    """
    packed = partial(_packed, tiers=tiers, progress=progress, dense_bits=dense_bits)
    if (own := bundled(model, progress)) is not None:
        return packed(own, str(model))
    if is_hub_id(model):
        return packed(str(model), str(model).replace("/", "--"))
    path = Path(model).expanduser().absolute()  # whatever the working directory is later
    if any((path / name).is_file() for name in ("manifest.json", GHOST)):
        return path
    if path.is_file() and path.suffix == ".gguf":
        return packed(unfolded(path.resolve()), path.stem)
    refuse_formats(path)
    if (path / "config.json").is_file():
        return packed(path, path.resolve().name)
    raise ValueError(
        f"model {model!r} is not 'demo', {SMOLLM2!r}, {SYNOPSIS!r}, a store (a folder with "
        "manifest.json), a checkpoint (a folder with config.json and safetensors), a GGUF file or "
        "a hub id like 'org/name'"
    )


def destination(source: str | Path, name: str, tiers: Sequence[int]) -> Path:
    """Where a checkpoint's store lies in the user's cache, or will lie."""
    slug = re.sub(r"[^\w.-]", "_", name).encode()[:100].decode(errors="ignore")  # of 255 bytes
    return cache_dir() / "stores" / f"{slug}-{_fingerprint(source, tiers)}"


def _packed(
    source: str | Path, name: str, tiers: Sequence[int], progress: Progress, dense_bits: int
) -> Path:
    from moelab.store.pack import pack

    def check(sizes: Sizes) -> None:
        dense, here = sizes.dense_bytes * dense_bits // 16, Machine().total_bytes()
        if dense + sizes.least_bytes > here:
            raise StoreError(
                f"{name} needs {size(dense)} of memory for dense weights at {dense_bits} bit and "
                f"{size(sizes.least_bytes)} for one layer's experts of a token; this machine has "
                f"{size(here)}. Open it with dense_bits=4, at fewer bits (tiers=(4,)), or on "
                "another machine"
            )

    made = destination(source, name, tiers)
    damaged = (made / "manifest.json").is_file()
    if damaged:
        try:
            return Store.open(made).path
        except StoreError as error:
            warnings.warn(f"{error}; packing {source} again", stacklevel=2)
    tiers = tuple(tiers)
    return pack(source, made, tiers=tiers, overwrite=damaged, progress=progress, check=check)


def _fingerprint(source: str | Path, tiers: Sequence[int]) -> str:
    """Changes with the files of a checkpoint folder, so that a newer one is packed anew.

    A hub id has no fingerprint of files, only its name and the tiers: what is packed of it stays,
    whatever is uploaded under that name later.
    """
    place = source.resolve() if isinstance(source, Path) else source
    digest = hashlib.blake2b(repr((str(place), sorted(tiers))).encode(), digest_size=6)
    if isinstance(source, Path):
        digest.update(repr(state(source)).encode())
    return digest.hexdigest()


def _process_bytes(engine: Engine) -> int:
    """Memory of this process alone beyond dense weights and experts: Python, torch, caches."""
    memory = psutil.Process().memory_info()
    shared = getattr(memory, "shared", 0)  # files; told on Linux
    return max(0, memory.rss - shared - engine.dense_bytes - engine.arena.held_bytes)


def _by_torch(store: Store, engine: Engine) -> tuple[str, ...]:
    """Says so where the kernels cannot compute a store's experts."""
    if engine.compute.fast:
        return ()
    old = store.manifest.transposed and not store.layout.turned
    again = "; it was packed by an older version: pack it again, and they may" if old else ""
    return (f"experts are computed by torch, slowly: the kernels do not know this kind{again}",)


def _of_family(engine: Engine) -> tuple[str, ...]:
    """What is otherwise here than in transformers' own forward of a family."""
    known = (layer.special.note for layer in engine.adapter.layers if layer.special)
    return tuple(dict.fromkeys(filter(None, known)))


def describe(name: str, store: Store, settings: Settings, engine: Engine) -> dict[str, Any]:
    """What a person reads before choosing a budget: sizes in bytes, counts of experts."""
    s, shape = settings, engine.shape
    return {
        "name": name,
        "architecture": store.manifest.architecture,
        "layers": shape.layers,
        "encoder_layers": shape.encoder_layers,
        "experts_per_layer": max(shape.experts),
        **({"free_experts": shape.free} if shape.free else {}),
        "top_k": shape.top_k,
        "positions": positions(engine.model),
        "tiers": tuple(sorted(shape.nbytes, reverse=True)),
        "expert_bytes": dict(shape.nbytes),
        **({"own_bytes": shape.own_cells()} if shape.own else {}),
        "all_experts_bytes": shape.all_bytes(max(shape.nbytes)),
        "token_cycle_bytes": shape.token_cycle_bytes(s.bits),
        "minimum_budget_bytes": minimum_budget(shape, s.strategy, s.knobs()),
        "budget_bytes": s.budget_bytes,
        "budget_experts": s.budget_bytes * shape.n // shape.all_bytes(s.bits),
        "resident_bytes": engine.scheduler.cache.used_bytes,
        "reference_bits": max(shape.nbytes),
        "direct_io": engine.loader.direct,
        "non_expert_parameters": sum(
            p.numel() for p in engine.model.parameters() if p.device.type != "meta"
        ),
        "draft_bits": drafts(engine),
        "dense_bits": engine.dense_bits,
        "dense_bytes": engine.dense_bytes,
        "process_bytes": _process_bytes(engine),
        "notes": (*store.manifest.notes, *_by_torch(store, engine), *_of_family(engine)),
        "store": str(store.path),
    }
