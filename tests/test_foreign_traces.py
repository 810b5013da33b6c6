"""Routing that other tools recorded: read back to the very experts, with what it lacks."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pandas as pd
import pytest

import moelab
from moelab.replays.bounds import belady_hits
from moelab.replays.replay import replay
from moelab.scheduling.stream import Knobs
from moelab.strategies import make

L, E, K, PROMPT, TOKENS = 3, 8, 2, 4, 6
JUNK = ("x", "-1", "1e9", "", "999999999")


@pytest.fixture
def routed() -> np.ndarray:
    """Experts ``[T, L, K]`` of a prompt and of decoded tokens, by falling weight."""
    rng = random.Random(5)
    return np.array(
        [[rng.sample(range(E), K) for _ in range(L)] for _ in range(PROMPT + TOKENS)], int
    )


def route_csv(routed, *, dense: int = 1) -> str:
    """As BigMoeOnEdge writes it; the first layers are dense and have no rows."""
    lines = ["# route_trace v1", f"# model=m.gguf arch=x n_layer={L + dense} n_expert={E}"]
    lines += ["turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"]
    for step, token in enumerate(routed):
        for layer, row in enumerate(token):
            if step < PROMPT - 1 and layer == L - 1:
                continue  # of a prompt the last layer is recorded for the last token only
            for slot, expert in enumerate(row):
                weight = (0.7, 0.3)[slot]
                phase = int(step >= PROMPT)
                lines.append(f"0,{phase},{step},{layer + dense},{slot},{expert},{weight},0,2654208")
    return "\n".join(lines)


def moe_trace_csv(routed) -> str:
    """As llama.cpp's example writes it: a prompt at once, layer by layer, then single tokens."""
    lines = ["layer,expert"]
    for batch in (routed[:PROMPT], *routed[PROMPT:, None]):
        for layer in range(L):
            lines += [f"{layer},{expert}" for token in batch for expert in token[layer]]
    return "\n".join(lines)


def chosen(trace) -> list:
    return [[list(row) for row in step.experts] for step in trace.steps if not step.prefill]


def decoded(routed) -> list:
    return [[token[layer].tolist()] for token in routed[PROMPT:] for layer in range(L)]


@pytest.mark.parametrize("packed", [False, True])
def test_bigmoeonedge(routed, tmp_path, packed):
    data = route_csv(routed).encode()
    path = tmp_path / ("route.csv.gz" if packed else "route.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    trace = moelab.Trace.load(path)
    assert trace.shape.experts == (E,) * L
    assert (trace.shape.top_k, dict(trace.shape.nbytes)) == (K, {16: 2654208})
    assert chosen(trace) == decoded(routed)
    assert [len(s.experts) for s in trace.steps if s.prefill] == [PROMPT, PROMPT, 1]
    assert trace.steps[L].weights == ((0.7, 0.3),)
    assert trace.lacks == ("look-ahead",)
    assert moelab.replay(trace, "lfu", budget="40%").counts["hit"] > 0
    again = moelab.Trace.load(trace.save(tmp_path / "a.parquet"))
    assert again == trace == moelab.Trace.load(trace.save(tmp_path / "a.json"))


def test_llama_cpp(routed, tmp_path):
    path = tmp_path / "moe_trace.csv"
    path.write_text(moe_trace_csv(routed))
    trace = moelab.Trace.load(path)
    assert chosen(trace) == decoded(routed)
    assert [[list(row) for row in step.experts] for step in trace.steps[:L]] == [
        routed[:PROMPT, layer].tolist() for layer in range(L)
    ]
    assert {"gate weights", "bytes of an expert"} <= set(trace.lacks)
    assert replay(trace, make("lru"), Knobs(10**7)).counts["hit"] <= belady_hits(trace, 10)[0]
    for name in ("hobbit", "adapmoe"):
        with pytest.raises(ValueError, match=f"no gate weights, by which '{name}' decides"):
            replay(trace, make(name), Knobs(10**7))
    assert moelab.replay(trace, "lfu", budget="50%").counts["hit"] > 0


@pytest.mark.parametrize("whole", [False, True])
def test_vllm(routed, tmp_path, whole):
    answer = {"routed_experts": routed[PROMPT:].tolist()}
    said = {"choices": [answer], "prompt_routed_experts": routed[:PROMPT].tolist()}
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(said if whole else answer))
    trace = moelab.Trace.load(path)
    assert chosen(trace) == decoded(routed)
    assert ("where the prompt ends" in trace.lacks) != whole
    assert moelab.policy_or_memory(trace, experts=10).experts == 10
    assert moelab.predictors(trace).recall["always right"] == 1


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_tokens_layers_and_experts(routed, tmp_path, suffix, listed):
    if listed and suffix == ".csv":
        pytest.skip("a cell of a CSV holds one number")
    rows = [
        {"Position": token, "layer_idx": layer, "is_prompt": token < PROMPT, **chosen}
        for token, of in enumerate(routed)
        for layer, row in enumerate(of.tolist())
        for chosen in (
            [{"experts": row, "gates": [0.7, 0.3]}]
            if listed
            else [{"experts": e, "gates": w} for e, w in zip(row, (0.7, 0.3), strict=True)]
        )
    ]
    random.Random(3).shuffle(rows)
    frame, path = pd.DataFrame(rows), tmp_path / f"routing{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    trace = moelab.Trace.load(path)
    assert chosen(trace) == decoded(routed)
    assert trace.steps[0].prefill
    assert len(trace.steps[0].experts) == PROMPT
    assert trace.steps[L].weights == ((0.7, 0.3),)
    assert set(trace.lacks) == {"look-ahead", "bytes of an expert", "the number of experts"}
    path = tmp_path / f"less{suffix}"
    less = frame.drop(columns=["layer_idx"])
    less.to_csv(path, index=False) if suffix == ".csv" else less.to_parquet(path)
    with pytest.raises(ValueError, match="none for the layer, called one of layer, layer_id"):
        moelab.Trace.load(path)


def test_a_position_goes_before_a_word_and_our_own_table_needs_its_header(routed, tmp_path):
    rows = [
        {"token": 7, "position": t, "layer": n, "expert": e}  # the same word at every place
        for t, of in enumerate(routed)
        for n, row in enumerate(of)
        for e in row
    ]
    path = tmp_path / "words.parquet"
    pd.DataFrame(rows).to_parquet(path)
    assert moelab.Trace.load(path).tokens == len(routed)
    own = moelab.Trace.load(path).save(tmp_path / "own.parquet")
    pd.read_parquet(own).to_parquet(path := tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="our columns and no header"):
        moelab.Trace.load(path)


def test_what_is_broken_is_refused_by_name(routed, tmp_path, monkeypatch):
    rng = random.Random(1)
    table = "token,layer,expert\n" + "\n".join(
        f"{t},{n},{e}" for t, of in enumerate(routed) for n, row in enumerate(of) for e in row
    )
    for text in (route_csv(routed), moe_trace_csv(routed), table):
        for _ in range(150):
            lines = text.splitlines()
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(lines))
                what = rng.choice(("drop", "junk", "number", "twice"))
                if what == "drop":
                    del lines[at]
                elif what == "twice":
                    lines.insert(at, lines[at])
                else:
                    cells = lines[at].split(",")
                    cells[rng.randrange(len(cells))] = rng.choice(
                        ("x", "-1", "1e9", "", "999999999")
                    )
                    lines[at] = ",".join(cells)
            path = tmp_path / "broken.csv"
            path.write_text("\n".join(lines))
            try:
                trace = moelab.Trace.load(path)
            except ValueError as error:
                assert "broken.csv is not a moelab trace" in str(error)  # noqa: PT017
            else:
                replay(trace, make("lru"), Knobs(trace.shape.all_bytes(16)))
    for text in ("", "a,b,c\n1,2,3", "# nothing"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"broken\.csv"):
            moelab.Trace.load(path)
    path = tmp_path / "large.csv.gz"
    path.write_bytes(gzip.compress(b"0" * 10**6))
    monkeypatch.setattr("moelab.replays.foreign.MOST_BYTES", 10**5)
    with pytest.raises(ValueError, match="unpacked it has more than"):
        moelab.Trace.load(path)
    with pytest.raises(ValueError, match="written as .json or .parquet"):
        trace.save(tmp_path / "a.csv")
