"""Which tokens come next in training.

Stateless but for the count of windows taken from each domain, so that a resumed run draws exactly
what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import numpy as np

from moelab.training.corpus import Corpus


class Sampler:
    """Windows of the corpus, in the domains' shares, without repetition within an epoch.

    The domain that is furthest behind its share comes next, so every worker draws the same
    windows and takes its own of them.

    Parameters
    ----------
    corpus
        Tokens and shares.
    drawn
        Windows taken so far by domain (empty: from the start); all that resuming needs.
    window
        Tokens of a window; the one after comes with it.
    seed
        Of the order within each epoch.
    """

    def __init__(
        self, corpus: Corpus, drawn: dict[str, int], *, window: int, seed: int = 0
    ) -> None:
        self.corpus, self.window, self.seed = corpus, window, seed
        self.drawn = {domain: drawn.get(domain, 0) for domain in corpus.shares}
        self._orders: dict[tuple[str, int], tuple[int, np.ndarray]] = {}

    def _order(self, domain: str, epoch: int, count: int) -> tuple[int, np.ndarray]:
        if (domain, epoch) not in self._orders:
            self._orders = {key: v for key, v in self._orders.items() if key[0] != domain}
            key = [self.seed, list(self.drawn).index(domain), epoch]
            rng = np.random.default_rng(key)
            self._orders[domain, epoch] = int(rng.integers(self.window)), rng.permutation(count)
        return self._orders[domain, epoch]

    def next(self, count: int) -> np.ndarray:
        """`count` windows of `window` tokens and the one after: [count, window + 1]."""
        out = np.empty((count, self.window + 1), dtype=np.int64)
        for row in out:
            total = sum(self.drawn.values()) + 1
            domain = max(self.drawn, key=lambda d: self.corpus.shares[d] * total - self.drawn[d])
            ids = self.corpus.train[domain]
            per_epoch = (len(ids) - 1) // self.window - 1
            epoch, at = divmod(self.drawn[domain], per_epoch)
            offset, order = self._order(domain, epoch, per_epoch)
            start = offset + order[at] * self.window
            row[:] = ids[start : start + self.window + 1]
            self.drawn[domain] += 1
        return out
