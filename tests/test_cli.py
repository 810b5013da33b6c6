"""The command line and the bench, as a person at a terminal meets them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import moelab
import tiny_models
from moelab import bench, health
from moelab.bench.scheduler import stream
from moelab.course import jupyter
from moelab.course import serve as serving

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_models.qwen3_moe(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("cli-store") / "store"
    return moelab.pack(checkpoint, made, tiers=(16, 4), progress=False)


def table(out: str) -> dict[str, str]:
    """The last block of `name  value` lines."""
    lines = out.rstrip().rsplit("\n\n", maxsplit=1)[-1].splitlines()
    return {line.split()[0]: line.partition("  ")[2].strip() for line in lines}


def test_help_names_every_command_without_importing_torch():
    code = (
        "import sys; sys.argv = ['moelab', '--help']\n"
        "from moelab.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    commands = ("lab", "serve", "doctor", "info", "pack", "run", "bench")
    assert all(word in out for word in commands)
    assert out.splitlines()[-1] == "False"


def test_version(call):
    assert call("--version") == (0, f"moelab {moelab.__version__}\n", "")


def test_info_prints_sizes_that_agree_with_the_lab(call, store):
    code, out, _ = call("info", store, "--budget", "50%")
    assert code == 0
    shown = table(out)
    with moelab.open(store, budget="50%") as lab:
        facts = lab.info()
    assert shown["layers"] == str(facts["layers"])
    assert shown["budget_experts"] == str(facts["budget_experts"])
    assert shown["tiers"] == "16, 4"


def test_pack_makes_a_store_that_opens(call, checkpoint, tmp_path):
    code, out, _ = call("pack", checkpoint, tmp_path / "made", "--tiers", "16,2")
    assert code == 0
    assert "tiers 16, 2" in out
    assert moelab.Store.open(tmp_path / "made", verify=True).tiers == (16, 2)


def test_run_prints_prompt_text_and_summary(call, store):
    words = ["--budget", "50%", "--bits", 16, "--low-bits", 4, "--strategy", "lfu", "--prefetch", 0]
    more = ["--device", "nvme", "--max-new-tokens", 6, "--temperature", 0, "--kl"]
    code, out, _ = call("run", store, PROMPT, *words, *more)
    assert code == 0
    shown = table(out)
    assert out.startswith(PROMPT)
    assert 1 <= int(shown["tokens"]) <= 6
    assert (shown["device"], shown["timing"]) == ("nvme", "emulated")
    assert float(shown["kl_mean"]) >= 0
    with moelab.open(
        store, budget="50%", bits=16, low_bits=4, strategy="lfu", prefetch=0, device="nvme"
    ) as lab:
        again = lab.generate(PROMPT, max_new_tokens=6, temperature=0, measure_kl=True)
    assert out.startswith(PROMPT + again.text + "\n")
    assert float(shown["hit_ratio"]) == pytest.approx(again.summary()["hit_ratio"], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "STORE", PROMPT, "--budget", "1KB"], r"budget .*raise it to \d+"),
        (["run", "STORE", PROMPT, "--budget", "lots"], r"budget 'lots' is not a size"),
        (["run", "STORE", PROMPT, "--strategy", "magic"], r"unknown strategy 'magic'.*lru"),
        (["run", "STORE", PROMPT, "--device", "tape"], r"unknown device 'tape'.*hdd"),
        (["run", "STORE", PROMPT, "--bits", "5"], r"bits=5 is not in this store.*16, 4"),
        (["run", "STORE", ""], r"the prompt is empty"),
        (["info", "no-such-model"], r"no-such-model.*not 'demo', .*'synopsis', a store"),
        (["pack", "no-such-model", "somewhere"], r"no-such-model"),
        (["pack", "STORE", "somewhere", "--tiers", "16,x"], r"--tiers '16,x': write numbers"),
        (["bench", "--model", "STORE", "--strategies", "lru + wings"], r"'wings'.*'look-ahead'"),
        (["bench", "--model", "STORE", "--strategies", "magic"], r"'magic'.*choose one of"),
        (["bench", "--model", "STORE", "--budgets", "1KB"], r"on_demand, 1KB, disk: budget"),
        (["bench", "--model", "STORE", "--json", "no/such/folder/x.json"], r"cannot write"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(
    call, store, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*[store if word == "STORE" else word for word in words])
    assert code == 2
    lines = [line for line in err.splitlines() if "it/s]" not in line and line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("moelab: ")
    assert re.search(message, lines[0])
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_prints_every_line_and_a_problem_is_exit_code_1(call, monkeypatch):
    lines = [health.Check("Python", "ok", "3.11"), health.Check("disk", "note", "slow", "buy one")]
    monkeypatch.setattr(moelab, "doctor", lambda: health.Diagnosis(tuple(lines)), raising=False)
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "no problem, 1 note"
    lines.append(health.Check("demo", "problem", "gone", "rm it"))
    code, out, err = call("doctor")
    assert (code, err) == (1, "")
    assert "mend: rm it" in out
    assert out.splitlines()[-1] == "1 problem, 1 note"


def test_serving_without_voila_is_one_line_with_the_command_to_install_it(call, monkeypatch):
    monkeypatch.setattr(serving.util, "find_spec", lambda name: None)
    told = "moelab: Voila is not installed here; run: pip install 'moelab[serve]'\n"
    assert call("serve") == (2, "", told)


def test_an_unknown_command_is_exit_code_2(call):
    code, _, err = call("fly")
    assert code == 2
    assert "fly" in err


@pytest.mark.slow
def test_ctrl_c_stops_a_run_and_still_prints_what_it_cost(store):
    words = [sys.executable, "-m", "moelab", "run", str(store), PROMPT, "--budget", "50%"]
    going = subprocess.Popen(
        [*words, "--max-new-tokens", "100000", "--device", "sd_card", "--strategy", "on_demand"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        seen = b""
        while len(seen) < len(PROMPT) + 8:  # some text has come
            seen += os.read(going.stdout.fileno(), 1)
        going.send_signal(signal.SIGINT)
        out, err = going.communicate(timeout=60)
    finally:
        going.kill()
    text = (seen + out).decode(errors="replace")
    assert going.returncode == 0, err
    assert b"Traceback" not in err
    assert "stopped" in text
    assert int(table(text)["tokens"]) >= 1


# -- bench --------------------------------------------------------------------------------------


def test_a_contender_is_written_in_words():
    assert bench.contender("lru") == {"strategy": "lru"}
    ahead = {"strategy": "lfu", "prefetch": 3, "bits": 4}
    assert bench.contender("lfu + look-ahead 3 + 4 bit") == ahead
    mixed = {"strategy": "lru", "bits": 16, "low_bits": 4}
    assert bench.contender("lru+mixed 16/4") == mixed


@pytest.fixture(scope="module")
def measured(store):
    return bench.bench(
        store,
        strategies=["on_demand", "lru", "lru + 4 bit"],
        budgets=["50%", "100%"],
        devices=["disk", "sd_card"],
        tokens=6,
        repeats=2,
        prompt=PROMPT,
        progress=False,
    )


def test_bench_has_a_row_for_each_strategy_budget_and_device(measured):
    assert len(measured) == 12
    assert not measured.duplicated(["strategy", "budget", "device"]).any()
    assert set(measured["repeats"]) == {2}
    assert set(measured["tokens"]) == {6}
    timing = set(zip(measured["device"], measured["timing"], strict=True))
    assert timing == {("disk", "measured"), ("sd_card", "emulated")}


def test_bench_figures_are_those_of_a_run_by_hand(measured, store):
    row = measured.set_index(["strategy", "budget", "device"]).loc[("lru", "50%", "disk")]
    with moelab.open(store, budget="50%", strategy="lru", measure_kl=False) as lab:
        run = lab.generate(PROMPT, max_new_tokens=6, temperature=0, ignore_eos=True)
    by_hand = run.summary()
    for name in ("hit_ratio", "byte_hit_ratio", "bytes_per_token", "downgrades", "skips"):
        assert row[name] == pytest.approx(by_hand[name]), name
    assert row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]


def test_bench_shows_what_settings_do(measured):
    rows = measured.set_index(["strategy", "budget", "device"])
    assert rows.loc[("on_demand", "100%", "disk"), "hit_ratio"] == 0
    assert rows.loc[("lru", "100%", "disk"), "hit_ratio"] > 0
    assert rows.loc[("lru", "100%", "disk"), "kl_mean"] < 1e-6
    assert rows.loc[("lru + 4 bit", "100%", "disk"), "kl_mean"] > 1e-6
    slow = rows.loc[("on_demand", "50%", "sd_card"), "tokens_per_s"]
    assert slow < 40e6 / rows.loc[("on_demand", "50%", "sd_card"), "bytes_per_token"]


def test_bench_writes_table_and_json(call, store, tmp_path):
    words = ["--strategies", "lru, lru + look-ahead", "--budgets", "50%", "--devices", "disk"]
    files = ["--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md"]
    code, out, _ = call(
        "bench", "--model", store, *words, *files, "--tokens", 4, "--repeats", 1, "--prompt", PROMPT
    )
    assert code == 0
    head = out.splitlines()[0]
    titles = ("strategy", "budget", "device", "tokens/s", "hit ratio", "stall share", "KL")
    assert all(title in head for title in titles)
    assert (tmp_path / "b.md").read_text() == out
    record = json.loads((tmp_path / "b.json").read_text())
    assert [row["strategy"] for row in record["rows"]] == ["lru", "lru + look-ahead"]
    assert record["prompt"] == PROMPT
    assert record["versions"]["moelab"] == moelab.__version__


def test_a_failing_case_stops_the_bench_before_anything_is_measured(store, monkeypatch):
    monkeypatch.setattr(moelab.Lab, "start", None)  # a run would fail otherwise than expected
    with pytest.raises(ValueError, match="lru, 1KB, disk"):
        bench.bench(
            store, strategies=["lru"], budgets=["50%", "1KB"], devices=["disk"], progress=False
        )


def test_the_schedulers_suite_prints_every_strategy_and_writes_what_it_measured(call, tmp_path):
    files = ["--json", tmp_path / "s.json", "--markdown", tmp_path / "s.md"]
    code, out, _ = call("bench", "--suite", "scheduler", "--quick", *files)
    assert code == 0
    named = [line.split()[1] for line in out.splitlines() if line.startswith("| ")][1:]
    assert named == list(moelab.strategies.NAMES)
    assert (tmp_path / "s.md").read_text() == out
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["machine"]["cores"] >= 1
    assert record["complete"]
    rows = {(row["strategy"], row["look_ahead"]): row for row in record["rows"]}
    assert len(rows) == 2 * len(named) - 3  # what three prefetch cannot be switched off
    assert rows["on_demand", 0]["hit_ratio"] == 0 < rows["lru", 0]["hit_ratio"]
    assert rows["lru", 1]["hit_ratio"] > rows["lru", 0]["hit_ratio"]
    for row in rows.values():
        assert row["activations_per_s"] == pytest.approx(6 * 2 / row["ms"] * 1e3)


def test_a_made_stream_is_the_same_for_the_same_seed_and_skewed():
    size = {"layers": 4, "experts": 32, "top_k": 4, "prompt": 8, "tokens": 64}
    stream.cache_clear()
    made, other = stream(**size, seed=1), stream(**size, seed=2)
    stream.cache_clear()
    assert (made.scores == stream(**size, seed=1).scores).all()
    assert (made.scores != other.scores).any()
    asked = [e for t in range(64) for e in made.given(0, t, 0, None, None).experts[0]]
    often = sum(sorted(map(asked.count, set(asked)))[-8:])
    assert often > 0.4 * len(asked)  # a quarter of the experts; 0.25 if none were preferred
    masked = made.given(0, 0, 1, [e % 2 == 0 for e in range(32)], None)
    assert all(e % 2 == 0 for e in masked.experts[0])
    assert masked.wanted == made.given(0, 0, 0, None, None).experts
    assert masked.look_ahead[0].layer == 1


# -- the lab ------------------------------------------------------------------------------------


def test_an_installed_package_copies_its_notebooks_and_keeps_what_is_there(tmp_path):
    package = tmp_path / "site-packages" / "moelab"
    (package / "notebooks").mkdir(parents=True)
    (package / "notebooks" / jupyter.NOTEBOOK).write_text("new")
    (package / "notebooks" / "02_more.ipynb").write_text("new")
    target = tmp_path / "here"
    target.mkdir()
    (target / jupyter.NOTEBOOK).write_text("mine")
    assert jupyter.notebooks(package, target) == target
    assert (target / jupyter.NOTEBOOK).read_text() == "mine"
    assert (target / "02_more.ipynb").read_text() == "new"


def test_a_checkout_opens_its_own_notebooks(tmp_path):
    package = Path(moelab.__file__).parent
    assert jupyter.notebooks(package, tmp_path / "never") == package.parent / "notebooks"
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_the_lab_serves_the_notebook_on_loopback_only(tmp_path):
    """`make lab` is this command after setting up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    words = [sys.executable, "-m", "moelab", "lab", *options, "--IdentityProvider.token=abc"]
    with (tmp_path / "log").open("w") as out:
        server = subprocess.Popen(
            words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=tmp_path
        )
    try:
        name = _notebook_served(server, port)
        log = (tmp_path / "log").read_text()
        assert name == jupyter.NOTEBOOK, log
        asked = "/lab/api/settings/@jupyterlab/apputils-extension:notification"
        news = json.loads(_asked(port, asked))["schema"]["properties"]["fetchNews"]
        assert news["default"] == "false", "its question would cover the first cell"
        heard = {c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp")}
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert heard == {"127.0.0.1"}


def _notebook_served(server: subprocess.Popen, port: int) -> str | None:
    """Ask the server for the notebook until it answers or ends."""
    until = time.monotonic() + 90
    while server.poll() is None and time.monotonic() < until:
        try:
            return json.loads(_asked(port, f"/api/contents/{jupyter.NOTEBOOK}?content=0"))["name"]
        except (OSError, KeyError):
            time.sleep(0.3)
    return None


def _asked(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Authorization": "token abc"})
    return connection.getresponse().read()
