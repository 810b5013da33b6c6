"""Is it the policy or the memory? What any budget could hit of a recorded stream.

LRU's hits at every budget come from one pass: a request hits in a cache of c experts where fewer
than c others were asked for since it was last (R. L. Mattson and others, "Evaluation techniques for
storage hierarchies", 1970). The best eviction is Belady's. Both load on demand, know one size of
expert and one cache for all layers. A scheduler also keeps a layer's experts while that layer
computes, so its LRU may differ by a request in some hundred.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.replays.bounds import RECENT, belady_hits, reuse_distances, working_set
from moelab.replays.replay import Replay, replay
from moelab.runs.prediction import trace_of
from moelab.scheduling.budget import size
from moelab.scheduling.events import HIT, LOAD, SUBSTITUTE
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.trace import Trace
from moelab.settings import is_whole
from moelab.spelling import named, spelled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from moelab.runs.run import Run

MOST_OF = 0.9
NEAR = 0.02
"""Of all requests: less than this is not worth another policy, or more memory."""
POINTS = 12


@dataclass(frozen=True, repr=False, eq=False)
class PolicyOrMemory:
    """What a stream lets a budget hit; hit ratios are of the decoded tokens' requests.

    Attributes
    ----------
    policy, now
        The strategy that decided, and its hit ratio.
    experts, expert_bytes
        How many experts the budget holds, and the size of one.
    best, all
        With the best eviction at this budget; with every expert in memory once it was loaded.
    cliff
        Fewest experts with which LRU hits any that has weights; None where nothing is asked for
        twice.
    enough
        Fewest experts with which LRU hits nine tenths of ``best``.
    lru
        LRU's hit ratio by number of experts, from 0 on (experts without weights are hits there),
        float ``[E + 1]``.
    belady
        Experts -> hit ratio of the best eviction, at some budgets.
    working_set
        Experts that the last 16 tokens asked for, int64 ``[T]``.
    own
        What the strategy itself found, where it does more than evict; ``now`` is LRU's then.
    """

    policy: str
    now: float
    experts: int
    expert_bytes: int
    best: float
    all: float
    cliff: int | None
    enough: int | None
    lru: np.ndarray
    belady: dict[int, float]
    working_set: np.ndarray
    own: str = ""

    @property
    def verdict(self) -> str:
        """``"policy"``, ``"memory"``, or ``"neither"``: which of the two has more to give."""
        by_policy, by_memory = self.best - self.now, self.all - self.best
        if max(by_policy, by_memory) < NEAR:
            return "neither"
        return "policy" if by_policy > by_memory else "memory"

    def sentence(self) -> str:
        """The verdict and the figures it stands on."""
        begin = {"policy": "The policy", "memory": "The memory", "neither": "Neither"}[self.verdict]
        said = (
            f"{begin}: with room for {self._room(self.experts)} {self.policy} hits {self.now:.0%} "
            f"of the requests, the best possible eviction {self.best:.0%}, and with room for all "
            f"{self.all:.0%} would hit (the others are first uses)."
        )
        said += f" ({self.own}.)" if self.own else ""
        if self.cliff is None:
            return f"{said} No expert is asked for twice."
        nothing = "nothing but experts of 0 bytes" if self.lru[0] else "nothing"
        if not self.enough:  # there is nothing to reach
            return f"{said} LRU hits {nothing} below {self._room(self.cliff)}."
        return (
            f"{said} LRU hits {nothing} below {self._room(self.cliff)}, and nine tenths of the "
            f"best from {self._room(self.enough)} on; the last {RECENT} tokens ask for "
            f"{int(np.median(self.working_set))} experts."
        )

    def _room(self, experts: int) -> str:
        return f"{experts} experts ({size(experts * self.expert_bytes)})"

    def figure(self) -> go.Figure:
        """Hit ratio over memory: LRU's at every budget, the best eviction's, and now."""
        from moelab.views.charts import curve

        title = "<br>".join(textwrap.wrap(self.sentence(), 100))
        figure = curve(
            self.points(), "experts", "hit ratio", color="eviction", title=title, mark=self.marks()
        )
        above = {"y": 1, "yanchor": "top", "pad_t": 10, "font_size": 13}
        return figure.update_layout(title=above, margin_t=120)

    def points(self) -> pd.DataFrame:
        """What `figure` draws: ``experts``, ``hit ratio``, ``eviction``."""
        import pandas as pd

        at = np.unique(np.linspace(0, len(self.lru) - 1, 400).astype(int))
        drawn = [(int(x), float(self.lru[x]), "LRU") for x in at]
        drawn += [(x, y, "best eviction (Belady)") for x, y in self.belady.items()]
        drawn.append((self.experts, self.now, f"{self.policy}, now"))
        return pd.DataFrame(drawn, columns=["experts", "hit ratio", "eviction"])

    def marks(self) -> list[Any]:
        """Upright lines of `figure`."""
        cliff = [(self.cliff, "LRU's cliff")] if self.cliff is not None else []
        return [(self.experts, "budget"), *cliff]

    def __repr__(self) -> str:
        return self.sentence()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        try:
            drawn = self.figure()._repr_mimebundle_(include, exclude)
        except ImportError:  # no plotly here: the sentence alone
            drawn = {}
        return {**drawn, "text/plain": self.sentence()}


def policy_or_memory(of: Run | Trace, *, experts: int | None = None) -> PolicyOrMemory:
    """Say whether another eviction or more memory would help a recorded stream.

    Parameters
    ----------
    of
        A run, or a trace.
    experts
        Room in experts instead of the budget that is recorded; what is hit now is LRU's then.

    Raises
    ------
    ValueError
        Nothing was decoded, or the settings changed on the way and ``experts`` is not given.

    Examples
    --------
    >>> moelab.policy_or_memory(run).verdict  # doctest: +SKIP
    'memory'
    """
    trace = trace_of(of)
    distances = reuse_distances(trace)
    if not len(distances):
        raise ValueError("nothing was decoded in this trace; record a run of some tokens")
    policy, now, own, nbytes = "LRU", None, "", trace.shape.nbytes
    expert_bytes = nbytes[max(nbytes)]
    if experts is None:
        if len(trace.changes) != 1:
            raise ValueError(
                f"this trace records {len(trace.changes)} settings; say how much memory is meant, "
                "experts="
            )
        (change,) = trace.changes
        expert_bytes = nbytes[change.knobs.bits]
        experts, policy = change.knobs.budget_bytes // expert_bytes, spelled(change.name)
        played = replay(trace, strategies=named())
        # Belady binds who evicts, at one size and on demand; whoever does more is named beside it.
        if change.strategy is None or _evicts_only(played, change.strategy, change.knobs.bits):
            now = played.hit_ratio
        else:
            own, policy = f"{policy} found {played.hit_ratio:.0%}, and does more than evict", "LRU"
    if not is_whole(experts, 1):
        raise ValueError(f"experts={experts!r}: room for at least one")
    whole = sum(trace.shape.experts)
    hits = np.bincount(np.minimum(distances, whole + 1), minlength=whole + 2)[: whole + 1].cumsum()
    lru = hits / len(distances)
    some = {*np.linspace(1, whole, POINTS).astype(int).tolist(), min(experts, whole)}
    belady = {room: belady_hits(trace, room)[0] / len(distances) for room in sorted(some)}
    best, reached = belady[min(experts, whole)], np.flatnonzero(hits > hits[0])
    enough = np.flatnonzero(lru >= MOST_OF * best)
    return PolicyOrMemory(
        policy,
        float(lru[min(experts, whole)]) if now is None else now,
        experts,
        expert_bytes,
        best,
        float(lru[-1]),
        int(reached[0]) if len(reached) else None,
        int(enough[0]) if len(reached) and len(enough) else None,
        lru,
        belady,
        working_set(trace),
        own,
    )


def _evicts_only(played: Replay, strategy: Strategy, bits: int) -> bool:
    """Whether hits are due to eviction alone: one size, on demand, the router's own choice."""
    served = {row[4] for row in played.rows if row[0] in (HIT, LOAD, SUBSTITUTE)} - {0}
    more = played.counts["prefetch"] or played.counts["skip"] or played.counts["substitute"]
    one = played.shape.own.get(bits) is None and served <= {bits}
    return one and not more and not strategy.steers
