"""What drafting was worth in a run: accepted and rejected tokens, their bytes, and whether it paid.

A pass over a drafted chain loads the union of its tokens' experts. What only rejected tokens asked
for was read for nothing, unless it is still there when it is next asked for. Tokens that follow one
another share experts, which a cache knows how to use as well: a draft is fairly held against a run
without one whose budget is larger by ``draft_bytes``. By that rule a chain reads more on the demo
at every budget (`moelab.bench.drafts`), so the paper's tree, which reads more a pass, is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.engine.speculation import AUTO, LONGEST, Length, Lengths, why_not
from moelab.replays.replay import goes_by_weight
from moelab.runs.passes import for_rejected
from moelab.scheduling import events as e
from moelab.scheduling.parts import Route
from moelab.scheduling.strategy import Strategy
from moelab.settings import as_tier, as_written, is_whole

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
    def kept(self) -> int:
        """Tokens of the passes: the accepted and the verifier's own."""
        return int(self._sum("kept"))

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
    def draft_ms(self) -> float | None:
        """Drafting, for each token kept; None where there is none."""
        return self._sum("draft_ms") / self._sum("kept") if len(self.passes) else None

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

    log, rows = run.log.records(), []
    own = ("token", "drafted", "accepted", "kept", "draft_ms", "verify_ms")
    for one in complete(made, len(run.tokens)):
        here = log[slice(*np.searchsorted(log["token"], (one.token, one.token + one.kept)))]
        here = here[here["at"] >= 0]
        read = here["bytes"][np.isin(here["kind"], (e.LOAD, e.PREFETCH))].sum()
        lost = for_rejected(here, kept(run, one))
        rows.append((*(getattr(one, name) for name in own), int(read), *lost))
    names = (*own, "bytes", "rejected_loads", "rejected_bytes")
    return Speculation(bits, run.trace.shape.all_bytes(bits), pd.DataFrame(rows, columns=names))


def complete(made: Sequence[Pass], tokens: int) -> list[Pass]:
    """The passes all of whose tokens are noted: one is made before its tokens are measured."""
    return [one for one in list(made) if one.token + one.kept <= tokens]


def kept(run: Run, one: Pass) -> set[tuple[int, int]]:
    """(layer, expert) of all that the tokens kept of a pass chose."""
    shape, first = run.trace.shape, run.passes(one.token + 1) - 1
    steps = run.trace.steps[shape.steps_of(first) : shape.steps_of(first + 1)]
    return {(s.layer, x) for s in steps for row in s.experts[: one.kept] for x in row}


# -- what is asked for ----------------------------------------------------------------------------


def drafts(engine: Engine) -> tuple[int, ...]:
    """Tiers below the best that may draft for this model; none where it cannot verify."""
    try:
        engine.store.require_weights("a draft")
    except ValueError:
        return ()
    return () if why_not(engine) else tuple(sorted(engine.shape.nbytes)[:-1])


def check(
    engine: Engine,
    settings: Settings,
    sampling: Sampling,
    written: int | str | None,
    length: Lengths,
) -> tuple[int | None, Lengths]:
    """The draft's tier and length; refused is one whose text would not be greedy decoding's own.

    Raises
    ------
    ValueError
        The message says what to do instead.
    """
    if (bits := as_tier(written)) is None:
        return None, length
    if bits not in engine.shape.nbytes:
        tiers = ", ".join(repr(as_written(tier)) for tier in sorted(engine.shape.nbytes))
        raise ValueError(f"draft_bits={written!r}: one of the store's tiers, {tiers}")
    for token, one in lengths(length).items():
        if not is_whole(token, 0):
            raise ValueError(f"draft_length={{{token!r}: ...}}: a key is a token's number from 0")
        check_length(one)
    if sampling.temperature:
        raise ValueError(
            f"a draft is verified against greedy decoding, and temperature={sampling.temperature}; "
            "pass temperature=0"
        )
    engine.store.require_weights(f"draft_bits={written!r}")
    if reason := why_not(engine):
        raise ValueError(f"this model cannot verify a draft: {reason}")
    check_strategy(settings.strategy)
    return bits, length


def check_length(length: Length) -> Length:
    """Refuse what is no length of a draft."""
    if length != AUTO and not is_whole(length, 0, LONGEST):
        words = f"a whole number from 0 to {LONGEST}, or {AUTO!r}"
        raise ValueError(f"draft_length={length!r}: {words}")
    return length


def lengths(given: Lengths) -> dict[int, Length]:
    """Token -> length of the drafts from there on."""
    return {0: 0, **given} if isinstance(given, Mapping) else {0: given}


def paced(run: Run, due: dict[int, Length]) -> Length:
    """The draft's length for the run's next pass; what is ``due`` by now is obeyed and noted."""
    if run.request.draft_bits is None:
        due.clear()
        return 0
    token, noted = len(run.tokens), run.draft_lengths
    for at in sorted(at for at in due if at <= token):
        run.draft_length = due.pop(at)
    length = run.draft_length
    if not noted or noted[-1][1] != length:
        if noted:
            run.changes.append((token, {"draft_length": str(length)}))
        noted.append((token, length))
    return length


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
