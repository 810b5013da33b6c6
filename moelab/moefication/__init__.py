"""A dense language model turned into a Mixture-of-Experts.

`moefy` takes any Llama-like model (SwiGLU feed-forward layers, RMSNorm, rotary attention) and some
text: neurons are grouped into a shared expert and routed ones, routers and corrections are fitted
layer by layer, then everything small is distilled from the dense model. `save_delta` keeps what was
learnt in a file small enough to ship, `materialise` makes a stock checkpoint of it. The idea that
routers and light training are enough is Read-ME's (arXiv 2410.19123).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from moelab.moefication.calibrate import calibrated
from moelab.moefication.distillation import Course, distil
from moelab.moefication.export import load_delta, materialise, save_delta
from moelab.moefication.measure import compare, continuations, routing
from moelab.moefication.student import Shape, Student

__all__ = [
    "Course",
    "Shape",
    "Student",
    "compare",
    "continuations",
    "load_delta",
    "materialise",
    "moefy",
    "routing",
    "save_delta",
]


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
        A Llama-like causal language model in float32. It is not changed.
    ids
        int64 ``[windows, length]``, token ids of varied text to learn from. Windows of 256 tokens
        do well; hold some text out to measure on.
    folder
        Keeps the calibration, checkpoints and the teacher's targets. The same call with the same
        folder goes on where the last one stopped.
    shape
        Experts, shared neurons and ranks. Multiples of 64 neurons per expert suit the kernels.
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
        The model's feed-forward layers are of another kind, or the shape does not fit them.

    Examples
    --------
    >>> student = moefy(dense, ids, "state", seconds=3600)  # doctest: +SKIP
    >>> materialise(dense, student, "my-moe", top_k=4, tokenizer=tokenizer)  # doctest: +SKIP
    >>> moelab.open("my-moe", budget="50%")  # doctest: +SKIP
    """
    shape, course, folder = shape or Shape(), course or Course(), Path(folder)
    _check(dense, ids, shape, course)
    start = folder / "calibrated.safetensors"
    if start.is_file():
        student, _ = load_delta(dense, start)
        if student.shape != shape:
            raise ValueError(
                f"{folder} holds a mixture of {student.shape}, not of {shape}; go on with that "
                "shape or choose another folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        text = ids[:calibration_windows]
        student = calibrated(
            dense, text, shape, top_ks=course.top_ks, seed=course.seed, progress=progress
        )
        save_delta(student, start)
    distil(student, dense, ids, folder, course=course, seconds=seconds, progress=progress)
    return student


def _check(dense: Any, ids: torch.Tensor, shape: Shape, course: Course) -> None:
    layers = getattr(getattr(dense, "model", None), "layers", None)
    names = ("gate_proj", "up_proj", "down_proj")
    if not layers or not all(hasattr(layer.mlp, name) for layer in layers for name in names):
        raise ValueError(
            f"{type(dense).__name__} has no model.layers[i].mlp with gate_proj, up_proj and "
            "down_proj; moefy takes dense SwiGLU models such as Llama's"
        )
    biased = [n for n, _ in dense.named_parameters() if n.endswith("_proj.bias")]
    if biased or dense.config.hidden_act != "silu":
        raise ValueError(
            f"{type(dense).__name__} has biases or an activation other than silu "
            f"({biased[:1] or dense.config.hidden_act}), which the mixture cannot hold"
        )
    shape.width(dense.config.intermediate_size)
    wrong = [k for k in course.top_ks if not 1 <= k <= shape.experts]
    if wrong or not course.top_ks:
        raise ValueError(f"top_ks={course.top_ks} must be 1 to {shape.experts} experts")
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"ids have shape {tuple(ids.shape)}; pass token ids [windows, length]")
