"""Opening JupyterLab on the course's notebooks, from a checkout or an installed package."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import util
from pathlib import Path

import typer

NOTEBOOK = "00_start_here.ipynb"


def notebooks(package: Path, target: Path) -> Path:
    """Return the folder of notebooks to open: a checkout's own, else copies of the package's.

    Parameters
    ----------
    package
        The folder of the package `moelab`.
    target
        Where copies go; what lies there already is kept.
    """
    checkout = package.parent / "notebooks"
    if (checkout / NOTEBOOK).is_file() and (package.parent / "pyproject.toml").is_file():
        return checkout
    shipped = package / "notebooks"
    if not (shipped / NOTEBOOK).is_file():
        raise FileNotFoundError(f"{shipped / NOTEBOOK} is missing: install moelab again")
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(shipped.glob("*.ipynb")):
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return target


def open_jupyter(options: list[str]) -> None:
    """Become JupyterLab, on loopback; root is let in because it asked."""
    if util.find_spec("jupyterlab") is None:
        raise ImportError("JupyterLab is not installed here; run: pip install 'moelab[lab]'")
    from moelab.course.serve import let_jupyter_find

    folder = notebooks(Path(__file__).parents[1], Path.cwd() / "moelab-notebooks")
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={folder}", f"--LabApp.default_url=/lab/tree/{NOTEBOOK}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    let_jupyter_find("JUPYTER_CONFIG_PATH")  # no news: their question would cover the first cell
    opened = folder / NOTEBOOK
    typer.echo(f"moelab: opening {opened} in JupyterLab (Ctrl-C twice ends it)")
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *options])  # noqa: S606
