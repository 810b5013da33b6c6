"""moelab beside llama.cpp and accelerate: the checkpoint, the caps, and the table."""

import json
import subprocess
import sys

import pandas as pd
import pytest

import moelab
from moelab.bench.rivals import contenders, gguf, limits, suite
from moelab.bench.rivals.checkpoint import IDS, Shape, make

capped = pytest.mark.skipif(bool(limits.refusal()), reason=limits.refusal())


@pytest.mark.parametrize(
    "text", ["4x64", "4x64 top-65 128x128", "4x64 top-8 100x128", "0x8 top-1 128x128"]
)
def test_a_shape_that_is_none_is_refused_with_what_to_write(text):
    with pytest.raises(ValueError, match="shape"):
        Shape.of(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    shape = Shape.of("2x16 top-2 256x256")
    make(folder / "checkpoint", shape)
    return folder, shape


def test_the_checkpoint_is_any_olmoe_and_its_routing_can_be_cached(made):
    folder, shape = made
    ids = json.loads((folder / "checkpoint" / IDS).read_text())
    before = (folder / "checkpoint" / "made.json").stat().st_mtime_ns
    make(folder / "checkpoint", shape)
    assert (folder / "checkpoint" / "made.json").stat().st_mtime_ns == before
    with moelab.open(folder / "checkpoint", budget="25%", progress=False) as lab:
        assert lab.info()["layers"] == 2
        total = sum(w.numel() for w in lab._engine.model.parameters())
        assert abs(total / shape.weights - 1) < 0.01
        text = lab._session.tokenizer.decode(ids[:256])
        run = lab.generate(text, max_new_tokens=1, measure_kl=False)
        used = pd.Series([e for step in run.trace.steps[:1] for row in step.experts for e in row])
    shares = used.value_counts(normalize=True)
    assert shares.iloc[:4].sum() > 0.4  # evenly it would be a quarter


@capped
def test_a_cap_holds_the_page_cache_too_and_kills_what_needs_more(tmp_path):
    file = tmp_path / "big"
    file.write_bytes(bytes(64 << 20))
    contenders.drop(file)
    enter = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
    for does, code in (("open(sys.argv[2], 'rb').read(1 << 25)", 0), ("x = b'1' * (1 << 28)", -9)):
        cap = limits.Cap(48 << 20)
        try:
            command = [sys.executable, "-c", f"{enter} {does}", cap.entrance, str(file)]
            assert subprocess.run(command, check=False).returncode == code
            assert 32 << 20 < cap.peak <= 48 << 20
        finally:
            cap.close()


def test_moelab_runs_in_a_process_of_its_own_within_its_cap(made):
    folder, shape = made
    files = suite.prepare(folder, shape, None, 0)
    runs = suite._Suite(shape, folder, 4, capped=not limits.refusal())
    row = runs.run(suite.Case("moelab", 4, 0.5, suite.HERE), files)
    assert "error" not in row, row
    assert row["tokens_per_s"] > 0
    assert row["bytes_per_token"] > 0


def test_the_table_has_ratios_and_says_who_failed_and_what_is_missing():
    case = {"bits": 4, "share": 0.25, "disk": suite.HERE}
    rows = [case | {"system": "moelab", "tokens_per_s": v, "peak_bytes": 1e6} for v in (2, 8, 3)]
    rows += [case | {"system": "llama.cpp", "tokens_per_s": 1.5, "peak_bytes": 2e6}]
    rows += [case | {"system": "accelerate", "error": "killed by its cap"}]
    frame = pd.DataFrame(rows)
    frame.attrs = {
        "shape": "x",
        "complete": False,
        "tokens": 8,
        "repeats": 3,
        "notes": ["a disk"],
        "llama": "",
    }
    frame.attrs |= {"room_bytes": suite.ROOM, "read_ahead_kib": {suite.HERE: 8192}}
    text = suite.report(frame)
    assert "2.00x" in text
    assert "- accelerate, 4, 0.25, this disk, killed by its cap" in text
    for said in ("Stopped early", "Left out: a disk", gguf.GET, "8192 KiB"):
        assert said in text
