"""The challenges themselves: what is fixed, what is limited, what wins.

The scoring process reads them from here by name; a `Task` that was edited elsewhere changes
nothing. Both limits are on measured figures: bytes of resident experts at their peak, and KL
against full precision, the worse of two: on held-out texts, and on the text the entry wrote in the
very runs that are timed (a policy that behaves only while it is examined gains nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

MB = 10**6
FIXED = ("device", "seed", "measure_kl", "budget_bytes")
"""Settings that are not the entry's to choose."""


@dataclass(frozen=True, slots=True)
class Task:
    """One challenge.

    Attributes
    ----------
    name, question, hint
        For people.
    goal, best
        The figure that ranks, and whether the ``"most"`` or the ``"fewest"`` of it wins.
    unit, scale
        How the goal is shown: the figure divided by ``scale``, then ``unit``.
    peak_bytes, kl
        Limits: bytes of resident experts at any moment, and mean KL in nats a token.
    device, seed
        Emulated, the same for everybody; of sampling, with the model's own settings.
    prompts, tokens
        Runs, each of another domain, and tokens of each; medians of these are the figures.
    texts, scored
        Held-out texts (at most), and tokens of each.
    """

    name: str
    question: str
    hint: str
    goal: str
    best: str
    unit: str
    scale: float
    peak_bytes: int
    kl: float
    device: str = "sd_card"
    prompts: int = 3
    tokens: int = 32
    texts: int = 6
    scored: int = 40
    seed: int = 0

    def quick(self) -> Task:
        """The same in a few seconds: it shows that an entry works and never ranks."""
        return replace(self, prompts=1, tokens=6, texts=2, scored=8)

    @property
    def limits(self) -> str:
        """Both limits and the device, as a sentence."""
        return (
            f"Limits: {self.peak_bytes / MB:g} MB of experts at the peak, KL below {self.kl:g}; "
            f"on an emulated {self.device}."
        )

    def goal_words(self, figures: dict[str, Any]) -> str:
        """The goal's figure with its unit: ``"92 tokens/s"``."""
        return f"{figures[self.goal] / self.scale:.3g} {self.unit}"

    def order(self, figures: dict[str, Any]) -> tuple[float, float]:
        """A smaller one is better: the goal to two digits, then the KL.

        Two digits, because a stopwatch has no more: equally fast entries are told apart by what
        they do to the text.
        """
        value = float(f"{figures[self.goal]:.2g}")
        return (-value if self.best == "most" else value, figures["kl"])

    def failures(self, figures: dict[str, Any]) -> list[str]:
        """The limits that do not hold for what `scoring.measure` gave, each with the numbers.

        Examples
        --------
        >>> TASKS["six megabytes"].failures({"peak_resident_bytes": 7_000_000, "kl": 0.01})
        ['peak memory 7.00 MB is 1.00 MB above the limit of 6.00 MB']
        """
        found = []
        if (peak := figures["peak_resident_bytes"]) > self.peak_bytes:
            found.append(
                f"peak memory {peak / MB:.2f} MB is {(peak - self.peak_bytes) / MB:.2f} MB above "
                f"the limit of {self.peak_bytes / MB:.2f} MB"
            )
        if not (kl := figures["kl"]) < self.kl:  # NaN fails too
            found.append(f"KL {kl:.4f} is {kl - self.kl:.4f} above the limit of {self.kl:g}")
        return found


_ALL = (
    Task(
        name="six megabytes",
        question="All experts take 21 MB. Fit under 6 MB and write the most tokens per second.",
        hint="A byte that is never read costs no time: what else can shrink besides the cache?",
        goal="tokens_per_s",
        best="most",
        unit="tokens/s",
        scale=1,
        peak_bytes=6 * MB,
        kl=0.05,
    ),
    Task(
        name="spare the card",
        question="Every byte read costs energy. Under 4 MB, read the fewest bytes per token.",
        hint="Nothing that fits whole is good enough here. Who should stay, and at which bits?",
        goal="bytes_per_token",
        best="fewest",
        unit="kB/token",
        scale=1000,
        peak_bytes=4 * MB,
        kl=0.02,
    ),
    Task(
        name="beat Belady's shadow",
        question="In 4 MB at 16 bit no eviction hits more often than Belady's. Be above him.",
        hint="He knows the future and one decision of five. Which others make a hit likelier?",
        goal="of_belady",
        best="most",
        unit="x Belady's hits",
        scale=1,
        peak_bytes=4 * MB,
        kl=0.02,
    ),
)
TASKS = {task.name: task for task in _ALL}


def find(name: str) -> Task:
    """A challenge by name.

    Raises
    ------
    ValueError
        There is none; the message lists those there are.
    """
    if name not in TASKS:
        raise ValueError(f"unknown challenge {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]
