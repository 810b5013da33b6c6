"""Routing that other tools recorded, read as a moelab trace: ``Trace.load("route.csv")``.

Read are BigMoeOnEdge's ``--route-trace`` (CSV, github.com/Helldez/BigMoeOnEdge), llama.cpp's
``moe-trace`` example (CSV of layer and expert, pull request 28544), what vLLM returns with
``--enable-return-routed-experts`` (JSON), and any CSV or Parquet file with a column each for token,
layer and expert under one of their usual names (`NAMES`). What a source does not say is in the
trace's ``lacks``, and what needs it is refused: a trace without gate weights has equal ones, one
without bytes counts each expert as a megabyte.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moelab.scheduling.trace import FILES, FORMAT, MOST_BYTES, SAVED

LOOK_AHEAD, GATES, BYTES, PROMPT, COUNT = (
    *("look-ahead", "gate weights", "bytes of an expert", "where the prompt ends"),
    "the number of experts",
)
NOMINAL = 10**6
NAMES = {
    "sequence": ("sequence", "sequence_id", "request_id", "prompt_id", "sample_id"),
    "token": ("position", "pos", "token_idx", "token_index", "token", "step"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index", "block"),
    "expert": ("expert", "expert_id", "expert_idx", "expert_index", "experts", "expert_ids"),
    "weight": ("weight", "weights", "gate", "gates", "score", "scores", "prob", "probs"),
    "prefill": ("prefill", "is_prefill", "is_prompt"),
}
"""What a table of routing calls its columns; an expert's may hold one number, or all of a token."""
Rows = list[list[int]]
"""Experts of some tokens, ``[T][K]``."""


def csv_document(data: bytes) -> dict[str, Any]:
    """The document of a CSV that BigMoeOnEdge or llama.cpp's moe-trace wrote."""
    lines = data.decode().splitlines()
    notes = [line for line in lines if line.startswith("#")]
    rows = list(csv.reader(line for line in lines if line and not line.startswith("#")))
    if rows and {"step", "slot", "expert"} <= set(rows[0]):
        return _route(notes, rows)
    if rows and len(rows[0]) == 2:
        return _moe_trace(rows)
    columns = zip(*rows[1:], strict=True) if rows else ()
    return table_document(dict(zip(rows[0] if rows else (), columns, strict=False)))


def table_document(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The document of a table with a row for each expert of a token in a layer, or for all of them.

    Tokens are in the order of their sequence and number.
    """
    lower = {name.lower(): name for name in columns}
    found = {
        what: columns[lower[name]]
        for what, names in NAMES.items()
        for name in [next((name for name in names if name in lower), None)]
        if name
    }
    if missing := [what for what in ("token", "layer", "expert") if what not in found]:
        raise ValueError(
            f"its columns are {list(columns)}; there is none for the {missing[0]}, called one of "
            f"{', '.join(NAMES[missing[0]])}"
        )
    none = itertools.repeat(0)
    names = ("sequence", "token", "layer", "expert", "weight", "prefill")
    tokens: dict[tuple[int, int], dict[int, tuple[list[int], list[float]]]] = {}
    sequences: dict[Any, int] = {}
    prompt: dict[tuple[int, int], bool] = {}
    for sequence, token, layer, expert, weight, prefill in zip(
        *(found.get(name, none) for name in names), strict=False
    ):
        key = sequences.setdefault(sequence, len(sequences)), int(token)
        experts, weights = tokens.setdefault(key, {}).setdefault(int(layer), ([], []))
        several = list(expert) if isinstance(expert, list | tuple) else [expert]
        experts += map(int, several)
        if len(set(experts)) < len(experts):
            raise ValueError(f"token {token} has an expert of layer {layer} twice")
        weights += map(
            float, weight if isinstance(weight, list | tuple) else [weight] * len(several)
        )
        prompt[key] = str(prefill).lower() in ("1", "true")
    layers = sorted({layer for token in tokens.values() for layer in token})
    of: list[Token] = []
    for key, token in sorted(tokens.items()):
        chosen = {}
        for layer, (experts, weights) in token.items():
            gates = weights if "weight" in found else [1 / len(experts)] * len(experts)
            order = sorted(range(len(experts)), key=lambda i: -gates[i])
            chosen[layers.index(layer)] = [experts[i] for i in order], [gates[i] for i in order]
        of.append((prompt[key], chosen))
    lacks = [LOOK_AHEAD, BYTES, COUNT]
    lacks += [GATES] * ("weight" not in found) + [PROMPT] * ("prefill" not in found)
    return _document(of, len(layers), 0, 0, lacks)


def json_document(data: bytes) -> Any:
    """Our own document, or vLLM's answer turned into one."""
    found = json.loads(data)
    if isinstance(found, dict) and "format" not in found:
        choices = found.get("choices")
        of = choices[0] if isinstance(choices, list) and choices else found
        if isinstance(of, dict) and "routed_experts" in of:
            return _vllm(found.get("prompt_routed_experts") or [], of["routed_experts"])
    return found


def unpacked(data: bytes) -> bytes:
    """What a gzip holds, within what a trace may have."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise ValueError(f"unpacked it has more than {MOST_BYTES} bytes")
    return found


def _route(notes: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """BigMoeOnEdge: a row a (step, layer, slot); phase 0 is the prompt."""
    said = dict(word.split("=", 1) for line in notes for word in line[1:].split() if "=" in word)
    place = {name: i for i, name in enumerate(rows[0])}
    tokens: dict[int, dict[int, dict[int, tuple[int, float]]]] = defaultdict(dict)
    prompt: set[int] = set()
    sizes = [0]
    for row in rows[1:]:
        step, layer, slot, expert = (
            int(row[place[n]]) for n in ("step", "layer", "slot", "expert")
        )
        tokens[step].setdefault(layer, {})[slot] = expert, float(row[place["weight"]])
        if int(row[place["phase"]]) == 0:
            prompt.add(step)
        if "expert_bytes" in place:
            sizes.append(int(row[place["expert_bytes"]]))
    layers = sorted({layer for token in tokens.values() for layer in token})
    index = {layer: at for at, layer in enumerate(layers)}  # dense layers have no row
    of: list[tuple[bool, dict[int, tuple[list[int], list[float]]]]] = []
    for step, token in sorted(tokens.items()):
        chosen = {}
        for layer, slots in token.items():
            pairs = [slots[slot] for slot in sorted(slots)]
            chosen[index[layer]] = [e for e, _ in pairs], [w for _, w in pairs]
        of.append((step in prompt, chosen))
    count = int(said.get("n_expert") or 0)
    lacks = [LOOK_AHEAD] + ([] if max(sizes) else [BYTES]) + ([] if count else [COUNT])
    return _document(of, len(layers), count, max(sizes), lacks)


def _moe_trace(rows: list[list[str]]) -> dict[str, Any]:
    """llama.cpp: a row (layer, expert) for each activation, layer after layer, batch after batch.

    The shortest run of one layer's rows is that of a single token; longer ones are a prompt's.
    """
    if not rows[0][0].strip().isdigit():
        rows = rows[1:]
    pairs = [(int(layer), int(expert)) for layer, expert in rows]
    blocks = [
        (layer, [expert for _, expert in same])
        for layer, same in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]
    layers = sorted({layer for layer, _ in blocks})
    k = min((len(block) for _, block in blocks), default=0)
    if not k or any(len(block) % k for _, block in blocks) or len(blocks) % len(layers):
        raise ValueError("its rows are no whole passes through the layers")
    of = []
    for at in range(0, len(blocks), len(layers)):
        whole = blocks[at : at + len(layers)]
        if [layer for layer, _ in whole] != layers:
            raise ValueError(f"pass {at // len(layers)} does not go through the layers in order")
        tokens = max(len(block) for _, block in whole) // k
        for token in range(tokens):
            rows_of = {
                i: block[k * token : k * token + k]
                for i, (_, block) in enumerate(whole)
                if len(block) > k * token
            }
            chosen = {i: (row, [1 / k] * k) for i, row in rows_of.items()}
            of.append((tokens > 1, chosen))
    return _document(of, len(layers), 0, 0, [LOOK_AHEAD, GATES, BYTES, COUNT])


def _vllm(prompt: list[Rows], written: list[Rows]) -> dict[str, Any]:
    """vLLM: expert numbers ``[T][L][K]`` of the prompt's and of the generated tokens."""
    of = []
    for is_prompt, tokens in ((True, prompt), (False, written)):
        for token in tokens:
            chosen = {i: (list(row), [1 / len(row)] * len(row)) for i, row in enumerate(token)}
            of.append((is_prompt, chosen))
    layers = max((len(chosen) for _, chosen in of), default=0)
    lacks = [LOOK_AHEAD, GATES, BYTES, COUNT] + ([] if prompt else [PROMPT])
    return _document(of, layers, 0, 0, lacks)


Token = tuple[bool, dict[int, tuple[list[int], list[float]]]]
"""Whether it is the prompt's, and layer -> experts and weights by falling weight."""


def _document(
    tokens: list[Token], layers: int, experts: int, nbytes: int, lacks: list[str]
) -> dict[str, Any]:
    """Tokens as the document of a trace: a prompt is one step, a decoded token another."""
    rows = [chosen for _, of in tokens for chosen, _ in of.values()]
    most = max((expert for row in rows for expert in row), default=-1) + 1
    steps = [step for batch in _batches(tokens) for step in _steps(batch, layers)]
    return {
        "format": FORMAT,
        "shape": {
            "experts": [experts or most] * layers,
            "top_k": max((len(row) for row in rows), default=1),
            "nbytes": {"16": nbytes or NOMINAL},
        },
        "steps": steps,
        "changes": [],
        "resident": [],
        "lacks": lacks,
    }


def _batches(tokens: list[Token]) -> Iterator[list[Token]]:
    for is_prompt, some in itertools.groupby(tokens, key=lambda token: token[0]):
        batch = list(some)
        yield from [batch] if is_prompt else ([token] for token in batch)


def _steps(batch: list[Token], layers: int) -> Iterator[list[Any]]:
    is_prompt = batch[0][0]
    for layer in range(layers):
        # Of a prompt's last layer some tools record the last token only.
        there = [of[layer] for _, of in batch if layer in of]
        if not there:
            raise ValueError(f"a token has nothing recorded in layer {layer}")
        step = dict.fromkeys(SAVED) | {
            "layer": layer,
            "experts": [experts for experts, _ in there],
            "weights": [weights for _, weights in there],
            "prefill": is_prompt,
            "look_ahead": [],
            "in_flight": [],
            "unread": [],
        }
        yield [step[name] for name in SAVED]


def _read_only(_document: dict[str, Any]) -> bytes:
    raise ValueError("a trace is written as .json or .parquet")


FILES[""] = (FILES[""][0], json_document)
FILES[".csv"] = (_read_only, csv_document)
FILES[".gz"] = (_read_only, lambda data: csv_document(unpacked(data)))
