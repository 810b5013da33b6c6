"""What a checkpoint's experts see on texts, for rounding by GPTQ while it is packed.

The model runs once over the texts in float32, its experts read from the checkpoint one at a time.
Each layer's inputs and routing are kept, bfloat16 ``[T, D]`` and ``[T, K]`` (16 MB a layer for 4096
tokens of a model 2048 wide); an expert's Hessians are made of them when it is packed. Each text is
cut into passes of `PASS` tokens, and every pass reads the experts that it chooses; of an
encoder-decoder a source and its target are one pass. What it does not know: inputs as they become
once earlier layers are rounded.

T tokens, K active, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moelab.models.adapter import attach
from moelab.models.chat import Text, check_text, load_tokenizer, start_token
from moelab.models.checkpoint import ExpertReader
from moelab.models.families import expert_forward, expert_hidden
from moelab.models.skeleton import load_skeleton, read_config

PASS = 512
FEW = 16
"""An expert that was chosen by fewer tokens is rounded plainly."""


class Inputs:
    """A run of a checkpoint over texts.

    Attributes
    ----------
    tokens
        How many there were.

    Raises
    ------
    ValueError
        There is no text, an empty one, or one that is no (source, target) pair where the model is
        an encoder-decoder.
    """

    @torch.inference_mode()
    def __init__(self, folder: Path, reader: ExpertReader, texts: Sequence[Text]) -> None:
        tokenizer, two = load_tokenizer(folder), read_config(folder).is_encoder_decoder
        given = () if isinstance(texts, str) else [check_text(text, two=two) for text in texts]
        parts = [(text,) if isinstance(text, str) else text for text in given]
        ids = [[tokenizer(part)["input_ids"] for part in text] for text in parts]
        if not ids or not all(map(all, ids)):
            raise ValueError("calibrate: a list of one or more texts, none of them empty")
        self._reader, self.tokens = reader, sum(len(part) for text in ids for part in text)
        # [L] of passes: inputs of experts [T, D], and which of them each token chose [T, K]
        self._seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in reader.layers]
        self._scales: list[list[torch.Tensor]] = [[] for _ in reader.layers]
        model = load_skeleton(folder, dtype=torch.float32, checkpoint=reader.checkpoint).float()
        adapter = attach(model, self._run)
        self._layers = adapter.layers
        for *source, text in ids:
            if source:
                own = torch.tensor([[start_token(model), *text]])
                model(torch.tensor(source), decoder_input_ids=own, use_cache=False)
                continue
            for at in range(0, len(text), PASS):
                model(torch.tensor([text[at : at + PASS]]), use_cache=False)
        adapter.detach()

    def _run(
        self, layer: int, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, scales: bool
    ) -> torch.Tensor:
        idx = idx.masked_fill(weights == 0, -1)
        self._seen[layer].append((x.bfloat16(), idx))
        self._scales[layer].append(weights.float() if scales else torch.ones(len(x), 1))
        out, at = torch.zeros_like(x), self._layers[layer]
        for expert in set(idx.flatten().tolist()) & set(range(at.num_experts)):
            rows, place = (idx == expert).nonzero(as_tuple=True)
            own, tensors = weights[rows, place, None], self._reader(layer, expert)
            given = x[rows] * own if scales else x[rows]
            y = expert_forward(at.module, given, tensors)
            out.index_add_(0, rows, y if scales else y * own)
        return out

    @torch.inference_mode()
    def of(self, layer: int, expert: int) -> torch.Tensor:
        """The inputs of an expert, float32 ``[T, D]``."""
        found = []
        for (x, idx), scales in zip(self._seen[layer], self._scales[layer], strict=True):
            rows, place = (idx == expert).nonzero(as_tuple=True)
            found.append(x[rows].float() * scales[rows, place.clamp(max=scales.shape[1] - 1), None])
        return torch.cat(found)

    @torch.inference_mode()
    def hessians(
        self, layer: int, expert: int, tensors: dict[str, torch.Tensor]
    ) -> dict[str, np.ndarray]:
        """X.T @ X by matrix, ``[K, K]``; none of an expert that fewer than `FEW` tokens chose."""
        x, module = self.of(layer, expert), self._layers[layer].module
        if len(x) < FEW:
            return {}
        first = "gate_up_proj" if module.has_gate else "up_proj"
        given = {first: x, "down_proj": expert_hidden(module, x, tensors)}
        return {name: (t.T.double() @ t.double()).numpy() for name, t in given.items()}

    def note(self) -> str:
        """What a store should say of it."""
        few, every = 0, sum(at.num_experts for at in self._layers)
        for at, seen in zip(self._layers, self._seen, strict=True):
            chosen = torch.cat([idx.flatten() for _, idx in seen])
            few += sum(int((chosen == expert).sum()) < FEW for expert in range(at.num_experts))
        return (
            f"below 8 bit rounded by GPTQ on {self.tokens} tokens; {few} of {every} experts were "
            f"chosen by fewer than {FEW} of them and are rounded plainly"
        )
