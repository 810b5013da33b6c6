"""From a model's name to a packed store on this machine, and what `lab.info` says of it.

``"demo"``, ``"smollm2-moe"``, a store, a checkpoint folder or a hub id; checkpoints are packed once
into the user's cache and found there the next time.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moelab import demo
from moelab.demo import smollm2
from moelab.scheduling.budget import minimum_budget
from moelab.store.codecs import TIERS
from moelab.store.paths import cache_dir
from moelab.store.store import Store, StoreError

if TYPE_CHECKING:
    from moelab.engine.engine import Engine
    from moelab.settings import Settings

CHEAP_BYTES = 256 * 2**20
"""Below this a model is small: float32, and compared with full precision by default."""

SMOLLM2 = smollm2.NAME

Progress = bool | Callable[[str], None]


def offered() -> dict[str, str]:
    """By name of the model what keeps it from being opened here, in words; empty if nothing."""
    if not smollm2.DELTA.is_file():
        return {"demo": ""}
    built = smollm2.is_built(smollm2.folder(smollm2.DELTA, smollm2.TOP_K))
    return {"demo": "", SMOLLM2: "" if built else smollm2.missing()}


def bundled(name: str, what: str) -> dict[str, Any]:
    """The ``"prompts"`` or held-out ``"probes"`` by domain that a model is offered with."""
    if name == SMOLLM2 and what == "prompts":
        return deepcopy(smollm2.PROMPTS)
    return getattr(demo, what)() if name in ("demo", SMOLLM2) else {}


def find_store(
    model: str | Path, *, tiers: Sequence[int] = TIERS, progress: Progress = True
) -> Path:
    """The store of ``model``, packed now if it has to be; `progress`: bars, or called with words.

    Raises
    ------
    ValueError
        The name is no store, no checkpoint and no hub id; the message says what would be.
    ImportError
        The model comes in a package that is not installed; the message holds the command.
    """
    if str(model) == "demo":
        return _packed(demo.checkpoint(), "demo", tiers, progress)
    if str(model) == SMOLLM2:
        return _packed(smollm2.build(progress=progress), SMOLLM2, tiers, progress)
    path = Path(model).expanduser()
    if (path / "manifest.json").is_file():
        return path
    if (path / "config.json").is_file():
        return _packed(path, path.resolve().name, tiers, progress)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return _packed(str(model), str(model).replace("/", "--"), tiers, progress)
    raise ValueError(
        f"model {str(model)!r} is not 'demo', {SMOLLM2!r}, a store (a folder with manifest.json), "
        "a checkpoint (a folder with config.json and safetensors) or a hub id like 'org/name'"
    )


def destination(source: str | Path, name: str, tiers: Sequence[int]) -> Path:
    """Where a checkpoint's store lies in the user's cache, or will lie."""
    slug = re.sub(r"[^\w.-]", "_", name)
    return cache_dir() / "stores" / f"{slug}-{_fingerprint(source, tiers)}"


def _packed(source: str | Path, name: str, tiers: Sequence[int], progress: Progress) -> Path:
    from moelab.store.pack import pack

    made = destination(source, name, tiers)
    damaged = (made / "manifest.json").is_file()
    if damaged:
        try:
            return Store.open(made).path
        except StoreError as error:
            warnings.warn(f"{error}; packing {source} again", stacklevel=2)
    return pack(source, made, tiers=tuple(tiers), overwrite=damaged, progress=progress)


def _fingerprint(source: str | Path, tiers: Sequence[int]) -> str:
    """Changes with the files of a checkpoint folder, so that a newer one is packed anew.

    A hub id has no fingerprint of files, only its name and the tiers: what is packed of it stays,
    whatever is uploaded under that name later.
    """
    digest = hashlib.blake2b(repr((str(source), sorted(tiers))).encode(), digest_size=6)
    if isinstance(source, Path):
        for file in sorted([*source.glob("*.safetensors"), *source.glob("*.json")]):
            stat = file.stat()
            digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def compute_dtype(store: Store) -> torch.dtype:
    """Float32 where the non-expert weights are small: exact, and faster on CPUs without bf16."""
    files = store.checkpoint_dir.glob("*.safetensors")
    small = sum(f.stat().st_size for f in files) <= CHEAP_BYTES
    return torch.float32 if small else getattr(torch, store.layout.dtype)


def model_sampling(folder: Path) -> dict[str, Any]:
    """The model's own way of sampling; greedy where it says nothing."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:
        return {}
    if not config.do_sample:
        return {}
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    return {n: v for n in names if (v := getattr(config, n, None)) is not None}


def load_tokenizer(store: Store) -> Any:
    """The tokenizer of a store, from its own files only.

    Raises
    ------
    ValueError
        The checkpoint brought none that can be used, or is an encoder-decoder.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder, local = store.checkpoint_dir, {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **local)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{store.path} is an encoder-decoder; moelab runs decoder-only models")
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, **local)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{store.path} has no usable tokenizer ({reason}); put tokenizer.json beside the "
            "checkpoint's config.json and pack it again"
        ) from error


def describe(name: str, store: Store, settings: Settings, engine: Engine) -> dict[str, Any]:
    """What a person reads before choosing a budget: sizes in bytes, counts of experts."""
    s, shape = settings, engine.shape
    return {
        "name": name,
        "architecture": store.manifest.architecture,
        "layers": shape.layers,
        "experts_per_layer": max(shape.experts),
        "top_k": shape.top_k,
        "tiers": tuple(sorted(shape.nbytes, reverse=True)),
        "expert_bytes": dict(shape.nbytes),
        "all_experts_bytes": shape.all_bytes(max(shape.nbytes)),
        "token_cycle_bytes": shape.token_cycle_bytes(s.bits),
        "minimum_budget_bytes": minimum_budget(shape, s.strategy, s.knobs()),
        "budget_bytes": s.budget_bytes,
        "budget_experts": s.budget_bytes // shape.nbytes[s.bits],
        "resident_bytes": engine.scheduler.cache.used_bytes,
        "reference_bits": max(shape.nbytes),
        "direct_io": engine.loader.direct,
        "non_expert_parameters": sum(
            p.numel() for p in engine.model.parameters() if p.device.type != "meta"
        ),
        "store": str(store.path),
    }
