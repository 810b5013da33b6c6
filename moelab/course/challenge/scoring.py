"""The scoring process: settings go in as JSON, measured figures come out.

It is started anew for every entry, isolated from the user's environment, and takes everything but
the settings from the installed package: the task by its name, prompts, seed, texts. The timed runs
are the ones judged: the logits that each of their tokens was drawn from are kept, and compared with
full precision when the run is over, so that the stopwatch sees none of it. An entry's own parts are
made anew for every lab: nothing they remember outlives a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moelab
from moelab.bench.papers.results import Extent, score
from moelab.bench.tables import circumstances
from moelab.course.challenge.own_code import make
from moelab.course.challenge.tasks import FIXED, Task, find
from moelab.engine.generation import Reference, begun_with
from moelab.replays.bounds import belady_hits
from moelab.runs.quality import kl_divergence

KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "XDG_CACHE_HOME", "MOELAB_CACHE", "LD_LIBRARY_PATH")
"""What the process sees of the environment: where things lie, nothing that changes what they do."""
MOST_SECONDS = 900
_CODE = (  # of the caller's moelab, whichever is installed
    "import sys; sys.path.insert(0, sys.argv.pop()); "
    "from moelab.course.challenge.scoring import main; main()"
)
Tell = Callable[[str], None]


def scored(request: dict[str, Any], tell: Tell = lambda _: None) -> dict[str, Any]:
    """The answer of a fresh scoring process: ``figures``, ``made``, ``versions``, ``machine``.

    Parameters
    ----------
    request, tell
        As `measure` takes them.

    Raises
    ------
    ValueError
        The entry was refused; the message is the engine's own.
    RuntimeError
        The process ended without an answer, or took longer than a quarter of an hour.
    """
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as noise:
        json.dump(request, given)
        given.seek(0)
        with subprocess.Popen(  # noqa: S603, this Python and our own words
            [sys.executable, "-I", "-c", _CODE, str(Path(moelab.__file__).parent.parent)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=environment,
            cwd=tempfile.gettempdir(),
            encoding="utf-8",
        ) as process:
            too_long = threading.Timer(MOST_SECONDS, process.kill)
            too_long.start()
            try:
                for line in process.stdout or ():
                    answer = json.loads(line)
                    if "step" in answer:
                        tell(answer["step"])
            finally:
                too_long.cancel()
                process.kill()
        noise.seek(0)
        last = noise.read()[-2000:]
    if "error" in answer:
        raise ValueError(answer["error"])
    if "figures" not in answer:
        raise RuntimeError(f"the scoring process ended without an answer; it said: {last}")
    return answer


def main() -> None:
    """In the process: serve one request from stdin, answer on stdout in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a policy's print goes to stderr

    def say(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    try:
        figures = measure(json.load(sys.stdin), lambda words: say(step=words))
    except ValueError as error:
        say(error=str(error))
    except Exception as error:  # noqa: BLE001, told to the one who asked, whatever it is
        say(error=f"{type(error).__name__}: {error}")
    else:
        say(figures=figures, **circumstances())


def measure(request: dict[str, Any], tell: Tell = lambda _: None) -> dict[str, Any]:
    """Measure an entry, in this process.

    Parameters
    ----------
    request
        ``challenge`` (name), ``settings`` (for ``lab.update``), ``own`` (decision -> ``class`` and
        ``source``), ``quick``; plain values only.
    tell
        Called with a few words before each step.

    Returns
    -------
    dict
        tokens_per_s (median, and _min and _max), bytes_per_token, hit_ratio, stall_share, of_belady
        (hits over those of the best eviction at 16 bit in the memory allowed) (medians),
        peak_resident_bytes (largest), kl (the larger of kl_held_out and of kl_written, that of the
        text written in the timed runs), same_top1, text (a digest of all tokens written).

    Raises
    ------
    ValueError
        The settings or the code are refused.
    """
    task = find(request["challenge"])
    task = task.quick() if request.get("quick") else task
    if fixed := [name for name in FIXED if name in request["settings"]]:  # of a file's line
        raise ValueError(f"{fixed[0]} is fixed in a challenge")
    tell("quality on held-out texts")
    with _opened(task, request, verify=True) as lab:
        quality = score(lab, Extent(task.tokens, task.prompts, task.texts, task.scored))
    runs = []
    for number, prompt in enumerate(_prompts(task), start=1):
        tell(f"timed run {number} of {task.prompts}")
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
        own = request.get("own", {}).items()
        parts = {role: make(part["class"], part["source"]) for role, part in own}
        lab.update(device=task.device, **request["settings"], **parts)
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
        own = begun_with(engine.model, run._ids)
        context = [*own, *run.tokens[:-1]]
        full = Reference(engine, own.source).logits(context, keep=len(logits))
    kl = float(kl_divergence(full, torch.stack(logits)).mean())
    shape, summary = run.trace.shape, run.summary()
    hits, asked = belady_hits(run.trace, task.peak_bytes // max(shape.nbytes.values()))
    best = hits / asked  # of the very experts that this run asked for
    of = {"kl": kl, "written": list(run.tokens), "of_belady": summary["hit_ratio"] / best}
    return summary | of


def _figures(quality: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    medians = ("tokens_per_s", "bytes_per_token", "hit_ratio", "stall_share", "of_belady")
    kl_written = float(np.mean(columns["kl"]))
    return (
        {name: float(np.median(columns[name])) for name in medians}
        | {
            "tokens_per_s_min": min(columns["tokens_per_s"]),
            "tokens_per_s_max": max(columns["tokens_per_s"]),
            "peak_resident_bytes": max(columns["peak_resident_bytes"]),
            "kl": float(np.maximum(quality["kl_mean"], kl_written)),  # NaN if either is
            "kl_held_out": quality["kl_mean"],
            "kl_written": kl_written,
            "same_top1": quality["same_top1"],
            "text": hashlib.sha256(json.dumps(columns["written"]).encode()).hexdigest()[:16],
        }
    )
