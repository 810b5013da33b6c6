"""A packed model is found again, and made again where it was damaged."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import tiny_models
from moelab import catalogue as models
from moelab.catalogue import find_store
from moelab.models import families
from moelab.models.adapter import attach, load_skeleton
from moelab.store.store import Store


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tiny_models.qwen3_moe(tmp_path / "qwen")


def find(source: Path) -> Path:
    return find_store(source, tiers=(4,), progress=False)


def test_a_whole_store_is_found_again_without_a_word(source):
    stamp = (find(source) / "manifest.json").stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (find(source) / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["experts-4.bin", "manifest.json"])
def test_a_damaged_store_is_packed_again_and_says_so(source, name):
    store = find(source)
    damaged = store / name
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{name}.*packing .* again"):
        assert find(source) == store
    Store.open(store, verify=True)


def test_a_changed_checkpoint_is_another_store_and_a_hub_id_always_the_same(source):
    before, hub = find(source), models._fingerprint("org/name", (4,))
    config = source / "config.json"
    config.write_text(config.read_text() + "\n")
    assert find(source) != before
    assert models._fingerprint("org/name", (4,)) == hub != models._fingerprint("org/name", (8,))


def test_a_models_layers_are_found_once_and_handed_on(source, monkeypatch):
    found, describe = [], families._describe

    def counted(model, name, *args, **kwargs):
        found.append(name)
        return describe(model, name, *args, **kwargs)

    monkeypatch.setattr(families, "_describe", counted)
    store = Store.open(find(source))
    assert found == list(store.manifest.layer_names)  # packing
    found.clear()
    model = load_skeleton(store.checkpoint_dir, dtype=torch.float32)
    assert found == list(store.manifest.layer_names)  # of the blank model that tells names apart
    found.clear()
    attach(model, lambda *_: _[1])
    assert found == list(store.manifest.layer_names)
