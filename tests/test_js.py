"""The views' scripts: what they work out, under Node, and how they become one module."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from graphlib import CycleError
from pathlib import Path

import pytest

import moelab
from moelab.runs.tokens import STALLS, figures
from moelab.views.scripts import STATIC, _bare, script

TESTS = Path(__file__).parent / "js"
OLDEST = 20
TOKENS = 24


@pytest.fixture(scope="module")
def node():
    """Node's path; a machine without one skips, CI does not."""
    found = shutil.which("node")
    if found and int(re.findall(r"\d+", told(found, "--version"))[0]) < OLDEST:
        found = None
    if found is None:
        words = f"no Node.js {OLDEST} or newer: install nodejs"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    return found


def told(*command, **env):
    """What a command prints; it fails where the command does."""
    env = os.environ | env
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=env, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recorded(demo_store, tmp_path_factory):
    """A file with a small run and what Python says of it."""
    with moelab.open(demo_store, budget="25%", strategy="hobbit", device="tx2_ssd") as lab:
        run = lab.start("Once upon a time", max_new_tokens=TOKENS, measure_kl=True, ignore_eos=True)
        while len(run.token_reports) < TOKENS // 2:
            run._done.wait(0.01)
        lab.update(budget="12%")
        recording = run.join().recording()
    values, events = recording.figures.T, recording.events
    layers = recording.document["model"]["layers"]
    moments = [
        (t, layer) for t in (3, TOKENS - 1, 0, 7, TOKENS // 2) for layer in range(-1, layers)
    ]
    waits = recording.per_token[list(STALLS)].sum(axis=1)[1:]
    lives = events[events.kind.isin(["load", "evict"])].groupby(["layer", "expert"]).kind
    said = {
        "document": recording.document,
        "figures": [
            {"begin": a, "end": b, "figures": figures(values[a:b], first=a)}
            for a, b in ((0, TOKENS), (0, 1), (5, 12), (TOKENS - 16, TOKENS), (4, 4))
        ],
        "maps": [
            {"token": t, "layer": at, "map": _cells(recording.cache_map(t, at))}
            for t, at in moments
        ],
        "blame": [
            json.loads(recording.blame(t).to_json(orient="records")) for t in range(1, TOKENS)
        ],
        "costliest": int(waits.idxmax()),
        "lives": [
            {"layer": int(at[0]), "expert": int(at[1])}
            | {"loads": int((k == "load").sum()), "evictions": int((k == "evict").sum())}
            for at, k in lives
        ],
    }
    path = tmp_path_factory.mktemp("js") / "recorded.json"
    path.write_text(json.dumps(said))
    return path


def _cells(cache):
    return {name: cells.ravel().tolist() for name, cells in cache.items()}


def test_what_the_scripts_work_out_is_right_and_as_in_python(node, recorded):
    tests = sorted(map(str, TESTS.glob("*.test.js")))
    assert "no recorded run" not in told(node, "--test", *tests, MOELAB_RECORDED=str(recorded))


@pytest.mark.parametrize("entry", ["dashboard", "page"])
def test_joined_they_are_one_module(entry, node, tmp_path):
    (tmp_path / "joined.mjs").write_text(script(entry))
    told(node, "--check", str(tmp_path / "joined.mjs"))


def test_each_file_can_be_loaded_by_itself(node):
    files = [file.as_uri() for file in sorted(STATIC.glob("*.js"))]
    load = f"for (const file of {json.dumps(files)}) await import(file)"
    told(node, "--input-type=module", "--eval", load)


def test_every_script_belongs_to_the_dashboard_or_the_page():
    both = script("dashboard") + script("page")
    for file in STATIC.glob("*.js"):
        assert _bare(file.read_text("utf-8")).strip() in both, file.name


def test_a_circle_of_imports_is_refused(tmp_path):
    for one, other in ("ab", "ba"):
        (tmp_path / f"{one}.js").write_text(f'import {{ x }} from "./{other}.js";\n')
    with pytest.raises(CycleError):
        script("a", tmp_path)


def test_what_is_imported_comes_first(tmp_path):
    (tmp_path / "a.js").write_text('import { b } from "./b.js";\n\nexport default b;\n')
    (tmp_path / "b.js").write_text("export const b = 1;\n")
    assert script("a", tmp_path) == "const b = 1;\n\n\nexport default b;\n"
