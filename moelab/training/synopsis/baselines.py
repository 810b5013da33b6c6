"""What a summary is worth that needs no network: the text's own first words, or a neighbour's.

Rouge rewards repeating the source, so its first words are no straw man, and a lead (`corpus.lead`)
is what the model itself is first taught to write; the nearest neighbour says what looking up among
the training pairs would give.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from moelab.training.synopsis.corpus import Pair, lead, unnamed

WORD = re.compile(r"[a-z0-9]+")


def first_words(text: str, words: int) -> str:
    """The first words of a description."""
    return " ".join(unnamed(text).split()[:words])


def first_sentence(text: str) -> str:
    """All up to the first full stop, question or exclamation mark before a space."""
    return re.split(r"(?<=[.!?])\s", unnamed(text))[0]


class Nearest:
    """The synopsis of the training pair whose description is nearest by TF-IDF and cosine.

    A word's weight in a text is (1 + log count) · log(N / texts that have it), N texts in all.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        found = [Counter(WORD.findall(pair.text.lower())) for pair in pairs]
        in_texts = Counter(word for counts in found for word in counts)
        self._rarity = {word: math.log(len(pairs) / n) for word, n in in_texts.items()}
        lists: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in in_texts}
        norms = np.zeros(len(pairs))
        for at, counts in enumerate(found):
            for word, weight in self._weights(counts).items():
                lists[word][0].append(at)
                lists[word][1].append(weight)
                norms[at] += weight * weight
        self._lists = {w: (np.array(at), np.array(x)) for w, (at, x) in lists.items()}
        self._norms = np.sqrt(norms + 1e-9)

    def _weights(self, counts: Counter[str]) -> dict[str, float]:
        rarity = self._rarity
        return {w: (1 + math.log(n)) * rarity[w] for w, n in counts.items() if w in rarity}

    def __call__(self, text: str) -> str:
        """The synopsis found for a description; the first pair's where no word is known."""
        likeness = np.zeros(len(self._pairs))
        for word, weight in self._weights(Counter(WORD.findall(text.lower()))).items():
            at, theirs = self._lists[word]
            likeness[at] += weight * theirs
        return self._pairs[int((likeness / self._norms).argmax())].synopsis


def baselines(train: Sequence[Pair]) -> dict[str, Callable[[str], str]]:
    """By name, what writes a synopsis from a description."""
    return {
        "first 8 words": lambda text: first_words(text, 8),
        "first 12 words": lambda text: first_words(text, 12),
        "first sentence": first_sentence,
        "lead": lead,
        "nearest neighbour": Nearest(train),
    }
