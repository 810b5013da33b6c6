"""Say what is missing here and how to mend it: `moelab.doctor()`, or `moelab doctor` in a terminal.

Every check is a function that yields its lines: ok; note (works, and something is worth knowing);
problem (something does not work). Notes and problems bring the command that mends them. Versions
asked for are the package's own metadata, speeds are measured now, and heavy imports happen where
they are looked at: a machine without torch still gets its lines. What it does not know is the
browser: a kernel cannot ask which extensions the front end has loaded.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from moelab.engine.spare import Machine
from moelab.store.paths import cache_dir

State = Literal["ok", "note", "problem"]
LAB_BYTES = 700e6  # of a kernel with the demo at its peak, and JupyterLab beside it (measured)
STORE_BYTES = 100e6  # of the demo's store with all its tiers, rounded up
WRONG = 0.03  # relative error of a wrong kernel; int8 activations alone make about 0.006
SCRATCH_BYTES, BLOCK_BYTES = 24 * 2**20, 1536 * 2**10
MOVE_CACHE = "export MOELAB_CACHE=/path/with/room"
AGAIN = "pip install --force-reinstall --no-deps"
WIDGETS = "anywidget jupyterlab-widgets widgetsnbextension"
SIGNS = {"ok": ("✓", "#00795a"), "note": ("i", "#0072b2"), "problem": ("✗", "#b32400")}
"""A sign and a colour (dark enough for white letters) to every state; the word stands beside."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, its state, what was found, and how to mend it."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """All lines; a table in a notebook, text elsewhere.

    Examples
    --------
    >>> found = Diagnosis((Check("memory", "note", "0.6 GB are free", "close other kernels"),))
    >>> found.healthy
    True
    >>> print(found)
    memory  note     0.6 GB are free
                     mend: close other kernels
    <BLANKLINE>
    no problem, 1 note
    """

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether no line is a problem."""
        return not self.problems

    @property
    def problems(self) -> tuple[Check, ...]:
        """The lines that say what does not work."""
        return tuple(check for check in self.checks if check.state == "problem")

    def verdict(self) -> str:
        """One line: how many problems and notes."""
        notes = [check for check in self.checks if check.state == "note"]
        told = [(self.problems, "problem")] + [(notes, "note")] * bool(notes)
        return ", ".join(f"{len(n) or 'no'} {word}{'s' * (len(n) > 1)}" for n, word in told)

    def __repr__(self) -> str:
        wide = max((len(check.name) for check in self.checks), default=0)
        indent, lines = " " * (wide + 11), []
        text = textwrap.TextWrapper(100, subsequent_indent=indent, break_long_words=False)
        for check in self.checks:
            lines += text.wrap(f"{check.name:<{wide}}  {check.state:<7}  {check.found}")
            if check.mend:  # never broken: it is there to be copied
                lines.append(f"{indent}mend: {check.mend}")
        return "\n".join([*lines, "", self.verdict()])

    def _repr_html_(self) -> str:
        cell = 'style="text-align:left;vertical-align:top"'
        mark = "color:#fff;border-radius:9px;padding:1px 8px;white-space:nowrap;background"
        rows = ""
        for check in self.checks:
            sign, colour = SIGNS[check.state]
            mend = f"<br>mend: <code>{escape(check.mend)}</code>" if check.mend else ""
            rows += (
                f'<tr data-state="{check.state}"><th scope="row" {cell}>{escape(check.name)}</th>'
                f'<td {cell}><span style="{mark}:{colour}"><span aria-hidden="true">{sign}</span> '
                f"{check.state}</span></td><td {cell}>{escape(check.found)}{mend}</td></tr>"
            )
        head = "".join(f'<th scope="col" {cell}>{n}</th>' for n in ("checked", "state", "found"))
        return (
            '<table style="border-collapse:collapse;max-width:60em">'
            '<caption style="text-align:left;caption-side:top;padding:4px 0"><b>moelab doctor</b>: '
            f"{self.verdict()}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )


def doctor() -> Diagnosis:
    """Look at everything moelab stands on, from Python to the disk; takes some seconds.

    One line per check, in the order in which things build on each other. Nothing is changed but a
    scratch file of 24 MB in the cache folder, which is deleted again, and numba's cache, into which
    the kernels are compiled where that has not been done yet.

    Examples
    --------
    >>> import moelab
    >>> moelab.doctor().healthy
    True
    """
    found: list[Check] = []
    for check in CHECKS:
        try:
            found.extend(check())
        except Exception as error:  # noqa: BLE001, a problem too, and it does not end the others
            name, words = check.__name__.replace("_", " "), " ".join(str(error).split())
            words = f"cannot be checked: {type(error).__name__}: {words}"
            found.append(Check(name, "problem", words))
    return Diagnosis(tuple(found))


def _line(
    name: str, found: str, wrong: str = "", mend: str = "", state: State = "problem"
) -> Check:
    """An "ok" with what was found, or another state where something is ``wrong`` with it."""
    return Check(name, state, found + wrong, mend) if wrong else Check(name, "ok", found)


def python() -> Iterator[Check]:
    """The interpreter and the system under it."""
    found = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    windows = "; moelab runs in WSL there" * (sys.platform == "win32")
    old = "; 3.11 or newer is needed" * (sys.version_info < (3, 11))
    yield _line("Python", found, old or windows, "make PYTHON=python3" if old else "wsl --install")


def packages() -> Iterator[Check]:
    """All that moelab asks for, with the versions it asks for."""
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires("moelab") or []]
    lab: State = "problem" if _in_kernel() else "note"
    states: dict[str, State] = {"": "problem", "lab": lab, "serve": "note"}
    for extra, name in {"": "packages", "lab": "JupyterLab", "serve": "Voila"}.items():
        mend = f"pip install 'moelab[{extra}]'" if extra else "pip install --upgrade moelab"
        lack, have = [], []
        for r in asked:
            fits = [not r.marker or r.marker.evaluate({"extra": e}) for e in ("", extra)]
            if fits == [not extra, True]:
                version = next((d.version for d in metadata.distributions(name=r.name)), "")
                good = version and r.specifier.contains(version, prereleases=True)
                bad = f"{version} is not {r.specifier}" if version else "is missing"
                (have if good else lack).append(f"{r.name} {version if good else bad}")
        if lack:
            yield Check(name, states[extra], ", ".join(lack), mend)
        elif have:
            yield _line(name, ", ".join(have))


def torch() -> Iterator[Check]:
    """Its build, and how many threads it takes."""
    loaded = import_module("torch")
    version, cuda = loaded.__version__, loaded.version.cuda
    if cuda is None:
        yield _line("torch", f"torch {version}, built for the CPU")
    else:
        homes = [Path(p) / name for p in sys.path for name in ("torch/lib", "nvidia")]
        size = sum(f.stat().st_size for home in homes for f in home.rglob("*.so*") if f.is_file())
        found = f"torch {version} brings CUDA {cuda}, {size / 1e9:.1f} GB that moelab does not use"
        wanted = f"torch=={version.partition('+')[0]}+cpu --index-url https://download.pytorch.org/whl/cpu"
        yield Check("torch", "note", found, f"{AGAIN} {wanted}")
    threads, cores = loaded.get_num_threads(), usable_cores()
    found = f"{threads} of torch on {cores} usable cores"
    many = ": they wait for each other" * (threads > cores)
    yield _line("threads", found, many, f"export OMP_NUM_THREADS={cores}", "note")


def usable_cores() -> int:
    """Cores that this process may use: affinity (not on macOS), and a container's quota."""
    import psutil

    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else psutil.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        usable = max(1, min(usable, round(int(quota) / int(period))))
    return usable


def kernels() -> Iterator[Check]:
    """Compile them, and hold every tier against a plain product of the decoded weights."""
    from moelab.engine import kernels as k

    begun = time.perf_counter()
    k.warm_up()
    ready = f"ready in {time.perf_counter() - begun:.1f} s, every tier checked"
    errors = _kernel_errors().items()
    if wrong := [f"{bits} bit is off by {e:.1%}" for bits, e in errors if not e < WRONG]:
        mend = "export MOELAB_PORTABLE=1" if k.AVX2 else "pip install --upgrade numba llvmlite"
        yield Check("kernels", "problem", f"they compute wrong results: {', '.join(wrong)}", mend)
    elif k.AVX2:
        yield _line("kernels", f"AVX2, {ready}")
    else:
        chosen = os.environ.get("MOELAB_PORTABLE", "0") not in ("", "0")
        slower = "MOELAB_PORTABLE is set" if chosen else "this CPU has no AVX2"
        found = f"portable, {ready}: {slower}, so compute is slower; waits are as real"
        yield Check("kernels", "note", found, "unset MOELAB_PORTABLE" * chosen)


def _kernel_errors() -> dict[int, float]:
    """Relative error of one small expert at each tier, against float64 of its decoded weights."""
    import numpy as np
    import torch as t

    from moelab.engine.kernels import TIERS, compute_experts
    from moelab.store.codecs import Layout, decode, encode

    rng, D, F = np.random.default_rng(0), 64, 128
    layout = Layout((("gate_up_proj", (2 * F, D)), ("down_proj", (D, F))), "float16")
    weights = {n: t.from_numpy(rng.standard_normal(s).astype("f4") / 8) for n, s in layout.tensors}
    x = rng.standard_normal((2, D)).astype("f4")  # [T, D]
    errors = {}
    for bits in TIERS:
        blob = encode(weights, layout, bits)
        plain = {n: w.double().numpy() for n, w in decode(blob, layout, bits).items()}
        gate, up = np.split(x @ plain["gate_up_proj"].T, 2, axis=1)  # [T, F] each
        want = (gate / (1 + np.exp(-gate)) * up) @ plain["down_proj"].T
        got, one = np.empty((1, *x.shape), np.float32), np.ones((1, 2), np.float32)
        address, tier = np.array([blob.ctypes.data], np.uintp), np.array([bits])
        compute_experts(address, tier, x, one, got, inner=F, half=layout.dtype)
        errors[bits] = float(np.linalg.norm(got[0] - want) / np.linalg.norm(want))
    return errors


_LAB = ("labextensions/anywidget", "labextensions/@jupyter-widgets/jupyterlab-manager")
_CODE = ("nbextensions/anywidget", "nbextensions/jupyter-js-widgets")
_HERE = "it must run from this environment, or have anywidget in its own"
_FRONT_ENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a terminal": ("in a notebook this line says more", ()),
    "Colab": ("its custom widget manager is switched on when the first widget is shown", ()),
    "VS Code": ("its Jupyter extension takes the widgets' scripts from this environment", _CODE),
    "Voila": (_HERE, _LAB),
    "Jupyter": (_HERE, _LAB),
}
"""What is said of each front end, and the folders of scripts that it needs."""


def front_end() -> Iterator[Check]:
    """Who shows the widgets, as far as a kernel can tell, and whether their scripts are there."""
    where = _front_end()
    said, scripts = _FRONT_ENDS[where]
    missing = ", ".join(name for name in scripts if not _shared(name))
    wrong = f"; scripts of the widgets are missing here: {missing}" if missing else ""
    found = where if wrong else f"{where}; {said}"
    yield _line("front end", found, wrong, f"{AGAIN} {WIDGETS}")


def _front_end() -> str:
    """The kernel's surroundings give away who started it."""
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        return "Colab"
    if not _in_kernel():
        return "a terminal"
    if os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        return "Voila"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    named = "__vsc_ipynb_file__" in getattr(shell, "user_ns", {})
    return "VS Code" if named or any(n.startswith("VSCODE_") for n in os.environ) else "Jupyter"


def _in_kernel() -> bool:
    app = getattr(sys.modules.get("ipykernel"), "kernelapp", None)
    return app is not None and app.IPKernelApp.initialized()


def _shared(name: str) -> bool:
    from jupyter_core.paths import jupyter_path

    return any((Path(place) / name).is_dir() for place in jupyter_path())


def memory() -> Iterator[Check]:
    """What is free, and what a container allows."""
    import psutil

    free, whole = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = Machine().limit_bytes()
    found = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    if limit is not None and limit < whole:
        free = min(free, limit)
        found += f"; a container's limit is {limit / 1e9:.2f} GB"
    few = f", and the demo with JupyterLab takes {LAB_BYTES / 1e9:.1f} GB" * (free < LAB_BYTES)
    yield _line("memory", found, few, "shut other kernels down: jupyter server list")


def cache_folder() -> Iterator[Check]:
    """Room for stores."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        yield Check("cache folder", "problem", found, MOVE_CACHE)
    else:
        free = shutil.disk_usage(folder).free
        few = f"; the demo's store takes up to {STORE_BYTES / 1e9:.1f} GB" * (free < STORE_BYTES)
        yield _line("cache folder", f"{folder}, {free / 1e9:.1f} GB free", few, MOVE_CACHE)


def bundled_stores() -> Iterator[Check]:
    """Whether the bundled models are there, and packed already."""
    from moelab import catalogue, demo
    from moelab.demo import synopsis
    from moelab.store.codecs import TIERS
    from moelab.store.store import Store, StoreError

    for name, made in {"demo": demo.checkpoint, synopsis.NAME: synopsis.checkpoint}.items():
        try:
            store = catalogue.destination(made(), name, TIERS)
        except FileNotFoundError as error:
            yield Check(name, "problem", f"its weights are not here: {error}", f"{AGAIN} moelab")
            continue
        if not (store / "manifest.json").is_file():
            yield _line(name, "not packed yet: that takes some seconds when it is first opened")
            continue
        try:
            Store.open(store, verify=True)
            yield _line(name, f"packed, and every blob's checksum is right: {store}")
        except StoreError as error:
            yield Check(name, "problem", f"its store is damaged: {error}", f"rm -r {store}")


def disk() -> Iterator[Check]:
    """How fast this disk is read, by how many loads at once."""
    from moelab.engine.readers import best
    from moelab.store.devices import DEVICES

    found, direct = disk_paces(cache_dir())
    most, speed = best(found), max(found.values())
    each = ", ".join(f"{n}: {pace / 1e6:.0f}" for n, pace in found.items())
    words = f"{found[most] / 1e6:.0f} MB/s by {most} readers in loads of {BLOCK_BYTES / 1e6:.1f} MB"
    faster = [n for n, d in DEVICES.items() if (d.bandwidth_bytes_s or 0) > speed]
    beyond = f"; too slow to stand for {', '.join(faster)}" if faster else ""
    cached = " out of the page cache: direct I/O is not to be had in this folder" * (not direct)
    mend = "export MOELAB_CACHE=/path/on/a/local/disk  # or emulate one: device='sd_card'"
    tried = f" (readers: MB/s, {each}), direct I/O{beyond}" * direct
    yield _line("disk", words + tried, cached, mend, "note")


def disk_paces(folder: Path) -> tuple[dict[int, float], bool]:
    """Bytes a second by number of readers of a scratch file in ``folder``, and whether direct."""
    from moelab.engine.readers import paces
    from moelab.store.blobs import BlobFile

    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(SCRATCH_BYTES))
        file.flush()
        os.fsync(file.fileno())
        blobs = BlobFile(Path(file.name))
        return paces(blobs, BLOCK_BYTES), blobs.direct


CHECKS = (python, packages, torch, kernels, front_end, memory, cache_folder, bundled_stores, disk)
