"""From `moelab.open` to the last token: six families, the whole engine, a tight budget."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moelab
import tiny_families
import tiny_models
from moelab.models.skeleton import model_class, read_config
from reference import logits_of

PROMPT = "A prompt of more than one hundred tokens, where one byte is one token. " * 2
NEW = 12


BY_KERNELS = {"hidden_size": 128, "intermediate_size": 64}
"""Whole groups of 64: then the kernels compute gpt-oss's experts too."""
SLIM = {"SlimMoE, tiny": 448, "SlimMoE, mini": 960}
"""PhiMoE whose experts were pruned to so many neurons (arXiv 2506.18349)."""


def with_pictures(name: str, folder: Path) -> Path:
    """A model that reads pictures too, as its family writes it."""
    model = tiny_families.build(name, "ForConditionalGeneration")
    return tiny_models.write(model, folder)


def omni(folder: Path) -> Path:
    """A whole checkpoint: one model thinks, another speaks, in which moelab has no part."""
    with_pictures("qwen3_omni_moe", folder / "thinker")
    config = json.loads((folder / "thinker" / "config.json").read_text())
    shutil.copy(folder / "thinker" / "tokenizer.json", folder)
    shutil.copy(folder / "thinker" / "tokenizer_config.json", folder)
    names = {
        "model_type": "qwen3_omni_moe",
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    }
    (folder / "config.json").write_text(json.dumps(names | {"thinker_config": config}))
    tensors = {"talker.model.norm.weight": torch.ones(8), "code2wav.decoder.0.bias": torch.ones(8)}
    for file in (folder / "thinker").glob("*.safetensors"):
        tensors |= {f"thinker.{key}": tensor for key, tensor in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PICTURES = ("dots3_note", "ernie4_5_vl_moe", "llama4")
FAMILIES = tiny_models.FAMILIES | {"llama4": tiny_models.llama4, "qwen3_omni": omni}
FAMILIES |= {f"{name}, pictures": partial(with_pictures, name) for name in PICTURES}


@pytest.fixture(scope="module", params=[*FAMILIES, "gpt_oss by kernels", *SLIM])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param in SLIM:
        place = tmp_path_factory.mktemp("phimoe_fast")
        return tiny_models.phimoe(place, intermediate_size=SLIM[request.param])
    name, kernels, _ = request.param.partition(" by kernels")
    place = tmp_path_factory.mktemp(name.replace(", ", "_") + "_fast" * bool(kernels))
    return FAMILIES[name](place, **BY_KERNELS if kernels else {})


@pytest.fixture(scope="module")
def lab(folder):
    options = {"tiers": (16, 4, 2), "measure_kl": False, "progress": False}
    with moelab.open(folder, budget="100%", **options) as lab:
        info = lab.info()
        lab.update(budget=info["minimum_budget_bytes"] + info["expert_bytes"][16])
        yield lab


@torch.inference_mode()
def stock_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Transformers' own logits `[len(ids), V]` in float32."""
    config = read_config(folder)
    model = model_class(config).from_pretrained(
        folder, config=config, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()(torch.tensor([ids])).logits[0]


def test_opening_says_what_of_a_checkpoint_no_text_uses(lab, folder):
    notes = [note for note in lab.info()["notes"] if "pictures and sound" in note]
    assert len(notes) == ("pictures" in folder.name or "omni" in folder.name)


def generate(lab: moelab.Lab) -> moelab.Run:
    return lab.generate(PROMPT, max_new_tokens=NEW, temperature=0, ignore_eos=True)


def test_sixteen_bits_are_stock_transformers(lab, folder):
    assert lab.settings.budget_bytes < lab.info()["all_experts_bytes"]
    run, ids = generate(lab), lab._encode(PROMPT)
    assert lab._engine.compute.fast or "fast" not in folder.name
    assert len(ids) > 100
    expected = stock_logits(folder, [*ids, *run.tokens[:-1]])[len(ids) - 1 :]
    assert run.tokens == expected.argmax(-1).tolist()
    assert (logits_of(lab, ids, run.tokens[:-1]) - expected).abs().max() <= 1e-4


def test_a_pair_of_tiers_with_prefetch_is_measured_and_scored(lab):
    lab.update(bits=4, low_bits=2, prefetch=1, measure_kl=True)
    lab.update(budget=lab.info()["minimum_budget_bytes"] + lab.info()["expert_bytes"][4])
    run = generate(lab)
    assert run.error is None
    assert len(run.tokens) == NEW
    assert run.summary()["kl_mean"] > 0
    assert run.summary()["peak_resident_bytes"] <= lab.settings.budget_bytes
    assert set(run.events.bits[run.events.kind == "load"]) <= {4, 2}
    score = lab.score("A short text to score here.", progress=False)
    assert score.tokens > 20
    assert score.kl_mean > 0
