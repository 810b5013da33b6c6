"""How close decoding comes to the machine's limit: ``python -m moelab.bench.floor STORE --bits 4``.

No engine can decode a token in less than max(computing it, reading the bytes it misses). Both are
measured in the same run, in turn with the decoding they are the limit of, because a disk's speed
drifts: a few tokens, then random experts through the loader alone, and again. What it does not know
is a better policy: the bytes are those that the settings miss.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections import Counter
from typing import Annotated, Any

import psutil
import typer

import moelab
from moelab.engine.engine import Engine
from moelab.engine.generation import Decoder
from moelab.engine.memory import pages
from moelab.runs.tokens import REQUESTS, tally
from moelab.settings import parse_budget

ROUND = 4
"""Tokens between two readings of the bandwidth."""
IN_FLIGHT = 4
"""Loads that the bandwidth is measured with, about what one layer misses."""


def measure(lab: moelab.Lab, ids: list[int], *, tokens: int = 32, warm: int = 8) -> dict[str, Any]:
    """Decode ``ids`` teacher-forced after a prompt of 32 and hold it against the floor.

    Returns
    -------
    dict
        Per token: ``token_ms``, ``compute_ms``, ``stall_ms``, ``bytes``, ``disk_ms`` (bytes over
        the bandwidth measured), ``floor_ms`` = max(compute, disk), ``ratio`` = token / floor; and
        ``bandwidth_bytes_s`` (harmonic mean), ``hit_ratio``, ``peak_resident_bytes`` and
        ``rss_bytes``.

    Raises
    ------
    ValueError
        The text is too short.
    """
    need = 32 + warm + tokens
    if len(ids) < need:
        raise ValueError(f"{len(ids)} tokens of text are too few; {need} are needed")
    engine, bits = lab._engine, lab.settings.bits
    engine.new_sequence(record=False)
    decoder, seconds, stalls, speeds = Decoder(engine), 0.0, 0.0, []
    total: Counter[str] = Counter()
    decoder.step(ids[:32])
    engine.end_of_token()
    for i in range(warm + tokens):
        if i >= warm and (i - warm) % ROUND == 0:
            speeds.append(bandwidth(engine, bits))
        begun = len(engine.log)
        decoder.step([ids[32 + i]])
        if i >= warm:
            sums = tally(engine.log.records(begun))
            stalls += sum(sums.pop("stall_ms").values()) / 1e3
            total.update(sums)
            seconds += decoder.seconds
        engine.end_of_token()
    speed = statistics.harmonic_mean(speeds)
    compute, disk = seconds - stalls, total["bytes"] / speed
    per_token = {"token_ms": seconds, "compute_ms": compute, "stall_ms": stalls}
    per_token |= {"disk_ms": disk, "floor_ms": max(compute, disk)}
    return {name: round(1e3 * s / tokens, 2) for name, s in per_token.items()} | {
        "ratio": round(seconds / max(compute, disk), 3),
        "tokens_per_s": round(tokens / seconds, 2),
        "bytes": total["bytes"] // tokens,
        "bandwidth_bytes_s": round(speed),
        "hit_ratio": round(total["hits"] / sum(total[name] for name in REQUESTS), 3),
        "peak_resident_bytes": engine.arena.peak_bytes,
        "rss_bytes": psutil.Process().memory_info().rss,
    }


def bandwidth(engine: Engine, bits: int, *, seconds: float = 0.4) -> float:
    """Bytes a second of random experts through the loader, with nothing else to do."""
    store, rng, read = engine.store, random.Random(0), 0
    slots = [pages(store.slot_bytes[bits]) for _ in range(IN_FLIGHT)]
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        tickets = []
        for slot in slots:
            layer = rng.randrange(store.num_layers)
            expert = rng.randrange(store.experts_per_layer[layer])
            _, offset, size = store.location(layer, expert, bits)
            into, read = slot[:size], read + size
            tickets.append(engine.loader.submit(store.files[bits], offset, into, urgent=True))
        for ticket in tickets:
            engine.loader.wait(ticket)
    return read / (time.perf_counter() - begun)


def main(
    model: str,
    budget: Annotated[str, typer.Option(help="of the experts at these bits, or bytes")] = "25%",
    bits: Annotated[int, typer.Option(help="tier")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens to measure")] = 32,
    prefetch: Annotated[int, typer.Option(help="layers to look ahead")] = 0,
    text: Annotated[typer.FileText | None, typer.Option(help="to decode [the library's]")] = None,
) -> None:
    """Measure decoding against max(compute, bytes / bandwidth) and print JSON."""
    begun = time.perf_counter()
    with moelab.open(model, bits=bits, budget="100%", measure_kl=False, prefetch=prefetch) as lab:
        opened = time.perf_counter() - begun
        of = dataclasses.replace(lab._shape, nbytes={bits: lab._shape.nbytes[bits]})
        lab.update(budget=parse_budget(budget, of))
        words = text.read() if text else (moelab.__doc__ or "") + (__doc__ or "")
        found = measure(lab, lab._encode(words), tokens=tokens)
        typer.echo(json.dumps({"open_s": round(opened, 2), "bits": bits, "budget": budget} | found))


if __name__ == "__main__":
    typer.run(main)
