"""The experts of a checkpoint as points, and points as a checkpoint's tensors again.

An expert is ``[F, 3D]``: a neuron's row of the gate matrix, its row of the up matrix and its column
of the down matrix. Supported are checkpoints that keep these three matrices of every expert as
tensors of their own, in bf16, fp16 or fp32: Qwen-MoE, OLMoE, Mixtral, DeepSeek and what is stored
like them. Others are refused by name.

L layers, E experts, F neurons of an expert, D width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moelab.models.checkpoint import ExpertReader
from moelab.models.families import MoELayer
from moelab.models.shards import DTYPES, GGUF
from moelab.models.skeleton import blank_model

PLAIN = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Size:
    """A layer of E experts: F neurons of 3D weights each, of which a token gets top-k experts."""

    experts: int
    neurons: int
    width: int
    top_k: int

    @property
    def each(self) -> int:
        """Weights of an expert."""
        return self.neurons * self.width

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.experts * self.each


class Layers:
    """The MoE layers of a checkpoint folder.

    Attributes
    ----------
    folder, model, reader, moe
        The checkpoint, its model on the meta device, its experts' reader and its MoE layers.

    Raises
    ------
    ValueError
        It is no checkpoint, or keeps its experts in a way that cannot be rewritten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, blank_model(folder)
        self.reader = ExpertReader(self.model, folder)
        self.checkpoint, self.moe = self.reader.checkpoint, self.reader.layers
        self._keys = [self._named(layer) for layer in self.moe]

    def size(self, layer: int) -> Size:
        """How large a layer is."""
        at = self.moe[layer]
        return Size(at.num_experts, at.inner, 3 * at.hidden, at.top_k)

    def expert(self, layer: int, number: int) -> torch.Tensor:
        """One expert ``[F, 3D]``, float32."""
        gate, up, down = (self.checkpoint.weight(key) for key in self._keys[layer][number])
        return torch.cat([gate, up, down.T], 1).float()

    def points(self, layer: int) -> torch.Tensor:
        """All experts of a layer ``[E, F, 3D]``, float32."""
        return torch.stack([self.expert(layer, e) for e in range(self.moe[layer].num_experts)])

    def tensors(self, layer: int, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """Experts ``[E', F', 3D]`` as tensors under the first E' names, in the stored type."""
        named = {}
        for keys, expert in zip(self._keys[layer], points, strict=False):
            gate, up, down = expert.chunk(3, 1)
            for key, matrix in zip(keys, (gate, up, down.T), strict=True):
                kind = DTYPES[self.checkpoint.info[key].dtype]
                named[key] = matrix.to(kind, copy=True).contiguous()
        return named

    def router(self, layer: int) -> list[str]:
        """Names in the checkpoint of what a layer's router has for each expert."""
        at = self.moe[layer]
        name = next(n for n, module in self.model.named_modules() if module is at.router)
        rest, info = self.reader.found.rest, self.checkpoint.info
        own = (key for key, target in rest.items() if target.rpartition(".")[0] == name)
        return [key for key in own if info[key].shape[:1] == (at.num_experts,)]

    def _named(self, layer: MoELayer) -> list[tuple[str, ...]]:
        """The names of gate, up and down matrix of each of a layer's experts ``[E]``."""
        kind = self.model.config.model_type
        sources = self.reader.found.experts[layer.index]
        pieces = [
            source.groups[pattern]
            for parameter in ("gate_up_proj", "down_proj")
            if (source := sources.get(parameter)) is not None and source.converter is not None
            for pattern in source.converter.source_patterns
        ]
        usual = layer.gating == "concatenated" and layer.router is not None
        usual &= not (layer.transposed or layer.has_bias)
        if len(pieces) != 3 or len(sources) != 2 or not usual or any(None in p for p in pieces):
            raise ValueError(
                f"{self.folder} ({kind}) keeps the experts of a layer in one tensor, or has other "
                "matrices than gate, up and down; transforms rewrite checkpoints with three "
                "tensors for each expert, such as those of qwen3_moe, olmoe or mixtral"
            )
        keys = [tuple(piece[e] for piece in pieces) for e in range(layer.num_experts)]
        stored = {self.checkpoint.info[key].stored for three in keys for key in three}
        if not stored <= set(PLAIN) or (self.folder / GGUF).is_file():
            raise ValueError(
                f"{self.folder} keeps its experts as {', '.join(sorted(stored))}; transforms read "
                f"safetensors in {', '.join(PLAIN)}: give the unquantised checkpoint"
            )
        return keys
