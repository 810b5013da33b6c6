"""Which neurons of a dense SwiGLU layer belong together: a shared expert, and groups of one size.

A neuron's importance for a token is ``|h| * ||down||``, the length of what it adds. Those with the
largest mean importance are always on: the shared expert. The others are clustered by *when their
gates open*, because a router is linear and a gate's input is linear too: neurons that open together
can be found together. Then neurons change places for as long as that lets the best linear router
keep more energy. What this does not know: later layers, and the language model's loss.

Letters: T tokens, D model width, F neurons, E groups.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

_PROFILE_TOKENS = 3000  # enough for stable clusters; more only costs time


def activations(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The hidden activations ``silu(gate x) * up x`` of a SwiGLU layer, ``[T, F]``."""
    return F.silu(x @ gate.T) * (x @ up.T)


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """The linear map from ``x`` to ``y`` by least squares, ``[D, outputs]``.

    The penalty is in units of the mean diagonal of ``x``'s second moments.
    """
    moments = x.T @ x / len(x)
    penalty = strength * moments.diagonal().mean() * torch.eye(len(moments))
    return torch.linalg.solve(moments + penalty, x.T @ y / len(x))


def group_neurons(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    shared: int,
    experts: int,
    top_k: int,
    weight: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Choose the shared neurons of one layer and group the others; their order, int64 ``[F]``.

    ``x``, float32 ``[T, D]``, is what enters the layer for some thousands of tokens; ``weight``,
    ``[T]``, how much each token's energy counts. ``top_k`` groups will be active per token; router
    and groups are fitted to each other in turn, twice. The neurons that are not shared divide into
    the groups: `Shape.width` holds that.
    """
    importance = activations(x, gate, up).abs() * down.norm(dim=0)  # [T, F]
    ranking = importance.mean(0).argsort(descending=True)
    rest = ranking[shared:]
    profile = torch.sigmoid(x[:_PROFILE_TOKENS] @ gate[rest].T).T  # [F, T]
    profile = F.normalize(profile - profile.mean(1, keepdim=True), dim=1)
    groups = _cluster(profile, experts, torch.Generator().manual_seed(seed))
    energy = importance[:, rest].square()
    if weight is not None:
        energy *= weight[:, None]
    energy /= energy.mean()
    for _ in range(2):
        groups = _regroup(x, energy, groups, experts, top_k)
    inside = torch.from_numpy(np.argsort(groups, kind="stable"))
    return torch.cat([ranking[:shared], rest[inside]])


def _regroup(
    x: torch.Tensor, energy: torch.Tensor, groups: np.ndarray, experts: int, top_k: int
) -> np.ndarray:
    """One round: fit a linear router to the groups, then let neurons swap groups under it."""
    sums = torch.zeros(experts, len(x)).index_add_(0, torch.from_numpy(groups), energy.T)
    norms = sums.T.sqrt()  # [T, E]
    scores = x @ ridge(x, norms, 3e-3)
    threshold = scores.topk(top_k, -1).values[:, -1:]
    chosen = torch.sigmoid((scores - threshold) / (0.15 * scores.std()))
    gain = (energy.T @ chosen / len(x)).numpy()  # [F, E]
    return _swap(gain - gain.mean(1, keepdims=True), groups.copy())


def _cluster(profile: torch.Tensor, experts: int, generator: torch.Generator) -> np.ndarray:
    """Balanced k-means over unit rows; the group of each row."""
    centres = profile[torch.randperm(len(profile), generator=generator)[:experts]].clone()
    groups = np.zeros(len(profile), np.int64)
    for _ in range(8):
        groups = _fill((profile @ centres.T).numpy())
        sums = torch.zeros_like(centres).index_add_(0, torch.from_numpy(groups), profile)
        centres = F.normalize(sums, dim=1)
    return groups


def _fill(likeness: np.ndarray) -> np.ndarray:
    """Give each row its best group that still has room; rows with most to lose go first."""
    ranked = np.sort(likeness, axis=1)
    second = ranked[:, -2] if ranked.shape[1] > 1 else 0
    preferred = np.argsort(-likeness, axis=1)
    room = np.full(likeness.shape[1], len(likeness) // likeness.shape[1])
    groups = np.empty(len(likeness), np.int64)
    for row in np.argsort(second - ranked[:, -1], kind="stable"):
        best = next(group for group in preferred[row] if room[group])
        groups[row] = best
        room[best] -= 1
    return groups


def _swap(gain: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Swap pairs of rows between groups while the total gain grows; sizes stay."""
    rows = np.arange(len(groups))
    for _ in range(20):
        own, other = gain[rows, groups], gain[:, groups]  # other[i, j]: i in j's group
        better = other + other.T - own[:, None] - own
        better[groups[:, None] == groups] = -1
        partner = better.argmax(1)
        best = better[rows, partner]
        busy = np.zeros(len(rows), bool)
        for i in np.argsort(-best, kind="stable"):
            j = partner[i]
            if best[i] <= 1e-9:
                break
            if not busy[i] and not busy[j]:
                groups[i], groups[j] = groups[j], groups[i]
                busy[i] = busy[j] = True
        if not busy.any():
            break
    return groups
