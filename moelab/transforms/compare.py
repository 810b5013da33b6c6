"""What the ideas lose at equal bytes, beside plain rounding to as many bits.

Every idea is set to the largest size that needs no more bytes than a tier of the store. KL is
measured over whole texts, teacher-forced, against the checkpoint's own weights.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moelab.calibration.probes import read, texts_of
from moelab.engine.generation import Ids, Stream
from moelab.opening import open as open_lab
from moelab.runs.quality import kl_divergence
from moelab.store.codecs import payload_bytes
from moelab.store.pack import pack
from moelab.transforms.layers import Size
from moelab.transforms.rewrite import IDEAS, transform

if TYPE_CHECKING:
    import pandas as pd

    from moelab.lab import Lab


def compare(
    model: str | Path = "demo",
    how: Sequence[str] = tuple(IDEAS),
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    texts: Sequence[str] | None = None,
    max_tokens: int = 256,
    sample: Sequence[str] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Mean KL of plain rounding and of each idea at as many bytes.

    Parameters
    ----------
    model
        What `transform` takes.
    how
        The ideas.
    bits
        Tiers whose bytes are given to each idea.
    texts
        To measure on; default the model's own probes.
    max_tokens
        Taken of each text.
    sample
        Text for ideas that weigh by activations, other than ``texts``; default weights alone.
    progress
        Show bars.

    Returns
    -------
    DataFrame
        A row for plain rounding and for each idea at each tier: ``how``, ``tier``,
        ``bits_per_weight`` (of the experts, scales, masks and positions included), ``bytes`` of all
        experts, ``kl`` in nats a token. An idea that cannot be made so small has no row there.

    Examples
    --------
    >>> compare("demo", bits=(4,), progress=False)  # doctest: +SKIP
    """
    import pandas as pd

    if isinstance(how, str) or any(name not in IDEAS for name in how):
        raise ValueError(f"how={how!r}: a list of {', '.join(IDEAS)}")
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: 2 or more")
    rows = []
    with open_lab(model, tiers=(16, *bits), measure_kl=False, progress=progress) as lab:
        ids = [read(lab, text, max_tokens) for text in texts_of(lab, texts)]
        full, shape = _logits(lab, ids, 16), lab._shape
        layout, weights = lab._store.layout, _weights(lab)
        for tier in bits:
            nbytes = shape.n * payload_bytes(layout, tier)
            rows.append(("plain", tier, nbytes, _kl(full, _logits(lab, ids, tier))))
        layer = lab._engine.adapter.layers[0]
    size = Size(layer.num_experts, layer.inner, 3 * layer.hidden, layer.top_k)
    budgets = [(tier, 8 * nbytes / weights) for _, tier, nbytes, _ in rows]
    for name, (tier, each) in itertools.product(how, budgets):
        idea = IDEAS[name].at_bits(each, size)
        if idea is None:
            continue
        text = None if name == "resmoe" else sample
        with tempfile.TemporaryDirectory() as folder:
            to, own = Path(folder), vars(idea)
            made = transform(model, name, to / "made", texts=text, progress=progress, **own)
            store = pack(made, to / "store", tiers=(16,), progress=progress)
            with open_lab(store, measure_kl=False, progress=progress) as other:
                kl = _kl(full, _logits(other, ids, 16))
        rows.append((name, tier, shape.layers * idea.needed_bytes(size), kl))
    table = pd.DataFrame(rows, columns=["how", "tier", "bytes", "kl"])
    table.insert(2, "bits_per_weight", (8 * table["bytes"] / weights).round(3))
    return table.sort_values("tier", ascending=False, kind="stable", ignore_index=True)


def _weights(lab: Lab) -> int:
    """Weights of all experts."""
    return lab._shape.n * sum(int(np.prod(shape)) for _, shape in lab._store.layout.tensors)


def _logits(lab: Lab, ids: Sequence[Ids], bits: int) -> list[torch.Tensor]:
    """Logits ``[T, V]`` of each text with every expert at one tier."""
    with lab._session.claimed() as engine, engine.full_precision(lambda _: bits):
        return [Stream(engine, one.source).forward(one, keep=len(one)) for one in ids]


def _kl(full: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    pairs = zip(full, other, strict=True)
    return float(torch.cat([kl_divergence(a, b) for a, b in pairs]).mean())
