"""What ghosts and fits are worth: ``python -m moelab.bench.worth demo STORE --fit qwen3-30b-a3b``.

Each model runs beside its own ghost, which is routed as that run was: an honest ghost takes as long
and hits as often. What `moelab.fit` models is set beside the ghost that it chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import pandas as pd
import typer
from tqdm.auto import tqdm

import moelab
from moelab.bench.tables import as_markdown, worded

BUDGETS, BITS, TOKENS = ("25%", "50%", "75%"), (16, 4), 24
PROMPT = "It is a truth universally acknowledged, that a single man in possession of"


def beside_ghosts(models: Sequence[str], rounds: int = 5) -> pd.DataFrame:
    """A row for each model, tier and budget: its ms a token, its ghost's, and whether hits agree.

    ``ghost_speed`` is the median over rounds of real / ghost, less 1. Both begin each run with an
    empty cache, in alternating order; LRU, from this machine's disk.
    """
    cases = [(model, bits, budget) for model in models for bits in BITS for budget in BUDGETS]
    return pd.DataFrame([_beside(*case, rounds) for case in tqdm(cases, unit="setting")])


def _beside(model: str, bits: int, budget: str, rounds: int) -> dict[str, object]:
    how = {"budget": budget, "bits": bits, "strategy": "lru", "measure_kl": False}
    with moelab.open(model, **how, progress=False) as real:
        run, _ = _run(real)
        tiers = tuple(real._store.tiers)
        of = real._store.checkpoint_dir
        ghost = moelab.ghost(of, routing=run.trace, disk="8GB", tiers=tiers, progress=False, **how)
        times, hits = [], []
        for turn in range(rounds):
            labs = (real, ghost) if turn % 2 else (ghost, real)
            found = {lab: _run(lab)[1] for lab in labs}
            times.append([found[lab]["total_ms"].median() for lab in (real, ghost)])
            hits.append(found[real]["hits"].tolist() == found[ghost]["hits"].tolist())
        moelab.ghost.remove(ghost)  # pyright: ignore[reportFunctionMemberAccess]
        table = pd.DataFrame(times, columns=["real_ms", "ghost_ms"])
        speed = (table["real_ms"] / table["ghost_ms"]).median() - 1
        own = {"model": real.name, "bits": bits, "budget": budget}
        return own | table.median().to_dict() | {"ghost_speed": speed, "same_hits": all(hits)}


def _run(lab: moelab.Lab) -> tuple[moelab.Run, pd.DataFrame]:
    """A run from an empty cache, and its decoded tokens."""
    lab._engine.recover()
    run = lab.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, temperature=0)
    return run, run.per_token.iloc[1:]


def beside_fits(models: Sequence[str], memory: str, rounds: int = 3) -> pd.DataFrame:
    """A row for each model and round: tokens a second as fit models them, and as a ghost makes."""
    rows = []
    for model in tqdm(list(models) * rounds, unit="fit"):
        found = moelab.fit(model, memory=memory, progress=False)
        checked = found.check(progress=False)
        error = checked.modelled / checked.measured - 1
        rows.append({"model": model, **checked._asdict(), "error": error})
    return pd.DataFrame(rows)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="to run beside their ghosts")] = None,
    fit: Annotated[list[str] | None, typer.Option(help="a model to fit; several times")] = None,
    memory: Annotated[str, typer.Option(help="for what is fitted")] = "6GB",
    rounds: Annotated[int, typer.Option(help="of each")] = 5,
) -> None:
    """Print a table of models beside their ghosts, and one of fits beside theirs."""
    forms = {"real_ms": "{:.2f}", "ghost_ms": "{:.2f}", "ghost_speed": "{:+.1%}"}
    if models:
        typer.echo(as_markdown(worded(beside_ghosts(models, rounds), forms)))
    if fit:
        forms = {"modelled": "{:.1f}", "measured": "{:.1f}", "error": "{:+.0%}"}
        table = beside_fits(fit, memory, rounds)
        typer.echo(as_markdown(worded(table, forms)))
        typer.echo(f"\nmedian of the errors without sign: {table['error'].abs().median():.0%}")


if __name__ == "__main__":
    typer.run(main)
