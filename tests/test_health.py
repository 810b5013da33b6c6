"""`moelab.doctor` names what is missing and the command that mends it."""

from __future__ import annotations

import importlib
import os
import re
import sys
import types

import numpy as np
import pytest

import moelab
from conftest import CACHE
from moelab import health
from moelab.demo import synopsis
from moelab.engine.spare import Machine
from moelab.health import Check, Diagnosis

MIXED = Diagnosis(
    (
        Check("Python", "ok", "Python 3.11"),
        Check("disk", "note", "slow", "export MOELAB_CACHE=/path"),
        Check("demo", "problem", "its store is <damaged> & gone " + "x " * 80, "rm -r 'here'"),
    )
)


@pytest.fixture(scope="module")
def found(demo_store) -> dict[str, Check]:
    """What the doctor says of the machine that runs the tests."""
    return {check.name: check for check in moelab.doctor().checks}


def states(check) -> dict[str, tuple[str, str, str]]:
    return {line.name: (line.state, line.found, line.mend) for line in check()}


# -- on this machine ----------------------------------------------------------------------------


def test_where_the_tests_run_nothing_is_wrong(found):
    wrong = {n: c for n, c in found.items() if c.state == "problem"}
    assert wrong == {}
    wanted = {"Python", "packages", "torch", "kernels", "memory", "cache folder", "demo", "disk"}
    assert wanted <= set(found)


def test_the_disk_is_measured_through_the_loader_and_nothing_is_left_behind(found):
    assert re.match(r"[\d.]+ MB/s", found["disk"].found)
    assert ("page cache" in found["disk"].found) == (found["disk"].state == "note")
    assert [p.name for p in health.cache_dir().iterdir() if p.name.startswith("tmp")] == []


def test_a_packed_demo_is_checked_blob_by_blob(found, demo_store, tmp_path, monkeypatch):
    assert "checksum" in found["demo"].found
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))
    assert "not packed yet" in states(health.bundled_stores)["demo"][1]
    broken = tmp_path / demo_store.relative_to(CACHE)
    broken.parent.mkdir(parents=True)
    broken.symlink_to(demo_store)
    assert "checksum" in states(health.bundled_stores)["demo"][1]
    broken.unlink()
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    state, told, mend = states(health.bundled_stores)["demo"]
    assert (state, mend) == ("problem", f"rm -r {broken}")
    assert "damaged" in told


def test_a_copy_without_a_bundled_model_s_weights_is_broken_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(synopsis, "MODEL", tmp_path)
    state, told, mend = states(health.bundled_stores)["synopsis"]
    assert (state, "its weights are not here" in told) == ("problem", True)
    assert mend == f"{health.AGAIN} moelab"


# -- what can be wrong --------------------------------------------------------------------------


def test_a_check_that_fails_is_a_problem_and_the_others_go_on(monkeypatch):
    def first():
        raise OSError("no such\nthing")
        yield

    def second():
        yield Check("second", "ok", "fine")

    monkeypatch.setattr(health, "CHECKS", (first, second))
    told = moelab.doctor()
    failed = Check("first", "problem", "cannot be checked: OSError: no such thing")
    assert told.checks == (failed, Check("second", "ok", "fine"))
    assert not told.healthy


def test_packages_that_are_missing_or_too_old_are_named_with_the_command(monkeypatch):
    wanted = ["numpy>=99", "nosuchthing>=1", 'voila>=0.5; extra == "serve"', 'b>1; extra == "x"']
    monkeypatch.setattr(health.metadata, "requires", lambda name: wanted)
    told = states(health.packages)
    state, words, mend = told["packages"]
    assert (state, mend) == ("problem", "pip install --upgrade moelab")
    assert words == f"numpy {np.__version__} is not >=99, nosuchthing is missing"
    assert "JupyterLab" not in told
    monkeypatch.setattr(health.metadata, "requires", lambda name: ['noone>2; extra == "serve"'])
    assert states(health.packages) == {
        "Voila": ("note", "noone is missing", "pip install 'moelab[serve]'")
    }


def test_a_cuda_build_of_torch_is_a_note_with_the_way_to_the_small_one(monkeypatch):
    version = types.SimpleNamespace(cuda="13.0")
    fake = types.SimpleNamespace(
        __version__="2.13.0+cu130", version=version, get_num_threads=lambda: 10_000
    )
    monkeypatch.setattr(health, "import_module", lambda name: fake)
    told = states(health.torch)
    assert told["torch"][0] == told["threads"][0] == "note"
    assert "torch==2.13.0+cpu --index-url" in told["torch"][2]
    assert re.fullmatch(r"export OMP_NUM_THREADS=\d+", told["threads"][2])


def test_kernels_that_compute_wrong_results_are_a_problem(monkeypatch):
    monkeypatch.setattr(health, "_kernel_errors", lambda: {16: 0.0, 4: float("nan")})
    state, words, mend = states(health.kernels)["kernels"]
    assert (state, words) == ("problem", "they compute wrong results: 4 bit is off by nan%")
    assert mend


def test_the_self_check_of_the_kernels_would_find_a_wrong_one(monkeypatch):
    errors = health._kernel_errors()
    assert set(errors) == {16, 8, 4, 3, 2}
    assert max(errors.values()) < health.WRONG
    kernels = importlib.import_module("moelab.engine.kernels")
    right = kernels.compute_experts

    def off(addrs, bits, x, gate, out, **more):
        right(addrs, bits, x, gate, out, **more)
        out[..., 0] += np.abs(out).max()

    monkeypatch.setattr(kernels, "compute_experts", off)
    assert min(health._kernel_errors().values()) > health.WRONG


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "file" / "cache"))
    state, _, mend = states(health.cache_folder)["cache folder"]
    assert state == "problem"
    assert mend.startswith("export MOELAB_CACHE=")


@pytest.mark.parametrize(
    ("file", "groups", "limit"),
    [
        ("memory.max", "0::/a/b\n", "800000000"),
        ("memory.limit_in_bytes", "4:memory:/a/b\n1:cpu:/x\n0::/\n", "800000000"),
    ],
)
def test_the_limit_of_a_container_is_found(tmp_path, file, groups, limit):
    (tmp_path / "groups").write_text(groups)
    machine = Machine(tmp_path / "groups", tmp_path)
    top = tmp_path / ("memory" if "limit" in file else "")
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / file).write_text("max")
    assert machine.limit_bytes() is None
    (top / "a" / file).write_text(limit)
    assert machine.limit_bytes() == machine.total_bytes() == 800_000_000


def test_too_little_memory_is_a_problem(monkeypatch):
    monkeypatch.setattr(Machine, "limit_bytes", lambda _: 300_000_000)
    state, words, _ = states(health.memory)["memory"]
    assert state == "problem"
    assert "limit is 0.30 GB" in words


def test_front_ends_are_told_apart(monkeypatch):
    for name in [n for n in os.environ if n.startswith("VSCODE_")]:
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert states(health.front_end)["front end"][1].startswith("a terminal")
    monkeypatch.setattr(health, "_in_kernel", lambda: True)
    assert states(health.front_end)["front end"][1].startswith("Jupyter;")
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    assert states(health.front_end)["front end"][1].startswith("Voila;")
    monkeypatch.delenv("SERVER_SOFTWARE")
    monkeypatch.setenv("VSCODE_PID", "1")
    state, words, _ = states(health.front_end)["front end"]
    assert (state, words.split(";")[0]) == ("ok", "VS Code")
    monkeypatch.setattr(health, "_shared", lambda name: "anywidget" not in name)
    state, words, mend = states(health.front_end)["front end"]
    assert state == "problem"
    assert "nbextensions/anywidget" in words
    assert "anywidget" in mend
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert "custom widget manager" in states(health.front_end)["front end"][1]


# -- how it is shown ----------------------------------------------------------------------------


def test_as_text_every_problem_has_its_command_whole():
    text = str(MIXED)
    assert "mend: rm -r 'here'" in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-1] == "1 problem, 1 note"
    assert str(Diagnosis(MIXED.checks[:1])).endswith("no problem")


def test_in_a_notebook_it_is_a_table_that_needs_no_colours_and_no_network():
    html = MIXED._repr_html_()
    assert re.findall(r'scope="(\w+)"', html) == ["col"] * 3 + ["row"] * 3
    assert re.findall(r"</span> (\w+)</span>", html) == [*health.SIGNS]  # a word beside its colour
    assert "&lt;damaged&gt; &amp; gone" in html
    assert set(re.findall(r"<(\w+)", html)).isdisjoint({"script", "link", "img"})
    assert "http" not in html
