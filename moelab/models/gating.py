"""What an expert does between its two products, in one formula that the kernels know.

    gated      g * sigmoid(alpha * (g + beta * g**3)) * (u + plus),
               g = min(gate, limit), u = clip(up, -limit, limit)
    ungated    max(h, 0) ** power

SwiGLU is alpha 1; the GELU that is computed by tanh is one with a beta; gpt-oss, MiniMax M3 and
DeepSeek V4 have limits, the first two a plus. A family is not looked up by its name: its own code
is asked for random numbers, and a rule stands only where it gives the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ASKED = 64, 256
"""Tokens, and values of each, that a family's own code is asked for."""
LARGEST = 12.0
"""Their standard deviation, or three times the module's own limit: it is passed often."""


class Rule(NamedTuple):
    """Constants of the formula.

    ``power`` is 0 where there is a gate; ``interleaved``: gate and value of one inner place are
    neighbours, else all gates come before all values.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    plus: float = 0.0
    power: int = 0
    interleaved: bool = False

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """``h [T, 2I]``, or ``[T, I]`` without a gate, as what goes into the second product."""
        if self.power:
            return h.relu() ** self.power
        two = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        gate, up = two[0].clamp(max=self.limit), two[1].clamp(-self.limit, self.limit)
        if self[:2] == (1.0, 0.0):
            return F.silu(gate) * (up + self.plus)
        slope = gate + self.beta * gate**3 if self.beta else gate  # 0 * inf is none
        return gate * torch.sigmoid(self.alpha * slope) * (up + self.plus)


SWIGLU = Rule()
GELU = Rule(2 * math.sqrt(2 / math.pi), 0.044715)


def rule_of_all(modules: Iterable[Any]) -> Rule | None:
    """The one rule of some experts modules; None where they differ or have none."""
    found = {rule_of(module) for module in modules}
    return found.pop() if len(found) == 1 else None


def rule_of(module: Any) -> Rule | None:
    """The rule of an experts module; None where its own code is none of these."""
    tokens, width = ASKED
    spread = max([LARGEST, *(3 * limit for limit in _limits(module))])
    h = spread * torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    try:
        theirs = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return None
    return next((r for r in _candidates(module) if _same(r(h), theirs)), None)


def _candidates(module: Any) -> list[Rule]:
    """The plainest first."""
    if not module.has_gate:
        return [Rule(power=1), Rule(power=2)]
    alphas = _numbers(module, "alpha", "swiglu_alpha")
    curves = [(1.0, 0.0), GELU[:2], *((alpha, 0.0) for alpha in alphas)]
    ends = [math.inf, *_limits(module)]
    every = itertools.product(curves, ends, (0.0, 1.0), (False, True))
    return [Rule(*curve, end, plus, 0, two) for curve, end, plus, two in every]


def _limits(module: Any) -> list[float]:
    return _numbers(module, "limit", "swiglu_limit")


def _numbers(module: Any, *names: str) -> list[float]:
    """The module's attributes of these names that are numbers."""
    found = [getattr(module, name, None) for name in names]
    return [float(n) for n in found if isinstance(n, (int, float)) and not isinstance(n, bool)]


def _same(ours: torch.Tensor, theirs: Any) -> bool:
    alike = isinstance(theirs, torch.Tensor) and theirs.shape == ours.shape
    return alike and theirs.device == ours.device and torch.allclose(ours, theirs, 1e-5, 1e-5)
