"""What moelab does around a router: look ahead with it, and hide experts from it.

`RouterTap` stands in for the router's `forward`: it remembers the input, so that the routers of
later layers can be asked with it (the gate look-ahead of HOBBIT and others), and it steers the
router where a mask (SwapMoE) or a preference (cache-prior routing) is set. Masks work inside the
router, on the logits and on the top-k inputs, and therefore before softmax, sigmoid or
normalisation, in whatever order a family has them. What it does not know: routers that choose by a
table of token ids ignore both, and routers that choose without top-k ignore preferences.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from moelab.models.families import Choice, MoELayer

# Finite: sparsemixer (PhiMoE) divides by the logits; exp and sigmoid of it are 0; float16 holds it.
HIDDEN = -1e4
TINY = 1e-30
CLOSED = HIDDEN / 2  # allowed, but in a group that group-limited routing has closed


class SteeredRouting(TorchFunctionMode):
    """While active, linear outputs and top-k inputs over all experts show only the allowed ones.

    A bias moves experts in the ranking: it is added to the log-scores in units of the token's own
    spread (largest - smallest over the allowed experts), and the values that top-k returns are
    the scores as they were, so gate weights are not touched (cache-prior routing, arXiv
    2412.00099, where the unit is a running mean of that spread).

    Group-limited routing (DeepSeek) first picks groups, then experts inside them: groups are ranked
    by their allowed experts, and an allowed expert of a closed group still comes before any hidden
    one. So no hidden expert is chosen as long as top-k experts are allowed.

    Parameters
    ----------
    mask
        Bool [E], the allowed experts.
    bias
        Float [E], or None.
    classes
        What the router chooses from: E, or more where a family has classes for "no expert".
    """

    def __init__(self, mask: torch.Tensor, bias: torch.Tensor | None, classes: int) -> None:
        super().__init__()
        self.mask, self.bias, self._count = mask, bias, classes
        self._hidden = ~F.pad(mask, (0, classes - len(mask)), value=True)
        self._masked = not bool(mask.all())
        self._bias = None if bias is None else F.pad(bias, (0, classes - len(bias)))

    def __torch_function__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run one torch function, with hidden experts where it sees all experts."""
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            scores = self._hide(args[0]) if self._masked else args[0]
            if self._bias is not None and scores.shape[-1] == self._count:
                return self._preferred(func, scores, *args[1:], **kwargs)
            args = (scores, *args[1:])
        result = func(*args, **kwargs)
        if self._masked and func is F.linear and result.shape[-1] == self._count:
            return result.masked_fill(self._hidden, HIDDEN)
        return result

    def _preferred(self, func: Callable, scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Top-k of the biased ranking, with the scores as they were."""
        shown = scores.masked_fill(self._hidden, torch.nan)
        positive = bool((scores >= 0).masked_fill(self._hidden, True).all())  # not logits
        place = shown.clamp_min(TINY).log() if positive else shown
        low = place.nan_to_num(torch.inf).amin(-1, keepdim=True)
        high = place.nan_to_num(-torch.inf).amax(-1, keepdim=True)
        assert self._bias is not None
        place = (place + self._bias * (high - low)).nan_to_num(-torch.inf, neginf=-torch.inf)
        chosen = func(place, *args, **kwargs).indices
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))

    def _hide(self, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[-1] == self._count:
            scores = scores.masked_fill(scores == -torch.inf, CLOSED)
            return scores.masked_fill(self._hidden, HIDDEN)
        if scores.ndim > 2 and scores.shape[-1] * scores.shape[-2] == self._count:  # by group
            return scores.masked_fill(self._hidden.view(scores.shape[-2:]), HIDDEN)
        return scores


class RouterTap:
    """Stands in for one router's `forward` until `remove` is called.

    Attributes
    ----------
    layer
        The layer whose router this is.
    steering
        The mask and the bias in force, or None.
    """

    def __init__(self, layer: MoELayer, *, seen: Callable[["RouterTap"], None]) -> None:
        self.layer = layer
        self.hidden: torch.Tensor | None = None  # the router's last input; dropped by `forget`
        self._seen = seen
        self._forward = layer.router.forward
        self._extra: tuple[tuple, dict] | None = None
        self.steering: tuple[tuple | None, tuple | None] = (None, None)
        self._mode: SteeredRouting | None = None  # kept until it is steered otherwise
        self._classes = 0
        self._own = {id(t) for t in (*layer.block.parameters(False), *layer.block.buffers(False))}
        if len(inspect.signature(self._forward).parameters) == 1:
            self._extra = ((), {})
        layer.router.forward = self

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The router's own forward, under mask and bias."""
        self.hidden, self._extra = hidden, (args, kwargs)
        self._seen(self)
        return self._ask(hidden, args, kwargs, steered=True)

    @torch.no_grad()
    def predict(self, asked_by: "RouterTap") -> Choice | None:
        """What this router chooses on the input of an earlier layer's router.

        None where the router needs more than its input and has not run yet, or where that is not
        known to transfer between layers.
        """
        extra = self._extra
        if extra is None or not self._is_constant(extra):
            same = type(self.layer.router) is type(asked_by.layer.router)
            extra = asked_by._extra if same else None
        if extra is None or asked_by.hidden is None:
            return None
        return self.layer.choice(self._ask(asked_by.hidden, *extra, steered=True))

    @torch.no_grad()
    def unmasked(self) -> Choice | None:
        """What the router would choose on its last input by itself."""
        if self.hidden is None or self._extra is None:
            return None
        return self.layer.choice(self._ask(self.hidden, *self._extra, steered=False))

    @torch.no_grad()
    def probabilities(self) -> torch.Tensor | None:
        """Those of all experts on the last input, unmasked ``[E]``: the mean over its tokens.

        Where a router gives logits, their softmax: also in families that choose by sigmoid.
        """
        if self.hidden is None or self._extra is None:
            return None
        said = self.layer.logits(self._ask(self.hidden, *self._extra, steered=False))
        experts = self.layer.num_experts
        if said is None:
            return None
        rows = said.reshape(-1, said.shape[-1]).float()
        sums = rows.sum(-1)
        given = bool((rows >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        return (rows if given else rows.softmax(-1))[:, :experts].mean(0)

    def forget(self) -> None:
        """Let go of the last input: a prefill's hidden states are megabytes per layer."""
        self.hidden = None

    def remove(self) -> None:
        """Give the router its own forward back."""
        vars(self.layer.router).pop("forward", None)

    def steer(self, mask: tuple | None, bias: tuple | None) -> None:
        """Put a mask (bool [E]) and a bias (float [E]) in force, from the next call on."""
        self.steering, self._mode = (mask, bias), None

    @property
    def steered(self) -> bool:
        """Whether a mask or a bias applies."""
        return self.steering != (None, None)

    def _ask(self, hidden: torch.Tensor, args: tuple, kwargs: dict, *, steered: bool) -> Any:
        if not (steered and self.steered):
            return self._forward(hidden, *args, **kwargs)
        if self._mode is None:
            if not self._classes:
                self._classes = self._count_classes(self._forward(hidden, *args, **kwargs))
            mask, bias = self.steering
            self._mode = SteeredRouting(
                torch.tensor(mask or [True] * self.layer.num_experts, dtype=torch.bool),
                None if bias is None else torch.tensor(bias, dtype=torch.float32),
                self._classes,
            )
        with self._mode:
            return self._forward(hidden, *args, **kwargs)

    def _count_classes(self, output: Any) -> int:
        """What the router chooses from: the experts, and in some families "no expert" besides."""
        logits = output[0] if isinstance(output, (tuple, list)) else output
        experts = self.layer.num_experts
        more = isinstance(logits, torch.Tensor) and experts < logits.shape[-1] <= 2 * experts
        return logits.shape[-1] if more else experts

    def _is_constant(self, extra: tuple[tuple, dict]) -> bool:
        """Whether the further arguments are the block's own, the same for every token."""
        tensors = [v for v in (*extra[0], *extra[1].values()) if isinstance(v, torch.Tensor)]
        return all(id(t) in self._own for t in tensors)
