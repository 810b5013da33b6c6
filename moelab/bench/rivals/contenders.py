"""One contender in a process of its own: ``python contenders.py '{"system": "moelab", ...}'``.

It enters its cap before it loads anything, computes a prompt and forced tokens one by one, and
prints one line of JSON: what it took. Run as a file, not as a module, so that llama.cpp's process
holds nothing of moelab's. What it does not know: whom it is compared with.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[list[int]], Any]
"""Computes tokens after those before, up to the logits of the last one."""
PROMPT, WARM, PREFILL = 32, 8, 512
"""Tokens before the measured ones, and of a prompt that is timed where all is in memory."""


def moelab(spec: dict[str, Any]) -> Step:
    """Ours, through the engine as `moelab.bench.floor` uses it."""
    import moelab as lab_of
    from moelab.engine.generation import Decoder

    how = {"budget": spec["budget"], "threads": spec["threads"], **spec["settings"]}
    lab = lab_of.open(spec["model"], measure_kl=False, progress=False, **how)
    spec["kept"], engine = lab, lab._engine  # a lab that nobody holds closes
    engine.new_sequence(record=False)
    decoder = Decoder(engine)

    def step(ids: list[int]) -> Any:
        logits = decoder.step(ids)
        engine.end_of_token()
        return logits

    return step


def llama(spec: dict[str, Any]) -> Step:
    """llama.cpp through its own library: memory-mapped, as it is by default."""
    c = importlib.import_module("llama_cpp")  # asked for by whoever runs this

    spec["kept"] = c.llama_log_callback(lambda _level, _text, _data: None)
    c.llama_log_set(spec["kept"], ctypes.c_void_p(0))
    c.llama_backend_init()
    how = c.llama_model_default_params()
    how.n_gpu_layers = 0
    if hasattr(how, "use_extra_bufts"):  # repacking copies the weights into anonymous memory
        how.use_extra_bufts = spec["in_memory"]
    model = c.llama_model_load_from_file(spec["model"].encode(), how)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {spec['model']}")
    size = c.llama_context_default_params()
    size.n_ctx, size.n_batch, size.n_ubatch = 2048, PREFILL, PREFILL
    size.n_threads = size.n_threads_batch = spec["threads"]
    context = c.llama_init_from_model(model, size)
    at = 0

    def step(ids: list[int]) -> Any:
        nonlocal at
        batch = c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(ids) - 1
        at += len(ids)
        if code := c.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        c.llama_batch_free(batch)
        return c.llama_get_logits_ith(context, -1)

    return step


def accelerate(spec: dict[str, Any]) -> Step:
    """Stock transformers with accelerate's offloading to disk."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": spec["budget"]},
        offload_folder=spec["offload_folder"],
    ).eval()
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]

    return step


SYSTEMS = {"moelab": moelab, "llama.cpp": llama, "accelerate": accelerate}


def drop(path: Path) -> None:
    """Let the page cache forget files: pages that are cached already would cost no cap."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _enter(spec: dict[str, Any]) -> None:
    if spec["entrance"]:
        if spec["late"]:  # what is held already stays outside: the limit is less by that
            drop(Path(spec["model"]))
            drop(Path(spec["offload_folder"]))
            limit = int(Path(spec["limit_file"]).read_text())
            Path(spec["limit_file"]).write_text(str(limit - _status("RssAnon")))
        Path(spec["entrance"]).write_text(str(os.getpid()))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def _now() -> tuple[float, int]:
    """Seconds, and bytes read from the disk so far."""
    said = Path("/proc/self/io").read_text().split()
    return time.perf_counter(), int(said[said.index("read_bytes:") + 1])


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, compute a prompt, then tokens one by one, then a long prompt."""
    if not spec["late"]:
        _enter(spec)
    step = SYSTEMS[spec["system"]](spec)
    if spec["late"]:
        _enter(spec)
    ids = iter(json.loads(Path(spec["ids"]).read_text()))
    take = lambda count: list(itertools.islice(ids, count))  # noqa: E731
    step(take(PROMPT))
    for token in take(WARM):
        step([token])
    begun = _now()
    for token in take(spec["tokens"]):
        step([token])
    end = _now()
    found = {
        "tokens_per_s": spec["tokens"] / (end[0] - begun[0]),
        "bytes_per_token": (end[1] - begun[1]) / spec["tokens"],
    }
    if spec["in_memory"]:
        step(take(PREFILL))  # every expert is touched once
        begun = _now()
        step(take(PREFILL))
        found["prefill_tokens_per_s"] = PREFILL / (_now()[0] - begun[0])
    return found | {"peak_rss": _status("VmHWM")}


if __name__ == "__main__":
    sys.stdout.write(f"RESULT {json.dumps(main(json.loads(sys.argv[1])))}\n")
