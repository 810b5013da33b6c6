"""Routing that behaves like a large model's, drawn from eleven numbers: always *modelled*.

Every expert has a score for every token; the K highest are chosen. A score has a part that stays
(what this text prefers, drifting slowly) and one that comes with the token (what kind of token it
is, at four levels of likeness). The numbers were fitted to miss-ratio curves, overlap of tokens,
skew and path predictability of real traces (BigMoeOnEdge's, Apache-2.0) and of published figures;
whole-trace curves of LRU and Belady then differ by 1 to 2 points. What it does not know: language,
topics, and any figure that it was not fitted to.

L layers, E experts of a layer, K active.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Shape
from moelab.scheduling.trace import Trace

LAM = 1.5
CLUSTERS = (4, 16, 64)
ZIPF = 2.7
BITS_PER_WEIGHT = {16: 16.0, 8: 8.5, 4: 4.5}
"""With scales and offsets."""


@dataclass(frozen=True)
class Profile:
    """A model's shape and what was fitted to its routing; see the module.

    Attributes
    ----------
    layers, experts, top_k
        The shape.
    c0, d0, cj
        How much stays: on average, less in the first layers, and its spread over layers.
    w, tau, b
        Of what stays: the share that never drifts, the tokens of its drift, and what is kept of it
        from the prompt to the first decoded token.
    v, eta, types
        Of what comes with a token: the share of its kind, how that falls from coarse to fine, and
        how many kinds there are.
    phi, psi
        What a token takes over from those before it, and for how long.
    gamma
        Sharpness of gate weights; None: not known.
    weights
        Of an expert; 0: not known.
    """

    layers: int
    experts: int
    top_k: int
    c0: float
    d0: float
    cj: float
    w: float
    tau: float
    b: float
    v: float
    eta: float
    types: int
    phi: float
    psi: float
    gamma: float | None
    weights: int = 0


QWEN, GPT, OLMOE = 3 * 2048 * 768, 3 * 2880 * 2880, 3 * 2048 * 1024
PROFILES = {
    "qwen3-30b-a3b": Profile(
        *(48, 128, 8, 0.735, 0.899, 0.067, 0.858, 49.0, 0.550),
        *(0.956, 0.530, 645, 0.234, 0.269, 0.904, QWEN),
    ),
    "qwen3-30b-a3b, one prompt, top 6": Profile(
        *(48, 128, 6, 0.473, 0.945, 0.197, 0.867, 37.1, 0.843),
        *(0.944, 0.298, 43, 0.384, 0.222, 0.862, QWEN),
    ),
    "gemma-4-26b-a4b, one prompt, top 6": Profile(
        *(30, 128, 6, 0.501, 0.921, 0.111, 0.818, 37.9, 0.754),
        *(0.966, 0.440, 69, 0.389, 0.424, 1.173),
    ),
    "gpt-oss-120b, one prompt, top 2": Profile(
        *(36, 128, 2, 0.636, 0.940, 0.141, 0.199, 30.1, 0.852),
        *(0.962, 0.561, 37, 0.114, 0.363, 0.898, GPT),
    ),
    "olmoe-1b-7b": Profile(
        *(16, 64, 8, 0.419, 0.960, 0.129, 0.431, 74.9, 0.944),
        *(0.754, 0.451, 75, 0.408, 0.198, None, OLMOE),
    ),
    "qwen3.8-flash-next": Profile(
        *(48, 512, 10, 0.375, 0.808, 0.010, 0.062, 28.3, 0.433),
        *(0.887, 2.319, 2054, 0.514, 0.162, None),
    ),
}
"""By model. The first was fitted to published figures of 25 prompts, those of one prompt to a real
trace at the top-k that it was recorded with, the last two to published curves alone."""


GATES = {"mixtral": 1.4, "phi-3.5": 1.8}
"""Sharpness of gate weights, drawn so that a second expert's score is within T1 = 0.6 and T2 = 0.9
for as many of them (34 and 94 %) as HOBBIT's paper says of Mixtral, arXiv 2411.01433."""


def routing(of: str | Profile, *, tokens: int = 128, prompt: int = 32, seed: int = 0) -> Trace:
    """Draw a trace whose routing behaves like a model's.

    Parameters
    ----------
    of
        One of `PROFILES`, or a `Profile`.
    tokens, prompt
        Decoded tokens, and those of the prompt before them (0: none).
    seed
        Another one is another text, and other experts.

    Returns
    -------
    Trace
        Without settings; its ``lacks`` says that it is modelled. Tiers are 16, 8 and 4 bit where
        the size of an expert is known, else 16 at a nominal megabyte.

    Raises
    ------
    ValueError
        There is no such model, or a number is out of range.

    Examples
    --------
    >>> trace = moelab.routing("olmoe-1b-7b", tokens=8)
    >>> trace.shape.layers, trace.tokens, trace.lacks[0]
    (16, 9, 'a real run: modelled after olmoe-1b-7b')
    """
    if isinstance(of, str) and of not in PROFILES:
        raise ValueError(f"no routing is known of {of!r}; there are {', '.join(PROFILES)}")
    if tokens < 1 or prompt < 0:
        raise ValueError(f"tokens={tokens}, prompt={prompt}: 1 or more, 0 or more")
    name, p = (of, PROFILES[of]) if isinstance(of, str) else ("a profile of your own", of)
    sizes = {bits: round(p.weights * each / 8) for bits, each in BITS_PER_WEIGHT.items()}
    shape = Shape((p.experts,) * p.layers, p.top_k, sizes if p.weights else {16: 10**6})
    drawn = list(_choices(p, prompt, tokens, seed))
    steps = list(_prompt(drawn[:prompt], p.layers)) if prompt else []
    for experts, gates in drawn[prompt:]:
        steps += [
            LayerInput(layer, (experts[layer],), (gates[layer],)) for layer in range(p.layers)
        ]
    lacks = [f"a real run: modelled after {name}", "look-ahead"]
    lacks += ["gate weights"] * (p.gamma is None) + ["bytes of an expert"] * (not p.weights)
    return Trace(shape, steps, lacks=tuple(lacks))


def nearest(name: str, shape: Shape) -> tuple[str, Profile]:
    """Whose routing is known and most like that of a model of this name and shape.

    Its own where its name says so; else the nearest in the share of experts that a token asks for,
    then in their number. The profile is of the sizes asked for, and knows no bytes; where gate
    weights were not recorded, theirs are of `GATES` or of the nearest that has some.
    """
    if shape.encoder_layers:
        raise ValueError(f"{name} is an encoder-decoder, and nobody's routing is known of those")
    experts, k = max(shape.experts), shape.top_k

    def away(one: tuple[str, Profile]) -> float:
        known, p = one
        share = abs(math.log(p.top_k / p.experts * experts / k))
        return -1 if known in name.lower() else share + abs(math.log(p.experts / experts)) / 4

    found, profile = min(PROFILES.items(), key=away)
    gamma = next((gamma for word, gamma in GATES.items() if word in name.lower()), profile.gamma)
    if gamma is None:
        gamma = min((one for one in PROFILES.items() if one[1].gamma), key=away)[1].gamma
    sizes = {"layers": shape.layers, "experts": experts, "top_k": k, "weights": 0, "gamma": gamma}
    return found, replace(profile, **sizes)


Choice = tuple[list[tuple[int, ...]], list[tuple[float, ...]]]
"""Experts and gate weights of a token in each layer, by falling weight."""


def _prompt(tokens: list[Choice], layers: int) -> Iterator[LayerInput]:
    for layer in range(layers):
        rows = tuple(experts[layer] for experts, _ in tokens)
        gates = tuple(weights[layer] for _, weights in tokens)
        yield LayerInput(layer, rows, gates, prefill=True)


def _choices(p: Profile, prompt: int, tokens: int, seed: int) -> Iterator[Choice]:
    """Token after token; arrays are ``[L, E]``."""
    rng = np.random.default_rng(seed)
    size = (p.layers, p.experts)
    early = 1 - p.d0 * np.exp(-np.arange(p.layers) / LAM)  # the first layers go by the token alone
    quantiles = [NormalDist().inv_cdf((i + 0.5) / p.layers) for i in range(p.layers)]
    spread = rng.permutation(quantiles)
    stays = np.clip(p.c0 * early + p.cj * spread, 0.02, 0.985)[:, None]  # [L, 1]
    liked, drift = rng.standard_normal(size), rng.standard_normal(size)
    kind_of = _Kinds(p, early, seed)
    odds = 1 / (np.arange(p.types) + ZIPF)
    kinds = rng.choice(p.types, prompt + tokens, p=odds / odds.sum())
    before = rng.standard_normal(size) / math.sqrt(1 - p.psi**2)
    for at, kind in enumerate(kinds):
        kept = p.b if prompt and at == prompt else math.exp(-1 / p.tau)
        drift = kept * drift + math.sqrt(1 - kept**2) * rng.standard_normal(size)
        comes = kind_of(int(kind)) + math.sqrt(1 - p.v) * rng.standard_normal(size)
        own = math.sqrt(1 - p.phi**2) * comes + p.phi * math.sqrt(1 - p.psi**2) * before
        text = math.sqrt(p.w) * liked + math.sqrt(1 - p.w) * drift
        score = stays * text + np.sqrt(1 - stays**2) * own
        before = p.psi * before + comes
        yield _top(score, p)


class _Kinds:
    """What each kind of token prefers: kinds that share more clusters route more alike."""

    def __init__(self, p: Profile, early: np.ndarray, seed: int) -> None:
        self._p, self._seed, self._known = p, seed, dict[int, np.ndarray]()
        shares = p.v * p.eta ** np.arange(4) / (1 + p.eta + p.eta**2 + p.eta**3)
        coarse = shares[:3, None] * early  # [3, L]
        self._roots = np.sqrt([*coarse, shares[:3].sum() - coarse.sum(0) + shares[3]])

    def __call__(self, kind: int) -> np.ndarray:
        if kind not in self._known:
            members = (*(kind % clusters for clusters in CLUSTERS), kind)
            parts = [
                root[:, None] * self._pattern(level, member)
                for level, (root, member) in enumerate(zip(self._roots, members, strict=True))
            ]
            self._known[kind] = sum(parts, np.zeros(1))
        return self._known[kind]

    def _pattern(self, level: int, member: int) -> np.ndarray:
        size = (self._p.layers, self._p.experts)
        return np.random.default_rng((self._seed, level, member)).standard_normal(size)


def _top(score: np.ndarray, p: Profile) -> Choice:
    order = np.argsort(-score, axis=1, kind="stable")[:, : p.top_k]
    if p.gamma is None:
        gates = np.full(order.shape, 1 / p.top_k)
    else:
        best = p.gamma * np.take_along_axis(score, order, 1)
        gates = np.exp(best - best.max(1, keepdims=True))
        gates /= gates.sum(1, keepdims=True)
    return list(map(tuple, order.tolist())), list(map(tuple, gates.tolist()))
