"""`make test` shares the files among workers; what has to be alone is alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

LOGGED = """
import json, os, time, pytest
def at_work(name, seconds):
    begun = time.monotonic()
    time.sleep(seconds)
    row = [name, os.environ["PYTEST_XDIST_WORKER"], begun, time.monotonic()]
    with open("log", "a") as log:
        log.write(json.dumps(row) + "\\n")
"""
TOGETHER = """
@pytest.mark.parametrize("i", range(20))
def test_beside_others(i):
    at_work("beside", 0.05)
"""
ALONE = """
@pytest.mark.alone
@pytest.mark.parametrize("i", range(3))
def test_alone(i):
    at_work("alone", 0.1)

def test_that_fails():
    assert False, "on purpose"
"""


def test_files_are_shared_and_beside_a_test_that_is_alone_nothing_runs(tmp_path):
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone\n    browser\n")
    (tmp_path / "test_one.py").write_text(LOGGED + TOGETHER)
    (tmp_path / "test_two.py").write_text(LOGGED + ALONE)
    ours = ("PYTEST_XDIST", "MOELAB_")  # a cache of their own: this test holds a lock in ours
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 23 passed" in done.stdout
    assert "on purpose" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    files = {name: {worker for what, worker, *_ in rows if what == name} for name, *_ in rows}
    assert {name: len(workers) for name, workers in files.items()} == {"beside": 1, "alone": 1}
    assert files["beside"] != files["alone"]
    for name, _, begun, ended in rows:
        others = [r for r in rows if r[2] < ended and begun < r[3]]
        assert name != "alone" or len(others) == 1, others
