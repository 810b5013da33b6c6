"""Stores that somebody else made: mutated, signed again or not, opened and made to write.

``python tests/fuzz_stores.py COUNT SEED FOLDER`` imports everything once and forks a process for
each mutant, with limits of time and memory; it prints a line of JSON for each finding, then a
tally.

A signed mutant has all its checksums made right again, as whoever made the store could.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import moelab
import tiny_models
from moelab.engine.generation import NotFiniteError
from moelab.engine.loader import LoadError
from moelab.scheduling.budget import BudgetError
from moelab.store.codecs import PAGE
from moelab.store.manifest import digest, digest_file
from moelab.store.pack import pack
from moelab.store.store import StoreError

SECONDS, MEMORY = 240, 6 << 30
NASTY = [0, 1, -1, 2, 3, 7, 63, 64, 128, 192, 2**20, 2**31, 2**63, 10**18, 0.5, 1e308, float("nan")]
NASTY += [float("inf"), None, True, False, "", "x", "silu", "gelu", "x" * 200_000, "\ud800", "../x"]
NASTY += ["org/repo", "flex_attention", [], {}, [[]], [0], ["x"] * 5000, {"a": {"b": 1}}]
KEYS = ("attn_implementation", "_attn_implementation", "auto_map", "rope_parameters", "dtype")
TEMPLATES = ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",)
TEMPLATES += ("{{ 'x' * 10**9 }}", "{{ messages[0].a.b }}", "{% for", "{{ bos_token }}")
CHAIN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}
NORMALIZERS = [{"type": "Sequence", "normalizers": [CHAIN] * 7}, {"type": "Lowercase"}]
NORMALIZERS += [{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}]


def originals(folder: Path) -> list[tuple[Path, list[int]]]:
    """The stores to mutate, one for the kernels and one for the slow path, with their text."""
    found = []
    for make in (tiny_models.qwen3_moe, tiny_models.gpt_oss):
        store = folder / make.__name__
        source = make(folder / f"{make.__name__}-source", num_hidden_layers=2)
        pack(source, store, tiers=(16, 4), progress=False)
        found.append((store, write(store, verify=True)))
    return found


def write(store: Path, *, verify: bool) -> list[int]:
    """Tokens of a short run, full precision beside it."""
    with moelab.open(store, budget="60%", verify=verify, progress=False, measure_kl=True) as lab:
        run = lab.generate("It is said that", max_new_tokens=3, temperature=0, ignore_eos=True)
        return list(run.tokens)


# -- mutants --------------------------------------------------------------------------------------


def mutate(store: Path, rng: random.Random) -> str:
    """Change something, and sign again or not; what was done, in words."""
    signed = rng.random() < 0.6
    kinds = (
        [_manifest, _json, _json, _bytes, _header, _files] if signed else [_bytes, _files, _json]
    )
    done = []
    for kind in rng.choices(kinds, k=rng.choice((1, 1, 2))):
        with contextlib.suppress(OSError, ValueError):  # what is to be changed is gone
            done.append(kind(store, rng))
    if signed:
        with contextlib.suppress(OSError, ValueError):
            sign(store)
    return f"{'signed' if signed else 'unsigned'}: {'; '.join(done)}"


def sign(store: Path) -> None:
    """Make all checksums and sizes right again, as far as they still can be."""
    path = store / "manifest.json"
    data = json.loads(path.read_text())
    try:
        for name in [*data["files"]]:
            file = store / name
            whole = name.endswith(".bin")
            data["files"][name] = [file.stat().st_size, "" if whole else digest_file(file)]
        for bits, sums in data["checksums"].items():
            blob = (store / f"experts-{bits}.bin").read_bytes()[PAGE:]
            size = len(blob) // max(1, len(sums))
            data["checksums"][bits] = [
                digest(blob[at * size : (at + 1) * size]) for at in range(len(sums))
            ]
    except (OSError, TypeError, AttributeError, KeyError, ValueError):
        pass  # a manifest that is none any more
    data.pop("checksum", None)
    data["checksum"] = digest(json.dumps(data, sort_keys=True).encode())
    path.write_text(json.dumps(data))


def _edit(data: object, rng: random.Random) -> str:
    """Change one value somewhere in parsed JSON."""
    at, key = data, ""
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return "nothing"
        last, key = at, rng.choice(keys)
        at = last[key]
        if not isinstance(at, dict | list) or rng.random() < 0.3:
            break
    if isinstance(last, dict) and rng.random() < 0.15:
        del last[key]
        return f"without {key}"
    number = isinstance(at, int | float) and not isinstance(at, bool) and rng.random() < 0.5
    last[key] = rng.choice((at + 1, at - 1, at * 2, at // 2)) if number else rng.choice(NASTY)
    return f"{key}={str(last[key])[:40]}"


def _manifest(store: Path, rng: random.Random) -> str:
    path = store / "manifest.json"
    data = json.loads(path.read_text())
    words = _edit(data, rng)
    path.write_text(json.dumps(data))
    return f"manifest {words}"


def _json(store: Path, rng: random.Random) -> str:
    path = rng.choice(sorted((store / "model").glob("*.json")))
    data = json.loads(path.read_text())
    choice = rng.random()
    if path.name == "tokenizer_config.json" and choice < 0.4:
        data["chat_template"] = rng.choice(TEMPLATES)
        words = f"template {data['chat_template'][:30]}"
    elif path.name == "tokenizer.json" and choice < 0.2:
        data["normalizer"] = rng.choice(NORMALIZERS)
        words = f"normalizer {data['normalizer']['type']}"
    elif choice < 0.2:
        key = rng.choice(KEYS)
        data[key] = rng.choice(NASTY)
        words = f"{key}={str(data[key])[:40]}"
    else:
        words = _edit(data, rng)
    path.write_text(json.dumps(data))
    return f"{path.name} {words}"


def _bytes(store: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in sorted(store.rglob("*")) if p.is_file()])
    data = bytearray(path.read_bytes())
    how = rng.choice(("flip", "flip", "fill", "cut", "grow"))
    at = rng.randrange(len(data)) if data else 0
    if how == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif how == "fill":
        data[at : at + 4096] = bytes([rng.choice((0, 255))]) * len(data[at : at + 4096])
    elif how == "cut":
        data = data[:at]
    else:
        data += bytes(rng.choice((1, 4096)))
    path.unlink()
    path.write_bytes(data)
    return f"{path.name} {how} at {at}"


def _header(store: Path, rng: random.Random) -> str:
    """The head of the safetensors file."""
    path = store / "model" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        head = json.loads(data[8 : 8 + length])
    except ValueError:
        return "nothing"
    words = _edit(head, rng)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"head of the weights {words}"


def _files(store: Path, rng: random.Random) -> str:
    files = [p for p in sorted(store.rglob("*")) if p.is_file()]
    path, other = rng.choice(files), rng.choice(files)
    how = rng.choice(("remove", "swap", "link", "folder"))
    if how == "swap":
        data = other.read_bytes()
        path.unlink()
        path.write_bytes(data)
    elif how == "link":
        outside = store.parent / "outside"
        shutil.copyfile(path, outside)
        path.unlink()
        path.symlink_to(outside)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
    return f"{how} {path.name} {other.name if how == 'swap' else ''}"


# -- a process for each ---------------------------------------------------------------------------


def outcome(store: Path, *, verify: bool) -> dict:
    """What opening and writing came to, within limits: in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        found = {"kind": "opened", "words": ""}
        try:
            sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
                resource.setrlimit(what, (most, most))
            found["tokens"] = write(store, verify=verify)
        except (StoreError, BudgetError, LoadError, NotFiniteError) as error:
            found = {"kind": "refused", "words": str(error)}
        except BaseException as error:  # noqa: BLE001
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            own = isinstance(error, ValueError) and f"{os.sep}moelab{os.sep}" in last
            words = "".join(traceback.format_exception(error))[-1500:]
            found = {"kind": "refused" if own else "raw", "words": words}
        if len(found["words"]) > 2000:
            found["kind"] = "long"
        os.write(writer, json.dumps(found | {"words": found["words"][-2000:]}).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    begun, text = time.monotonic(), b""
    while time.monotonic() - begun < SECONDS:
        if select.select([reader], [], [], 1)[0]:
            piece = os.read(reader, 1 << 16)
            text += piece
            if not piece:
                break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        late = time.monotonic() - begun >= SECONDS
        return {"kind": "hang" if late else "crash", "words": f"signal {os.WTERMSIG(status)}"}
    return json.loads(text) if text else {"kind": "crash", "words": "no answer"}


def main(count: int, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    stores, tally = originals(folder), collections.Counter()
    for number in range(seed, seed + count):
        rng = random.Random(number)
        original, tokens = rng.choice(stores)
        mutant = folder / f"mutant-{os.getpid()}" / "store"
        shutil.rmtree(mutant.parent, ignore_errors=True)
        shutil.copytree(original, mutant)
        done = mutate(mutant, rng)
        for verify in (False, True):
            found = outcome(mutant, verify=verify)
            same = found.get("tokens") == tokens
            if found["kind"] == "opened" and verify and done.startswith("unsigned") and not same:
                found["kind"] = "wrong"
            tally[found["kind"]] += 1
            if found["kind"] not in ("opened", "refused"):
                print(json.dumps({"number": number, "verify": verify, "done": done} | found))
                sys.stdout.flush()
        print(number, dict(tally), file=sys.stderr)  # how far it is
    print(json.dumps(tally))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
