"""What the virtual clock is worth: ``python -m moelab.bench.clock demo STORE``.

Of each model one run is recorded, by LRU on this machine's disk. From it every strategy is
predicted on every device, and then each of those runs is made, in turn with the recorded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import pandas as pd
import typer
from tqdm.auto import tqdm

import moelab
from moelab.bench.tables import as_markdown, worded

STRATEGIES = ("lru", "mixtral_offloading", "hobbit")
DEVICES = ("sd_card", "emmc", "disk")
AHEAD = 2
"""Layers that the recorded run looked ahead, so that strategies which do can be asked."""
PROMPT = "It is a truth universally acknowledged, that a single man in possession of"


def errors(
    lab: moelab.Lab,
    *,
    strategies: Sequence[str] = STRATEGIES,
    devices: Sequence[str] = DEVICES,
    tokens: int = 16,
    repeats: int = 3,
) -> pd.DataFrame:
    """A row for each strategy and device: predicted and measured ms a token, and the error.

    ``shared`` is the share of tokens that the run and the recorded one have in common. The recorded
    run is of LRU that looks ahead as HOBBIT does, and so is the row "lru".
    """
    lab.update(strategy="lru", device="disk", measure_kl=False)
    lab.update(prefetch="hobbit", depth=AHEAD)  # who looks ahead in the prompt, too
    lab.generate(
        PROMPT, max_new_tokens=4, ignore_eos=True
    )  # pages and clocks of a process that runs
    lab._engine.recover()  # an empty cache again
    run = lab.generate(PROMPT, max_new_tokens=tokens, ignore_eos=True, temperature=0)
    rows = []
    pairs = [(strategy, device) for device in devices for strategy in strategies]
    for strategy, device in tqdm(pairs, unit="setting"):
        found = moelab.predict(run, lab, strategy=strategy, device=device)
        own = {"strategy": strategy, "device": device, "recorded": found.error}
        rows.append(own | found.check(repeats))
    return pd.DataFrame(rows)


def main(
    models: list[str],
    budget: Annotated[str, typer.Option(help="of the experts")] = "25%",
    bits: Annotated[int, typer.Option(help="tier")] = 16,
    tokens: Annotated[int, typer.Option(help="of each run")] = 16,
    repeats: Annotated[int, typer.Option(help="runs of each setting")] = 3,
) -> None:
    """Print a table of predictions beside what then was measured."""
    found = []
    for name in models:
        how = {"budget": budget, "bits": bits, "measure_kl": False, "progress": False}
        with moelab.open(name, **how) as lab:
            table = errors(lab, tokens=tokens, repeats=repeats)
            found.append(table.assign(model=lab.name))
    table = pd.concat(found)
    columns = ["model", "strategy", "device", "predicted_ms", "measured_ms", "error", "shared"]
    forms = {"predicted_ms": "{:.1f}", "measured_ms": "{:.1f}", "error": "{:+.1%}"}
    typer.echo(as_markdown(worded(table.filter(columns), forms)))
    typer.echo(f"\nmedian of the errors without sign: {table.error.abs().median():.1%}")


if __name__ == "__main__":
    typer.run(main)
