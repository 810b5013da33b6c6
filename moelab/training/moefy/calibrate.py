"""A first mixture without gradients through the model: one pass over some text, layer by layer.

At each layer the student's neurons are grouped, a router is fitted to keep what the layer's output
needs, and a low-rank correction of the down projection makes up for as much of the rest as a linear
map can. Each layer is fitted on what the student's own earlier layers feed it, and a token's error
counts relative to its residual stream, because all that reads the stream normalises it first (a
few tokens' streams are a thousand times longer than the others').

Letters: T tokens, D model width, F neurons, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from tqdm.auto import tqdm

from moelab.demo.mixture import Shape
from moelab.training.moefy.grouping import group_neurons, ridge
from moelab.training.moefy.student import MaskedMoE, Student, route

_CHUNK = 2048  # tokens whose experts' outputs are held at once
_GROUPING_TOKENS = 10_000
_STEPS = 250  # of fitting a router


@torch.no_grad()
def calibrated(
    dense: Any,
    ids: torch.Tensor,
    shape: Shape,
    *,
    top_ks: Sequence[int],
    seed: int = 0,
    progress: bool = True,
) -> Student:
    """A student whose groups, routers and down corrections are fitted layer by layer.

    ``ids``, int64 ``[windows, length]``, is the text to fit on (25 thousand tokens are enough); the
    windows are shared out among the numbers of active experts ``top_ks``, and the student is set to
    the largest. The progress bar shows each layer's error before and after correction.
    """
    torch.manual_seed(seed)
    neurons = dense.model.layers[0].mlp.gate_proj.out_features
    student = Student(dense, [torch.arange(neurons)] * len(dense.model.layers), shape)
    active = torch.tensor([top_ks[i % len(top_ks)] for i in range(len(ids))])
    wanted = dense.model.embed_tokens(ids)  # the teacher's stream
    stream = wanted.clone()  # the student's
    both = list(zip(dense.model.layers, student.model.model.layers, strict=True))
    bar = tqdm(both, desc="calibrating", unit="layer", disable=not progress)
    for theirs, ours in bar:
        wanted = attended(dense, theirs, wanted)
        wanted = wanted + theirs.mlp(theirs.post_attention_layernorm(wanted))
        stream = attended(dense, ours, stream)
        x = ours.post_attention_layernorm(stream)
        weight = 1 / wanted.square().mean(-1).flatten()
        order = group_neurons(
            _spread(x.flatten(0, 1), _GROUPING_TOKENS),
            *(getattr(theirs.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")),
            shared=shape.shared,
            experts=shape.experts,
            top_k=min(top_ks),
            weight=_spread(weight, _GROUPING_TOKENS),
            seed=seed,
        )
        ours.mlp = MaskedMoE(theirs.mlp, order, shape)
        target = wanted - stream
        fit_router(ours.mlp, x, target, active, weight, seed)
        ours.mlp.top_k = active
        masked = ours.mlp.masked(x)
        missing = target - ours.mlp.down(masked)
        scale = weight.sqrt().view(*x.shape[:2], 1)
        x, y = ((part * scale).flatten(0, 1) for part in (masked, missing))
        low, high = low_rank_map(x, y, len(ours.mlp.down.a))
        ours.mlp.down.a.copy_(low)
        ours.mlp.down.b.copy_(high)
        output = ours.mlp.down(masked)
        stream = stream + output
        ours.mlp.top_k = max(top_ks)
        before, after = ((p * scale).square().mean() for p in (missing, target - output))
        bar.set_postfix(error=f"{before:.3f}", corrected=f"{after:.3f}")
    return student


def attended(model: Any, layer: Any, stream: torch.Tensor) -> torch.Tensor:
    """The residual stream ``[windows, length, D]`` after a layer's attention."""
    rotary = model.model.rotary_emb(stream, torch.arange(stream.shape[1])[None])
    options = {"position_embeddings": rotary, "attention_mask": None}
    parts = stream.split(16)
    return torch.cat([p + layer.self_attn(layer.input_layernorm(p), **options)[0] for p in parts])


def fit_router(
    mixture: MaskedMoE,
    x: torch.Tensor,
    target: torch.Tensor,
    active: torch.Tensor,
    weight: torch.Tensor,
    seed: int,
) -> None:
    """Fit a layer's router so that the layer's output is near ``target``.

    With ``y_e`` an expert's output and ``r`` what the shared expert leaves of the target, the error
    of gates ``g`` is ``g G g - 2 c g + r r`` where ``G = y_e y_f`` and ``c = y_e r``: once these
    few numbers per token are known, the experts are not needed any more and steps cost nothing.

    ``x`` and ``target``, ``[windows, length, D]``, are the layer's input and the wanted output;
    ``active``, int64 ``[windows]``, active experts for each window; ``weight``,
    ``[windows * length]``, how much each token's squared error counts; a step takes 2048 tokens.
    """
    tokens, wanted = x.flatten(0, 1), target.flatten(0, 1)
    parts = map(_quadratic, repeat(mixture), tokens.split(_CHUNK), wanted.split(_CHUNK))
    gram, cross, norms = map(torch.cat, zip(*parts, strict=True))
    size = (wanted.square().sum(-1) * weight).mean()
    k = active.repeat_interleave(x.shape[1])
    start = ridge(tokens, (norms - norms.mean(0)) / norms.std(0), 3e-3).T
    router = (0.5 * start).requires_grad_()
    bias = torch.zeros(len(start), requires_grad=True)
    rates = [{"params": [router], "lr": 0.03 * float(start.std())}, {"params": [bias], "lr": 3e-3}]
    optimizer = torch.optim.Adam(rates, betas=(0.9, 0.98))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        at = torch.randint(len(tokens), (min(2048, len(tokens)),), generator=generator)
        with torch.enable_grad():
            gates = route(torch.sigmoid(tokens[at] @ router.T), bias, k[at])
            fit = (gates * (torch.einsum("te,tef->tf", gates, gram[at]) - 2 * cross[at])).sum(-1)
            loss = (fit * weight[at]).mean() / size
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        decay.step()
    mixture.router.data.copy_(router.detach())
    mixture.bias.data.copy_(bias.detach())


def _quadratic(
    mixture: MaskedMoE, x: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token: the experts' Gram matrix ``[T, E, E]``, ``c`` and output norms ``[T, E]``."""
    shape, down = mixture.shape, mixture.down.merged()
    hidden = mixture.hidden(x)
    rest = target - hidden[:, : shape.shared] @ down[:, : shape.shared].T
    routed = hidden[:, shape.shared :].view(len(x), shape.experts, -1)
    matrices = down[:, shape.shared :].view(len(down), shape.experts, -1)
    outputs = torch.einsum("tew,dew->ted", routed, matrices)
    gram = outputs @ outputs.transpose(1, 2)
    norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    return gram, (outputs @ rest.unsqueeze(-1)).squeeze(-1), norms


def low_rank_map(x: torch.Tensor, y: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best map of rank R from ``x`` to ``y``: ridge regression, then its main directions.

    Of ``x``, ``[T, F]``, and ``y``, ``[T, D]``, the last sixth is held out to choose the penalty
    among three, for inputs scaled to mean square 1. Returns ``a`` ``[R, F]`` and ``b``
    ``[D, R]``, so that ``y`` is about ``x a^T b^T``.
    """
    scale = x.square().mean(0).sqrt().clamp(min=1e-6)
    scaled = x / scale
    first = len(x) - len(x) // 6
    moments, cross = scaled[:first].T @ scaled[:first], scaled[:first].T @ y[:first]
    best, result = float("inf"), (torch.zeros(rank, x.shape[1]), torch.zeros(y.shape[1], rank))
    for strength in (0.01, 0.1, 1.0):
        penalty = strength * first * torch.eye(len(moments))
        whole = torch.linalg.solve(moments + penalty, cross)  # [F, D]
        spread = whole.T @ moments @ whole  # second moments of what it predicts
        directions = torch.linalg.eigh(spread).eigenvectors[:, -rank:]  # [D, R]
        narrow = whole @ directions
        error = float((y[first:] - scaled[first:] @ narrow @ directions.T).square().sum())
        if error < best:
            a = (narrow / scale[:, None]).T
            size = a.norm(dim=1).clamp(min=1e-12).sqrt()  # shared out evenly between a and b
            best, result = error, (a / size[:, None], directions * size)
    return result


def _spread(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most about so many rows, evenly spread."""
    return x[:: max(1, len(x) // most)]
