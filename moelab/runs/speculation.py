"""What drafting was worth in a run: accepted and rejected tokens, their bytes, and whether it paid.

A pass over a drafted chain loads the union of its tokens' experts. What only rejected tokens asked
for was read for nothing, unless it is still there when it is next asked for. Tokens that follow one
another share experts, which a cache knows how to use as well: a draft is fairly held against a run
without one whose budget is larger by ``draft_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.engine.speculation import LONGEST, why_not
from moelab.replays.replay import goes_by_weight
from moelab.scheduling import events as e
from moelab.scheduling.parts import Route
from moelab.scheduling.strategy import Strategy
from moelab.settings import is_whole

if TYPE_CHECKING:
    import pandas as pd

    from moelab.engine.engine import Engine
    from moelab.engine.generation import Sampling
    from moelab.engine.speculation import Pass
    from moelab.runs.run import Run
    from moelab.settings import Settings


@dataclass(frozen=True)
class Speculation:
    """The verified passes of a run. Made by ``run.speculation``, not by hand.

    Attributes
    ----------
    draft_bits, draft_bytes
        The draft's tier, and the memory of all its experts, beside the budget.
    passes
        A row for each pass: ``token`` (the first it made; its events are noted there), ``drafted``,
        ``accepted``, ``kept`` (the accepted and the verifier's own next token), ``draft_ms``,
        ``verify_ms`` (waiting included), ``bytes`` read from the device, ``rejected_loads`` and
        ``rejected_bytes`` (loads on demand of experts that only rejected tokens asked for).
    """

    draft_bits: int
    draft_bytes: int
    passes: pd.DataFrame

    @property
    def drafted(self) -> int:
        """Tokens that the draft wrote."""
        return int(self._sum("drafted"))

    @property
    def accepted(self) -> int:
        """Drafted tokens that the verifier would have written too."""
        return int(self._sum("accepted"))

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted tokens; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens that a pass yields; None where there was none."""
        return self._sum("kept") / len(self.passes) if len(self.passes) else None

    @property
    def ms_per_pass(self) -> float | None:
        """Drafting and verifying one chain; None where there was none."""
        spent = self._sum("draft_ms") + self._sum("verify_ms")
        return spent / len(self.passes) if len(self.passes) else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read for each token kept, the prompt's apart; None where there is none."""
        return self._sum("bytes") / self._sum("kept") if len(self.passes) else None

    @property
    def rejected_bytes(self) -> int:
        """Bytes read on demand that only rejected tokens asked for."""
        return int(self._sum("rejected_bytes"))

    def _sum(self, name: str) -> float:
        return float(self.passes[name].to_numpy().sum())

    def break_even(self, plain_ms: float) -> float | None:
        """Tokens that a pass has to yield to be as fast as ``plain_ms`` a token without a draft.

        It paid where `tokens_per_pass` is more.
        """
        if plain_ms <= 0:
            raise ValueError(f"plain_ms={plain_ms}: the milliseconds of a token, above 0")
        return None if self.ms_per_pass is None else self.ms_per_pass / plain_ms

    def summary(self) -> dict[str, Any]:
        """All of it in figures."""
        names = ("draft_bits", "draft_bytes", "drafted", "accepted", "acceptance")
        names += ("tokens_per_pass", "ms_per_pass", "bytes_per_token", "rejected_bytes")
        return {"passes": len(self.passes)} | {name: getattr(self, name) for name in names}


def speculation(run: Run, made: list[Pass], bits: int) -> Speculation:
    """The account of a run's passes, folded from its trace and its event log."""
    import pandas as pd

    log, shape = run.log.records(), run.trace.shape
    rows = []
    # A pass is made before its tokens are measured and noted: one under way is not of it yet.
    for one in [m for m in list(made) if m.token + m.kept <= len(run.tokens)]:
        low, high = np.searchsorted(log["token"], (one.token, one.token + one.kept))
        here = log[low:high]
        here = here[here["at"] >= 0]
        read = np.isin(here["kind"], (e.LOAD, e.PREFETCH))
        first = run.passes(one.token + 1) - 1
        steps = run.trace.steps[shape.steps_of(first) : shape.steps_of(first + 1)]
        kept = {(s.layer, x) for s in steps for row in s.experts[: one.kept] for x in row}
        loads = here[here["kind"] == e.LOAD]
        places = zip(loads["layer"].tolist(), loads["expert"].tolist(), strict=True)
        lost = loads["bytes"][np.array([place not in kept for place in places], bool)]
        own = (one.token, one.drafted, one.accepted, one.kept, one.draft_ms, one.verify_ms)
        rows.append((*own, int(here["bytes"][read].sum()), len(lost), int(lost.sum())))
    names = ("token", "drafted", "accepted", "kept", "draft_ms", "verify_ms")
    names += ("bytes", "rejected_loads", "rejected_bytes")
    return Speculation(bits, shape.all_bytes(bits), pd.DataFrame(rows, columns=list(names)))


def check(
    engine: Engine, settings: Settings, sampling: Sampling, bits: int | None, length: int
) -> None:
    """Refuse a draft that cannot be, or whose text would not be greedy decoding's own.

    Raises
    ------
    ValueError
        The message says what to do instead.
    """
    if bits is None:
        return
    if bits not in engine.shape.nbytes:
        tiers = ", ".join(str(tier) for tier in sorted(engine.shape.nbytes))
        raise ValueError(f"draft_bits={bits!r}: one of the store's tiers, {tiers}")
    if not is_whole(length, 1, LONGEST):
        raise ValueError(f"draft_length={length!r}: a whole number from 1 to {LONGEST}")
    if sampling.temperature:
        raise ValueError(
            f"a draft is verified against greedy decoding, and temperature={sampling.temperature}; "
            "pass temperature=0"
        )
    engine.store.require_weights(f"draft_bits={bits}")
    if reason := why_not(engine):
        raise ValueError(f"this model cannot verify a draft: {reason}")
    check_strategy(settings.strategy)


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which what is computed depends on what is in memory."""
    stands_in = type(strategy.route).stand_in is not Route.stand_in
    if strategy.steers or stands_in:
        raise ValueError(
            f"a draft is verified where routing is the router's own; {strategy.full_name} has "
            f"route={strategy.route.title!r}"
        )
    if goes_by_weight(strategy):
        raise ValueError(
            f"a draft is verified where experts are served at the bits asked for; precision="
            f"{strategy.precision.title!r} of {strategy.full_name} goes by gate weights: "
            "low_bits=None switches that off, where it has that"
        )
