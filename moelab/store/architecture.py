"""What a model is by its configuration alone: layers, experts, bytes; no weight is needed.

The sizes are those of the model that transformers makes on the meta device, in whatever family.
`KNOWN` holds the few keys of config.json that make the model, from the hub repository named beside
them, and the number of parameters published there. What it does not know: what the weights hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from moelab.models.config import make_config, read_json
from moelab.models.families import expert_parameter, find_moe
from moelab.models.skeleton import blank_of, half_plan, read_config
from moelab.scheduling.stream import Shape
from moelab.store.codecs import GROUP, TIERS, Layout, nbytes
from moelab.store.manifest import MODEL, StoreError, of_model, shortened
from moelab.store.source import is_hub_id, unfolded

KNOWN: dict[str, dict[str, Any]] = json.loads(
    files("moelab.models").joinpath("known.json").read_text("utf-8")
)
"""By name: ``hub``, the ``billions`` of parameters published there, and the ``config``."""
HUB = {known["hub"].lower(): name for name, known in KNOWN.items()}
"""Names of `KNOWN` by hub id: what is known here is not asked of the hub."""


class Architecture:
    """A model without weights.

    Parameters
    ----------
    of
        A name of `KNOWN`, a folder with a config.json, a GGUF file, a hub id (its config.json is
        fetched), or the keys of a config.json.
    tiers
        Bits that an expert is to be stored at.

    Attributes
    ----------
    config
        The keys of its config.json.
    model, layers
        transformers' model on the meta device, and its MoE layers.
    shape
        MoE layers, experts of each, top-k, and bytes of an expert by tier.
    parameters, expert_parameters
        Numbers of weights, all and of the experts.

    Raises
    ------
    ValueError
        There is no such model, or it has no experts.

    Examples
    --------
    >>> found = Architecture("olmoe-1b-7b")
    >>> found.shape.layers, found.shape.experts[0], found.shape.nbytes[4]
    (16, 64, 3538944)
    """

    def __init__(self, of: str | Path | Mapping[str, Any], *, tiers: Sequence[int] = TIERS) -> None:
        self.name, self.config, config = _found(of)
        self.model = blank_of(config)
        self.layers = find_moe(self.model)
        self.described = of_model(self.model, self.layers)
        half = "float16" if config.dtype == torch.float16 else "bfloat16"
        self.layout = Layout(
            self.described.pop("tensors"), half, turned=self.described["transposed"]
        )
        sizes = {bits: nbytes(self.layout, bits) for bits in tiers}
        own = self.described["experts_per_layer"], self.layers[0].top_k, sizes
        self.shape = Shape(*own, self.described["encoder_layers"])
        self.parameters = sum(p.numel() for p in self.model.parameters())
        each = sum(math.prod(shape) for _, shape in self.layout.tensors)
        self.expert_parameters = self.shape.n * each

    @cached_property
    def dense(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """By name, shape of every weight that is no expert's, and whether it stays at 16 bit."""
        own = {
            name: tuple(weight.shape)
            for name, weight in self.model.named_parameters()
            if expert_parameter(name, self.layers) is None
        }
        stored = {key: {torch.bfloat16} for key in own}
        half = {name for name, _ in half_plan(self.model, self.layers, stored)}
        return {name: (shape, name in half) for name, shape in own.items()}

    @property
    def lacking(self) -> str:
        """What modelled routing leaves out of this model, as a clause; empty: nothing."""
        free = self.layers[0].free
        words = f"no request goes to the {free} experts of a layer that have no weights"
        return f"{words}: more is read and computed than would be" if free else ""

    def dense_bytes(self, bits: int = 16) -> int:
        """Memory of all weights that are no expert's, the large ones kept at ``bits``."""
        total = 0
        for shape, half in self.dense.values():
            kept = bits if half and shape[-1] % GROUP == 0 else 16
            size = math.prod(shape) * kept // 8 + 4 * math.prod(shape) // GROUP * (kept < 16)
            total += size if half else 4 * math.prod(shape)
        return total


def _found(of: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any], PreTrainedConfig]:
    """Name, keys of config.json, and the configuration that they make."""
    if isinstance(of, Mapping):
        return str(of.get("model_type")), dict(of), make_config(of)
    if (name := HUB.get(str(of).lower(), str(of))) in KNOWN:
        data = KNOWN[name]["config"]
        return name, dict(data), make_config(data)
    folder = Path(of).expanduser().absolute()
    if (folder / "manifest.json").is_file():
        return _found(folder / MODEL)
    if is_hub_id(of):
        folder = _fetched(name)
    elif folder.is_file():
        folder = unfolded(folder) if folder.suffix == ".gguf" else folder.parent
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no architecture is known of {name!r}; give one of {', '.join(KNOWN)}, a folder "
            "with a config.json, a GGUF file, or a hub id like 'org/name'"
        )
    name = folder.parent.name if folder.name == MODEL else Path(name).stem
    return name, read_json(folder / "config.json"), read_config(folder)


def _fetched(hub_id: str) -> Path:
    """The folder with a hub repository's config.json."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent
    except Exception as error:
        raise StoreError(
            f"{hub_id} is no folder here and its config.json could not be downloaded "
            f"({shortened(error)}); check the name and the network"
        ) from error
