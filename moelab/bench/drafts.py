"""Where a draft pays, over devices and budgets: ``python -m moelab.bench.drafts demo``.

One text is written three times: without a draft, with one, and without one in a cache that is given
the draft's memory as well, which is the fair rival. Bytes are exact: a greedy text, its routing
and its rejected tokens are the same whatever the device and the budget are, so a replay decides
what a run would have. Times are *modelled* by the virtual clock; `check` makes one of the runs and
says how far the model was from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import typer

import moelab
from moelab.bench.tables import as_markdown
from moelab.runs.prediction import Prediction, Predictor
from moelab.scheduling.budget import bits_in_words

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moelab.lab import Lab
    from moelab.runs.run import Run

BUDGETS = ("10%", "15%", "25%", "35%", "50%", "75%")
DEVICES = ("sd_card", "tx2_ssd", "nvme", "disk")
COLUMNS = ("device", "budget", "plain_bytes", "drafted_bytes", "rival_bytes")
COLUMNS += ("plain_tokens_per_s", "drafted_tokens_per_s", "rival_tokens_per_s", "needed", "pays")
PROMPT, TOKENS = "Once upon a time", 96


class Drafts:
    """A drafted run and the same text without a draft, under other devices and budgets.

    Parameters
    ----------
    lab
        In which both were made.
    drafted, plain
        Of the same prompt and length.

    Raises
    ------
    ValueError
        The texts differ, or nothing was drafted.
    """

    def __init__(self, lab: Lab, drafted: Run, plain: Run) -> None:
        if drafted.speculation is None or not drafted.speculation.drafted:
            raise ValueError("nothing was drafted: give a run with draft_bits=")
        if drafted.tokens != plain.tokens:
            raise ValueError("the two texts differ: give greedy runs of one prompt and length")
        self._lab, self.speculation = lab, drafted.speculation
        self._drafted, self._plain = Predictor(drafted, lab), Predictor(plain, lab)

    def at(self, **changes: Any) -> tuple[Prediction, Prediction, Prediction]:
        """Without a draft, with one, and without one but with its memory; as in ``lab.update``."""
        plain = self._plain(**changes)
        budget = plain.settings.budget_bytes + self.speculation.draft_bytes
        most = self._lab.info()["all_experts_bytes"]
        rival = self._plain(**changes | {"budget": min(budget, most)})
        return plain, self._drafted(**changes), rival

    def table(
        self, devices: Sequence[str] = DEVICES, budgets: Sequence[str] = BUDGETS
    ) -> pd.DataFrame:
        """A row for each device and budget.

        Returns
        -------
        DataFrame
            Bytes read a token kept and tokens a second, ``plain``, ``drafted``, and of the
            ``rival`` with the draft's memory. ``needed``: the tokens that a pass would have to
            yield for a draft to be as fast as the rival, beside what it does yield (the first line
            of `__repr__`). ``pays``: whether it is faster.
        """
        rows, yields = [], self.speculation.tokens_per_pass or 1.0
        for device in devices:
            for budget in budgets:
                _, drafted, rival = three = self.at(device=device, budget=budget)
                read = [one.bytes_per_token for one in three]
                needed = yields * drafted.token_ms / rival.token_ms
                speed = [1e3 / one.token_ms for one in three]
                rows.append((device, budget, *read, *speed, needed, needed < yields))
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def check(self, repeats: int = 1, **changes: Any) -> dict[str, Any]:
        """Make the drafted run under these settings: predicted against measured."""
        return self._drafted(**changes).check(repeats)

    def __repr__(self) -> str:
        told, bits = self.speculation, bits_in_words(self.speculation.draft_bits)
        each, right = told.tokens_per_pass or 0, told.acceptance or 0
        return f"<Drafts at {bits}: {each:.2f} tokens a pass, {right:.0%} accepted>"


def picture(table: pd.DataFrame, *, versus: str = "rival") -> go.Figure:
    """Speed with a draft over speed without, device by budget, modelled; 1 is the break-even.

    ``versus``: ``"plain"`` with the same budget, ``"rival"`` with the draft's memory as well.
    """
    speed = table["drafted_tokens_per_s"] / table[f"{versus}_tokens_per_s"]
    gain = table.assign(gain=speed).pivot_table("gain", "device", "budget")
    devices, budgets = (list(dict.fromkeys(table[name])) for name in ("device", "budget"))
    gain = gain.loc[devices, budgets].to_numpy()
    title = f"speed with a draft over {versus} without, modelled"
    figure = moelab.charts.heat_map(gain, title=title, unit="times", x="budget", y="device")
    figure.update_xaxes(tickvals=list(range(len(budgets))), ticktext=budgets)
    return figure.update_yaxes(tickvals=list(range(len(devices))), ticktext=devices)


def main(
    model: Annotated[str, typer.Argument(help="name, folder or store")] = "demo",
    draft_bits: Annotated[int, typer.Option(help="tier of the draft")] = 4,
    draft_length: Annotated[str, typer.Option(help="tokens ahead, or auto")] = "7",
    tokens: int = TOKENS,
    prompt: str = PROMPT,
) -> None:
    """Print where a draft pays, and what the model of it is worth at one point."""
    length = draft_length if draft_length == "auto" else int(draft_length)
    with moelab.open(model, budget="25%", measure_kl=False, strategy="lru") as lab:
        how = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        plain = lab.generate(prompt, **how)
        lab._engine.recover()  # both begin with an empty cache
        drafted = lab.generate(prompt, **how, draft_bits=draft_bits, draft_length=length)
        found = Drafts(lab, drafted, plain)
        typer.echo(repr(found))
        typer.echo(as_markdown(found.table().round(1)))
        told = found.check(device="sd_card")
        words = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
        typer.echo(f"sd_card, made: {words}")


if __name__ == "__main__":
    typer.run(main)
