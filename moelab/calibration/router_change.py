"""What fine-tuning did to routers, expert by expert: the numbers of pruning by router change.

M. N. R. Chowdhury et al., "A Provably Effective Method for Pruning Experts in Fine-tuned Sparse
MoE", arXiv 2405.16646: the change of an expert is ‖its row of the router, fine-tuned‖ less ‖the
same, pre-trained‖, with its sign; experts of the smallest change of a layer go first. What it does
not know: what either checkpoint was trained on.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moelab.models.families import find_moe
from moelab.models.skeleton import load_skeleton


def router_change(before: str | Path, after: str | Path) -> list[list[float]]:
    """The change of every expert's row in the routers, ``[L][E]``: a profile's ``change``.

    Parameters
    ----------
    before, after
        Checkpoint folders of one architecture, pre-trained and fine-tuned; of neither is an expert
        read.

    Raises
    ------
    ValueError
        Their routers differ in shape, or have no row for each expert.

    Examples
    --------
    >>> from moelab.strategies import static_pruning
    >>> change = router_change("pretrained", "finetuned")  # doctest: +SKIP
    >>> static_pruning({"change": change}, by="change")  # doctest: +SKIP
    """
    old, new = (_norms(Path(path)) for path in (before, after))
    if [len(row) for row in old] != [len(row) for row in new]:
        shapes = [[len(row) for row in norms] for norms in (old, new)]
        raise ValueError(f"routers of {shapes[0]} and {shapes[1]} experts: give one architecture's")
    return [(b - a).tolist() for a, b in zip(old, new, strict=True)]


def _norms(path: Path) -> list[torch.Tensor]:
    """Euclidean norms of the routers' rows, [L] of [E]."""
    found = []
    for layer in find_moe(load_skeleton(path, dtype=torch.float32)):
        own = [] if layer.router is None else layer.router.named_parameters()
        rows = [p for _, p in own if p.ndim == 2 and len(p) == layer.num_experts]
        if len(rows) != 1:
            raise ValueError(
                f"{path}: the router of layer {layer.index} ({layer.name}) has {len(rows)} "
                f"matrices of {layer.num_experts} rows; one is needed"
            )
        found.append(rows[0].detach().double().norm(dim=1))
    return found
