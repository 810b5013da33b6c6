"""GGUF files: opened by name, computing what the checkpoint computes that they were made of."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import moelab
import tiny_models
from moelab.engine.kernels import compute_experts
from moelab.models.gguf_file import ATTENTION, BARE, ENDS, FAMILIES
from moelab.models.gguf_header import parts_of
from moelab.store.blocks import KINDS
from moelab.store.codecs import Layout, decode, encode
from moelab.store.pack import pack
from moelab.store.store import StoreError
from reference import logits_of

gguf = pytest.importorskip("gguf")
IDS = [72, 101, 108, 108, 111, 32, 119, 111]
CPU = gguf.GGMLQuantizationType
WHOLE_BLOCKS = {"qwen3_moe": {}, "gpt_oss": {"hidden_size": 128, "intermediate_size": 64}}
ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "gemma4_text": "gemma4",
}


def qwen2_moe(folder: Path) -> Path:
    config = transformers.Qwen2MoeConfig(
        **tiny_models._COMMON, hidden_size=96, moe_intermediate_size=64, intermediate_size=80,
        shared_expert_intermediate_size=128, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=False, mlp_only_layers=[1],
    )  # fmt: skip
    return tiny_models.write(transformers.Qwen2MoeForCausalLM(config), folder)


def minimax_m2(folder: Path) -> Path:
    config = transformers.MiniMaxM2Config(
        **tiny_models._COMMON, hidden_size=96, intermediate_size=64, head_dim=32,
        num_local_experts=6, num_experts_per_tok=2, rotary_dim=16,
    )  # fmt: skip
    return tiny_models.write(transformers.MiniMaxM2ForCausalLM(config), folder)


def gemma4_text(folder: Path) -> Path:
    config = transformers.Gemma4TextConfig(
        **tiny_models._COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2},
        hidden_size=96, intermediate_size=64, moe_intermediate_size=64, enable_moe_block=True,
        num_experts=6, top_k_experts=2, head_dim=32, global_head_dim=64, sliding_window=4,
        attention_k_eq_v=True, num_global_key_value_heads=1, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        final_logit_softcapping=30.0,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("scale") or "scalar" in name:  # 1 in a new model
            tensor.data.uniform_(0.5, 1.5)
    return tiny_models.write(model, folder)


def made(name: str, folder: Path) -> Path:
    own = {"qwen2_moe": qwen2_moe, "minimax_m2": minimax_m2, "gemma4_text": gemma4_text}
    return (tiny_models.FAMILIES | own)[name](folder)


def as_gguf(source: Path, file: Path, kind=CPU.F32, *, split: int = 1) -> Path:
    """Write a checkpoint as llama.cpp's converter would, by the names and layouts of its format."""
    config = json.loads((source / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    family = FAMILIES[architecture]
    weights: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.safetensors"):
        weights |= load_file(shard)
    out = _all_as_llama_cpp(weights, family, config)
    if config["model_type"] == "gemma4_text":  # of a head of the layers that see all: a quarter
        out["rope_freqs.weight"] = np.array([1] * 8 + [1e30] * 24, np.float32)
    keys = list(out)
    files = [file] if split == 1 else [
        file.with_name(f"{file.stem}-{i + 1:05}-of-{split:05}.gguf") for i in range(split)
    ]  # fmt: skip
    for i, part in enumerate(files):
        writer = gguf.GGUFWriter(part, architecture)
        if i == 0:
            _say(writer, config)
        for name in keys[i::split]:
            value = np.ascontiguousarray(out[name])
            if value.ndim < 2 or "gate_inp" in name or name.endswith("bias"):
                writer.add_tensor(name, value)
            else:
                own = kind if value.shape[-1] % 32 == 0 else CPU.F16
                data = value if own == CPU.F32 else gguf.quants.quantize(value, own)
                writer.add_tensor(name, data, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for one in (source / "tokenizer.json", source / "tokenizer_config.json"):
        shutil.copyfile(one, file.parent / one.name)
    return files[0]


def _all_as_llama_cpp(weights, family, config) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in weights.items():
        if family.fused and ".mlp.experts." in name:
            out |= _apart(name, tensor.float().numpy())
            continue
        if family.whole and ".experts." in name:
            layer, own = name.removeprefix("model.layers.").split(".experts.")
            out[f"blk.{layer}.ffn_{own.removesuffix('_proj')}_exps.weight"] = tensor.float().numpy()
            continue
        there, number, value = _as_llama_cpp(name, tensor.float().numpy(), family, config)
        if number is None:
            out[there] = value
        else:
            experts.setdefault(there, {})[number] = value
    return out | {name: np.stack([r[e] for e in sorted(r)]) for name, r in experts.items()}


def _apart(name, value):
    """Gate, up and down of a tensor with all experts, [E, in, out] or a bias [E, out]."""
    layer, own = name.removeprefix("model.layers.").split(".mlp.experts.")
    end = "bias" if own.endswith("_bias") else "weight"
    value = value if end == "bias" else value.swapaxes(1, 2)
    parts = {"gate": value[:, ::2], "up": value[:, 1::2]} if "gate_up" in own else {"down": value}
    return {f"blk.{layer}.ffn_{part}_exps.{end}": rows for part, rows in parts.items()}


def _as_llama_cpp(name, value, family, config):
    """(name, expert or None, value) of one of transformers' tensors."""
    stem, end = name.rpartition(".")[::2]
    if stem in (ends := {v: k for k, v in ENDS.items()}):
        return f"{ends[stem]}.{end}", None, value
    if bare := [end for own, end in BARE.items() if name.endswith(own)]:
        stem, (end,) = name, bare
    layer, own = stem.removeprefix("model.layers.").split(".", 1)
    for part, pattern in ({} if family.fused or family.whole else family.experts).items():
        before, after = pattern.split("{}")
        if own.startswith(before) and own.endswith(after):
            return f"blk.{layer}.ffn_{part}_exps.weight", int(own[len(before) : -len(after)]), value
    if family.permuted and own.endswith(("q_proj", "k_proj")):
        n = config["num_attention_heads" if own.endswith("q_proj") else "num_key_value_heads"]
        halves = value.reshape(n, 2, len(value) // n // 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    names = {v: k for k, v in (ATTENTION | family.layer).items()}
    there = names[own].removesuffix(".scale")
    return f"blk.{layer}.{there}.{end}", None, value[0] if "expert_gate" in own else value


def _say(writer, config) -> None:
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    if config["model_type"] != "gemma4_text":
        writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    if config["model_type"] != "gemma4_text":
        writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_used_count(config.get("num_experts_per_tok") or config["top_k_experts"])
    if config["model_type"] == "gemma4_text":
        _say_gemma4(writer, config)
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    if config.get("head_dim") and config["model_type"] != "gemma4_text":
        writer.add_key_length(config["head_dim"])
    if config.get("rotary_dim"):
        writer.add_rope_dimension_count(config["rotary_dim"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def _say_gemma4(writer, config) -> None:
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    heads = config["num_key_value_heads"], 1
    writer.add_sliding_window_pattern(local)
    writer.add_head_count_kv([heads[0] if x else heads[1] for x in local])
    writer.add_key_length(64)
    writer.add_key_length_swa(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def unpacked(source: Path, folder: Path, kind) -> Path:
    """The checkpoint that a GGUF file with these blocks stands for, in float32."""

    def change(weights):
        for name, w in weights.items():
            weights[name] = w.float()
            if w.ndim > 1 and not name.endswith(("mlp.gate.weight", "router.weight", "bias")):
                rows = w.float().mT if w.ndim > 2 else w.float()  # fused experts are [in, out]
                blocks = gguf.quants.quantize(rows.contiguous().numpy(), kind)
                found = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
                weights[name] = found.mT.contiguous() if w.ndim > 2 else found

    return tiny_models.edit(source, folder, change, dtype="float32")


def stock(source: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(("name", "split"), [*((n, 1) for n in ARCHITECTURES), ("qwen3_moe", 2)])
def test_it_computes_what_its_checkpoint_computes(name, split, tmp_path):
    source = made(name, tmp_path / "source")
    (tmp_path / "given").mkdir()
    file = as_gguf(source, tmp_path / "given" / "tiny.gguf", split=split)
    with moelab.open(file, budget="100%", tiers=(16, 4), measure_kl=False, progress=False) as lab:
        got = logits_of(lab, IDS[:1], IDS[1:])
        run = lab.generate("Hello", max_new_tokens=4, ignore_eos=True)
        assert len(run.tokens) == 4
        assert lab.info()["name"] == str(file)
    assert torch.allclose(got, stock(source), atol=2e-4), (got - stock(source)).abs().max()


@pytest.mark.parametrize("kind", [CPU.F16, CPU.Q8_0, CPU.Q4_1])
def test_blocks_are_unpacked_as_their_format_says(kind, tmp_path):
    source = made("qwen3_moe", tmp_path / "source")
    (tmp_path / "given").mkdir()
    file = as_gguf(source, tmp_path / "given" / "tiny.gguf", kind)
    weights: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.safetensors"):
        weights |= load_file(shard)
    store = moelab.Store.open(pack(file, tmp_path / "store", tiers=(16,), progress=False))
    said = " ".join(store.manifest.notes)
    lost = re.search(rf"{kind.name} .* rounded again, .* 3 of 18 experts .*: 16 bit (\S+)$", said)
    if kind.name.startswith("Q"):
        assert 0 < float(lost[1]) < 5e-4  # of float16
    else:
        assert not lost
    for expert in (0, 5):
        read = store.read(1, expert, 16)
        wanted = weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].float().numpy()
        own = wanted if kind == CPU.F32 else gguf.quants.dequantize(
            gguf.quants.quantize(wanted, kind), kind
        )  # fmt: skip
        half = np.dtype("float16") if store.layout.dtype == "float16" else None
        values = torch.from_numpy(np.array(read)).view(getattr(torch, store.layout.dtype)).float()
        there = values.numpy()[-own.size :].reshape(own.shape)
        exact = (
            own.astype(half) if half else torch.from_numpy(own.copy()).bfloat16().float().numpy()
        )
        assert np.array_equal(there, exact.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("qwen3_moe", kind) for kind in (CPU.Q8_0, CPU.Q4_0, CPU.Q4_1, CPU.MXFP4)),
        *(("gpt_oss", kind) for kind in (CPU.Q8_0, CPU.MXFP4)),
    ],
)
def test_a_files_own_blocks_are_a_tier_bit_by_bit(name, kind, tmp_path):
    source = tiny_models.FAMILIES[name](tmp_path / "source", **WHOLE_BLOCKS[name])
    (tmp_path / "given").mkdir()
    file = as_gguf(source, tmp_path / "given" / "tiny.gguf", kind)
    own = unpacked(source, tmp_path / "unpacked", kind)
    bits = 8 if kind == CPU.Q8_0 else 4
    path = pack(file, tmp_path / "store", progress=False)
    with moelab.open(path, budget="100%", measure_kl=False, progress=False) as lab:
        store, said = lab._store, " ".join(lab.info()["notes"])
        assert lab._engine.compute.fast
        got = logits_of(lab, IDS[:1], IDS[1:])
        lab.update(bits=2, budget="50%")
        assert len(lab.generate("Hello", max_new_tokens=4, ignore_eos=True).tokens) == 4
    assert store.tiers[0] == bits  # more would hold no more
    assert f"{bits} bit are the {kind.name} blocks of the GGUF file as they are" in said
    assert "3 of 18 experts" in said
    weights = load_file(own / "model.safetensors")
    for layer, expert in ((0, 0), (2, 5)):
        found = decode(store.read(layer, expert, bits), store.layout, bits)
        prefix = f"model.layers.{layer}.mlp.experts"
        if name == "gpt_oss":
            wanted = {n: weights[f"{prefix}.{n}"][expert] for n in found if "bias" not in n}
        else:
            parts = {
                p: weights[f"{prefix}.{expert}.{p}_proj.weight"] for p in ("gate", "up", "down")
            }
            wanted = {"gate_up_proj": torch.cat([parts["gate"], parts["up"]])}
            wanted |= {"down_proj": parts["down"]}
        assert all(torch.equal(found[n], values) for n, values in wanted.items())
    wanted = stock(own)  # the kernels' activations are integers, see below
    assert (got - wanted).norm() < (0.002 if bits == 8 else 0.06) * wanted.norm()


@pytest.mark.parametrize("name", KINDS)
def test_kernels_compute_a_files_own_blocks_beside_groups_of_64(name):
    kind, shapes = KINDS[name], (("gate_up_proj", (640, 192)), ("down_proj", (192, 320)))
    layout, bits = Layout(shapes, "bfloat16", name), KINDS[name].bits
    generator = np.random.default_rng(0)
    expert = {n: generator.standard_normal(s).astype(np.float32) / 8 for n, s in shapes}
    raw = {n: torch.from_numpy(gguf.quants.quantize(w, CPU[name])) for n, w in expert.items()}
    plain = {n: torch.from_numpy(w) for n, w in expert.items()}
    blobs = [encode(raw if b == bits else plain, layout, b) for b in (bits, 3, 16)]
    forms = np.array([layout.form(b) for b in (bits, 3, 16)])
    addresses = np.array([blob.ctypes.data for blob in blobs], np.uintp)
    for count in (1, 3, 13):
        x = generator.standard_normal((count, 192)).astype(np.float32)
        out = np.zeros((3, count, 192), np.float32)
        gate = np.ones((3, count), np.float32)
        compute_experts(addresses, forms, x, gate, out, inner=320, half="bfloat16")
        for b, blob, got in zip((bits, 3, 16), blobs, out, strict=True):
            w, given = decode(blob, layout, b), torch.from_numpy(x)
            first, second = F.linear(given, w["gate_up_proj"]).chunk(2, -1)
            wanted = F.linear(F.silu(first) * second, w["down_proj"]).numpy()
            limit = {16: 2e-6, 8: 2e-4}.get(b, 0.03)
            assert np.linalg.norm(got - wanted) < limit * np.linalg.norm(wanted)
    assert kind.nbytes == gguf.GGML_QUANT_SIZES[CPU[name]][1]
    raw["down_proj"][0, :2] = 255  # an exponent, or a half, that is no number
    with pytest.raises(ValueError, match="down_proj has NaN or infinite weights"):
        encode(raw, layout, bits)


def test_what_is_not_read_says_what_would_do(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"GGUF")
    for name, said in (
        ("dense.gguf", "of the architecture 'llama'; moelab reads GGUF files of the mixtures"),
        ("broken.gguf", "broken.gguf"),
        ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf is missing"),
        ("none.gguf", "is not 'demo'"),
    ):
        with pytest.raises(ValueError, match=said):
            moelab.open(tmp_path / name, progress=False)
    (tmp_path / "folder").mkdir()
    shutil.copyfile(tmp_path / "dense.gguf", tmp_path / "folder" / "dense.gguf")
    with pytest.raises(StoreError, match="give one of them by name"):
        moelab.open(tmp_path / "folder", progress=False)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([1, 1, 8, 8], "rope_freqs.weight scale the turning of positions by 1 to 8"),
        ([1, 1e30, 1, 1e30], "scale the turning of positions by 1 to 1e"),
        ([1, 1, 1, 1e30], "only a part of each head turns .* gemma4, not of olmoe"),
    ],
)
def test_frequencies_that_are_not_computed_are_refused(factors, said, tmp_path, monkeypatch):
    written = _all_as_llama_cpp
    more = {"rope_freqs.weight": np.array(factors, np.float32)}
    monkeypatch.setitem(globals(), "_all_as_llama_cpp", lambda *how: written(*how) | more)
    (tmp_path / "given").mkdir()
    file = as_gguf(made("olmoe", tmp_path / "source"), tmp_path / "given" / "tiny.gguf")
    with pytest.raises(ValueError, match=said):
        moelab.open(file, progress=False)


def test_frequencies_that_all_turn_change_nothing(tmp_path, monkeypatch):
    written = _all_as_llama_cpp
    more = {"rope_freqs.weight": np.ones(4, np.float32)}
    monkeypatch.setitem(globals(), "_all_as_llama_cpp", lambda *how: written(*how) | more)
    (tmp_path / "given").mkdir()
    file = as_gguf(made("olmoe", tmp_path / "source"), tmp_path / "given" / "tiny.gguf")
    with moelab.open(file, tiers=(16,), progress=False) as lab:
        assert lab.generate("a", max_new_tokens=2).text is not None


def test_a_lost_tensor_and_a_lost_tokenizer_are_named(tmp_path, monkeypatch):
    source = made("olmoe", tmp_path / "source")
    (tmp_path / "given").mkdir()
    file = as_gguf(source, tmp_path / "given" / "tiny.gguf")
    (tmp_path / "given" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"put the model's tokenizer\.json beside it"):
        moelab.open(file, progress=False)
    plain = gguf.GGUFWriter.add_tensor

    def without(self, name, *args, **options):
        if name != "blk.1.ffn_norm.weight":
            plain(self, name, *args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", without)
    file = as_gguf(source, tmp_path / "given" / "less.gguf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.post_attention_layernorm"):
        moelab.open(file, progress=False)
    assert parts_of(file) == [file]


def test_the_bundled_model_written_as_a_gguf_file_says_what_it_says(demo_lab, tmp_path):
    with pytest.raises(ValueError, match="blocks='Q9': one of F32, F16, Q8_0"):
        moelab.demo.gguf(tmp_path / "wrong.gguf", blocks="Q9")
    how = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0}
    expected = demo_lab.generate("Once upon a time", **how).tokens
    file = moelab.demo.gguf(tmp_path / "demo.gguf", blocks="F32")
    with moelab.open(file, measure_kl=False, progress=False) as lab:
        assert lab.generate("Once upon a time", **how).tokens == expected


def test_packing_a_gguf_file_goes_on_where_it_was_stopped(tmp_path):
    source = made("qwen3_moe", tmp_path / "source")
    (tmp_path / "given").mkdir()
    file = as_gguf(source, tmp_path / "given" / "tiny.gguf", CPU.Q8_0)
    straight = pack(file, tmp_path / "straight", tiers=(16, 4), progress=False)
    said: list[str] = []

    def stopping(words: str) -> None:
        said.append(words)
        if words == "packing the experts: 83 %":  # in the last of three layers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(file, tmp_path / "store", tiers=(16, 4), progress=stopping)
    begun = len(said)
    again = pack(file, tmp_path / "store", tiers=(16, 4), progress=said.append)
    packed = [words for words in said[begun:] if words.startswith("packing the experts")]
    assert packed[0] == "packing the experts: 66 %"
    assert len(packed) == 6
    names = {f.relative_to(straight) for f in straight.rglob("*") if f.is_file()}
    assert names == {f.relative_to(again) for f in again.rglob("*") if f.is_file()}
    for name in names - {Path("manifest.json")}:
        assert (straight / name).read_bytes() == (again / name).read_bytes()
    one, other = (moelab.Store.open(path).manifest for path in (straight, again))
    assert one == dataclasses.replace(other, created=one.created)
    assert not list(tmp_path.glob("*.partial-*"))
