"""The suite: who decodes faster with a share of the weights in memory, reading how much a token.

Every system decodes the same forced tokens of the same weights in a process of its own, within a
cap of ``share`` of the weights' bytes + its `ROOM`, started cold, in rotated order. What it does
not know: quality; the weights are random.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import moelab
from moelab.bench.rivals import contenders, gguf, limits
from moelab.bench.rivals.checkpoint import IDS, VOCABULARY, Shape, make
from moelab.bench.tables import as_markdown, circumstances
from moelab.runs.rounds import rotated
from moelab.store.paths import cache_dir

ROOM = {"moelab": 450 << 20, "llama.cpp": 96 << 20, "accelerate": 450 << 20}
"""Bytes of a cap beyond the share of the weights, for the process itself.

Accelerate enters its cap, less what it holds by then, when it has loaded: loading takes more.
"""
SHAPE, QUICK = "4x64 top-8 2048x1024", "2x32 top-2 256x512"
MEMORY, HERE, USUAL = "memory", "this disk", f"read-ahead {limits.READ_AHEAD} KiB"
MIXED = "16+4"
DISK_NEEDED = 7.5
"""Bytes of disk for each byte of the checkpoint: it, the stores and GGUF files, and a copy."""


@dataclass(frozen=True)
class Case:
    """One system at one precision with so much memory, its files on one kind of disk."""

    system: str
    bits: int | str
    share: float
    disk: str


@dataclass
class Files:
    """What the systems load; ``ggufs`` is empty without llama.cpp."""

    checkpoint: Path
    store: Path
    ggufs: dict[int, Path]

    def on(self, folder: Path) -> Files:
        """Copies in another folder, of what is read from there."""
        store = Path(shutil.copytree(self.store, folder / self.store.name))
        ggufs = {bits: Path(shutil.copy(file, folder)) for bits, file in self.ggufs.items()}
        return Files(self.checkpoint, store, ggufs)


def rivals(
    shape: str = "",
    *,
    folder: Path | None = None,
    llama: Path | None = None,
    tokens: int = 32,
    repeats: int = 3,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Make, convert, and measure; Ctrl-C ends it with what there is.

    Parameters
    ----------
    shape
        ``"layersxexperts top-active widthxinner"`` (default `SHAPE`).
    folder
        For checkpoint, store and GGUF files, which stay there (default: the user's cache).
    llama
        Unpacked source package of llama-cpp-python, see `gguf.GET`; without it no llama.cpp.
    tokens, repeats, seed
        Measured per run; runs per case; of the weights.
    quick
        Once, at a tiny shape, no disk of its own.

    Returns
    -------
    DataFrame
        One row per run: system, bits, share, disk, cap_bytes, peak_bytes, threads, tokens_per_s,
        bytes_per_token, prefill_tokens_per_s (in memory), peak_rss, error. ``attrs`` holds the
        rest of the circumstances.

    Raises
    ------
    ValueError
        The shape is not one.
    OSError
        The disk is too small, or this is not Linux.
    """
    if sys.platform != "linux":
        raise OSError("what a process reads and holds is measured as Linux tells it; use Linux")
    extent = Shape.of(shape or (QUICK if quick else SHAPE))
    name = str(extent).replace(" ", "-") + f"-{seed}"
    folder = (folder or cache_dir() / "rivals") / name
    folder.mkdir(parents=True, exist_ok=True)
    need = round(DISK_NEEDED * 2 * extent.weights) if not (folder / "store").is_dir() else 0
    if need > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{folder}: {need / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free")
    notes = [text for text in (gguf.missing(llama), limits.refusal()) if text]
    files = prepare(folder, extent, None if gguf.missing(llama) else llama, seed)
    suite = _Suite(extent, folder, tokens if not quick else 4, capped=not limits.refusal())
    rows, complete, times = [], False, 1 if quick else repeats
    with contextlib.suppress(KeyboardInterrupt), suite.disks(files, notes, quick=quick) as at:
        cases = [case for case in _cases(files) if case.disk in at]
        cases = [case for case in cases if suite.capped or case.share == 1]
        for bits in files.ggufs:
            suite.tune(bits, files)
        with tqdm(total=len(cases) * times, disable=not progress, desc="rivals") as bar:
            for case in rotated(cases, times):
                bar.set_postfix_str(" ".join(map(str, vars(case).values())))
                rows.append(suite.run(case, at[case.disk]))
                bar.update()
        complete = True
    frame = pd.DataFrame(rows)
    frame.attrs = {"suite": "rivals", "shape": str(extent), "seed": seed, "complete": complete}
    frame.attrs |= {"room_bytes": dict(ROOM), "tokens": suite.tokens, "repeats": times}
    frame.attrs |= {"notes": notes, "llama": gguf.version() if files.ggufs else ""}
    frame.attrs |= {"read_ahead_kib": {HERE: limits.read_ahead(folder), USUAL: limits.READ_AHEAD}}
    return frame


def prepare(folder: Path, shape: Shape, llama: Path | None, seed: int) -> Files:
    """Checkpoint, store and GGUF files, made where they are missing."""
    make(folder / "checkpoint", shape, seed=seed)
    if not (folder / "store/manifest.json").is_file():
        moelab.pack(folder / "checkpoint", folder / "store", tiers=(16, 8, 4), progress=False)
    ggufs = gguf.convert(folder / "checkpoint", folder, llama) if llama else {}
    return Files(folder / "checkpoint", folder / "store", ggufs)


def _cases(files: Files) -> Iterator[Case]:
    systems = ("moelab", "llama.cpp") if files.ggufs else ("moelab",)
    for bits in (16, 8, 4):
        for system in systems:
            yield Case(system, bits, 1, MEMORY)
            for disk in (HERE, USUAL):
                yield from (Case(system, bits, share, disk) for share in (0.5, 0.25))
    for system in systems:  # llama.cpp: Q4_0 in as much memory
        yield from (Case(system, MIXED, 0.25, disk) for disk in (HERE, USUAL))
    yield Case("accelerate", 16, 0.5, HERE)


class _Suite:
    """Runs cases of one checkpoint."""

    def __init__(self, shape: Shape, folder: Path, tokens: int, *, capped: bool) -> None:
        self.tokens, self.capped = tokens, capped
        self._shape, self._folder, self._threads = shape, folder, {}

    @contextlib.contextmanager
    def disks(self, files: Files, notes: list[str], *, quick: bool) -> Iterator[dict[str, Files]]:
        """Where the files are: here, and as copies on a disk as most have it."""
        at = {HERE: files, MEMORY: files}
        with contextlib.ExitStack() as stack:
            if self.capped and not quick:
                size = sum(f.stat().st_size for f in files.store.rglob("*") if f.is_file())
                size += sum(f.stat().st_size for f in files.ggufs.values())
                try:
                    disk = limits.usual_disk(
                        self._folder / "usual.img", round(1.05 * size) + (256 << 20)
                    )
                    at[USUAL] = files.on(stack.enter_context(disk))
                except RuntimeError as error:
                    notes.append(f"no disk with a read-ahead of {limits.READ_AHEAD} KiB: {error}")
            yield at

    def tune(self, bits: int, files: Files) -> None:
        """Find llama.cpp's best number of threads in memory."""
        counts = sorted({1, torch.get_num_threads()})
        speeds = {}
        for self._threads[bits] in counts:
            found = self.run(Case("llama.cpp", bits, 1, MEMORY), files)
            speeds[self._threads[bits]] = found.get("tokens_per_s", 0)
        self._threads[bits] = max(counts, key=lambda count: speeds[count])

    def _bytes(self, bits: int) -> tuple[int, int]:
        """Of all weights, and of those that are no expert's; four bits cost 4.5, eight 8.5."""
        rate = (2 if bits == 16 else (bits + 0.5) / 8, 2)
        d, shape = self._shape.width, self._shape
        dense = 2 * VOCABULARY * d + shape.layers * 4 * d**2
        routers = shape.layers * shape.experts * d
        return round(shape.weights * rate[0]), round(dense * rate[0] + 4 * routers)

    def run(self, case: Case, files: Files) -> dict[str, Any]:
        """One process; its row."""
        tier = case.bits if isinstance(case.bits, int) else 16
        whole, dense = self._bytes(tier)
        in_memory, late = case.share == 1, case.system == "accelerate"
        limit = round(case.share * whole) + (4 << 30 if in_memory else ROOM[case.system])
        spec: dict[str, Any] = {"system": case.system, "tokens": self.tokens, "late": late}
        spec |= {
            "in_memory": in_memory,
            "ids": str(files.checkpoint / IDS),
            "threads": torch.get_num_threads(),
        }
        if case.system == "moelab":
            how = {"strategy": "in_ram"} if in_memory else {}
            spec["model"] = str(files.store)
            spec["budget"] = "100%" if in_memory else round(case.share * whole) - dense
            how |= {"strategy": "hobbit"} if case.bits == MIXED else {"bits": tier}
            spec["settings"] = how | {"dense_bits": tier}
            cold = files.store
        elif case.system == "llama.cpp":
            kind = tier if isinstance(case.bits, int) else 4
            cold = files.ggufs[kind]
            spec |= {"model": str(cold), "threads": self._threads[kind]}
        else:
            cold, spec["model"] = files.checkpoint, str(files.checkpoint)
            spec["budget"] = round(case.share * whole / 2)  # the other half: a layer in the works
            spec["offload_folder"] = str(self._folder / "offload")
        contenders.drop(cold)
        found = _process(spec, limit if self.capped else None)
        return {**vars(case), "cap_bytes": limit, "threads": spec["threads"], **found}


def _process(spec: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    cap = limits.Cap(limit) if limit else None
    spec = {**spec, "entrance": cap.entrance if cap else ""}
    spec["limit_file"] = cap.limit_file if cap else ""
    command = [sys.executable, contenders.__file__, json.dumps(spec)]
    # A core that spins for the next layer takes it from whoever reads the disk.
    around = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, env=around
        )
        peak = {"peak_bytes": cap.peak} if cap else {}
    finally:
        if cap:
            cap.close()
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return peak | json.loads(line.removeprefix("RESULT "))
    ended = "killed by its cap" if done.returncode == -9 else done.stderr.strip()[-300:]
    return peak | {"error": ended or f"ended with {done.returncode}"}


def report(frame: pd.DataFrame) -> str:
    """Medians side by side in Markdown, with all that they hang on."""
    how, machine = frame.attrs, circumstances()["machine"]
    ahead = ", ".join(f"{disk}: {kib} KiB" for disk, kib in how["read_ahead_kib"].items())
    room = ", ".join(f"{name} {size >> 20}" for name, size in how["room_bytes"].items())
    told = (
        f"{how['shape']}, random weights; {how['tokens']} forced tokens after "
        f"{contenders.PROMPT + contenders.WARM}, median of "
        f"{'up to ' * (not how['complete'])}{how['repeats']} on "
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}. A cap is the "
        f"share of the weights' bytes + MiB for the process ({room}), page cache in it, cold. "
        f"Read-ahead: {ahead}. moelab {moelab.__version__}, {how['llama'] or 'no llama.cpp'}."
    )
    out = [told] if how["complete"] else [told, "**Stopped early.**"]
    out += [f"Left out: {note}" for note in how["notes"]]
    if not how["llama"]:
        out.append(f"llama.cpp joins in after:\n\n```\n{gguf.GET}\n```")
    rows = frame.to_dict("records")
    if rows:
        out.append(as_markdown(pd.DataFrame(_side_by_side(rows)).fillna("")))
    failed = [row for row in rows if isinstance(row.get("error"), str)]
    keys = ("system", "bits", "share", "disk", "error")
    said = [f"- {', '.join(str(row[key]) for key in keys)}" for row in failed]
    return "\n\n".join([*out, *dict.fromkeys(said)]) + "\n"


FIGURES = {
    "tokens_per_s": ("tokens/s", 1),
    "bytes_per_token": ("MB/token", 1e6),
    "prefill_tokens_per_s": ("prefill tokens/s", 1),
    "peak_bytes": ("peak MB", 1e6),
}


def _side_by_side(rows: Sequence[Mapping[Any, Any]]) -> Iterator[dict[str, str]]:
    """A line for each disk, share and precision; medians of the systems beside each other."""
    groups: dict[tuple, dict[str, list[Mapping]]] = {}
    for row in rows:
        group = groups.setdefault((row["disk"], row["share"], str(row["bits"])), {})
        group.setdefault(row["system"], []).append(row)
    for (disk, share, bits), systems in groups.items():
        line = {"where": disk, "share": f"{share:.0%}", "bits": bits}
        speeds: dict[str, float] = {}
        for figure, (unit, scale) in FIGURES.items():
            for name, runs in systems.items():
                values = [v for run in runs if not math.isnan(v := run.get(figure, math.nan))]
                if values:
                    line[f"{name}, {unit}"] = f"{statistics.median(values) / scale:.3g}"
                    if figure == "tokens_per_s":
                        speeds[name] = statistics.median(values)
        ours = speeds.pop("moelab", None)
        yield line | {
            f"moelab / {n}": f"{ours / speed:.2f}x" for n, speed in speeds.items() if ours
        }
