"""A model whose experts are served from the checkpoint is the model transformers would have run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import reference
import tiny_models
from moelab.models.adapter import attach, find_moe, load_skeleton
from moelab.models.checkpoint import ExpertReader
from moelab.models.shards import Checkpoint
from moelab.store.pack import pack
from reference import run_experts
from tiny_models import edit

PROMPT = torch.tensor([[72, 101, 108, 108, 111, 32, 116, 104, 101, 114, 101]])


@pytest.fixture(scope="module", params=list(tiny_models.FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.qwen3_moe(tmp_path_factory.mktemp("qwen"))


class Served(reference.Served):
    """With a log of what it asked for."""

    def __init__(self, folder: Path, *, depth: int = 1) -> None:
        self.calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.ahead: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = []
        self.wanted: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self.depth = depth
        super().__init__(folder)

    def seen(self, layer, idx, weights):
        assert idx.dtype == torch.int64
        self.calls.append((layer, idx.clone(), weights.clone()))
        self.ahead.append(self.adapter.look_ahead(layer, self.depth))
        self.wanted.append(self.adapter.wanted(layer))


def stock(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def decode(model: torch.nn.Module, steps: int = 6) -> Iterator[torch.Tensor]:
    """Prefill, then greedy steps with the cache: the logits of each."""
    out = model(PROMPT, use_cache=True)
    yield out.logits
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        yield out.logits


def test_logits_equal_stock_transformers_in_prefill_and_decode(folder):
    served = Served(folder)
    for ours, theirs in zip(decode(served.model), decode(stock(folder)), strict=True):
        assert (ours - theirs).abs().max() == 0.0


def test_generate_gives_the_same_text(folder):
    settings = {"max_new_tokens": 12, "do_sample": False}
    served, theirs = Served(folder).model, stock(folder)
    assert torch.equal(served.generate(PROMPT, **settings), theirs.generate(PROMPT, **settings))


def test_experts_stay_on_meta_and_everything_else_is_loaded(folder):
    model, theirs = load_skeleton(folder, dtype=torch.float32), stock(folder)
    layers = find_moe(model)
    inside = tuple(layer.name + "." for layer in layers)
    expected = theirs.state_dict() | dict(theirs.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.is_meta == name.startswith(inside), name
        if not tensor.is_meta:
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name


def test_no_expert_byte_is_read_for_the_skeleton(folder, monkeypatch):
    read = []
    plain = Checkpoint._fill
    monkeypatch.setattr(
        Checkpoint, "_fill", lambda s, shard, b, at: (read.append(len(b)), plain(s, shard, b, at))
    )
    model = load_skeleton(folder, dtype=torch.bfloat16)
    loaded = {id(p): p.nbytes for p in model.parameters() if not p.is_meta}
    buffers = sum(b.numel() * 4 for b in model.buffers())
    assert sum(read) <= sum(loaded.values()) + buffers


def test_reader_gives_the_bytes_that_transformers_would_load(folder):
    served, theirs = Served(folder), stock(folder)
    for layer in served.adapter.layers:
        module = theirs.get_submodule(layer.name)
        for expert in range(layer.num_experts):
            for name, tensor in served.reader(layer.index, expert).items():
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor.float(), getattr(module, name)[expert]), name


def test_layer_facts_describe_the_family(folder):
    layers = find_moe(load_skeleton(folder, dtype=torch.float32))
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert len(layers) == (2 if "deepseek" in folder.name else 3)
    for layer in layers:
        assert layer.num_experts == 6
        assert dict(layer.tensors)["down_proj"] == (
            (layer.inner, layer.hidden) if layer.transposed else (layer.hidden, layer.inner)
        )
        odd = "gpt_oss" in folder.name
        assert (layer.gating == "custom") == odd
        assert layer.has_bias == layer.transposed == odd
        assert odd or layer.activation == "silu"


def test_no_masked_expert_is_ever_chosen(folder):
    served = Served(folder)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        allowed = {}
        for layer in served.adapter.layers:
            some = torch.randperm(6, generator=generator)[: layer.top_k]
            allowed[layer.index] = set(some.tolist())
            mask = torch.zeros(6, dtype=torch.bool)
            mask[some] = True
            served.adapter.steer(layer.index, mask)
        served.calls.clear()
        for logits in decode(served.model, steps=2):
            assert torch.isfinite(logits).all()
        for layer, idx, weights in served.calls:
            assert set(idx.unique().tolist()) <= allowed[layer]
            assert torch.isfinite(weights).all()


def test_removing_the_masks_gives_the_old_logits_back(folder):
    served = Served(folder)
    before = list(decode(served.model, steps=1))
    mask = torch.tensor([True, True, True, False, False, False])
    for layer in served.adapter.layers:
        served.adapter.steer(layer.index, mask)
    masked = list(decode(served.model, steps=1))
    for layer in served.adapter.layers:
        served.adapter.steer(layer.index)
    after = list(decode(served.model, steps=1))
    assert not torch.equal(before[0], masked[0])
    assert torch.equal(before[0], after[0])


def test_wanted_is_the_choice_without_the_mask(folder):
    served = Served(folder)
    list(decode(served.model, steps=0))
    assert served.wanted == [None] * len(served.adapter.layers)
    plain = served.calls[0]
    served.adapter.steer(0, torch.tensor([True, True, True, False, False, False]))
    served.wanted.clear()
    list(decode(served.model, steps=0))
    idx, weights = served.wanted[0]
    assert torch.equal(idx, plain[1])
    assert torch.equal(weights, plain[2])


def test_look_ahead_is_the_next_routers_own_answer(folder):
    served = Served(folder, depth=2)
    count = len(served.adapter.layers)
    inputs = []
    for layer in served.adapter.layers:
        layer.router.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    list(decode(served.model, steps=1))
    for (layer, _, _), ahead, x in zip(served.calls, served.ahead, inputs, strict=True):
        assert [a[0] for a in ahead] == list(range(layer + 1, min(layer + 3, count)))
        for later, idx, weights in ahead:
            facts = served.adapter.layers[later]
            with torch.no_grad():
                real = facts.choice(type(facts.router).forward(facts.router, x))
            assert torch.equal(idx, real[0])
            assert torch.equal(weights, real[1])


def test_look_ahead_follows_the_mask_of_the_layer_it_asks(folder):
    served = Served(folder)
    served.adapter.steer(1, torch.tensor([False, False, False, True, True, True]))
    list(decode(served.model, steps=1))
    for (layer, _, _), ahead in zip(served.calls, served.ahead, strict=True):
        assert layer != 0 or ahead[0][1].min() >= 3


def test_zero_weights_and_indices_outside_load_nothing(qwen):
    served = Served(qwen)
    fetched = []

    def fetch(expert: int):
        fetched.append(expert)
        return served.reader(0, expert)

    x = torch.randn(3, 192)
    idx = torch.tensor([[0, 6], [-1, 2], [3, 4]])
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.0], [0.0, 1.0]])
    module = served.adapter.layers[0].module
    out = run_experts(module, x, idx, weights, fetch)
    assert sorted(fetched) == [0, 4]
    assert torch.count_nonzero(out[1]) == 0


def test_a_mask_that_is_too_narrow_or_of_the_wrong_length_is_refused(qwen):
    adapter = Served(qwen).adapter
    with pytest.raises(ValueError, match="allows 1 experts, its router picks 2"):
        adapter.steer(0, torch.arange(6) == 3)
    with pytest.raises(ValueError, match="one entry for each of 6 experts"):
        adapter.steer(0, torch.ones(5, dtype=torch.bool))


def test_group_limited_routing_keeps_to_experts_of_different_groups(tmp_path):
    """One group is open, the two allowed experts lie in two groups: both must be chosen."""
    served = Served(tiny_models.deepseek_v3(tmp_path / "d", topk_group=1))
    for layer in served.adapter.layers:
        served.adapter.steer(layer.index, torch.tensor([True, False, False, False, True, False]))
    list(decode(served.model, steps=3))
    assert {e for _, idx, _ in served.calls for e in idx.unique().tolist()} == {0, 4}


def test_attaching_twice_is_refused_and_detach_undoes_it(qwen):
    before = load_skeleton(qwen, dtype=torch.float32).config._experts_implementation
    served = Served(qwen)
    assert served.model.config._experts_implementation == "moelab"
    with pytest.raises(ValueError, match="attached already"):
        attach(served.model, served.run)
    served.adapter.detach()
    assert all("forward" not in vars(layer.router) for layer in find_moe(served.model))
    assert served.model.config._experts_implementation == before
    attach(served.model, served.run)


def test_two_models_do_not_share_an_adapter(qwen):
    first, second = Served(qwen), Served(qwen)
    list(decode(first.model, steps=0))
    assert len(first.calls) == 3
    assert second.calls == []


def test_loading_is_silent_and_leaves_logging_as_it_was(qwen, caplog, capfd):
    logger = logging.getLogger("transformers.modeling_utils")
    filters = list(logger.filters)
    capfd.readouterr()
    load_skeleton(qwen, dtype=torch.float32)
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")
    assert logger.filters == filters


def test_a_missing_weight_besides_the_experts_is_refused_by_name(qwen, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    broken = edit(qwen, tmp_path / "m", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=name):
        load_skeleton(broken, dtype=torch.float32)


def test_a_weight_of_the_wrong_shape_is_refused_by_name(qwen, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    broken = edit(qwen, tmp_path / "m", lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(ValueError, match=name):
        load_skeleton(broken, dtype=torch.float32)


def test_pickled_weights_are_refused_with_the_next_step(tmp_path, qwen):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((qwen / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="save_pretrained"):
        load_skeleton(folder, dtype=torch.float32)


def test_a_truncated_shard_is_refused_by_name(qwen, tmp_path):
    folder = edit(qwen, tmp_path / "t")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        load_skeleton(folder, dtype=torch.float32)


def test_a_missing_shard_is_refused_by_name(tmp_path):
    folder = tiny_models.mixtral(tmp_path / "m")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        load_skeleton(folder, dtype=torch.float32)


def test_one_row_of_a_fused_tensor_is_all_that_is_read(tmp_path, monkeypatch):
    folder = tiny_models.gpt_oss(tmp_path / "g")
    reader = ExpertReader(load_skeleton(folder, dtype=torch.float32), folder)
    read = []
    plain = Checkpoint._fill
    monkeypatch.setattr(
        Checkpoint, "_fill", lambda s, shard, b, at: (read.append(len(b)), plain(s, shard, b, at))
    )
    expert = reader(1, 3)
    assert sum(read) == sum(t.nbytes for t in expert.values())


def test_threads_may_read_at_once(folder):
    reader = Served(folder).reader
    jobs = [(layer, e) for layer in range(2) for e in range(6)] * 4
    expected = {job: reader(*job) for job in set(jobs)}
    with ThreadPoolExecutor(4) as pool:
        for job, got in zip(jobs, pool.map(lambda j: reader(*j), jobs), strict=True):
            assert all(torch.equal(got[k], t) for k, t in expected[job].items())


def test_mxfp4_experts_are_decoded_like_transformers_does(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = tiny_models.gpt_oss(tmp_path / "bf16", intermediate_size=64)
    packed: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for key in [k for k in tensors if k.endswith("_proj") and ".experts." in k]:
            experts, rows, columns = tensors.pop(key).transpose(1, 2).shape
            shape = (experts, rows, columns // 32, 16)
            tensors[key + "_blocks"] = torch.randint(
                0, 256, shape, dtype=torch.uint8, generator=generator
            )
            tensors[key + "_scales"] = torch.randint(
                120, 126, shape[:-1], dtype=torch.uint8, generator=generator
            )
            packed[key] = convert_moe_packed_tensors(
                tensors[key + "_blocks"], tensors[key + "_scales"]
            )

    method = {"quant_method": "mxfp4"}
    served = Served(edit(source, tmp_path / "mxfp4", quantise, quantization_config=method))
    for layer in served.adapter.layers:
        for expert in range(6):
            got = served.reader(layer.index, expert)
            for name in ("gate_up_proj", "down_proj"):
                assert torch.equal(got[name], packed[f"{layer.name}.{name}"][expert])
    assert all(torch.isfinite(logits).all() for logits in decode(served.model, steps=1))

    lost = "model.layers.1.mlp.experts.down_proj_scales"
    source = edit(tmp_path / "mxfp4", tmp_path / "lost", lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match="layer 1 brings down_proj_blocks for down_proj"):
        pack(source, tmp_path / "store", tiers=(16,), progress=False)


def test_fp8_experts_and_weights_are_scaled_block_by_block(tmp_path):
    source = tiny_models.deepseek_v3(tmp_path / "bf16", hidden_size=192, moe_intermediate_size=160)
    expected: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        matrices = [k for k in tensors if k.endswith("_proj.weight")]
        for key in matrices:
            weight = tensors[key].float()
            grid = (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
            scale = torch.rand(grid) * 0.01 + 0.005
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            spread = spread[: weight.shape[0], : weight.shape[1]]
            tensors[key] = (weight / spread).to(torch.float8_e4m3fn)
            tensors[key + "_scale_inv"] = scale
            expected[key] = (tensors[key].float() * spread).to(torch.bfloat16)

    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    served = Served(edit(source, tmp_path / "fp8", quantise, quantization_config=method))
    for layer in served.adapter.layers:
        for expert in range(6):
            got = served.reader(layer.index, expert)
            stem = f"{layer.name}.{expert}"
            gate_up = [expected[f"{stem}.{n}_proj.weight"] for n in ("gate", "up")]
            assert torch.equal(got["gate_up_proj"], torch.cat(gate_up))
            assert torch.equal(got["down_proj"], expected[f"{stem}.down_proj.weight"])
    state = served.model.state_dict()
    plain = [k for k in expected if ".experts." not in k]
    assert plain
    for key in plain:
        assert torch.equal(state[key], expected[key].float()), key
    assert all(torch.isfinite(logits).all() for logits in decode(served.model, steps=1))


@pytest.mark.parametrize("grid", [(1, 1), (2, 4)])
def test_fp8_scales_of_fused_experts_are_applied_expert_by_expert(tmp_path, grid):
    source = tiny_models.gpt_oss(tmp_path / "bf16")
    expected: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.endswith("_proj") and ".experts." in k]:
            weight = tensors[key].float()
            scale = torch.rand(6, *grid) * 0.01 + 0.005
            spread = scale.repeat_interleave(weight.shape[1] // grid[0], 1)
            spread = spread.repeat_interleave(weight.shape[2] // grid[1], 2)
            if grid == (1, 1):
                spread = scale
            tensors[key] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[key + "_scale_inv"] = scale
            expected[key] = (tensors[key].float() * spread).to(torch.bfloat16)

    method = {"quant_method": "fp8", "weight_block_size": [48, 32]}
    served = Served(edit(source, tmp_path / "fp8", quantise, quantization_config=method))
    for layer in served.adapter.layers:
        for expert in range(6):
            got = served.reader(layer.index, expert)
            for name in ("gate_up_proj", "down_proj"):
                assert torch.equal(got[name], expected[f"{layer.name}.{name}"][expert])


def test_an_fp8_weight_without_its_scale_is_refused_by_name(tmp_path):
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.1.mlp.experts.gate_up_proj"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    method = {"quant_method": "fp8", "weight_block_size": [48, 32]}
    bf16 = tiny_models.gpt_oss(tmp_path / "bf16")
    source = edit(bf16, tmp_path / "fp8", quantise, quantization_config=method)
    with pytest.raises(
        ValueError, match="gate_up_proj' is fp8 and has no .*gate_up_proj_scale_inv"
    ):
        pack(source, tmp_path / "store", progress=False)
