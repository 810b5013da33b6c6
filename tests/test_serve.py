"""`moelab serve`, and the same dashboard in the other front ends a class may use."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from browser import TOKEN, shot
from moelab.course import serve as serving
from test_browser import Dash

GB = 10**9
KERNEL_IS_THERE = """async () => {
  const { context, sessionContext } = window.jupyterapp.shell.currentWidget;
  await context.ready;
  await sessionContext.ready;
  await sessionContext.session.kernel.info;
}"""


# -- before anybody comes -----------------------------------------------------------------------


def test_there_are_as_many_places_as_memory_and_cores_allow_and_at_least_one():
    fit = (8 * GB - serving.RESERVED_BYTES) // serving.VISITOR_BYTES
    assert serving.places(None, 8 * GB, cores=64) == fit
    assert serving.places(None, 64 * GB, cores=2) == 2 * serving.A_CORE
    assert serving.places(None, 0, cores=2) == 1
    assert serving.places(30, 1 * GB, cores=2) == 30
    with pytest.raises(ValueError, match="--max-visitors 0: at least 1"):
        serving.places(0, 8 * GB, cores=2)


def test_what_a_visitor_costs_is_said_and_that_too_many_do_not_fit():
    assert "up to 3 visitors" in serving.announcement(3, 8 * GB)
    assert "0.45 GB" in serving.announcement(3, 8 * GB)
    assert "lower" not in serving.announcement(3, 8 * GB)
    assert "would need 14.0 GB: lower --max-visitors" in serving.announcement(30, 8 * GB)


def test_the_small_notebook_is_valid_and_shows_the_dashboard():
    notebook = nbformat.read(serving.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code"]
    assert notebook.cells[1].source.endswith("lab.dashboard()\n")


def test_the_page_fetches_nothing_from_the_internet():
    template = [*(serving.HOME / "voila" / "templates" / "moelab").iterdir()]
    assert len(template) == 3
    assert not re.search(r"https?:|//\w", "".join(file.read_text("utf-8") for file in template))


def test_a_notebook_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no notebook .*x\.ipynb"):
        serving.serve(tmp_path / "x.ipynb")


# -- in Chromium --------------------------------------------------------------------------------


@pytest.fixture
def page(chromium):
    """A page whose `faults` are its errors and whose `asked` are addresses of other machines."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.faults, page.asked = [], []
    page.on("pageerror", lambda error: page.faults.append(error.stack or str(error)))
    page.on("request", lambda r: page.asked.append(r.url) if strange(r.url) else None)
    yield page
    context.close()


def strange(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:"))


def use(page) -> Dash:
    """Run, and drag the budget down meanwhile."""
    page.locator(".moe-dash").first.wait_for()
    dash = Dash(page)
    dash.choose("device", "sd_card")
    dash.run(tokens=400)
    dash.until(lambda: dash.data("token") > 3, "tokens")
    before = dash.data("budget")
    dash.drag(0.1)
    dash.until(lambda: dash.data("budget") < before, "a smaller budget")
    at = dash.data("token")
    dash.until(lambda: dash.data("token") > at + 2, "the run goes on")
    dash.stop()
    return dash


@pytest.fixture
def voila(tmp_path, demo_store):
    """`moelab serve` for one visitor: (process, address, file of its log)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "moelab", "serve", "--no-browser", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*words, "--max-visitors", "1"], stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path
        )
    try:
        told(server, log, "?token=")
        (address,) = re.findall(r"http://\S+\?token=\w+", log.read_text())
        yield server, address, log
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def told(server: subprocess.Popen, log: Path, words: str, seconds: float = 300) -> None:
    """Wait until the server's log has these words."""
    until = time.monotonic() + seconds
    while words not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_class_has_the_live_lab_without_notebooks(page, voila):
    server, address, log = voila
    bare = address.partition("?")[0]
    assert "moe-dash" not in page.request.get(bare).text(), "without the token there is no page"
    assert not psutil.Process(server.pid).children(), "and no kernel"
    assert page.goto(address).status == 200
    for path in ("voila/files/moelab.ipynb", "voila/files/notebook.log", "files/moelab.ipynb"):
        assert page.request.get(f"{bare}{path}").status in (403, 404), path
    use(page)
    shot(page, "serve-light")
    assert "import moelab" not in page.content(), "no code on the page"
    heard = {c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp")}
    assert heard == {"127.0.0.1"}
    assert "up to 1 visitor at a time" in log.read_text()

    second = page.context.new_page()
    assert second.goto(address).status == 503
    assert "All places are taken (1)" in second.get_by_role("alert").inner_text()
    second.close()
    page.goto("about:blank")
    told(server, log, "Kernel shutdown")
    assert not page.faults + page.asked


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_cell_to_the_live_lab_in_notebook_7(page, jupyter):
    page.goto(f"{jupyter}/notebooks/00_start_here.ipynb?token={TOKEN}")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget")
    page.evaluate(KERNEL_IS_THERE)
    page.locator(".jp-CodeCell").first.click()
    page.keyboard.press("Shift+Enter")
    dash = use(page)
    shot(page, "notebook7-light")
    assert dash.root.bounding_box()["width"] <= 1280
    ours = [fault for fault in page.faults if "blob:" in fault]  # Notebook 7 has faults of its own
    assert not ours + page.asked
