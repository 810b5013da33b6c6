"""A hub's model is packed shard by shard as it comes; what stops it costs nothing that was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny_models
from moelab.catalogue import find_store
from moelab.engine.spare import Machine
from moelab.models.shards import Checkpoint
from moelab.store import destination, hub
from moelab.store import pack as packing
from moelab.store.manifest import StoreError
from moelab.store.pack import pack
from moelab.store.store import Store
from tiny_hub import Hub, served

SHARDS = 4
TIERS = (16, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards one after another, as real ones are: the last expert of one may go on in the next."""
    folder = tiny_models.qwen3_moe(tmp_path_factory.mktemp("qwen"), num_experts=5)
    names, tensors = Checkpoint(folder).names(), {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    weight_map, each = {}, -(-len(names) // SHARDS)
    for number in range(SHARDS):
        mine = names[number * each : (number + 1) * each]
        name = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({key: tensors[key] for key in mine}, folder / name)
        weight_map |= dict.fromkeys(mine, name)
    (folder / hub.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def site(source, tmp_path, monkeypatch) -> Iterator[Hub]:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    with served(source, tmp_path / "hub", monkeypatch) as site:
        yield site


def find() -> Path:
    return find_store("org/tiny", tiers=TIERS, progress=False)


def shards(site: Hub) -> dict[str, int]:
    return {name: e["size"] for name, e in site.listed.items() if name.startswith("model-")}


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "stores").iterdir())


def test_it_is_the_store_of_the_same_folder_and_the_disk_held_what_was_said(
    site, source, tmp_path, monkeypatch
):
    seen, held = [], []
    fetch = hub.HubCheckpoint.fetch

    def watched(self, numbers):
        fetch(self, numbers)
        held.append(sum(f.stat().st_size for f in self.files[0].parent.iterdir()))

    monkeypatch.setattr(hub.HubCheckpoint, "fetch", watched)
    made = pack("org/tiny", tmp_path / "made", tiers=TIERS, progress=False, check=seen.append)
    local = pack(source, tmp_path / "local", tiers=TIERS, progress=False)
    ours, theirs = Store.open(made, verify=True).manifest, Store.open(local).manifest
    assert ours.checksums == theirs.checksums
    assert ours.source == "org/tiny"
    dense = "model/model.safetensors"
    assert (made / dense).read_bytes() == (local / dense).read_bytes()
    assert {f.name for f in made.rglob("*")} == {f.name for f in local.rglob("*")}

    (sizes,), whole = seen, sum(shards(site).values())
    assert site.sent == shards(site)  # every shard once, and nothing else
    assert sizes.fetch_bytes == whole
    assert max(held) == sizes.shard_bytes < 0.6 * whole  # two neighbours share an expert
    assert sizes.store_bytes == pytest.approx(
        sum(f.stat().st_size for f in made.rglob("*.*") if f.suffix in (".bin", ".safetensors")),
        abs=20_000,
    )
    assert "to fetch in 4 files" in str(sizes)


def test_nothing_is_asked_of_the_hub_once_it_is_packed(site):
    made = find()
    site.shutdown()
    assert find() == made


@pytest.mark.parametrize("at", [0, 6, 11])
def test_packing_that_was_stopped_goes_on_and_fetches_no_shard_twice(
    site, tmp_path, monkeypatch, at
):
    count, encode = iter(range(at * len(TIERS))), packing.encode

    def stopped(*args, **options):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return encode(*args, **options)

    monkeypatch.setattr(packing, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        find()
    monkeypatch.setattr(packing, "encode", encode)
    assert [name.count(".partial-") for name in left(tmp_path)] == [1]
    Store.open(find(), verify=True)
    assert site.sent == shards(site)
    assert [name.count(".partial-") for name in left(tmp_path)] == [0]


def test_a_connection_cut_in_the_middle_is_taken_up_at_that_byte(site, tmp_path):
    second = sorted(shards(site))[1]
    site.cut = {second: 10_000}
    Store.open(find(), verify=True)
    assert site.sent == shards(site)


def test_a_hub_that_goes_away_in_the_middle_costs_no_byte_that_came(site, tmp_path, monkeypatch):
    second = sorted(shards(site))[1]
    site.cut = {second: 10_000}
    send = site.RequestHandlerClass.file

    def file(self, name):
        send(self, name)
        site.down = site.down or site.sent[second] > 0

    monkeypatch.setattr(site.RequestHandlerClass, "file", file)
    with pytest.raises(StoreError, match=r"org/tiny .*could not be downloaded.*has come is kept"):
        find()
    monkeypatch.setattr(site.RequestHandlerClass, "file", send)
    assert site.sent[second] == 10_000
    site.down = False
    Store.open(find(), verify=True)
    assert site.sent == shards(site)


def test_a_shard_that_is_not_what_the_hub_says_is_removed_and_named(site, tmp_path):
    third = sorted(shards(site))[2]
    site.spoilt = {third}
    with pytest.raises(StoreError, match=rf"{third[:11]}.* checksum .*fetched anew"):
        find()
    site.spoilt = set()
    Store.open(find(), verify=True)
    assert site.sent == shards(site) | {third: 2 * shards(site)[third]}


@pytest.mark.parametrize("lacks", ["disk", "memory"])
def test_what_does_not_fit_is_refused_in_numbers_before_a_weight_comes(site, monkeypatch, lacks):
    if lacks == "disk":
        usage = type("Usage", (), {"free": 1_000_000})
        monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage)
        message = r"the store with its shards .*needs 0\.0\d GB and .* has 0\.00 GB free; make room"
    else:
        monkeypatch.setattr(Machine, "total_bytes", lambda _: 100_000)
        message = r"needs .* kB of memory for dense weights at 16 bit .* this machine has 100 kB"
    with pytest.raises(StoreError, match=message):
        find()
    assert site.sent == {}


def test_a_file_that_is_there_whole_is_not_fetched(site, source, tmp_path):
    snapshot = Path(hub.look("org/tiny", ["config.json"])[0])
    for name in shards(site):
        shutil.copyfile(source / name, snapshot / name)
    for file in source.glob("*token*"):
        shutil.copyfile(file, snapshot / file.name)
    Store.open(find(), verify=True)
    assert site.sent == {}


def test_who_is_told_how_far_a_shard_has_come_may_stop_it(site):
    class Enough(Exception):  # noqa: N818
        pass

    told = []

    def tell(words: str) -> None:
        told.append(words)
        if words.startswith("fetching model-00002"):
            raise Enough

    with pytest.raises(Enough):
        find_store("org/tiny", tiers=TIERS, progress=tell)
    assert told[0].startswith("org/tiny: 2.")
    find()
    first = min(shards(site))
    assert site.sent[first] == shards(site)[first]


def test_one_gguf_file_of_a_repository_by_name_or_alone(source, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from test_gguf import as_gguf

    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    folder, plain = tmp_path / "files", shutil.ignore_patterns("consolidated*")
    folder.mkdir()
    whole = shutil.copytree(source, tmp_path / "whole", ignore=plain)
    as_gguf(whole, folder / "tiny.gguf", split=2)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    local = pack(folder / "tiny-00001-of-00002.gguf", tmp_path / "s", tiers=(4,), progress=False)
    with served(folder, tmp_path / "hub", monkeypatch) as site:
        for name in ("org/tiny", "org/tiny:tiny-00001-of-00002.gguf"):
            found = Store.open(find_store(name, tiers=(4,), progress=False))
            assert found.manifest.checksums == Store.open(local).manifest.checksums
        assert all(sent == site.listed[name]["size"] for name, sent in site.sent.items())
        with pytest.raises(StoreError, match=r"holds no file 'other\.gguf'"):
            find_store("org/tiny:other.gguf", progress=False)


def test_what_another_process_is_making_is_waited_for_and_stays_where_it_stopped(tmp_path):
    made, one = tmp_path / "made", tmp_path / "made.partial-k"

    def stopped() -> None:
        with destination.partial_folder(made, key="k"):
            (one / "half").touch()
            with pytest.raises(StoreError, match="being made by another process; wait"):
                destination.partial_folder(made, key="k").__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    destination.remove_stale(made, but="k")
    assert (one / "half").is_file()
    destination.remove_stale(made)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_of_pickles_says_what_is_read(site):
    for name in [*shards(site), "consolidated.safetensors", hub.INDEX]:
        del site.listed[name]
    with pytest.raises(StoreError, match="holds no safetensors"):
        find()
