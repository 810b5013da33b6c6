"""The first values of a model that is to copy: what it would take long to learn, it begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from moelab.training.synopsis.train import Recipe


@torch.no_grad()
def begin_to_copy(model: Any, recipe: Recipe) -> None:
    """First values with which the decoder can say what follows in the source after its last tokens.

    A summary repeats its source; from random values the model had not learnt to after two epochs.
    Heads begin by reading one near token (its relative position has a bias of ``spike``): three of
    the encoder's the next one, one the token before, one the one before that, and two of the
    decoder's the same as these. Each cross attention begins by looking for the decoder's own tokens
    (its query is ``match`` times its key), and three of its heads write back what the first layer's
    three have read. These are ``loud`` times as strong as drawn and all other outputs ``quiet``
    times, so that layers add little to them at first.
    """
    spike, match, loud, quiet = recipe.spike, recipe.match, recipe.loud, recipe.quiet
    if recipe.heads < 5:
        raise ValueError(f"heads={recipe.heads}: 5 or more, so many begin by reading a near token")
    model.decoder.final_layer_norm.weight.fill_(1.5)
    for name, weight in model.named_parameters():
        if name.split(".")[-2] in ("o", "wo"):
            weight.mul_(quiet)
    read, written = (
        part.block[0].layer[0].SelfAttention for part in (model.encoder, model.decoder)
    )
    width = read.key_value_proj_dim
    ahead, back = slice(3 * width), slice(3 * width, 5 * width)
    read.o.weight[:, ahead] *= loud / quiet
    read.o.weight[:, back] /= quiet
    read.v.weight[back] *= loud
    written.v.weight[back] = read.v.weight[back]
    written.o.weight[:, back] = read.o.weight[:, back]
    far = {"num_buckets": read.relative_attention_num_buckets, "max_distance": 128}
    for head, step in enumerate((1, 1, 1, -1, -2)):
        for of, both in ((read, True), (written, False)):
            if both or step < 0:
                bucket = read._relative_position_bucket(torch.tensor([[step]]), both, **far)
                of.relative_attention_bias.weight[int(bucket), head] = spike
    for block in model.decoder.block:
        cross = block.layer[1].EncDecAttention
        cross.q.weight.copy_(match * cross.k.weight)
        cross.v.weight[ahead] = read.o.weight[:, ahead].T / loud
        cross.o.weight[:, ahead] = read.v.weight[ahead].T
