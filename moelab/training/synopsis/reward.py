"""What a synopsis is worth, learnt from those the model writes itself.

Cross-entropy makes likely what Debian wrote, word by word; the likeliest synopsis need not be the
one that has most in common with what somebody might have written.  So the last part of the training
draws some from the model and makes those likelier that have more in common with Debian's than the
others of the same description: REINFORCE, each draw against the mean of its description's draws
(Kool et al. 2019), in units of the draws' mean spread.  Paulus et al. (2017, arXiv 1705.04304)
trained summaries by Rouge like this, against the greedy one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelab.runs.rouge import f_measures

LONGEST = 32
"""Tokens of a drawn synopsis; a longer one stays without its end."""
Decode = Callable[[list[list[int]]], list[str]]


class Rewarded(NamedTuple):
    """What `rewarded` returns; `total.backward()` makes the gradients."""

    worth: Tensor  # [B, draws]
    total: Tensor

    def told(self) -> dict[str, float]:
        """Its figures, as the curve names them."""
        return {"worth": float(self.worth.mean())}


def worth(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """Rouge-2 plus half of Rouge-L ``[texts]``: these tell apart those without a right pair too."""
    found = f_measures(texts, references, ("rouge2", "rougeL"))
    return torch.from_numpy(found[:, 0] + found[:, 1] / 2)


def rewarded(
    model: Any, source: Tensor, references: Sequence[str], decode: Decode, draws: int
) -> Rewarded:
    """Loss by which summaries of the sources [B, S] that are worth more become likelier.

    ``references``: one of each source. ``decode`` turns token ids into texts without their ends.
    ``draws``: two or more, each is held against the others. The model is left in `eval`.
    """
    model.eval()
    end, padding = model.config.eos_token_id, model.config.pad_token_id
    mask = (source != padding).long()
    with torch.no_grad():
        written = model.generate(
            source,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=draws,
            max_new_tokens=LONGEST,
        )[:, 1:]
    torch.clear_autocast_cache()  # older torch keeps what was cast without gradients
    texts = decode(written.tolist())
    each = worth(texts, [text for text in references for _ in range(draws)]).view(-1, draws)
    spread = each.std(1, keepdim=True).mean() + 1e-6
    better = ((each - each.mean(1, keepdim=True)) / spread).float()
    after = (written == end).cumsum(1) - (written == end).long()  # behind the first end
    target = torch.where(after == 0, written, -100)
    encoded = model.encoder(input_ids=source, attention_mask=mask)
    encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(draws, 0)
    said = model(
        encoder_outputs=encoded, attention_mask=mask.repeat_interleave(draws, 0), labels=target
    )
    cost = F.cross_entropy(said.logits.float().flatten(0, 1), target.flatten(), reduction="none")
    weights = better.view(-1, 1).expand_as(target).flatten()
    return Rewarded(each, (weights * cost).sum() / (target >= 0).sum())
