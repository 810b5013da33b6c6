"""A real JupyterLab and a real Chromium, for tests marked `browser`.

Where there is no Chromium these tests are skipped, but not in CI: there they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOKEN = "moelab-tests"
ARTIFACTS = Path(os.environ.get("MOELAB_ARTIFACTS", ROOT / "test-artifacts"))
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
# JupyterLab's own commands, not its menus: those race the start of the kernel on a slow machine.
OPEN_AND_RUN_ALL = """async ({ path, content }) => {
  const app = window.jupyterapp;
  await app.restored;
  await app.serviceManager.contents.save(path, { type: "notebook", format: "json", content });
  const notebook = await app.commands.execute("docmanager:open", { path, factory: "Notebook" });
  await notebook.context.ready;
  await notebook.sessionContext.ready;
  await notebook.sessionContext.session.kernel.info;
  app.commands.execute("notebook:run-all-cells");
}"""
ALL_HAVE_RUN = """() => {
  const code = window.jupyterapp.shell.currentWidget.content.widgets
    .map(({ model }) => model).filter(({ type }) => type === "code");
  const error = code.flatMap(({ outputs }) => outputs.toJSON())
    .find((output) => output.output_type === "error");
  if (error) throw new Error(`a cell failed: ${error.ename}: ${error.evalue}`);
  return code.every(({ executionCount }) => executionCount);
}"""
SHUT_DOWN = "() => window.jupyterapp.serviceManager.sessions.shutdownAll()"


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory, demo_store):
    """Base address of a JupyterLab that serves a copy of the notebooks and has its own settings."""
    with serving(tmp_path_factory.mktemp("jupyter")) as address:
        yield address


@contextmanager
def serving(home):
    """Start a JupyterLab that keeps all it writes in ``home``; yields its address."""
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    env = os.environ | {name: str(home / folder) for name, folder in places.items()}
    env["PYTHONPATH"] = str(ROOT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={home / 'notebooks'}"]
    command += [f"--{app}.expose_app_in_browser=True" for app in ("LabApp", "JupyterNotebookApp")]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(server, f"{address}/api/status?token={TOKEN}", home / "log")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def wait_for(server, address, log, seconds=120):
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except OSError as error:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no JupyterLab: {error}\n{log.read_text()}") from error
            time.sleep(0.3)
        else:
            return


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        words = "no Chromium: install the chromium package, or set CHROMIUM to its path"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live_page(chromium, jupyter, request):
    """The live lab on a laptop's screen, its cells run; `page.faults` are the page's errors.

    Each file of tests has its own copy of the notebook, and a workspace in which nothing is open.
    A file that says ``CELLS`` has so many of its cells of code, which saves their time.
    """
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    notebook, cells = shipped("01_live_lab"), getattr(request.module, "CELLS", None)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    notebook["cells"] = code[:cells] if cells else notebook["cells"]
    open_and_run_all(page, jupyter, request.module.__name__, notebook)
    page.wait_for_function(ALL_HAVE_RUN, timeout=400_000)
    yield page
    page.evaluate(SHUT_DOWN)
    context.close()


@pytest.fixture
def page(chromium):
    """An empty page; an error in it fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    yield page
    assert not page.faults
    context.close()


def shipped(stem):
    """A notebook of ours, as JSON."""
    return json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text("utf-8"))


def open_and_run_all(page, address, name, notebook):
    """Open a copy of a notebook in a workspace of its own and begin to run its cells."""
    page.goto(f"{address}/lab/workspaces/{name}?token={TOKEN}")
    page.wait_for_function("window.jupyterapp")
    page.evaluate(OPEN_AND_RUN_ALL, {"path": f"{name}.ipynb", "content": notebook})


def kernel(page, code):
    """Run code in the notebook's kernel; return what it prints."""
    run = """async (code) => {
      const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
      let printed = "";
      const future = kernel.requestExecute({ code, store_history: false });
      future.onIOPub = ({ content }) => { printed += content.text ?? content.evalue ?? ""; };
      await future.done;
      return printed.trim();
    }"""
    return page.evaluate(run, code)


def run_cell(page, code):
    """Put code into the notebook's first code cell and run it."""
    run = """async (code) => {
      const { content } = window.jupyterapp.shell.currentWidget;
      content.activeCellIndex = content.widgets.findIndex((cell) => cell.model.type === "code");
      content.activeCell.model.sharedModel.setSource(code);
      await window.jupyterapp.commands.execute("notebook:run-cell");
    }"""
    page.evaluate(run, code)


def share(seconds=0.25):
    """The part of a processor that is ours at the moment: 1 where nobody else wants it."""
    begun, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < seconds:
        pass
    part = (time.process_time() - used) / (time.perf_counter() - begun)
    return 1.0 if part > 0.9 else part


def record(name, **figures):
    """Keep what was measured beside the pictures, one JSON object a line."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with (ARTIFACTS / "figures.jsonl").open("a") as file:
        file.write(json.dumps({"name": name, **figures}) + "\n")


def shot(page, name):
    """Keep a picture of the page for people to look at."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def read_sheet(page, path, name):
    """Open a saved sheet, light and dark: its picture is there, nothing lies beside the page."""
    page.set_viewport_size({"width": 1280, "height": 900})
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(path.as_uri())
        assert (
            page.locator("img").first.evaluate("i => i.decode().then(() => i.naturalWidth)") > 300
        )
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shot(page, f"{name}-{scheme}")
    of = "document.querySelector('h2')).color, getComputedStyle(document.body).backgroundColor]"
    text, ground = page.evaluate(f"[getComputedStyle({of}")
    assert text != ground


def reload(page, selector):
    """Load the page anew. A starved JupyterLab may come up blank: that is tried once more."""
    from playwright.sync_api import TimeoutError as TooLate

    page.reload()
    try:
        page.wait_for_selector(selector, timeout=90_000)
    except TooLate:
        page.reload()
        page.wait_for_selector(selector)
