"""A store that somebody else made, or that changes under an open lab: refused by name, or right."""

from __future__ import annotations

import json
import os
import shutil
import threading

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

import moelab
import tiny_models
from fuzz_stores import sign
from moelab.engine.loader import LoadError
from moelab.models import chat, tokenizer_trial
from moelab.models.config import make_config
from moelab.store import manifest
from moelab.store.codecs import PAGE
from moelab.store.destination import partial_folder, remove_stale
from moelab.store.foreign import foreign
from moelab.store.pack import pack
from moelab.store.store import Store, StoreError

PROMPT = "It is said that"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two stores of one shape and different weights."""
    folder, found = tmp_path_factory.mktemp("packed"), []
    for name, active in (("mine", 2), ("other", 3)):
        source = tiny_models.qwen3_moe(
            folder / f"{name}-source", num_hidden_layers=2, num_experts_per_tok=active
        )
        found.append(pack(source, folder / name, tiers=(16, 4), progress=False))
    return found


@pytest.fixture
def store(packed, tmp_path):
    return shutil.copytree(packed[0], tmp_path / "store")


def opened(store, **options):
    settings = {"budget": "60%", "measure_kl": False, "progress": False, **options}
    return moelab.open(store, **settings)


def text(lab):
    return list(lab.generate(PROMPT, max_new_tokens=4, temperature=0, ignore_eos=True).tokens)


def change(store, name="manifest.json", **entries):
    """Change entries of a JSON file and make every checksum right again."""
    file = store / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    sign(store)


# -- a manifest only repeats what the configuration says -------------------------------------------

CONTRADICTIONS = {
    "top_k": 1,
    "hidden": 128,
    "inner": 64,
    "activation": "gelu",
    "gating": "none",
    "transposed": True,
    "has_bias": True,
    "has_post_norm": True,
    "architecture": "MixtralForCausalLM",
    "model_type": "mixtral",
    "layer_names": ["model.layers.1.mlp.experts", "model.layers.0.mlp.experts"],
    "experts_per_layer": [5, 7],
    "layout": {
        "tensors": [["gate_up_proj", [192, 256]], ["down_proj", [128, 192]]],
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_its_configuration_is_refused_before_a_kernel_runs(
    store, name, verify
):
    change(store, **{name: CONTRADICTIONS[name]})
    said = "tensors" if name == "layout" else name
    with pytest.raises(StoreError, match=rf"says {said}=.*, its model/config\.json makes"):
        opened(store, verify=verify)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"top_k": 0}, "top_k=0 has a number that cannot be"),
        ({"top_k": True}, "top_k=True is not what it has to be"),
        ({"hidden": "192"}, "hidden='192' is not"),
        ({"top_k": 7}, "fewer than top_k=7 experts"),
        ({"tiers": [4, 16]}, "highest first"),
        ({"notes": [1]}, "notes="),
        ({"source": "x" * 200_000}, "source has a text of 200000 characters"),
        ({"files": {"x" * 300: [1, ""]}}, "too long"),
    ],
)
def test_fields_of_a_manifest_are_what_they_have_to_be(store, entries, message):
    change(store, **entries)
    with pytest.raises(StoreError, match=message) as refused:
        Store.open(store)
    assert len(str(refused.value)) < 1000


def test_sizes_are_bounded_before_anything_is_parsed(store, monkeypatch):
    (store / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(StoreError, match="not a store's manifest"):
        Store.open(store)
    monkeypatch.setattr(manifest, "MOST_BYTES", 100)
    with pytest.raises(StoreError, match="longer than"):
        Store.open(store)


def test_a_manifest_that_is_a_link_out_of_the_store_is_refused(store, tmp_path):
    (store / "manifest.json").rename(tmp_path / "outside")
    (store / "manifest.json").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match=r"manifest\.json is a link that leads out of the store"):
        Store.open(store)


# -- config.json chooses no code ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flex_attention", "org/repo", {"": "flash_attention_2"}])
def test_config_chooses_no_attention(packed, store, key, value):
    change(store, "model/config.json", **{key: value}, experts_implementation="grouped_mm")
    with opened(packed[0]) as mine, opened(store) as lab:
        assert lab._engine.model.config._attn_implementation == "sdpa"
        assert text(lab) == text(mine)


def test_what_a_family_knows_reaches_it_and_nothing_else():
    data = {"model_type": "qwen3_moe", "hidden_size": 64, "rope_theta": 5e6, "num_experts": 3}
    made = make_config(data | {"to_dict": 1, "unheard_of": 2, "dtype": "load", "use_kernels": True})
    assert (made.hidden_size, made.num_experts) == (64, 3)
    assert made.rope_parameters["rope_theta"] == 5e6
    assert not hasattr(made, "unheard_of")
    assert not hasattr(made, "use_kernels")
    assert made.dtype is None
    assert callable(made.to_dict)


def test_a_part_that_is_no_object_is_refused():
    for value in ("x", [1], 7):
        with pytest.raises(ValueError, match="thinker_config is .*, no JSON object"):
            make_config({"model_type": "qwen3_omni_moe", "thinker_config": value})


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "qwen3_vl_moe"])
def test_a_saved_configuration_comes_back_as_it_was(kind):
    config = CONFIG_MAPPING[kind]()
    data = json.loads(config.to_json_string(use_diff=False))
    assert make_config(data).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000 is beyond"),
        ({"num_local_experts": 10**9}, "is beyond"),
        ({"vocab_size": 10**7}, "asks for .* weights besides the experts, the files hold"),
        ({"model_type": "unheard"}, "model_type is 'unheard'"),
        ({"hidden_size": None}, r"config\.json"),
        ({"head_dim": 31}, r"config\.json|has shape"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_by_its_file(store, entries, message):
    change(store, "model/config.json", **entries)
    with pytest.raises(StoreError, match=message):
        opened(store)


# -- what libraries read ---------------------------------------------------------------------------


class Panic(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError(), MemoryError(), Panic("no")])
def test_whatever_a_library_raises_names_the_file(tmp_path, error):
    with (
        pytest.raises(StoreError, match=r"tokenizer\.json: \w+"),
        foreign(tmp_path / "tokenizer.json"),
    ):
        raise error


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}),
        ("tokenizer.json", {"decoder": {"type": "none such"}}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("generation_config.json", {"eos_token_id": "end"}),
        ("generation_config.json", {"bos_token_id": "start"}),
        ("generation_config.json", {"no_repeat_ngram_size": "two"}),
    ],
)
def test_what_a_first_token_needs_is_tried_when_the_store_is_opened(store, name, entries):
    change(store, f"model/{name}", **entries)
    with pytest.raises(StoreError, match=r"\.json|tokenizer"):
        opened(store)


def test_a_tokenizer_that_never_ends_is_tried_elsewhere(store, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 1)
    replace = {"type": "Replace", "pattern": {"Regex": "(a|a|aa)+$"}, "content": ""}
    change(store, "model/tokenizer.json", normalizer=replace)
    with pytest.raises(StoreError, match=r"tokenizer\.json cannot be used"):
        opened(store)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "runs for more than"),
        ("{% for a in range(1000) %}" + "=" * 1000 + "{% endfor %}", "writes more than 500000 "),
        ("{{ 'x' * 10**9 }}", "multiplies by something else"),
        ("{{ 'x' * 100 * 100 }}", "multiplies by something else"),
        ("{{ messages[0].a.b }}", "has no attribute"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for", "unexpected"),
        ("x" * 300_000, "300000 characters long"),
    ],
)
def test_a_template_has_bounds_and_says_which(packed, monkeypatch, template, message):
    monkeypatch.setattr("moelab.models.template.SECONDS", 1.0)
    tokenizer = chat.load_tokenizer(packed[0] / "model")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"chat template cannot be used: .*{message}"):
        chat.encode(tokenizer, [{"role": "user", "content": "Hello"}])


def test_a_template_within_its_bounds_is_as_transformers_renders_it(packed):
    tokenizer = chat.load_tokenizer(packed[0] / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '=' * 3 }}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
        "{% generation %}{% endgeneration %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    said = [{"role": "user", "content": " Hello "}]
    assert chat.encode(tokenizer, said) == tokenizer("===user: Hello\nassistant:").input_ids


# -- a store that changes under an open lab --------------------------------------------------------


def test_a_file_that_shrinks_ends_a_run_with_its_name(store):
    with opened(store, measure_kl=True) as lab:
        os.truncate(store / "experts-16.bin", PAGE)
        with pytest.raises((StoreError, LoadError), match=r"experts-16\.bin.* ends at"):
            text(lab)
        with pytest.raises((StoreError, LoadError), match=r"experts-16\.bin.* ends at"):
            lab.score(PROMPT, progress=False)


def test_a_lab_reads_the_files_it_opened_after_another_model_was_packed_over_them(packed, store):
    with opened(packed[0], bits=4) as mine, opened(store) as lab:
        want, run = text(mine), lab.generate(PROMPT, max_new_tokens=2, ignore_eos=True)
        shutil.rmtree(store)
        shutil.copytree(packed[1], store)
        lab.update(bits=4)
        assert text(lab) == want
        with pytest.raises(StoreError, match="was replaced or removed since it was opened"):
            lab.what_if(run, budget="100%")


def test_a_file_that_is_written_over_is_an_error_not_another_models_experts(packed, store):
    with opened(store) as lab:
        other = (packed[1] / "experts-4.bin").read_bytes()
        with (store / "experts-4.bin").open("r+b") as file:
            file.write(other)
        os.utime(store / "experts-4.bin")
        lab.update(bits=4)
        with pytest.raises(LoadError, match=r"experts-4\.bin.*written to since it was opened"):
            text(lab)


# -- who packs -------------------------------------------------------------------------------------


def test_what_is_being_written_stays_whatever_number_its_process_has(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every container
    destination = tmp_path / "store"
    (tmp_path / "store.partial-1").mkdir()  # left by somebody killed
    with partial_folder(destination) as one, partial_folder(destination) as two:
        assert one != two
        thread = threading.Thread(target=remove_stale, args=(destination,))
        thread.start()
        thread.join()
        assert one.is_dir()
        assert two.is_dir()
        assert not (tmp_path / "store.partial-1").exists()
    assert list(tmp_path.iterdir()) == []


def test_full_precision_reads_what_the_loader_reads(packed):
    store = Store.open(packed[0])
    into = np.empty(store.slot_bytes[4], np.uint8)
    assert store.read(1, 2, 4, into=into) is into
    assert np.array_equal(into, store.read(1, 2, 4))
