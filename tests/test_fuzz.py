"""Stores of strangers by the hundred; MOELAB_FUZZ_STORES says how many, MOELAB_FUZZ_SEED which.

Each mutant is opened twice, with and without ``verify``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = int(os.environ.get("MOELAB_FUZZ_STORES", "30"))
SEED = int(os.environ.get("MOELAB_FUZZ_SEED", "0"))
SCRIPT = Path(__file__).with_name("fuzz_stores.py")


@pytest.mark.slow
@pytest.mark.timeout(120 * COUNT)
def test_a_strangers_store_crashes_nothing_hangs_nothing_and_never_writes_another_text(tmp_path):
    paths = os.pathsep.join([str(SCRIPT.parent.parent), str(SCRIPT.parent)])
    done = subprocess.run(
        [sys.executable, SCRIPT, str(COUNT), str(SEED), tmp_path],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    *findings, tally = done.stdout.splitlines()
    assert findings == []
    counted = json.loads(tally)
    assert sum(counted.values()) == 2 * COUNT
    assert min(counted["opened"], counted["refused"]) > COUNT / 10, "mutants of one kind only"
