"""The scoring process: settings come in as JSON, measured figures go out.

It is started anew for every entry, isolated from the user's environment (`process`), and takes
everything but the settings from the installed package: the task by its name, prompts, seed, texts.
Peak memory is what the arena held and, recounted apart from it, what the event log says; the larger
one counts. The timed runs are the ones judged: the logits that each of their tokens was drawn from
are kept, and compared with full precision when the run is over, so that the stopwatch sees none of
it. An entry's own parts are made anew for every lab: nothing they remember outlives a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import moelab
from moelab.bench.papers.measured import Extent, score
from moelab.bench.papers.tables import circumstances
from moelab.course.challenge import own_code
from moelab.course.challenge.tasks import FIXED, Task, find
from moelab.engine.generation import Reference
from moelab.runs.quality import kl_divergence
from moelab.scheduling.events import CODES

Tell = Callable[[str], None]


def measure(request: dict[str, Any], tell: Tell = lambda _: None) -> dict[str, Any]:
    """Measure an entry.

    Parameters
    ----------
    request
        ``challenge`` (name), ``settings`` (for ``lab.update``), ``own`` (decision -> ``class`` and
        ``source``), ``quick``.
    tell
        Called with a few words before each step.

    Returns
    -------
    dict
        tokens_per_s (median, and _min and _max), bytes_per_token, hit_ratio, stall_share (medians),
        peak_resident_bytes (largest), kl (the larger of kl_held_out and of kl_written, that of the
        text written in the timed runs), same_top1,
        text (a digest of all tokens written).

    Raises
    ------
    ValueError
        The settings or the code are refused.
    """
    task = find(request["challenge"])
    task = task.quick() if request.get("quick") else task
    if fixed := [name for name in FIXED if name in request["settings"]]:  # of a file's line
        raise ValueError(f"{fixed[0]} is fixed in a challenge")
    prompts, runs = _prompts(task), []
    tell("quality on held-out texts")
    with _opened(task, request, verify=True) as lab:
        quality = score(lab, Extent(task.tokens, task.prompts, task.texts, task.scored))
    for number, prompt in enumerate(prompts, start=1):
        tell(f"timed run {number} of {len(prompts)}")
        runs.append(_run(task, request, prompt))
    return _figures(quality, runs)


def _prompts(task: Task) -> list[str]:
    return [texts[0] for texts in moelab.demo.prompts().values()][: task.prompts]


def _opened(task: Task, request: dict[str, Any], *, verify: bool = False) -> moelab.Lab:
    """The bundled model with an empty cache, set as the entry says, with parts made anew."""
    lab = moelab.open(
        "demo", budget="100%", measure_kl=False, seed=task.seed, verify=verify, progress=False
    )
    try:
        own = {
            role: own_code.make(part["class"], part["source"])
            for role, part in request.get("own", {}).items()
        }
        lab.update(device=task.device, **request["settings"], **own)
    except BaseException:
        lab.close()
        raise
    return lab


def _run(task: Task, request: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A timed run, and the KL of that very run: of its own logits, worked out when it is over."""
    logits: list[torch.Tensor] = []
    with _opened(task, request) as lab:
        engine = lab._engine
        hook = engine.model.register_forward_hook(
            lambda _module, _given, out: logits.append(out.logits[0, -1].clone())
        )
        try:
            run = lab.generate(prompt, max_new_tokens=task.tokens, ignore_eos=True)
        finally:
            hook.remove()
        if not len(logits) == len(run.tokens) == task.tokens:
            raise ValueError(f"{len(run.tokens)} tokens were written instead of {task.tokens}")
        context = [*run._ids, *run.tokens[:-1]]
        full = Reference(engine).logits(context, keep=len(logits))
    kl = float(kl_divergence(full, torch.stack(logits)).mean())
    more = {"kl": kl, "written": list(run.tokens), "recounted_bytes": peak_of_log(run)}
    return run.summary() | more


def peak_of_log(run: moelab.Run) -> int:
    """Most bytes resident at a time, counted from a run's event log alone."""
    nbytes, events = run.trace.shape.nbytes, run.log.records()
    begun = sum(nbytes[bits] for _, bits in run.trace.resident)
    comes = np.isin(events["kind"], [CODES["load"], CODES["prefetch"]])
    sign = comes.astype(np.int64) - (events["kind"] == CODES["evict"])
    moved = sign * [nbytes.get(int(bits), 0) for bits in events["bits"]]
    return int(begun + max(0, moved.cumsum().max(initial=0)))


def _figures(quality: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [run["tokens_per_s"] for run in runs]
    medians = ("tokens_per_s", "bytes_per_token", "hit_ratio", "stall_share")
    kl_written = float(np.mean([run["kl"] for run in runs]))
    text = json.dumps([run["written"] for run in runs]).encode()
    return {name: float(np.median([run[name] for run in runs])) for name in medians} | {
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "peak_resident_bytes": max(
            max(run["peak_resident_bytes"], run["recounted_bytes"]) for run in runs
        ),
        "kl": float(np.maximum(quality["kl_mean"], kl_written)),
        "kl_held_out": quality["kl_mean"],
        "kl_written": kl_written,
        "same_top1": quality["same_top1"],
        "text": hashlib.sha256(text).hexdigest()[:16],
    }


def main() -> None:
    """Serve one request from stdin; answer on stdout in lines of JSON, whatever the code prints."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a policy's print goes to stderr

    def say(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    try:
        figures = measure(json.load(sys.stdin), lambda words: say(step=words))
    except Exception as error:  # noqa: BLE001, told to the one who asked, whatever it is
        say(
            error=f"{error}"
            if isinstance(error, ValueError)
            else f"{type(error).__name__}: {error}"
        )
    else:
        say(figures=figures, **circumstances())
