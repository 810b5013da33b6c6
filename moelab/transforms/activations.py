"""What the experts of a checkpoint see and make on sample text, layer by layer.

The model runs in float32 at full precision with its experts read from the checkpoint one at a time:
no store, no budget. What it does not know: what a transform makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moelab.models.adapter import attach
from moelab.models.chat import load_tokenizer
from moelab.models.skeleton import load_skeleton
from moelab.transforms.layers import Layers

SAMPLE = 512
"""Tokens of each layer's input that are kept, for the outputs of experts on the same ones."""


@dataclass
class Seen:
    """One layer's sample; T tokens.

    Attributes
    ----------
    inputs, hidden
        2-norms over the tokens routed to an expert, of each input channel ``[E, D]`` and of each
        neuron's value ``[E, F]``. An expert that saw none has the mean of the others.
    tokens
        Inputs of the layer ``[T, D]``, `SAMPLE` at most.
    activation
        The experts' own.
    """

    inputs: torch.Tensor
    hidden: torch.Tensor
    tokens: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]

    def scale(self, width: int) -> torch.Tensor:
        """The norm of what every weight of the points ``[E, F, 3D]`` is multiplied by."""
        neurons = self.hidden.shape[1]
        rows = self.inputs.repeat(1, 2)[:, None].expand(-1, neurons, -1)
        columns = self.hidden[..., None].expand(-1, -1, width // 3)
        return torch.cat([rows, columns], -1)

    def outputs(self, points: torch.Tensor) -> torch.Tensor:
        """What each of a layer's experts ``[E, F, 3D]`` makes of the sample ``[E, T, D]``."""
        return torch.stack([self._hidden(e, self.tokens) @ e.chunk(3, 1)[2] for e in points])

    def _hidden(self, expert: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, up, _ = expert.chunk(3, 1)
        return self.activation(x @ gate.T) * (x @ up.T)

    def add(self, number: int, expert: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Count tokens ``[T, D]`` routed to an expert ``[F, 3D]``; returns its outputs."""
        h = self._hidden(expert, x)
        self.inputs[number] += x.square().sum(0)
        self.hidden[number] += h.square().sum(0)
        return h @ expert.chunk(3, 1)[2]

    def finish(self) -> None:
        """From sums of squares to norms."""
        for sums in (self.inputs, self.hidden):
            unseen = sums.sum(1) == 0
            sums[unseen] = sums[~unseen].mean(0)
            sums.sqrt_()


@torch.inference_mode()
def activations(layers: Layers, texts: Sequence[str], tokens: int) -> list[Seen]:
    """Run texts through a checkpoint, so many tokens of each, ``[L]``.

    Raises
    ------
    ValueError
        A text is empty, or the checkpoint has no tokenizer that can be used.
    """
    tokenizer = load_tokenizer(layers.folder)
    ids = [tokenizer(text)["input_ids"][:tokens] for text in texts]
    if not ids or min(map(len, ids)) < 1:
        raise ValueError("texts: one or more, none of them empty")
    found = [
        Seen(
            torch.zeros(at.num_experts, at.hidden),
            torch.zeros(at.num_experts, at.inner),
            torch.zeros(0, at.hidden),
            at.module.act_fn,
        )
        for at in layers.moe
    ]

    def run(
        layer: int, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, scale_input: bool
    ) -> torch.Tensor:
        seen, out = found[layer], torch.zeros_like(x)
        seen.tokens = torch.cat([seen.tokens, x])[:SAMPLE]
        for expert in set(idx.flatten().tolist()) & set(range(len(seen.inputs))):
            rows, place = (idx == expert).nonzero(as_tuple=True)
            own = weights[rows, place, None]
            points = layers.expert(layer, expert)
            if scale_input:
                out.index_add_(0, rows, seen.add(expert, points, x[rows] * own))
            else:
                out.index_add_(0, rows, seen.add(expert, points, x[rows]) * own)
        return out

    model = load_skeleton(layers.folder, dtype=torch.float32).float()
    adapter = attach(model, run)
    for text in ids:
        model(torch.tensor([text]), use_cache=False)
    adapter.detach()
    for seen in found:
        seen.finish()
    return found
