"""Roofs over a prompt's length: computing, memory, disk (``python -m moelab.bench.roofline demo``).

After the hierarchical roofline of S. Cao et al., "MoE-Lightning", arXiv 2411.11217: what is
computed at one level from data of another runs no faster than min(peak of computing, bandwidth of
memory x FLOP a byte there, bandwidth of the disk x FLOP a byte there). Of a prompt of T tokens a
layer asks for E (1 - (1 - k/E)^T) of its experts where all are asked alike, and reads each once:
the FLOP of a byte grow with T, until loading is no longer the limit.

The roofs are *modelled* from what this machine does at this model (an expert's kernel on many
tokens, on one, and the disk, or an emulated device where that is slower), of experts alone and of
none in memory; prompts are measured beside them, with all else that a token takes. Once measured
they are in ``lab.info()["roofs"]``, by bits. What it does not know: that some experts are asked
for more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import torch
import typer

import moelab
from moelab.bench.tables import worded
from moelab.engine.compute import Routed, Serve
from moelab.engine.generation import threads
from moelab.engine.memory import Slot, pages
from moelab.engine.pace import median_ms
from moelab.scheduling.budget import bits_in_words
from moelab.store.devices import device as find_device
from moelab.views.sheet import Picture, Sheet, Shown, Table, lines

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MANY = 128
"""Tokens at which a kernel computes as fast as it can."""
ROOFS, MEASURED = ("computing", "memory", "disk"), "measured"


@dataclass(frozen=True, repr=False, eq=False)
class Roofline(Shown):
    """Tokens a second that each roof allows, by a prompt's length; shown as a sheet.

    Attributes
    ----------
    model, bits
        Whose, and at which tier.
    device
        Title of what the third roof reads from.
    roofs
        By ``tokens``: ``computing``, ``memory``, ``disk`` (tokens a second, modelled), ``limit``
        (the lowest one's name), and ``measured`` where a prompt was run.
    """

    model: str
    bits: int
    device: str
    roofs: pd.DataFrame

    @property
    def turns(self) -> int | None:
        """The shortest prompt, of those asked, for which the disk is no longer the limit."""
        rows = self.roofs.to_dict("records")
        return next((row["tokens"] for row in rows if row["limit"] != "disk"), None)

    def sentence(self) -> str:
        """What limits a prompt, in one sentence."""
        lengths = self.roofs["tokens"].tolist()
        said = f"{self.model} at {bits_in_words(self.bits)}, loading"
        if self.turns == lengths[0]:
            return f"{said} is no prompt's limit ({self.device}; modelled)."
        until = f"below {self.turns}" if self.turns else f"up to {lengths[-1]}"
        return f"{said} limits prompts {until} tokens ({self.device}; modelled)."

    def sheet(self) -> Sheet:
        """Sentence, picture, table."""
        of = {"tokens": "tokens of the prompt"}
        long = self.roofs.drop(columns="limit").melt("tokens", var_name="roof").dropna()
        long["roof"] = [f"{name} (modelled)" if name in ROOFS else name for name in long["roof"]]
        long = long.rename(columns={**of, "value": "tokens/s"})
        picture = Picture(
            self.sentence(),
            lambda: lines(long, of["tokens"], "tokens/s", "roof", log_x=True, log_y=True),
        )
        table = worded(self.roofs.rename(columns=of), dict.fromkeys((*ROOFS, MEASURED), "{:.3g}"))
        return Sheet(f"Roofs of {self.model}", self.sentence(), [picture, Table("Tokens/s", table)])


def roofline(
    lab: moelab.Lab, lengths: tuple[int, ...] = LENGTHS, *, measured: bool = True
) -> Roofline:
    """The roofs of a lab's model at its bits, and prompts run beside them.

    Parameters
    ----------
    lab
        Its settings hold; each prompt begins with an empty cache.
    lengths
        Tokens of the prompts.
    measured
        Run a prompt of each length, too.

    Raises
    ------
    RuntimeError
        The lab is at work.
    ValueError
        No length is given, or one is below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={lengths}: tokens of prompts, each 1 or more")
    lengths = tuple(sorted(lengths))
    shape, bits = lab._shape, lab.settings.bits
    machine, layout = lab._session.machine(), lab._store.manifest.layout
    device = find_device(lab.settings.device)
    flop = 2 * sum(math.prod(size) for _, size in layout.tensors)  # of a token and expert
    peak = flop * MANY / _many_s(lab, bits)
    computing = machine.computing  # where noise hid an expert in a call, it takes the call's time
    nbytes, count, k = shape.nbytes[bits], max(shape.experts), shape.top_k
    bandwidths = {
        "memory": 1e3 * nbytes / (computing.expert_ms[bits] or computing.call_ms),
        "disk": min(machine.disk.bandwidth_bytes_s, device.bandwidth_bytes_s or math.inf),
    }
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        asked = count * (1 - (1 - k / count) ** tokens)
        per_byte = flop * k * tokens / (asked * nbytes)
        rates = {"computing": peak} | {at: rate * per_byte for at, rate in bandwidths.items()}
        row: dict[str, Any] = {"tokens": tokens}
        row |= {name: rate / (flop * k * shape.layers) for name, rate in rates.items()}
        row["limit"] = min(rates, key=rates.__getitem__)
        row[MEASURED] = _prompt(lab, tokens) if measured else math.nan
        rows.append(row)
    found = Roofline(lab.name, bits, device.title, pd.DataFrame(rows))
    told = found.roofs.drop(columns="limit").dropna(axis="columns").to_dict("list")
    lab._session.roofs[bits] = {"device": lab.settings.device, **told}
    return found


def _many_s(lab: moelab.Lab, bits: int) -> float:
    """Seconds of one expert on `MANY` tokens."""
    with lab._session.claimed() as engine, threads(engine.threads), torch.inference_mode():
        store = engine.store
        slot = Slot(bits, pages(store.location(0, 0, bits)[2]))
        store.read(0, 0, bits, into=slot.view)
        x = torch.randn(MANY, store.manifest.hidden, dtype=engine.model.dtype)
        all_to_one = torch.zeros(MANY, 1, dtype=torch.long), torch.ones(MANY, 1)
        routed = Routed(*all_to_one, engine.shape.experts[0])

        def work() -> None:
            batch = engine.compute.batch(0, x, routed, scale_input=False)
            batch.add([(Serve(0, bits), slot)])
            batch.result()

        work()
        return median_ms(work) / 1e3


def _prompt(lab: moelab.Lab, tokens: int) -> float:
    """Tokens a second of a prompt of that length, from an empty cache."""
    text = " ".join(t for texts in lab.prompts().values() for t in texts) or "Once upon a time. "
    ids = lab._encode(text)
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    lab._engine.recover()
    words = lab._store.tokenizer().decode(ids)
    run = lab.generate(words, max_new_tokens=1, ignore_eos=True, chat=False)
    return 1e3 * len(run._ids) / float(run.per_token["total_ms"].iloc[0])


def main(
    model: str,
    budget: Annotated[str, typer.Option(help="of the experts, or bytes")] = "25%",
    bits: Annotated[int, typer.Option(help="tier")] = 16,
) -> None:
    """Print the roofs of a model, and prompts measured beside them."""
    with moelab.open(model, budget=budget, bits=bits, measure_kl=False) as lab:
        typer.echo(repr(roofline(lab)))


if __name__ == "__main__":
    typer.run(main)
