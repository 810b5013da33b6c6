"""Packing either makes a whole store or leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import tiny_models
from moelab.models.adapter import find_moe, load_skeleton
from moelab.models.checkpoint import ExpertReader
from moelab.store import destination
from moelab.store import pack as packing
from moelab.store.codecs import PAGE, decode, encode
from moelab.store.manifest import StoreError
from moelab.store.pack import pack
from moelab.store.store import Store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.qwen3_moe(tmp_path_factory.mktemp("qwen"))


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_expert_at_every_tier_is_what_the_checkpoint_holds(family, tmp_path):
    source = tiny_models.FAMILIES[family](tmp_path / "source")
    store = Store.open(pack(source, tmp_path / "store", progress=False), verify=True)
    model = load_skeleton(source, dtype=torch.float32)
    layers, reader = find_moe(model), ExpertReader(model, source)
    assert store.experts_per_layer == tuple(layer.num_experts for layer in layers)
    assert store.layout.tensors == layers[0].tensors
    assert store.top_k == layers[0].top_k
    for layer in layers:
        for expert in (0, 3, 5):
            tensors = reader(layer.index, expert)
            exact = decode(store.read(layer.index, expert, 16), store.layout, 16)
            assert all(torch.equal(exact[k], t.float()) for k, t in tensors.items())
            for bits in store.tiers:
                blob = store.read(layer.index, expert, bits)
                assert (blob == encode(tensors, store.layout, bits)).all()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_stores_own_model_folder_loads_like_the_checkpoint(family, tmp_path):
    source = tiny_models.FAMILIES[family](tmp_path / "source")
    store = Store.open(pack(source, tmp_path / "store", tiers=(4,), progress=False))
    ours = load_skeleton(store.checkpoint_dir, dtype=torch.float32)
    theirs = load_skeleton(source, dtype=torch.float32)
    for (name, a), (_, b) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert a.is_meta == b.is_meta, name
        assert a.is_meta or torch.equal(a, b), name
    kept = sum(p.stat().st_size for p in store.checkpoint_dir.glob("*.safetensors"))
    assert kept < 0.8 * sum(p.stat().st_size for p in source.glob("*.safetensors"))


def test_manifest_says_what_the_engine_needs(qwen, tmp_path):
    store = Store.open(pack(qwen, tmp_path / "store", tiers=(4, 16), progress=False))
    manifest = store.manifest
    assert manifest.architecture == "Qwen3MoeForCausalLM"
    assert manifest.source == qwen.name
    assert store.tiers == (16, 4)
    assert (manifest.hidden, manifest.inner, store.top_k) == (192, 128, 2)
    assert (manifest.activation, manifest.gating) == ("silu", "concatenated")
    assert [manifest.transposed, manifest.has_bias, manifest.has_post_norm] == [False] * 3
    assert manifest.layout.dtype == "bfloat16"
    assert all(size % PAGE == 0 for size in store.slot_bytes.values())
    assert "/" not in manifest.source


def test_gpt_oss_is_marked_as_not_plain(tmp_path):
    source = tiny_models.gpt_oss(tmp_path / "g")
    store = Store.open(pack(source, tmp_path / "store", tiers=(8,), progress=False))
    assert store.manifest.gating == "custom"
    assert store.manifest.transposed
    assert store.manifest.has_bias


def test_packing_twice_gives_the_same_bytes(qwen, tmp_path):
    first, second = (pack(qwen, tmp_path / n, tiers=(4,), progress=False) for n in "ab")
    assert (first / "experts-4.bin").read_bytes() == (second / "experts-4.bin").read_bytes()
    assert Store.open(first).manifest.id == Store.open(second).manifest.id


def test_float32_checkpoints_are_stored_as_bfloat16_and_say_so(tmp_path, capsys):
    def widen(tensors):
        tensors.update({key: t.float() for key, t in tensors.items()})

    source = tiny_models.edit(tiny_models.mixtral(tmp_path / "m"), tmp_path / "wide", widen)
    store = Store.open(pack(source, tmp_path / "store", tiers=(16,)))
    assert store.layout.dtype == "bfloat16"
    assert store.manifest.notes == ("experts are float32 in the source, stored as bfloat16",)
    assert "stored as bfloat16" in capsys.readouterr().out


def test_a_second_pack_of_the_same_is_a_no_op_and_of_another_is_refused(qwen, tmp_path):
    store = pack(qwen, tmp_path / "store", tiers=(4,), progress=False)
    stamp = (store / "manifest.json").stat().st_mtime_ns
    assert pack(qwen, store, tiers=(4,), progress=False) == store
    assert (store / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(StoreError, match="overwrite=True"):
        pack(qwen, store, tiers=(8, 4), progress=False)
    other = tiny_models.mixtral(tmp_path / "other")
    with pytest.raises(StoreError, match="overwrite=True"):
        pack(other, store, tiers=(4,), progress=False)
    pack(other, store, tiers=(4,), overwrite=True, progress=False)
    assert Store.open(store, verify=True).manifest.model_type == "mixtral"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]


def test_a_retrained_checkpoint_of_the_same_size_is_not_the_same(qwen, tmp_path):
    twin = shutil.copytree(qwen, tmp_path / "twin")
    store = pack(twin, tmp_path / "store", tiers=(2,), progress=False)
    shard = min(twin.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="overwrite=True"):
        pack(twin, store, tiers=(2,), progress=False)


def test_a_store_that_somebody_else_puts_in_its_place_is_said(tmp_path, monkeypatch):
    partial, store = tmp_path / "partial", tmp_path / "store"
    partial.mkdir()
    rename = Path.rename

    def and_another_one(self, target):
        rename(self, target)
        rename(target, tmp_path / "gone")
        store.mkdir()

    monkeypatch.setattr(Path, "rename", and_another_one)
    with pytest.raises(StoreError, match="store was replaced by somebody else meanwhile; pack"):
        destination.move(partial, store, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_store_is_never_replaced(qwen, tmp_path, overwrite):
    taken = tmp_path / "thesis"
    taken.mkdir()
    (taken / "chapter.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is not a store"):
        pack(qwen, taken, overwrite=overwrite, progress=False)
    assert (taken / "chapter.txt").read_text() == "years of work"


def test_wrong_tiers_and_sources_are_refused_with_the_next_step(qwen, tmp_path):
    with pytest.raises(StoreError, match=r"tiers=\(5,\) must be one or more of \(16, 12"):
        pack(qwen, tmp_path / "s", tiers=(5,))
    with pytest.raises(StoreError, match="one or more"):
        pack(qwen, tmp_path / "s", tiers=())
    with pytest.raises(StoreError, match="neither a folder nor a hub id"):
        pack(tmp_path / "nothing here", tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        pack(tmp_path / "empty", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_hub_id_is_downloaded_as_safetensors_only_and_remembered(qwen, tmp_path, monkeypatch):
    asked = {}

    def download(repo, **patterns):
        asked.update(repo=repo, **patterns)
        return str(qwen)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    store = pack("somebody/tiny-moe", tmp_path / "store", tiers=(2,), progress=False)
    assert Store.open(store).manifest.source == "somebody/tiny-moe"
    assert asked["repo"] == "somebody/tiny-moe"
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in asked["allow_patterns"])


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def download(repo, **_):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(StoreError, match="no route to host.*check the name and the network"):
        pack("somebody/tiny-moe", tmp_path / "store", progress=False)


def full_after(experts: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the encoder fail as if something happened after some experts."""
    count = iter(range(experts))

    def failing(tensors, layout, bits, **_):
        if next(count, None) is None:
            raise error
        return encode(tensors, layout, bits)

    monkeypatch.setattr(packing, "encode", failing)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StoreError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_interrupted_pack_leaves_nothing(qwen, tmp_path, monkeypatch, error, seen):
    full_after(7, monkeypatch, error)
    with pytest.raises(seen):
        pack(qwen, tmp_path / "store", tiers=(4,), progress=False)
    assert tree(tmp_path) == []


def test_who_is_told_how_far_it_is_may_also_stop_it(qwen, tmp_path):
    told = []
    pack(qwen, tmp_path / "store", tiers=(4,), progress=told.append)
    assert told[:2] == ["reading the source", "writing what is not an expert"]
    done = [int(words.split()[-2]) for words in told[2:]]
    assert done == sorted(done)
    assert done[0] == 0
    assert 80 < done[-1] < 100

    def enough(words: str) -> None:
        if " 50 %" in words:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(qwen, tmp_path / "other", tiers=(4,), progress=enough)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_an_interrupted_overwrite_keeps_the_old_store(qwen, tmp_path, monkeypatch):
    store = pack(qwen, tmp_path / "store", tiers=(4,), progress=False)
    before = tree(tmp_path)
    full_after(7, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pack(qwen, store, tiers=(8,), overwrite=True, progress=False)
    assert tree(tmp_path) == before
    Store.open(store, verify=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    qwen, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match="the store needs"):
        pack(qwen, tmp_path / "store", progress=False)
    assert tree(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_is_left_empty(qwen, small_disk, monkeypatch):
    monkeypatch.setattr(packing, "_check_room", lambda *_: None)
    with pytest.raises(StoreError, match="is full"):
        pack(qwen, small_disk / "store", progress=False)
    assert tree(small_disk) == []


SLOW_PACK = textwrap.dedent(
    """
    import sys, time
    from moelab.store import pack as packing
    plain = packing.encode
    def slow(*args, **fit):
        time.sleep(0.05)
        return plain(*args, **fit)
    packing.encode = slow
    packing.pack(sys.argv[1], sys.argv[2], tiers=(4,), progress=False)
    """
)


@pytest.mark.slow
def test_kill_9_leaves_no_store_and_the_next_pack_cleans_up(qwen, tmp_path):
    target = tmp_path / "store"
    child = subprocess.Popen([sys.executable, "-c", SLOW_PACK, qwen, target], cwd=ROOT)
    while not any(f.stat().st_size > PAGE for f in tmp_path.glob("store.partial-*/experts-4.bin")):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists()
    assert sum(left.is_dir() for left in tmp_path.glob("store.partial-*")) == 1
    pack(qwen, target, tiers=(4,), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    Store.open(target, verify=True)


def test_two_threads_with_one_destination_make_one_store(qwen, tmp_path):
    target, errors = tmp_path / "store", []

    def work():
        try:
            pack(qwen, target, tiers=(4,), progress=False)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    Store.open(target, verify=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", ["before move", "inside move"])
def test_the_same_store_that_appears_while_packing_is_kept(
    qwen, tmp_path, monkeypatch, overwrite, moment
):
    other, target = pack(qwen, tmp_path / "other", tiers=(4,), progress=False), tmp_path / "store"
    if moment == "before move":
        appear_while_packing(monkeypatch, other, target)
    else:
        appear_at_the_last_moment(monkeypatch, other, target)
    assert pack(qwen, target, tiers=(4,), overwrite=overwrite, progress=False) == target
    assert (target / "first").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]


def test_another_store_that_appears_while_packing_is_kept_and_said(qwen, tmp_path, monkeypatch):
    other = pack(qwen, tmp_path / "other", tiers=(8,), progress=False)
    appear_while_packing(monkeypatch, other, tmp_path / "store")
    with pytest.raises(StoreError, match="appeared while packing"):
        pack(qwen, tmp_path / "store", tiers=(4,), progress=False)
    assert Store.open(tmp_path / "store").tiers == (8,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]


def appear(store: Path, target: Path) -> None:
    shutil.copytree(store, target)
    (target / "first").touch()


def appear_while_packing(monkeypatch: pytest.MonkeyPatch, store: Path, target: Path) -> None:
    plain = packing.move

    def move(*args, **options):
        appear(store, target)
        plain(*args, **options)

    monkeypatch.setattr(packing, "move", move)


def appear_at_the_last_moment(monkeypatch: pytest.MonkeyPatch, store: Path, target: Path) -> None:
    plain = Path.rename

    def rename(self, new):
        if new == target:
            appear(store, target)
        return plain(self, new)

    monkeypatch.setattr(Path, "rename", rename)


MEMORY = textwrap.dedent(
    """
    import sys, threading, time
    import psutil
    from moelab.store import pack as packing
    first, small, large = (sys.argv[i] for i in (1, 2, 3))
    packing.pack(first, small, tiers=(16, 4), progress=False)  # libraries and compilers are in
    process, seen, done = psutil.Process(), [], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(process.memory_info().rss)
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    packing.pack(large, small + "-2", tiers=(16, 4), progress=False)
    done.set()
    watcher.join()
    print(max(seen) - before)
    """
)


def test_a_rule_is_known_again_in_another_process_and_told_from_others():
    rule = "def fit(g, top): return min({uses}(g), key=lambda x: x in {{'a', 'b', 'c'}})"
    code = (
        "import sys; from moelab.store.rows import fingerprint\n"
        "for rule in sys.argv[1:]: exec(rule); print(fingerprint(fit))"
    )

    def told(*uses):
        command = [sys.executable, "-c", code, *(rule.format(uses=used) for used in uses)]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        return done.stdout.splitlines()

    list_first, set_first = told("list", "set"), told("set", "list")
    assert list_first == set_first[::-1]
    assert list_first[0] != list_first[1]


@pytest.mark.slow
def test_memory_grows_by_a_few_experts_however_many_there_are(qwen, tmp_path):
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 20}
    large = tiny_models.qwen3_moe(tmp_path / "large", num_hidden_layers=1, **sizes)
    run = [sys.executable, "-c", MEMORY, qwen, tmp_path / "s", large]
    live = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}  # glibc: freed is given back
    done = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True, env=live)
    store = Store.open(tmp_path / "s-2")
    in_float32 = 2 * store.slot_bytes[16]
    print(f"grew by {int(done.stdout) / in_float32:.1f} float32 experts of {store.num_layers * 20}")
    assert int(done.stdout) < 5 * in_float32


def test_code_and_foreign_files_of_a_checkpoint_stay_out_of_the_store(tmp_path):
    source = tiny_models.olmoe(tmp_path / "o")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "notes.json").write_text(json.dumps({"a": 1}))
    (source / "LICENSE").write_text("MIT")
    store = Store.open(pack(source, tmp_path / "store", tiers=(2,), progress=False))
    names = {f.name for f in store.checkpoint_dir.iterdir()}
    assert {"config.json", "tokenizer.json", "LICENSE", "model.safetensors"} <= names
    assert not {"modeling_evil.py", "notes.json", "model.safetensors.index.json"} & names
