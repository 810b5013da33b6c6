"""Every system in one table: what its paper says, and what its idea does here.

Each is set against what its headline compares it with: on the bundled model and on smollm2-moe
live, at an emulated eMMC, and by replay over routing of 48 layers x 128 experts (*modelled*, see
`moelab.routing`). The verdict is a rule, not an opinion: an idea *holds* where every place that can
be told gives at least half of the printed gain (for no more loss than `BORNE`), *does not hold*
where none does; otherwise, and where the headline is of something that is not here, it *cannot be
told here*. What changes the output is not replayed: another one's stream is not its own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import moelab
from moelab.bench.cases import Case, contender, measure, settle
from moelab.bench.papers.results import Ratio
from moelab.bench.tables import Table, circumstances
from moelab.calibration.mixed import compared
from moelab.calibration.probes import halves
from moelab.calibration.representations import Loss, losses
from moelab.replays.replay import goes_by_weight
from moelab.runs.rounds import rotated
from moelab.store.representations import REPRESENTATIONS
from moelab.strategies import Route
from moelab.transforms import IDEAS, compare

HOLDS, NOT, OPEN = "holds", "does not hold", "cannot be told here"
HARMLESS, BORNE = 0.02, 0.05
"""Mean KL, nats: of an output that its paper calls unchanged; of one whose speed counts at all."""


@dataclass(frozen=True)
class System:
    """A system's idea as a contender, its headline, and what that is to be read with.

    ``figure``: ``"speed"`` (by replay: bytes a token, the fewer the faster), ``"hits"``, or
    ``"loss"`` (KL, no more than `HARMLESS`); ``gain``: how many times as good as ``against`` the
    paper says, None where its headline is of something else.
    """

    name: str
    ours: str
    against: str
    figure: str
    gain: float | None
    headline: str
    why: str


SYSTEMS = (
    System(
        "EdgeMoE", "lru + evict edgemoe + prefetch edgemoe", "on_demand", "speed", 2.64,
        "2.64 to 3.03x as fast as on demand, Jetson TX2",
        "on demand keeps nothing: what any buffer finds is won, the more the smaller the rest is",
    ),
    System(
        "HOBBIT", "hobbit", "moe_infinity", "speed", 3.64,
        "3.64x (Mixtral) and 9.93x (Phi-MoE) as fast as MoE-Infinity, Orin",
        "whole systems were compared there; the decisions alone give less",
    ),
    System(
        "SwapMoE", "swapmoe", "static_pruning", "loss", None,
        "two thirds less memory for 0.041 of Rouge-2",
        "its quality is of summaries by an encoder-decoder; KL is another scale",
    ),
    System(
        "MoE-APEX", "moe_apex", "hobbit", "speed", None,
        "HOBBIT's successor, another eviction",
        "its headline is against other systems; beside HOBBIT only the eviction differs",
    ),
    System(
        "MoE-Infinity", "moe_infinity", "lru", "hits", None,
        "latency against systems without activation-aware caching",
        "it guesses by whole sequences: that needs sequences like those before",
    ),
    System(
        "mixtral-offloading", "mixtral_offloading", "layer_lru", "speed", None,
        "2 to 3 tokens/s of Mixtral on free Colab GPUs",
        "its cache is LRU per layer; what is won beside that is won by the next gate",
    ),
    System(
        "AdapMoE", "adapmoe", "mixtral_offloading", "speed", 1.35,
        "1.35x as fast as the offloading before it",
        "second experts of little weight are few where routing was trained to use both",
    ),
    System(
        "Pre-gated MoE", "pregated", "on_demand", "speed", 1.7,
        "1.7x as fast as on demand, accuracy as before",
        "experts named a layer ahead are there in time; untrained, that costs the output",
    ),
    System(
        "eMoE", "emoe", "lru", "loss", 1.0,
        "80 % less memory, perplexity unchanged up to 40 prompts",
        "without most experts the text of these models is another one",
    ),
    System(
        "cache-prior routing", "cache_prior", "lru", "speed", 2.0,
        "up to 2x as fast on a phone",
        "as far as the router is made to prefer what is there; the KL beside it is the price",
    ),
    System(
        "FlashMoE", "flashmoe", "lru", "hits", 1.21,
        "hits 1.21x LRU's (OLMoE)",
        "recency and frequency are all that its net sees, and LFU sees most of that",
    ),
    System(
        "FineMoE", "finemoe", "moe_infinity", "hits", 1.68,
        "hits 1.68x MoE-Infinity's",
        "a token's own map is a better key than a sequence's, as far as texts have that in common",
    ),
    System(
        "SpecMD (Least-Stale)", "least_stale", "lru", "hits", None,
        "88 % hits at 5 % of memory, up to 85x fewer collisions than LRU",
        "it helps below one token's cycle, where LRU finds nothing; this is above",
    ),
    System(
        "Hermes", "hermes", "on_demand", "speed", None,
        "2.58 to 4.24x as fast as PipeSwitch",
        "of dense models, which need every layer; a mixture needs a few of its experts",
    ),
)  # fmt: skip

PLACES = {"demo": "25%", "smollm2-moe": "75%"}
"""Models to run, and the share of their experts in memory."""
DEVICE, ROUTED, SHARE = "emmc", "qwen3-30b-a3b", "25%"


def systems(
    chosen: Sequence[System] = SYSTEMS,
    places: Mapping[str, str] = PLACES,
    *,
    tokens: int = 24,
    repeats: int = 3,
    replayed: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every system beside what its headline compares it with.

    Parameters
    ----------
    chosen
        Of `SYSTEMS`.
    places
        Models by name -> budget.
    tokens, repeats
        Of each run; runs of each contender, in rotated order.
    replayed
        Tokens of modelled routing at 48 x 128.
    progress
        Show a bar. Ctrl-C keeps what there is.

    Returns
    -------
    pandas.DataFrame
        A row for each contender, place and run: ``speed``, ``hits``, ``loss``; for `report`.
    """
    words = list(dict.fromkeys(w for s in chosen for w in (s.ours, s.against)))
    rows: list[dict[str, Any]] = []
    count = len(words) * (1 + len(places) * (repeats + 1))
    complete, forms = False, list[dict[str, str]]()
    with contextlib.suppress(KeyboardInterrupt), tqdm(total=count, disable=not progress) as bar:
        for place, budget in places.items():
            _live(place, budget, words, tokens, repeats, rows, bar)
        rows += _replayed(words, replayed, bar)
        bar.set_postfix_str("forms of an expert")
        forms = _forms()
        complete = True
    frame = pd.DataFrame(rows, columns=["place", "contender", "speed", "hits", "loss"])
    frame.attrs = {"suite": "systems", "complete": complete, "repeats": repeats, "tokens": tokens}
    frame.attrs |= {"places": dict(places), "systems": [asdict(one) for one in chosen]}
    frame.attrs["forms"] = forms
    return frame


def measured(*, quick: bool) -> pd.DataFrame:
    """All of it, or the bundled model once."""
    return systems(places={"demo": "25%"}, repeats=1, replayed=8) if quick else systems()


def _live(
    place: str, budget: str, words: Sequence[str], tokens: int, repeats: int, rows: list, bar: Any
) -> None:
    """Runs of every contender on a model, and its KL."""
    cases = {w: Case(w, budget, DEVICE) for w in words}
    with moelab.open(place, budget="100%", measure_kl=False, progress=False) as lab:
        prompt = next(text for texts in lab.prompts().values() for text in texts)
        loss = {}
        for w, case in cases.items():
            bar.set_postfix_str(f"{place}: quality of {w}")
            bar.update()
            with contextlib.suppress(ValueError):  # not calibrated for this model
                now = settle(lab, Case(case.strategy, case.budget, "disk"))
                if "in_flight" in now.strategy.observes:  # it decides by what has landed
                    settle(lab, case)
                text = None if lab.probes() else prompt
                loss[w] = lab._scored(text, progress=False, summaries=False).kl_mean
    for w in rotated([*loss], repeats):
        bar.set_postfix_str(f"{place}: {w}")
        found = measure(place, cases[w], prompt, tokens=tokens, seed=0, temperature=0)
        figures = {"speed": found["tokens_per_s"], "hits": found["hit_ratio"], "loss": loss[w]}
        rows.append({"place": place, "contender": w, **figures})
        bar.update()


def _replayed(words: Sequence[str], tokens: int, bar: Any) -> list[dict[str, Any]]:
    """Hits, and the inverse of bytes a token, over modelled routing."""
    trace, rows = moelab.routing(ROUTED, tokens=tokens), []
    for w in words:
        bar.set_postfix_str(f"48 x 128: {w}")
        bar.update()
        settings = contender(w)
        if changes_output(settings["strategy"]):
            continue
        with contextlib.suppress(ValueError):  # not calibrated for this model
            found = moelab.replay(
                trace, settings.pop("strategy"), budget=SHARE, bits=16, **settings
            )
            figures = {"speed": 1 / max(1, found.bytes), "hits": found.hit_ratio}
            rows.append({"place": ROUTED, "contender": w, **figures})
    return rows


def changes_output(name: str) -> bool:
    """Whether a strategy may compute something else than the router chose, at full precision."""
    maker = moelab.strategies.maker(name)
    try:
        made = maker({}) if name in moelab.strategies.CALIBRATED else maker()
    except (KeyError, ValueError):  # by a profile's numbers alone
        return False
    stands_in = type(made.route).stand_in is not Route.stand_in
    return made.steers or goes_by_weight(made) or stands_in


FORMS = {
    "puzzle": "PuzzleMoE: half the bytes, MMLU 65.7 of 67.9 (Mixtral)",
    "resmoe": "ResMoE: a quarter of the parameters with little loss",
    "merge": "Diversifying: half the experts, better than other pruning",
    "slim": "one shot; SlimMoE distils",
    "4 bit, rows": "EdgeMoE's and MoQE's quantiser",
    "2 bit, rows": "MoQE: a fifth of the size, better than the dense model",
    "2 bit, GPTQ": "QMoE's milder option: 2 bit lose little, 1.6 T parameters",
    "ternary, rows": "QMoE's levels without its GPTQ",
    "ternary, groups": "the same bits with a fitted scale for 64",
    "ternary, GPTQ": "QMoE: ternary loses little; 0.8 bit a weight with a dictionary",
    "mixed bits": "MoQE, MxMoE: experts bear few bits, and their matrices unequally",
}
"""Representations, and what their papers say."""


def _forms() -> list[dict[str, str]]:
    """KL of the bundled model's experts in other forms, beside rounding at their bytes or fewer."""
    found = compare("demo", [n for n in FORMS if n in IDEAS], max_tokens=64, progress=False)
    with moelab.open("demo", measure_kl=False, progress=False) as lab:
        more = losses(lab, [n for n in FORMS if n in REPRESENTATIONS])
        plain_3, mixed = compared(lab, (3,), ("expert",)).to_dict("records")
    more += _by_inputs()
    ideas: list[dict[str, Any]] = found.to_dict("records")
    plain = sorted((r for r in ideas if r["how"] == "plain"), key=itemgetter("bits_per_weight"))
    own = [r for r in ideas if r["how"] != "plain" and r["tier"] in (8, 4)]
    rows = [(r["how"], r["bits_per_weight"], r["kl"]) for r in own]
    rows += [(one.name, one.bits, one.kl_mean) for one in more]
    table = []
    for name, bits, kl in rows:
        fit = [r for r in plain if r["bits_per_weight"] <= bits + 0.5][-1:]
        beside = f"{fit[0]['kl']:.4f} at {fit[0]['tier']} bit" if fit else ""
        table.append(
            {"form": name, "bits a weight": f"{bits:.2f}", "KL": f"{kl:.4f}", "rounding": beside}
            | {"its paper": FORMS[name]}
        )
    held_out = {"rounding": f"{plain_3['KL']:.4f} at 3 bit (held out)"}
    row = {
        "form": "mixed bits",
        "bits a weight": f"{mixed['bits']:.2f}",
        "KL": f"{mixed['KL']:.4f}",
    }
    return [*table, row | held_out | {"its paper": FORMS["mixed bits"]}]


def _by_inputs() -> list[Loss]:
    """The tiers of 2 bit and ternary weights, rounded by other text than they are measured on."""
    with tempfile.TemporaryDirectory() as folder:
        later = [halves(text)[1] for text in moelab.demo.probes().values()]
        how: dict[str, Any] = {"tiers": (16, 2, 1), "calibrate": later, "progress": False}
        store = moelab.pack(moelab.demo.checkpoint(), Path(folder) / "store", **how)
        with moelab.open(store, measure_kl=False, progress=False) as lab:
            texts = [halves(text)[0] for text in moelab.demo.probes().values()]
            found = losses(lab, [2, 1], texts)
    names = "2 bit, GPTQ", "ternary, GPTQ"
    return [one._replace(name=name) for name, one in zip(names, found, strict=True)]


# -- the table ------------------------------------------------------------------------------------


def report(frame: pd.DataFrame) -> str:
    """The table in Markdown."""
    made, machine = circumstances()["made"], circumstances()["machine"]
    places = list(dict.fromkeys(frame["place"]))
    shown = ", ".join(f"{place} at {share}" for place, share in frame.attrs["places"].items())
    how = (
        f"Measured {made[:10]} on {machine['cores']} cores of {machine['processor']}: {shown} of "
        f"their experts' memory, {frame.attrs['tokens']} tokens, {frame.attrs['repeats']} runs in "
        f"rotated order, {DEVICE} (emulated); KL on the models' own texts. {ROUTED}: replay of "
        f"modelled routing at {SHARE}, speed as bytes a token. Ratios: median of paired runs, in "
        "brackets the lowest and the highest."
    )
    rows = [_row(System(**system), frame, places) for system in frame.attrs["systems"]]
    early = [] if frame.attrs["complete"] else ["**Stopped early.**"]
    table = Table("Every system, its headline, and ours", pd.DataFrame(rows)).markdown()
    if forms := frame.attrs["forms"]:
        said = "Forms of an expert on the demo, beside plain rounding at half a bit more or fewer"
        table += Table(said, pd.DataFrame(forms)).markdown()
    return "\n\n".join([how, *early, *table]) + "\n"


def _row(system: System, frame: pd.DataFrame, places: Sequence[str]) -> dict[str, str]:
    by_place: dict[Any, pd.DataFrame] = dict(list(frame.groupby("place")))
    found = {place: _at(system, by_place[place]) for place in places}
    said = {place: "" if one is None else one[0] for place, one in found.items()}
    good = [one[1] for one in found.values() if one is not None and one[1] is not None]
    return {
        "system": system.name,
        "its headline": system.headline,
        **said,
        "here": verdict(good if system.gain is not None else []),
        "why": system.why,
    }


def verdict(good: Sequence[bool]) -> str:
    """What the places say together.

    Examples
    --------
    >>> verdict([True, True]), verdict([False]), verdict([True, False]), verdict([])
    ('holds', 'does not hold', 'cannot be told here', 'cannot be told here')
    """
    if good and all(good):
        return HOLDS
    return NOT if good and not any(good) else OPEN


def _at(system: System, runs: pd.DataFrame) -> tuple[str, bool | None] | None:
    """What a place says: in words, and whether the headline holds; None where it cannot be told."""
    by_contender: dict[Any, pd.DataFrame] = dict(list(runs.groupby("contender")))
    ours, theirs = (by_contender.get(w) for w in (system.ours, system.against))
    if ours is None or theirs is None:
        return None
    loss, their_loss = (float(np.median(one["loss"])) for one in (ours, theirs))
    price = "" if np.isnan(loss) or loss < 1e-6 else f", KL {loss:.3f}"
    if system.figure == "loss":
        if np.isnan(loss):
            return None
        beside = f" against {their_loss:.3f}" if system.gain is None else ""
        return f"KL {loss:.3f}{beside}", bool(loss <= HARMLESS)
    values = [one[system.figure].tolist() for one in (ours, theirs)]
    if not min(values[1]):
        return None
    ratio = Ratio.of(*values)
    words = str(ratio) if len(ours) > 1 and system.figure == "speed" else f"{ratio.median:.2f}x"
    if system.gain is None:
        return words + price, None
    good = ratio.median >= 1 + (system.gain - 1) / 2 and not loss > BORNE
    return words + price, bool(good)
