"""Text to learn from: windows cut from documents, and text the dense model writes itself.

A mixture learns best on what its dense model knows. Where no such text is at hand, the model can
write it: sampled answers to many small questions are varied enough, and are exactly what a chat
model will be asked for.

Letters: N windows, T tokens of a window.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm


def windows(
    documents: Sequence[str],
    tokenizer: Any,
    *,
    length: int = 256,
    most: int | None = None,
    end: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Cut documents into windows of token ids, int64 ``[N, T]``, in random order.

    Parameters
    ----------
    documents
        Plain texts; they are joined with a separator.
    tokenizer
        The model's.
    length
        T.
    most
        At most so many windows.
    end
        Token id between documents; by default what the tokenizer calls the end of a text.
    seed
        Of the order.

    Raises
    ------
    ValueError
        There is less text than one window.
    """
    end = tokenizer.eos_token_id if end is None else end
    ids = [[*tokenizer(text).input_ids, end] for text in documents]
    flat = np.concatenate([np.asarray(part, np.int64) for part in ids]) if ids else np.empty(0)
    count = len(flat) // length
    if count == 0:
        raise ValueError(
            f"{len(flat)} tokens of text do not fill one window of {length}; give more documents"
        )
    order = np.random.default_rng(seed).permutation(count)[:most]
    return torch.from_numpy(flat[: count * length].reshape(count, length)[order])


@torch.no_grad()
def written(
    dense: Any,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    length: int = 256,
    batch: int = 32,
    temperature: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> torch.Tensor:
    """Let the model answer questions, and return what it wrote as windows, int64 ``[N, T]``.

    Questions whose prompts have the same number of tokens are answered together; a batch that
    cannot be filled is left out.

    Parameters
    ----------
    dense, tokenizer
        A chat model with its template.
    questions
        Many more than there are windows to fill do best.
    length
        T, question and answer together. An answer that ends early is followed by padding.
    batch
        Sequences written at once.
    temperature
        Of the sampling, within the likeliest 95 %.
    seed
        Of the sampling.
    progress
        Show a progress bar.
    """
    torch.manual_seed(seed)
    by_length: defaultdict[int, list[list[int]]] = defaultdict(list)
    for question in random.Random(seed).sample(questions, len(questions)):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        by_length[len(prompt)].append(list(prompt))
    batches = [
        prompts[at : at + batch]
        for prompts in by_length.values()
        for at in range(0, len(prompts) - batch + 1, batch)
        if len(prompts[0]) < length
    ]
    done = []
    for prompts in tqdm(batches, desc="writing", unit="batch", disable=not progress):
        out = dense.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
            max_length=length,
            do_sample=True,
            temperature=temperature,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        padding = length - out.shape[1]
        done.append(torch.nn.functional.pad(out, (0, padding), value=tokenizer.pad_token_id))
    return torch.cat(done) if done else torch.empty(0, length, dtype=torch.int64)
