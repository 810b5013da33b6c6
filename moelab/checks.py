"""What `moelab.doctor` looks at, each check a function that yields its lines.

Versions asked for are read from the package's own metadata, so they are written down once. Heavy
imports happen inside, each where it is looked at: a machine without torch still gets its lines.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from moelab.store.paths import cache_dir

State = Literal["ok", "note", "problem"]
LAB_BYTES = 700e6  # of a kernel with the demo at its peak, and JupyterLab beside it (measured)
STORE_BYTES = 100e6  # of the demo's store with all its tiers, rounded up
WRONG = 0.03  # relative error of a wrong kernel; int8 activations alone make about 0.006
SCRATCH_BYTES, BLOCK_BYTES = 24 * 2**20, 1536 * 2**10
MOVE_CACHE = "export MOELAB_CACHE=/path/with/room"
AGAIN = "pip install --force-reinstall --no-deps"
WIDGETS = "anywidget jupyterlab-widgets widgetsnbextension"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, its state, what was found, and how to mend it."""

    name: str
    state: State
    found: str
    mend: str = ""


def _line(name: str, found: str, wrong: str = "", mend: str = "") -> Check:
    """An "ok" with what was found, or a problem where something is ``wrong`` with it."""
    return Check(name, "problem", found + wrong, mend) if wrong else Check(name, "ok", found)


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
    threads, cores = loaded.get_num_threads(), _cores()
    found = f"{threads} of torch on {cores} usable cores"
    if threads > cores:
        found += ": they wait for each other"
        yield Check("threads", "note", found, f"export OMP_NUM_THREADS={cores}")
    else:
        yield _line("threads", found)


def _cores() -> int:
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
    wrong = {bits: error for bits, error in _kernel_errors().items() if not error < WRONG}
    if wrong:
        found = ", ".join(f"{bits} bit is off by {error:.1%}" for bits, error in wrong.items())
        mend = "export MOELAB_PORTABLE=1" if k.AVX2 else "pip install --upgrade numba llvmlite"
        yield Check("kernels", "problem", f"they compute wrong results: {found}", mend)
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

    from moelab.engine.kernels import TIERS, swiglu_experts
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
        swiglu_experts(address, tier, x, one, got, inner=F, half=layout.dtype)
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
    if missing := [name for name in scripts if not _shared(name)]:
        found = f"{where}; scripts of the widgets are missing here: {', '.join(missing)}"
        yield Check("front end", "problem", found, f"{AGAIN} {WIDGETS}")
    else:
        yield _line("front end", f"{where}; {said}")


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
    limit = memory_limit_bytes()
    found = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    if limit is not None and limit < whole:
        free = min(free, limit)
        found += f"; a container's limit is {limit / 1e9:.2f} GB"
    few = f", and the demo with JupyterLab takes {LAB_BYTES / 1e9:.1f} GB" * (free < LAB_BYTES)
    yield _line("memory", found, few, "shut other kernels down: jupyter server list")


def memory_limit_bytes(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The least limit of the control groups of this process (version 2 or 1), if any has one."""
    limits: list[int] = []
    tops = {"": (root, "memory.max"), "memory": (root / "memory", "memory.limit_in_bytes")}
    for line in groups.read_text("utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        for top, file in (tops[c] for c in controllers.split(",") if c in tops):
            inner = top / path.lstrip("/")
            for folder in (f for f in (inner, *inner.parents) if f.is_relative_to(top)):
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int((folder / file).read_text("utf-8")))
    return min(limits, default=None)


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


def demo_store() -> Iterator[Check]:
    """Whether the bundled model is there, and packed already."""
    from moelab import catalogue, demo
    from moelab.store.codecs import TIERS
    from moelab.store.store import Store, StoreError

    checkpoint = demo.checkpoint()
    store = catalogue.destination(checkpoint, "demo", TIERS)
    if not (checkpoint / "model.safetensors").is_file():
        yield Check("demo", "problem", f"{checkpoint} has no weights", f"{AGAIN} moelab")
    elif not (store / "manifest.json").is_file():
        yield _line("demo", "not packed yet: that takes some seconds when it is first opened")
    else:
        try:
            Store.open(store, verify=True)
            yield _line("demo", f"packed, and every blob's checksum is right: {store}")
        except StoreError as error:
            yield Check("demo", "problem", f"its store is damaged: {error}", f"rm -r {store}")


def disk() -> Iterator[Check]:
    """How fast the engine's own loader reads here, and whether past the page cache."""
    from moelab.store.devices import DEVICES

    speed, direct = disk_speed(cache_dir())
    found = f"{speed / 1e6:.0f} MB/s in loads of {BLOCK_BYTES / 1e6:.1f} MB"
    faster = [n for n, d in DEVICES.items() if (d.bandwidth_bytes_s or 0) > speed]
    beyond = f"; too slow to stand for {', '.join(faster)}" if faster else ""
    if direct:
        yield _line("disk", f"{found}, direct I/O{beyond}")
    else:
        found += " out of the page cache: direct I/O is not to be had in this folder"
        mend = "export MOELAB_CACHE=/path/on/a/local/disk  # or emulate one: device='sd_card'"
        yield Check("disk", "note", found, mend)


def disk_speed(folder: Path) -> tuple[float, bool]:
    """Bytes a second through the loader from a scratch file in ``folder``, and whether direct."""
    from moelab.engine.loader import Loader
    from moelab.engine.memory import Slot

    slots = itertools.cycle([Slot(16, BLOCK_BYTES).view for _ in range(4)])
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(SCRATCH_BYTES))
        file.flush()
        os.fsync(file.fileno())
        loader, path = Loader(BLOCK_BYTES), Path(file.name)
        try:
            begun = time.perf_counter()
            at = range(0, SCRATCH_BYTES, BLOCK_BYTES)
            for load in [loader.submit(path, i, next(slots), urgent=True) for i in at]:
                loader.wait(load)
            return SCRATCH_BYTES / (time.perf_counter() - begun), loader.direct
        finally:
            loader.close()


CHECKS = (python, packages, torch, kernels, front_end, memory, cache_folder, demo_store, disk)
