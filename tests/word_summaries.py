"""A tiny encoder-decoder whose tokens are words, so that what it writes has a Rouge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny_models

WORDS = [f"w{number}" for number in range(256)]
ENDS = ["<bos>", "<eos>", "<pad>", "<unk>"]


def switch(folder: Path, **changes: Any) -> Path:
    """`tiny_models.switch` that repeats no word, with a tokenizer of 256 words."""
    tiny_models.switch(folder, **changes)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, *ENDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), ENDS, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(folder)
    config = transformers.GenerationConfig.from_pretrained(folder)
    config.repetition_penalty = 3.0
    config.save_pretrained(folder)
    return folder
