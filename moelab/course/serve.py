"""`moelab serve`: the live lab as a web page for a class, each visitor with a kernel of their own.

Voila runs one small notebook per visitor and shows what it shows, without cells and without a way
to run code. A kernel costs memory, so there are as many places as fit; who comes later is told so.
A kernel ends with its page, and two minutes after a page that went away without a word.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
import webbrowser
from importlib import util
from pathlib import Path
from typing import Any, ClassVar

VISITOR_BYTES = 450_000_000
"""Memory of one visitor's kernel with the demo at its peak (proportional set size, measured)."""
RESERVED_BYTES = 500_000_000
"""Left to Voila and the system."""
A_CORE = 4
"""Visitors a core: most of them read or drag while others' runs write."""
CULL_AFTER_S, CULL_EVERY_S = 120, 30
EXTENSIONS = (
    "anywidget",
    "@jupyter-widgets/jupyterlab-manager",  # for the modules it shares
    "@voila-dashboards/widgets-manager8",
)
HOME = Path(__file__).parent
"""Has what Voila looks for (`voila/templates/moelab`, a template that needs no internet) and
JupyterLab (`labconfig`, defaults of settings)."""
NOTEBOOK = HOME / "voila" / "moelab.ipynb"
"""What a visitor sees."""


def places(max_visitors: int | None, free_bytes: int, cores: int) -> int:
    """How many visitors at a time: as asked, otherwise as memory and cores allow, at least one.

    Raises
    ------
    ValueError
        Fewer than one is asked for.

    Examples
    --------
    >>> places(None, 4_000_000_000, cores=8)
    7
    >>> places(None, 4_000_000_000, cores=1)
    4
    >>> places(30, 4_000_000_000, cores=1)
    30
    """
    if max_visitors is None:
        return max(1, min((free_bytes - RESERVED_BYTES) // VISITOR_BYTES, cores * A_CORE))
    if max_visitors < 1:
        raise ValueError(f"--max-visitors {max_visitors}: at least 1 is needed to show anything")
    return max_visitors


def announcement(visitors: int, free_bytes: int) -> str:
    """What a teacher should know before the class comes."""
    need, each = visitors * VISITOR_BYTES + RESERVED_BYTES, VISITOR_BYTES / 1e9
    told = (
        f"up to {visitors} visitor{'s' if visitors > 1 else ''} at a time; each is a kernel of "
        f"about {each:.2g} GB with the demo, and {free_bytes / 1e9:.1f} GB are free"
    )
    if need > free_bytes:
        told += f". All of them would need {need / 1e9:.1f} GB: lower --max-visitors"
    return told


def serve(
    notebook: Path | None = None,
    *,
    ip: str = "127.0.0.1",
    port: int = 8866,
    max_visitors: int | None = None,
    open_browser: bool = True,
) -> None:
    """Serve the live lab until Ctrl-C.

    Parameters
    ----------
    notebook
        Another notebook to show; default a small one with the dashboard of the demo.
    ip, port
        Where to listen. Whoever has the address with its token may look, move the controls and use
        the processors of this machine; they cannot run code or read files.
    max_visitors
        Kernels at a time; default as many as cores and the memory that is free now allow.
    open_browser
        Open the page here too.

    Raises
    ------
    ImportError
        Voila is not installed; the message says how to.
    ValueError
        The notebook does not exist, or there would be no visitor.

    Examples
    --------
    >>> serve(port=8866, max_visitors=12)  # doctest: +SKIP
    """
    if util.find_spec("voila") is None:
        raise ImportError("Voila is not installed here; run: pip install 'moelab[serve]'")
    from moelab.engine.spare import Machine
    from moelab.health import usable_cores

    if notebook is not None and not notebook.is_file():
        raise ValueError(f"there is no notebook {notebook}")
    free = Machine().spare_bytes()
    visitors = places(max_visitors, free, usable_cores())
    print(f"moelab: {announcement(visitors, free)}", flush=True)
    if ip not in {"127.0.0.1", "localhost", "::1"}:
        print(f"moelab: listening on {ip}: whoever has the address below may use it", flush=True)
    let_jupyter_find("JUPYTER_PATH")
    if notebook is None:
        _warm_up()
    _run_voila(notebook or NOTEBOOK, visitors, ip, port, open_browser=open_browser)


def let_jupyter_find(variable: str) -> None:
    """Put our folder before those that an environment variable of Jupyter's has."""
    os.environ[variable] = os.pathsep.join(filter(None, (str(HOME), os.environ.get(variable))))


def _warm_up() -> None:
    """Pack the demo and compile its kernels before anybody waits; in a process that then ends."""
    words = "import moelab; moelab.open('demo', progress=False).generate('Once', max_new_tokens=2)"
    subprocess.run([sys.executable, "-c", words], check=True)  # noqa: S603


def _run_voila(notebook: Path, visitors: int, ip: str, port: int, *, open_browser: bool) -> None:
    from traitlets.config import Config
    from voila.app import Voila

    class WithToken(Voila):
        def launch_browser(self) -> None:
            webbrowser.open(self.display_url)  # Voila's own leaves the token out

    config = Config()
    config.Voila.ip, config.Voila.port, config.Voila.port_retries = ip, port, 0
    config.Voila.open_browser = open_browser
    config.Voila.auto_token = True  # in the address that Voila prints: whoever has it may look
    config.VoilaConfiguration.file_allowlist = []  # nothing but the page, not what lies beside it
    config.Voila.root_dir = str(notebook.parent.absolute())
    config.VoilaConfiguration.multi_kernel_manager_class = _with_places(visitors)
    config.VoilaConfiguration.template = "moelab"
    config.VoilaConfiguration.extension_allowlist = list(EXTENSIONS)
    config.MappingKernelManager.cull_idle_timeout = CULL_AFTER_S
    config.MappingKernelManager.cull_interval = CULL_EVERY_S
    WithToken.launch_instance(argv=[str(notebook.absolute())], config=config)


def _with_places(visitors: int) -> type:
    """A kernel manager that refuses a kernel more than there are places."""
    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
    from tornado.web import HTTPError

    class WithPlaces(AsyncMappingKernelManager):
        starting: ClassVar[set[str]] = set()

        async def start_kernel(self, **options: Any) -> str:  # type: ignore[override]
            if len(self.starting | set(self.list_kernel_ids())) >= visitors:
                words = f"All places are taken ({visitors}); reload this page in a while"
                raise HTTPError(503, words, reason=words)
            name = options.setdefault("kernel_id", str(uuid.uuid4()))
            self.starting.add(name)
            try:
                return await super().start_kernel(**options)
            finally:
                self.starting.discard(name)

    return WithPlaces
