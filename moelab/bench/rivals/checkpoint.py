"""A stock OLMoE checkpoint of any shape, filled at random, whose routing is like a real model's.

Random routers choose experts evenly and anew each token, which no cache can use. Here all
embeddings share a direction, which the routers read as a liking for some experts (popularity), and
attention averages the recent tokens, which moves the choice slowly (locality). Nothing but the
weights differs from any OLMoE, so every system loads it. What it does not know: language.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, OlmoeConfig, PreTrainedTokenizerFast

from moelab.scheduling.writing import write_atomically

VOCABULARY, HEAD = 8192, 128
SHARED = 1.0
"""Weight of the direction that all embeddings share."""
ROUTER, POPULARITY, RECENT, EXPERTS = 1.5, 0.4, 1.5, 0.25
"""Spread of a token's router logits, popularity as a share of it, attention, experts' output."""
IDS = "ids.json"


@dataclass(frozen=True)
class Shape:
    """Layers, experts a layer, active ones, model width and inner width."""

    layers: int
    experts: int
    active: int
    width: int
    inner: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """From ``"4x64 top-8 2048x1024"``.

        Raises
        ------
        ValueError
            It is written otherwise, or the widths are no multiples of 128.
        """
        found = re.fullmatch(r"(\d+)x(\d+) top-(\d+) (\d+)x(\d+)", text.strip())
        if found is None:
            raise ValueError(f"shape {text!r}: write 'layersxexperts top-active widthxinner'")
        shape = cls(*map(int, found.groups()))
        if shape.width % HEAD or shape.inner % HEAD or not shape.width or not shape.inner:
            raise ValueError(f"shape {text!r}: the two widths have to be multiples of {HEAD}")
        if not shape.layers or not 1 <= shape.active <= shape.experts:
            raise ValueError(f"shape {text!r}: at least a layer, and 1 to all experts active")
        return shape

    def __str__(self) -> str:
        size = f"{self.width}x{self.inner}"
        return f"{self.layers}x{self.experts} top-{self.active} {size}"

    @property
    def weights(self) -> int:
        """Number of weights, experts and all else."""
        expert = 3 * self.width * self.inner
        attention = 4 * self.width**2
        each = self.experts * (expert + self.width) + attention
        return self.layers * each + 2 * VOCABULARY * self.width


def make(folder: Path, shape: Shape, *, seed: int = 0) -> None:
    """Write the checkpoint in bfloat16, its tokenizer, and the ids that every system decodes.

    What is there already of the same shape and seed stays.
    """
    note = {"shape": str(shape), "seed": seed}
    done = folder / "made.json"
    if done.is_file() and json.loads(done.read_text()) == note:
        return
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    ids = _tokenizer(folder)
    heads = shape.width // HEAD
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.active,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["OlmoeForCausalLM"],
    )
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1).save_pretrained(folder)
    fill = _Fill(shape, seed)
    parts = [fill.ends(), *(fill.layer(at) for at in range(shape.layers))]
    index: dict[str, str] = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{shape.layers + 1:05}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    listed = {"metadata": {}, "weight_map": index}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(listed).encode())
    write_atomically(folder / IDS, json.dumps(ids).encode())
    write_atomically(done, json.dumps(note).encode())


def _tokenizer(folder: Path) -> list[int]:
    """Train a byte-level BPE on Python's own help texts; the ids of a part of them."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text.split("\n\n"), trainer)
    end, pad = trainer.special_tokens
    saved = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end.content)
    saved.pad_token = pad.content
    saved.save_pretrained(folder)
    return made.encode(text[len(text) // 3 :][:20000]).ids


class _Fill:
    """Random weights; D model width, I inner width, E experts."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._random = torch.Generator().manual_seed(seed)
        self._shared = self._normal(shape.width).sign()  # [D]

    def _normal(self, *size: int, spread: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=self._random) * spread

    def ends(self) -> dict[str, torch.Tensor]:
        """Embedding, last norm and head."""
        d = self._shape.width
        embedding = self._normal(VOCABULARY, d) + SHARED * self._shared
        head = self._normal(VOCABULARY, d, spread=d**-0.5)
        found = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
        found["model.norm.weight"] = torch.ones(d)
        return {name: value.bfloat16() for name, value in found.items()}

    def layer(self, at: int) -> dict[str, torch.Tensor]:
        """One layer's weights."""
        shape, d = self._shape, self._shape.width
        u, share = self._shared, SHARED / math.sqrt(1 + SHARED**2)
        out: dict[str, torch.Tensor] = {}
        out["q_proj"], out["k_proj"] = self._recent(share)
        value = self._normal(d, d, spread=d**-0.5)
        out["v_proj"] = value - torch.outer(value @ u, u) / d  # the shared direction says nothing
        output = self._normal(d, d, spread=RECENT * d**-0.5)
        out["o_proj"] = output - torch.outer(u, u @ output) / d
        found = {f"self_attn.{name}.weight": value for name, value in out.items()}
        router = self._normal(shape.experts, d, spread=ROUTER * d**-0.5)
        router -= torch.outer(router @ u, u) / d
        liking = self._normal(shape.experts, spread=POPULARITY * ROUTER / d)
        found["mlp.gate.weight"] = router + torch.outer(liking, u)
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm")
        found |= {f"{name}.weight": torch.ones(d) for name in (*norms, "self_attn.k_norm")}
        for e in range(shape.experts):
            for name, rows, columns in (
                ("gate_proj", shape.inner, d),
                ("up_proj", shape.inner, d),
                ("down_proj", d, shape.inner),
            ):
                spread = columns**-0.5 * (4 * EXPERTS if name == "down_proj" else 1)
                weight = self._normal(rows, columns, spread=spread)
                found[f"mlp.experts.{e}.{name}.weight"] = weight.bfloat16()
        return {f"model.layers.{at}.{name}": value.bfloat16() for name, value in found.items()}

    def _recent(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys whose product falls with the distance: ten to forty tokens wide."""
        d, u = self._shape.width, self._shared
        query, key = (self._normal(d, d, spread=0.3 * d**-0.5) for _ in range(2))
        turns = 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)  # rotary frequencies
        for head in range(d // HEAD):
            low = 0.01 * 2 ** (head % 3)
            band = ((turns > low) & (turns < 6 * low)).nonzero().flatten()
            rows = torch.cat([band, band + HEAD // 2]) + head * HEAD
            pull = math.sqrt(HEAD / len(rows)) * self._normal(len(rows)).sign() / d / share
            for weight in (query, key):
                weight[rows] += torch.outer(pull, u)
        return query, key
