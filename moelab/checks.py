"""What `moelab.doctor` looks at, each check a function that yields its lines.

Versions asked for are read from the package's own metadata, so they are written down once. Heavy
imports happen inside, each where it is looked at: a machine without torch still gets its lines.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata, util
from pathlib import Path

from moelab.health import Check
from moelab.store.paths import cache_dir

OLDEST_PYTHON = (3, 11)
LAB_BYTES = 700e6
"""Memory that a kernel with the demo takes at its peak, with JupyterLab beside it (measured)."""
STORE_BYTES = 100e6
"""Disk that the demo's store takes with all its tiers, rounded up."""
WRONG = 0.03
"""Relative error above which a kernel is wrong; int8 activations alone make about 0.006."""
SCRATCH_BYTES, BLOCK_BYTES = 24 * 2**20, 1536 * 2**10


def python() -> Iterator[Check]:
    """The interpreter and the system under it."""
    found = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        yield Check("Python", "problem", f"{found}; 3.11 or newer is needed", "make PYTHON=python3")
    elif sys.platform == "win32":
        yield Check("Python", "problem", f"{found}; moelab runs in WSL there", "wsl --install")
    else:
        yield Check("Python", "ok", found)


def packages() -> Iterator[Check]:
    """All that moelab asks for, with the versions it asks for."""
    yield from _required("", "packages", "problem", "pip install --upgrade moelab")
    lab = "pip install 'moelab[lab]'"
    yield from _required("lab", "JupyterLab", "problem" if _in_kernel() else "note", lab)
    yield from _required("serve", "Voila", "note", "pip install 'moelab[serve]'")


def _required(extra: str, name: str, state: str, mend: str) -> Iterator[Check]:
    """One line for the requirements of an extra ("": those that always hold)."""
    from packaging.requirements import Requirement

    have, lack = [], []
    for requirement in map(Requirement, metadata.requires("moelab") or []):
        marker = requirement.marker
        wanted = "" if marker is None or marker.evaluate({"extra": ""}) else extra
        if wanted != extra or (marker and not marker.evaluate({"extra": extra})):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lack.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            have.append(f"{requirement.name} {version}")
        else:
            lack.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if lack:
        yield Check(name, state, ", ".join(lack), mend)  # type: ignore[arg-type]
    elif have:
        yield Check(name, "ok", ", ".join(have))


def torch() -> Iterator[Check]:
    """Its build, and how many threads it takes."""
    loaded = import_module("torch")
    version, cuda = loaded.__version__, loaded.version.cuda
    if cuda is None:
        yield Check("torch", "ok", f"torch {version}, built for the CPU")
    else:
        size = _cuda_bytes() / 1e9
        words = f"torch {version} brings CUDA {cuda} ({size:.1f} GB), which moelab does not use"
        yield Check(
            "torch", "note", words, f"pip install --force-reinstall --no-deps {_cpu(version)}"
        )
    threads, cores = loaded.get_num_threads(), _cores()
    if threads > cores:
        words = f"{threads} threads on {cores} usable cores: they wait for each other"
        yield Check("threads", "note", words, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Check("threads", "ok", f"{threads} of torch on {cores} usable cores")


def _cpu(version: str) -> str:
    index = "https://download.pytorch.org/whl/cpu"
    return f"torch=={version.partition('+')[0]}+cpu --index-url {index}"


def _cuda_bytes() -> int:
    """What torch and its CUDA packages take on disk."""
    homes = [Path(p) / name for p in sys.path for name in ("torch/lib", "nvidia")]
    return sum(f.stat().st_size for home in homes for f in home.rglob("*.so*") if f.is_file())


def kernels() -> Iterator[Check]:
    """Compile them, and hold every tier against a plain product of the decoded weights."""
    from moelab.engine import kernels as k

    begun = time.perf_counter()
    k.warm_up()
    seconds = time.perf_counter() - begun
    wrong = {bits: error for bits, error in _kernel_errors().items() if not error < WRONG}
    if wrong:
        words = ", ".join(f"{bits} bit is off by {error:.1%}" for bits, error in wrong.items())
        mend = "export MOELAB_PORTABLE=1" if k.AVX2 else "pip install --upgrade numba llvmlite"
        yield Check("kernels", "problem", f"they compute wrong results: {words}", mend)
        return
    took = f"ready in {seconds:.1f} s, every tier checked"
    if k.AVX2:
        yield Check("kernels", "ok", f"AVX2, {took}")
    elif os.environ.get("MOELAB_PORTABLE", "0") not in ("", "0"):
        words = f"portable (MOELAB_PORTABLE is set), {took}; AVX2 would be faster"
        yield Check("kernels", "note", words, "unset MOELAB_PORTABLE")
    else:
        words = f"portable, {took}: this CPU has no AVX2, so compute is slower; waits are as real"
        yield Check("kernels", "note", words)


def _kernel_errors() -> dict[int, float]:
    """Relative error of one small expert at each tier, against float64 of its decoded weights."""
    import numpy as np
    import torch as t

    from moelab.engine.kernels import TIERS, swiglu_experts
    from moelab.store.codecs import Layout, decode, encode

    rng, width, inner = np.random.default_rng(0), 64, 128
    layout = Layout(
        (("gate_up_proj", (2 * inner, width)), ("down_proj", (width, inner))), "float16"
    )
    weights = {n: t.from_numpy(rng.standard_normal(s).astype("f4") / 8) for n, s in layout.tensors}
    x = rng.standard_normal((2, width)).astype("f4")  # [T, D]
    errors = {}
    for bits in TIERS:
        blob = encode(weights, layout, bits)
        plain = {n: w.double().numpy() for n, w in decode(blob, layout, bits).items()}
        gate, up = np.split(x @ plain["gate_up_proj"].T, 2, axis=1)  # [T, F] each
        want = (gate / (1 + np.exp(-gate)) * up) @ plain["down_proj"].T
        got, one = np.empty((1, *x.shape), np.float32), np.ones((1, 2), np.float32)
        address, tier = np.array([blob.ctypes.data], np.uintp), np.array([bits])
        swiglu_experts(address, tier, x, one, got, inner=inner, half=layout.dtype)
        errors[bits] = float(np.linalg.norm(got[0] - want) / np.linalg.norm(want))
    return errors


def front_end() -> Iterator[Check]:
    """Who shows the widgets, as far as a kernel can tell, and whether their scripts are there."""
    where = _front_end()
    if where == "terminal":
        yield Check("front end", "ok", "a terminal; in a notebook this line says more")
        return
    if where == "Colab":
        words = "Colab; its custom widget manager is switched on when the first widget is shown"
        yield Check("front end", "ok", words)
        return
    missing = [name for name in _SCRIPTS[where] if not _shared(name)]
    if missing:
        words = f"{where}; scripts of the widgets are missing here: {', '.join(missing)}"
        scripts = "anywidget jupyterlab-widgets widgetsnbextension"
        mend = f"pip install --force-reinstall --no-deps {scripts}"
        yield Check("front end", "problem", words, mend)
    elif where == "VS Code":
        words = "VS Code; its Jupyter extension takes the widgets' scripts from this environment"
        yield Check("front end", "ok", words)
    else:
        words = f"{where}; it must run from this environment, or have anywidget in its own"
        yield Check("front end", "ok", words)


_LAB_SCRIPTS = ("labextensions/anywidget", "labextensions/@jupyter-widgets/jupyterlab-manager")
_SCRIPTS = {
    "VS Code": ("nbextensions/anywidget", "nbextensions/jupyter-js-widgets"),
    "Voila": _LAB_SCRIPTS,
    "Jupyter": _LAB_SCRIPTS,
}


def _front_end() -> str:
    """The kernel's surroundings give away who started it."""
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        return "Colab"
    if not _in_kernel():
        return "terminal"
    if os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        return "Voila"
    if any(name.startswith("VSCODE_") for name in os.environ) or _names_vs_code():
        return "VS Code"
    return "Jupyter"


def _names_vs_code() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return "__vsc_ipynb_file__" in getattr(shell, "user_ns", {})


def _in_kernel() -> bool:
    if "ipykernel" not in sys.modules:
        return False
    return sys.modules["ipykernel"].__dict__.get("kernelapp") is not None and (
        sys.modules["ipykernel"].kernelapp.IPKernelApp.initialized()
    )


def _shared(name: str) -> bool:
    """Whether a folder of scripts lies where Jupyter looks."""
    from jupyter_core.paths import jupyter_path

    return any((Path(place) / name).is_dir() for place in jupyter_path())


def memory() -> Iterator[Check]:
    """What is free, and what a container allows."""
    import psutil

    free, whole = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = memory_limit_bytes()
    words = f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"
    if limit is not None and limit < whole:
        free = min(free, limit)
        words += f"; a container's limit is {limit / 1e9:.2f} GB"
    if free < LAB_BYTES:
        words += f", and the demo with JupyterLab takes {LAB_BYTES / 1e9:.1f} GB"
        yield Check("memory", "problem", words, "shut other kernels down: jupyter server list")
    else:
        yield Check("memory", "ok", words)


def memory_limit_bytes(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The control group's limit on this process (version 2 or 1), None where there is none.

    A group may use no more than any that it lies in, so all of them are asked.
    """
    limits = []
    for line in groups.read_text("utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int((folder / file).read_text("utf-8")))
    return min(limits, default=None)


def cache_folder() -> Iterator[Check]:
    """Room for stores, and the demo's own."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        words = f"{folder} cannot be written: {error.strerror}"
        yield Check("cache folder", "problem", words, "export MOELAB_CACHE=/path/with/room")
        return
    free = shutil.disk_usage(folder).free
    words = f"{folder}, {free / 1e9:.1f} GB free"
    if free < STORE_BYTES:
        words += f"; the demo's store takes up to {STORE_BYTES / 1e9:.1f} GB"
        yield Check("cache folder", "problem", words, "export MOELAB_CACHE=/path/with/room")
    else:
        yield Check("cache folder", "ok", words)


def demo_store() -> Iterator[Check]:
    """Whether the bundled model is there, and packed already."""
    from moelab import demo
    from moelab.store.store import Store, StoreError

    checkpoint = demo.checkpoint()
    if not (checkpoint / "model.safetensors").is_file():
        words = f"the bundled model is missing from {checkpoint}"
        yield Check("demo", "problem", words, "pip install --force-reinstall --no-deps moelab")
        return
    store = destination()
    if not (store / "manifest.json").is_file():
        yield Check("demo", "ok", "not packed yet: that takes some seconds when it is first opened")
        return
    try:
        Store.open(store, verify=True)
    except StoreError as error:
        yield Check("demo", "problem", f"its store is damaged: {error}", f"rm -r {store}")
    else:
        yield Check("demo", "ok", f"packed, and every blob's checksum is right: {store}")


def destination() -> Path:
    """Where the demo's store lies, or will lie."""
    from moelab import catalogue as models
    from moelab import demo
    from moelab.store.codecs import TIERS

    return models.destination(demo.checkpoint(), "demo", TIERS)


def disk() -> Iterator[Check]:
    """How fast the engine's own loader reads here, and whether past the page cache."""
    speed, direct = disk_speed(cache_dir())
    words = f"{speed / 1e6:.0f} MB/s in loads of {BLOCK_BYTES / 1e6:.1f} MB"
    if not direct:
        words = f"{words} out of the page cache: direct I/O is not to be had in this folder"
        mend = "export MOELAB_CACHE=/path/on/a/local/disk  # or emulate one: device='sd_card'"
        yield Check("disk", "note", words, mend)
        return
    from moelab.store.devices import DEVICES

    faster = [n for n, d in DEVICES.items() if (d.bandwidth_bytes_s or 0) > speed]
    beyond = f"; too slow to stand for {', '.join(faster)}" if faster else ""
    yield Check("disk", "ok", f"{words}, direct I/O{beyond}")


def disk_speed(folder: Path) -> tuple[float, bool]:
    """Bytes a second through the loader from a scratch file in ``folder``, and whether direct."""
    from moelab.engine.loader import Loader
    from moelab.engine.memory import Slot

    count = SCRATCH_BYTES // BLOCK_BYTES
    slots = [Slot(16, BLOCK_BYTES) for _ in range(4)]
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(count):
            file.write(os.urandom(BLOCK_BYTES))
        file.flush()
        os.fsync(file.fileno())
        loader = Loader(BLOCK_BYTES)
        try:
            begun = time.perf_counter()
            tickets = [
                loader.submit(Path(file.name), i * BLOCK_BYTES, slots[i % 4].view, urgent=True)
                for i in range(count)
            ]
            for ticket in tickets:
                loader.wait(ticket)
            return SCRATCH_BYTES / (time.perf_counter() - begun), loader.direct
        finally:
            loader.close()


def browser() -> Iterator[Check]:
    """Chromium, which only the tests need."""
    if util.find_spec("playwright") is None:
        return
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found:
        yield Check("Chromium", "ok", f"{found}, for the browser tests")
    else:
        words = "none, so browser tests are skipped; nothing else needs it"
        yield Check(
            "Chromium", "note", words, "apt install chromium  # or set CHROMIUM to its path"
        )


def _cores() -> int:
    """Cores that this process may use: affinity, and a container's quota."""
    import psutil

    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        usable = psutil.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return usable


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    *(python, packages, torch, kernels, front_end),
    *(memory, cache_folder, demo_store, disk, browser),
)
