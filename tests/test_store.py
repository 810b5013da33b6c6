"""A store that is not exactly what was packed is refused, by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from moelab.scheduling.writing import write_atomically
from moelab.store.codecs import PAGE
from moelab.store.manifest import Manifest, digest
from moelab.store.pack import pack
from moelab.store.store import Store, StoreError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    source = tiny_models.deepseek_v3(folder / "source")
    return pack(source, folder / "store", tiers=(16, 4), progress=False)


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Store:
    """A copy to spoil."""
    return Store.open(shutil.copytree(packed, tmp_path / "store"))


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def flip(path: Path, offset: int) -> None:
    patch(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def rewrite(store: Store, change, *, forge: bool) -> None:
    """Edit the manifest; `forge` also recomputes its checksum."""
    path = store.path / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    if forge:
        del data["checksum"]
        data["checksum"] = digest(json.dumps(data, sort_keys=True).encode())
    path.write_text(json.dumps(data))


def test_an_untouched_store_verifies(store):
    store.verify()
    assert Store.open(store.path, verify=True).manifest == store.manifest


def test_manifest_survives_the_round_trip(store):
    assert Manifest.from_json(store.manifest.to_json()) == store.manifest


def test_places_are_aligned_contiguous_and_cover_the_file(store):
    for bits in store.tiers:
        end = PAGE
        for layer, count in enumerate(store.experts_per_layer):
            for expert in range(count):
                file, offset, size = store.location(layer, expert, bits)
                assert (offset, size) == (end, store.slot_bytes[bits])
                assert offset % PAGE == size % PAGE == 0
                end = offset + size
        assert file.stat().st_size == end


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((0, 0, 8), r"no 8-bit tier; it has \(16, 4\)"),
        ((2, 0, 4), "no layer 2; it has 0 to 1"),
        ((-1, 0, 4), "no layer -1"),
        ((1, 6, 4), "layer 1 of .* has no expert 6"),
    ],
)
def test_places_that_do_not_exist_are_refused(store, place, message):
    with pytest.raises(StoreError, match=message):
        store.location(*place)


def test_threads_may_read_at_once(store):
    jobs = [(layer, e, bits) for layer in range(2) for e in range(6) for bits in (16, 4)] * 4
    expected = {job: store.read(*job) for job in set(jobs)}
    with ThreadPoolExecutor(2) as pool:
        for job, blob in zip(jobs, pool.map(lambda j: store.read(*j), jobs), strict=True):
            assert np.array_equal(blob, expected[job])


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 2), (1, 5)])
@pytest.mark.parametrize("part", [1 / 3, 1 - 1e-9], ids=["codes", "padding"])
def test_one_flipped_bit_is_found_by_file_layer_and_expert(store, bits, layer, expert, part):
    file, offset, size = store.location(layer, expert, bits)
    flip(file, offset + int(part * size))
    opened = Store.open(store.path)
    with pytest.raises(StoreError, match=rf"experts-{bits}\.bin.*layer {layer} expert {expert} "):
        opened.verify()


def test_two_swapped_experts_are_found(store):
    one, two = store.read(0, 2, 4).tobytes(), store.read(1, 3, 4).tobytes()
    patch(*store.location(0, 2, 4)[:2], two)
    patch(*store.location(1, 3, 4)[:2], one)
    with pytest.raises(StoreError, match="layer 0 expert 2"):
        Store.open(store.path, verify=True)


def test_two_swapped_files_are_refused_at_open(store, tmp_path):
    """Same names, same sizes: the first page tells."""
    other = tiny_models.deepseek_v3(tmp_path / "other", num_attention_heads=2)
    stranger = pack(other, tmp_path / "stranger", tiers=(16, 4), progress=False)
    shutil.copyfile(stranger / "experts-4.bin", store.path / "experts-4.bin")
    with pytest.raises(StoreError, match=r"experts-4\.bin is not this store's 4-bit file"):
        Store.open(store.path)


def test_tiers_swapped_within_a_store_are_refused_at_open(store):
    four, sixteen = store.path / "experts-4.bin", store.path / "experts-16.bin"
    page = sixteen.read_bytes()[:PAGE]
    patch(four, 0, page)
    with pytest.raises(StoreError, match=r"experts-4\.bin is not this store's 4-bit file"):
        Store.open(store.path)


@pytest.mark.parametrize("name", ["experts-16.bin", "experts-4.bin", "model/model.safetensors"])
@pytest.mark.parametrize(("change", "word"), [(-PAGE, "truncated"), (1, "longer")])
def test_wrong_sizes_are_refused_at_open_by_name(store, name, change, word):
    file = store.path / name
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(StoreError, match=rf"{Path(name).name} is {word}"):
        Store.open(store.path)


def test_a_file_truncated_after_opening_is_named_with_layer_and_expert(store):
    file, offset, size = store.location(1, 4, 4)
    with file.open("r+b") as stream:
        stream.truncate(offset + size // 2)
    with pytest.raises(
        StoreError, match=r"experts-4\.bin cannot be read at layer 1 expert 4: .* ends"
    ):
        store.read(1, 4, 4)


@pytest.mark.parametrize("name", ["experts-4.bin", "model/config.json", "manifest.json"])
def test_missing_files_are_refused_by_name(store, name):
    (store.path / name).unlink()
    with pytest.raises(StoreError, match=Path(name).name):
        Store.open(store.path)


def test_an_edited_configuration_is_refused_at_open(store):
    config = store.checkpoint_dir / "config.json"
    text = config.read_text()
    assert '"rms_norm_eps": 1e-06' in text
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(StoreError, match=r"config\.json is damaged or edited"):
        Store.open(store.path)


def test_a_flipped_bit_in_the_other_weights_is_found(store):
    file = store.checkpoint_dir / "model.safetensors"
    flip(file, file.stat().st_size - 10)
    with pytest.raises(StoreError, match=r"model\.safetensors is damaged or edited"):
        Store.open(store.path, verify=True)


def test_a_file_that_does_not_belong_to_the_model_folder_is_refused(store):
    index = store.checkpoint_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(StoreError, match=r"index\.json does not belong to the store"):
        Store.open(store.path)


def test_an_edited_manifest_is_refused(store):
    rewrite(store, lambda data: data.update(top_k=1), forge=False)
    with pytest.raises(StoreError, match="edited or damaged"):
        Store.open(store.path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "\0\0\0"])
def test_a_manifest_that_is_none_is_refused(store, text):
    (store.path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="not a store's manifest"):
        Store.open(store.path)


def test_a_manifest_of_another_version_is_refused(store):
    rewrite(store, lambda data: data.update(format=99), forge=True)
    with pytest.raises(StoreError, match="format 99, this moelab reads 1"):
        Store.open(store.path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "model/../../secret",
        "/etc/passwd",
        "model//x",
        "model/a/b",
        "other/x",
        "..",
        "",
        "model\\..\\x",
    ],
)
def test_a_path_that_leads_out_of_the_store_is_refused(store, name):
    rewrite(store, lambda data: data["files"].update({name: [4, ""]}), forge=True)
    (store.path.parent / "secret").write_bytes(b"keys")
    with pytest.raises(StoreError, match="leads out of the store"):
        Store.open(store.path)


@pytest.mark.parametrize("name", ["experts-4.bin", "model/tokenizer.json", "model"])
def test_a_link_that_leads_out_of_the_store_is_refused(store, tmp_path, name):
    file = store.path / name
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="link that leads out of the store"):
        Store.open(store.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiers": [16, 5]}, "not among"),
        ({"tiers": []}, "not among"),
        ({"id": "abc"}, "makes no sense"),
        ({"experts_per_layer": [6]}, "differ in length"),
        ({"experts_per_layer": [6, 7]}, "has .* bytes for 13 experts"),
        ({"checksums": {"16": [], "4": []}}, "has 0 checksums"),
        ({"layout": {"tensors": [], "dtype": "bfloat16"}}, "makes no sense"),
        ({"unheard": 1}, "makes no sense"),
    ],
)
def test_a_forged_manifest_that_contradicts_itself_is_refused(store, change, message):
    rewrite(store, lambda data: data.update(change), forge=True)
    with pytest.raises(StoreError, match=message):
        Store.open(store.path)


def test_a_folder_that_is_no_store_is_refused_with_the_next_step(tmp_path):
    with pytest.raises(StoreError, match=r"is not a store; make one with moelab\.pack"):
        Store.open(tmp_path)


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_atomically(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
