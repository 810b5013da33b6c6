"""What a store is made from: all of it is used, known to be ignorable, or refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moelab
import tiny_models
from moelab.catalogue import find_store
from moelab.store.pack import pack
from moelab.store.store import Store
from tiny_models import edit

PROJ = "model.layers.{}.mlp.experts.{}.{}_proj.weight"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.qwen3_moe(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def find(source: str | Path) -> Path:
    return find_store(source, tiers=(16,), progress=False)


def add(*names: str):
    return lambda tensors: tensors.update({name: torch.ones(2, 2) for name in names})


def drop(part: str):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]


def spoil(key: str, value: float):
    return lambda tensors: tensors[key].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            None,
            {"num_hidden_layers": 2},
            r"27 tensors in layers 2 .* no place for: model\.layers\.2",
        ),
        (None, {"num_local_experts": 5, "num_experts": 5}, "holds an expert 5, .* says 5 experts"),
        (None, {"num_experts_per_tok": 7}, r"has 6 experts and is to activate 7"),
        (
            drop("model.norm."),
            {},
            r"lacks 1 weights besides the experts, first 'model\.norm\.weight'",
        ),
        (drop("layers.1.input_layernorm"), {}, r"'model\.layers\.1\.input_layernorm\.weight'"),
        (drop(PROJ.format(1, 4, "up")), {}, r"layer 1 expert 4 has no .*up_proj"),
        (drop("layers.1.mlp.experts.4."), {}, r"layer 1 expert 4 has no"),
        (
            add("model.layers.0.mlp.experts.gate_up_proj_scale_inv"),
            {},
            r"experts\.gate_up_proj_scale",
        ),
        (add("model.layers.0.self_attn.gate.weight"), {}, r"self_attn\.gate\.weight"),
        (spoil("model.layers.1.mlp.gate.weight", torch.nan), {}, r"mlp\.gate\.weight has NaN"),
        (spoil("model.norm.weight", torch.inf), {}, r"model\.norm\.weight has NaN or infinite"),
        (
            spoil("model.embed_tokens.weight", -torch.inf),
            {},
            r"embed_tokens\.weight has NaN or inf",
        ),
        (spoil(PROJ.format(1, 4, "up"), torch.nan), {}, r"layer 1 expert 4: .* has NaN or inf"),
        (spoil(PROJ.format(2, 0, "up"), 1e5), {}, r"layer 2 expert 0: .* at most 6\.55e\+04"),
        (None, {"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        (None, {"quantization": {"group_size": 64, "bits": 4}}, r"quantised to 4 bit by MLX"),
        (None, {"hidden_act": "unheard"}, r"config\.json: KeyError: 'unheard'"),
        (None, {"num_local_experts": "many"}, r"config\.json"),
        (None, {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "code of its own"),
        (None, {"model_type": "unheard"}, r"config\.json is not understood by transformers"),
    ],
)
def test_what_would_not_be_the_model_is_refused_by_name_and_leaves_nothing(
    qwen, tmp_path, change, config, message
):
    source = edit(qwen, tmp_path / "source", change, **config)
    with pytest.raises(ValueError, match=message) as refused:
        pack(source, tmp_path / "store", tiers=(16, 4), progress=False)
    assert "trust_remote_code" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no usable tokenizer"),
        ("tokenizer.json", POINTER, r"tokenizer\.json is a pointer of Git LFS .*`git lfs pull`"),
        ("model.safetensors", POINTER, r"model\.safetensors is a pointer of Git LFS"),
        ("config.json", b"{", r"config\.json is damaged"),
        ("config.json", b"[]", r"config\.json holds no JSON object"),
        ("config.json", None, r"has no config\.json"),
        ("generation_config.json", b"[]", r"generation_config\.json: TypeError"),
        ("generation_config.json", b"{", r"generation_config\.json' is not a valid JSON"),
        ("tokenizer.json", b"3", r"tokenizer\.json: AttributeError"),
        ("tokenizer.json", b"{}", "no usable tokenizer"),
    ],
)
def test_a_file_that_is_missing_or_none_is_named_before_packing(
    qwen, tmp_path, name, content, message
):
    source = edit(qwen, tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pack(source, tmp_path / "store", tiers=(16,), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("family", "names", "note"),
    [
        (
            "qwen3_moe",
            ("mtp.fc.weight",),
            "predict several tokens at once (1 tensors, first mtp.fc",
        ),
        (
            "deepseek_v3",
            ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"),
            "predict several tokens at once (2 tensors, first model.layers.3.eh_proj",
        ),
        ("qwen3_moe", ("model.layers.0.self_attn.q_proj.input_scale",), "scales of activations"),
        ("qwen3_moe", ("model.rotary_emb.inv_freq",), "what transformers leaves out too"),
    ],
)
def test_what_is_ignored_is_said_in_the_notes_and_in_info(tmp_path, family, names, note):
    plain = tiny_models.FAMILIES[family](tmp_path / "plain")
    source = edit(plain, tmp_path / "source", add(*names))
    with moelab.open(source, tiers=(16,), progress=False) as lab:
        (said,) = (note for note in lab.info()["notes"] if "by torch" not in note)
        assert note in said
        assert lab.info()["positions"] == 512


def test_the_16_bit_type_is_one_that_holds_every_layer(qwen, tmp_path):
    def mix(tensors):
        for key, t in tensors.items():
            if ".experts." in key:
                tensors[key] = t.half() if "layers.0." in key else t * 1e-6
        tensors[PROJ.format(2, 3, "up")][0, 0] = 1e5  # float16 ends at 65504

    source = edit(qwen, tmp_path / "source", mix)
    store = Store.open(pack(source, tmp_path / "store", tiers=(16,), progress=False))
    assert store.layout.dtype == "bfloat16"
    assert store.manifest.notes == (
        "experts are bfloat16 and float16 in the source, stored as bfloat16",
    )

    half = edit(qwen, tmp_path / "half", lambda ts: ts.update({k: t.half() for k, t in ts.items()}))
    store = Store.open(pack(half, tmp_path / "second", tiers=(16,), progress=False))
    assert (store.layout.dtype, store.manifest.notes) == ("float16", ())


def test_weights_too_small_for_float16_scales_are_said(qwen, tmp_path):
    def shrink(tensors):
        tensors.update({k: t * 1e-6 for k, t in tensors.items() if "layers.1.mlp.experts" in k})

    source = edit(qwen, tmp_path / "source", shrink)
    for tiers, notes in (((16,), 0), ((16, 8), 1)):
        store = Store.open(pack(source, tmp_path / f"{notes}", tiers=tiers, progress=False))
        assert len(store.manifest.notes) == notes
    assert store.manifest.notes[0].startswith("layers 1 have matrices without a weight above 1e-05")


# -- the file that transformers would load ------------------------------------------------------


def weights(store: Path) -> dict[str, torch.Tensor]:
    return load_file(store / "model" / "model.safetensors")


def test_a_new_file_beside_an_old_index_is_what_is_packed(qwen, tmp_path):
    source = shutil.copytree(qwen, tmp_path / "source")
    tuned = edit(qwen, tmp_path / "tuned", spoil("model.norm.weight", 7.0))
    shutil.copyfile(tuned / "model.safetensors", source / "model.safetensors")
    assert weights(find(source))["model.norm.weight"][0] == 7
    for shard in source.glob("model-*.safetensors"):
        shard.unlink()
    assert weights(find(source))["model.norm.weight"][0] == 7


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused_by_name(qwen, tmp_path, text):
    source = shutil.copytree(qwen, tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        find(source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_change_behind_the_same_size_and_time_makes_another_store(qwen, tmp_path, name):
    source = edit(qwen, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }} 0.02")
    before = find(source)
    assert find(source) == before
    file, stat = source / name, (source / name).stat()
    data = file.read_bytes()
    other = data[:-1] + bytes([data[-1] ^ 1]) if name == "model.safetensors" else None
    file.write_bytes(other or data.replace(b"0.02", b"0.03"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert (find(source) / "model" / name).read_bytes() != (before / "model" / name).read_bytes()


# -- a path is a path -----------------------------------------------------------------------------


def test_one_folder_is_one_store_however_it_is_written(qwen, tmp_path, monkeypatch):
    source = shutil.copytree(qwen, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = (source, "source", "./source", "../" + tmp_path.name + "/source", "~/source", "link")
    assert len({find(way).name.rpartition("-")[2] for way in ways}) == 1


def test_a_lab_goes_on_when_the_working_directory_changes(qwen, tmp_path, monkeypatch):
    pack(qwen, tmp_path / "store", tiers=(16, 4), progress=False)
    monkeypatch.chdir(tmp_path)
    with moelab.open("store", budget="50%", progress=False) as lab:
        monkeypatch.chdir("/")
        assert lab.generate("Hi", max_new_tokens=2).error is None
        lab.update(bits=4)
        assert lab.generate("Hi", max_new_tokens=2).error is None


@pytest.mark.parametrize("name", ["demo", "smollm2-moe", "synopsis", "org/name"])
def test_a_path_named_like_a_model_is_a_path(name, tmp_path, monkeypatch, qwen):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not 'demo'"):
        find(Path(name))
    shutil.copytree(qwen, tmp_path / name)
    with moelab.open(Path(name), tiers=(16,), progress=False) as lab:
        assert lab.info()["name"] == str(tmp_path / name)
        assert lab.prompts() == {}


def test_a_folder_of_a_very_long_name_is_packed(qwen, tmp_path):
    for letter in ("n" * 230, "ж" * 115):
        source = shutil.copytree(qwen, tmp_path / letter)
        assert Store.open(find(source)).manifest.source == letter


@pytest.mark.parametrize("given", ["folder", "folder/model.gguf"])
def test_a_gguf_file_is_named_as_such(tmp_path, given):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.gguf").write_bytes(b"GGUF")
    for use in (find, lambda source: pack(source, tmp_path / "store")):
        said = "model.gguf" if given.endswith("gguf") else "give one of them by name"
        with pytest.raises(ValueError, match=said):
            use(tmp_path / given)


@pytest.mark.parametrize("named_by", ["MOELAB_CACHE", "HOME"])
def test_a_cache_that_cannot_be_written_says_what_to_set(qwen, tmp_path, monkeypatch, named_by):
    (tmp_path / "taken").write_text("no folder")
    for name in ("MOELAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(named_by, str(tmp_path / "taken" / "cache"))
    with pytest.raises(
        ValueError, match=r"taken.* cannot be made or written \(Not a directory\).*MOELAB_CACHE"
    ):
        find(qwen)


def test_without_a_budget_a_dense_router_starts_at_the_least_that_works(tmp_path):
    source = tiny_models.qwen3_moe(tmp_path / "source", num_experts_per_tok=6)
    with pytest.warns(UserWarning, match=r"25 % of the experts are less.*0\.885 MB \(33%\)"):
        lab = moelab.open(source, tiers=(16,), progress=False)
    with lab:
        assert lab.info()["budget_bytes"] == lab.info()["minimum_budget_bytes"]
        assert lab.generate("Hi", max_new_tokens=2).error is None
    with pytest.raises(ValueError, match="below one layer's need"):
        moelab.open(source, budget="25%", tiers=(16,), progress=False)
