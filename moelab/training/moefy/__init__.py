"""A dense language model turned into a Mixture-of-Experts.

`moefy` takes any Llama-like model (SwiGLU feed-forward layers, RMSNorm, rotary attention) and some
text: neurons are grouped into a shared expert and routed ones, routers and corrections are fitted
layer by layer, then everything small is distilled from the dense model. `save_delta` keeps what was
learnt in a file small enough to ship, `materialise` makes a stock checkpoint of it. The idea that
routers and light training are enough is Read-ME's (arXiv 2410.19123).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from moelab.demo.mixture import Shape, materialise
from moelab.training.moefy.calibrate import calibrated
from moelab.training.moefy.card import card, compare, continuations, routing
from moelab.training.moefy.distillation import Course, distil
from moelab.training.moefy.student import Student, load_delta, save_delta
from moelab.training.moefy.texts import windows

__all__ = [
    "Course",
    "Shape",
    "Student",
    "card",
    "compare",
    "continuations",
    "load_delta",
    "materialise",
    "moefy",
    "routing",
    "save_delta",
    "windows",
]

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""The model types that can become a mixture."""


def moefy(
    dense: Any,
    ids: torch.Tensor,
    folder: str | os.PathLike[str],
    *,
    shape: Shape | None = None,
    course: Course | None = None,
    calibration_windows: int = 96,
    seconds: float = math.inf,
    progress: bool = True,
) -> Student:
    """Turn a dense model into a mixture of experts; stop and call again at any time.

    Parameters
    ----------
    dense
        A dense causal language model of one of `KINDS`, in float32. It is not changed.
    ids
        int64 ``[windows, length]``, token ids of varied text to learn from. Windows of 256 tokens
        do well; hold some text out to measure on.
    folder
        Keeps the calibration, checkpoints and the teacher's targets. The same call with the same
        folder goes on where the last one stopped.
    shape
        Experts, shared neurons and ranks; by default `Shape.of` the model's width. Multiples of 64
        neurons per expert suit the kernels.
    course
        How long and how to distil, and which numbers of active experts to serve.
    calibration_windows
        Windows for the fit layer by layer, before distillation.
    seconds
        Stop distilling after this time; the student is as good as it got.
    progress
        Show progress bars.

    Returns
    -------
    Student
        Ready for `compare`, `save_delta` and `materialise`.

    Raises
    ------
    ValueError
        The model is of another kind or precision, the shape does not fit it, the ids are not its
        own, or the folder belongs to other text.

    Examples
    --------
    >>> ids = windows(documents, tokenizer)  # doctest: +SKIP
    >>> student = moefy(dense, ids, "state", seconds=3600)  # doctest: +SKIP
    >>> compare(dense, student, {"news": held_out}, top_ks=(8, 4))  # doctest: +SKIP
    >>> materialise(dense, student, "my-moe", top_k=4, tokenizer=tokenizer)  # doctest: +SKIP
    >>> moelab.open("my-moe", budget="50%")  # doctest: +SKIP
    """
    _check_model(dense)
    shape = shape or Shape.of(dense.config.intermediate_size)
    course, folder = course or Course(), Path(folder)
    _check(dense, ids, shape, course, calibration_windows)
    folder.mkdir(parents=True, exist_ok=True)
    _bind(folder / "text.json", ids)
    start = folder / "calibrated.safetensors"
    if start.is_file():
        student, _ = load_delta(dense, start)
        if student.shape != shape:
            raise ValueError(
                f"{folder} holds a mixture of {student.shape}, not of {shape}; go on with that "
                "shape or choose another folder"
            )
    else:
        text = ids[:calibration_windows]
        student = calibrated(
            dense, text, shape, top_ks=course.top_ks, seed=course.seed, progress=progress
        )
        save_delta(student, start)
    distil(student, dense, ids, folder, course, seconds=seconds, progress=progress)
    return student


def _bind(path: Path, ids: torch.Tensor) -> None:
    """Remember which text a folder belongs to; refuse another."""
    text = {
        "windows": list(ids.shape),
        "digest": hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest(),
    }
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8"))) != text:
        raise ValueError(
            f"{path.parent} was begun with other text, {kept['windows']} and not "
            f"{text['windows']} windows x tokens or other words; pass the same ids or choose "
            "another folder"
        )
    path.write_text(json.dumps(text) + "\n", encoding="utf-8")


def _check_model(dense: Any) -> None:
    """Refuse what a Glm4Moe cannot compute exactly."""
    config = dense.config
    if config.model_type not in KINDS:
        raise ValueError(
            f"moefy takes dense models of the kinds {', '.join(KINDS)}, not {config.model_type!r}: "
            "their attention is what the mixture's architecture, Glm4Moe, computes too"
        )
    names = [n for n, _ in dense.named_parameters() if n.endswith(".bias")]
    biased = [n for n in names if not n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if biased or config.hidden_act != "silu":
        raise ValueError(
            f"{config.model_type} with {biased[0] if biased else config.hidden_act}: the mixture "
            "has biases of queries, keys and values only, and silu"
        )
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        raise ValueError(
            f"{config.model_type} with a sliding window: the mixture attends to everything; set "
            "config.sliding_window to None if that is meant"
        )
    weight, attention = dense.lm_head.weight, config._attn_implementation
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or attention != "sdpa":
        raise ValueError(
            f"the model is {weight.dtype} on {weight.device} with {attention} attention; load it "
            'with dtype=torch.float32, device_map="cpu" and attn_implementation="sdpa"'
        )


def _check(
    dense: Any, ids: torch.Tensor, shape: Shape, course: Course, calibration_windows: int
) -> None:
    config = dense.config
    shape.width(config.intermediate_size)
    if max(shape.ranks) > min(config.hidden_size, config.intermediate_size):
        raise ValueError(f"ranks={shape.ranks} must not exceed the width, {config.hidden_size}")
    if max(course.top_ks) > shape.experts:
        raise ValueError(f"top_ks={course.top_ks} must be 1 to {shape.experts} experts")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"ids have shape {tuple(ids.shape)}; pass token ids [windows, length]")
    if len(ids) < course.batch or calibration_windows < 1:
        raise ValueError(
            f"{len(ids)} windows with batch={course.batch} and calibration_windows="
            f"{calibration_windows}; give at least one batch of text and one window to calibrate on"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"ids go from {int(ids.min())} to {int(ids.max())}; the model has tokens 0 to "
            f"{config.vocab_size - 1}: encode the text with its own tokenizer"
        )
