"""Rouge: how much of a reference's words a written summary has (Lin, 2004), by ``rouge-score``.

F-measures from 0 to 1 over stemmed words: single words, pairs of neighbours, and the longest common
subsequence. The metric of EdgeMoE and SwapMoE is Rouge-2. What it does not know: the same thing
said in other words. A text of one word has no pairs, so its Rouge-2 is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rouge(NamedTuple):
    """Mean F-measures over pairs of a text and its reference, 0 to 1."""

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815, its name everywhere


def f_measures(
    written: Sequence[str], references: Sequence[str], kinds: Sequence[str] = Rouge._fields
) -> np.ndarray:
    """F-measure of each text against its reference ``[texts, kinds]``.

    Raises
    ------
    ValueError
        There are none, or not as many of both.
    """
    if not written or len(written) != len(references):
        raise ValueError(
            f"{len(written)} texts and {len(references)} references: give one reference to each"
        )
    from rouge_score.rouge_scorer import RougeScorer  # a second to import

    scorer = RougeScorer(list(kinds), use_stemmer=True)
    found = [scorer.score(wanted, text) for text, wanted in zip(written, references, strict=True)]
    return np.array([[one[kind].fmeasure for kind in kinds] for one in found])


def rouge(written: Sequence[str], references: Sequence[str]) -> Rouge:
    """Rouge of texts against a reference each.

    Raises
    ------
    ValueError
        There are none, or not as many of both.

    Examples
    --------
    >>> found = rouge(["the cat sat down"], ["the cat sat"])
    >>> [round(part, 3) for part in found]
    [0.857, 0.8, 0.857]
    """
    return Rouge(*f_measures(written, references).mean(0).tolist())
