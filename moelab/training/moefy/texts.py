"""Text to learn from: windows cut from documents.

A mixture learns best on what its dense model knows: text like what that was trained on, and where
it is a chat model, answers that it wrote itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


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
