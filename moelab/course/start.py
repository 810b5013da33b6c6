"""Exercises of notebooks 00 and 01: count experts, stop the waiting, find it, ask what if."""

from __future__ import annotations

from typing import Any

import moelab
from moelab.course.verdict import RefusedError, Said, a_number, exercise, is_run, opened

TOKENS, LESS, FEWER = 16, 4, 0.05
"""Tokens of a run to be judged, times fewer bytes, the share of bytes a what-if is to spare."""


@exercise("00.1")
def experts_of_a_token(answer: Any) -> Said:
    """How many of all experts one token uses."""
    count = a_number(answer, "experts of one token, all layers together")
    with opened() as lab:
        info = lab.info()
        run = lab.generate("The", max_new_tokens=4, ignore_eos=True)
    served = run.events.query("token == 3 and kind in ('hit', 'load')")
    used = len(served[["layer", "expert"]].drop_duplicates())
    if count != used:
        return False, (
            f"a token did not use {count:g}. Move along a row of the cache map after a run: a dot "
            "marks what the newest token used. Then count the rows."
        )
    return True, (
        f"{used} of {info['layers'] * info['experts_per_layer']}: {info['layers']} layers, "
        f"{info['top_k']} in each. The others could have stayed on disk."
    )


@exercise("00.2")
def stop_the_waiting(answer: Any) -> Said:
    """A run that reads a quarter of the bytes with no more memory than at the start."""
    if not isinstance(answer, moelab.Lab):
        raise RefusedError(f"give the lab itself: lab; this is {answer!r}")
    run = is_run(answer.run, least=TOKENS)
    tokens = run.token_reports[1:]
    with opened() as lab:
        allowed = lab.settings.budget_bytes
        plain = lab.generate(run.prompt, max_new_tokens=len(run.token_reports), ignore_eos=True)
    was, now = (r.summary()["bytes_per_token"] / 1e3 for r in (plain, run))
    said = f"your last run read {now:.0f} kB a token, at 16 bit and LRU it would be {was:.0f}"
    if (most := max(t.budget_bytes for t in tokens)) > allowed:
        return False, f"{said}. But it took {most / 1e6:.2f} MB; keep to {allowed / 1e6:.2f} MB."
    if now > was / LESS:
        return False, f"{said}. Make it {LESS} times less: which control makes an expert smaller?"
    return True, f"{said}. The same memory holds more experts when each is smaller."


@exercise("01.1")
def the_longest_wait(answer: Any, *, run: moelab.Run) -> Said:
    """(token, layer, expert) of the longest single wait of the decoded tokens."""
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise RefusedError(f"give (token, layer, expert); this is {answer!r}")
    events = is_run(run, least=TOKENS).events.query("kind == 'stall' and token > 0")
    waits = events.set_index(["token", "layer", "expert"])["dur_ms"].groupby(level=[0, 1, 2]).sum()
    if waits.empty:
        raise RefusedError("nothing waited in this run; take a slower device")
    longest = waits.idxmax()
    if answer != longest:
        mine = f"{waits[answer]:.1f} ms" if answer in waits.index else "not at all"
        return False, (
            f"{answer} waited {mine}; there is one that waited {waits.max():.1f} ms. Click the "
            "tallest bar, then look down the column of waits; or sort run.blame(token)."
        )
    return True, f"token {longest[0]} waited {waits.max():.1f} ms for expert {longest[2]}."


@exercise("01.2")
def spare_bytes_same_text(answer: Any) -> Said:
    """A what-if that reads less and writes the same text, with no more memory."""
    was, then = _two(answer)
    first, second = was["summary"], then["summary"]
    spared = 1 - second["bytes_per_token"] / first["bytes_per_token"]
    said = (
        f"{first['bytes_per_token'] / 1e3:.0f} kB a token as it was, "
        f"{second['bytes_per_token'] / 1e3:.0f} then ({-spared:+.0%})"
    )
    if second["budget_bytes"] > first["budget_bytes"]:
        return False, f"{said}, but with more memory."
    if (at := answer.diverges_at) is not None:
        return False, f"{said}, but the texts part at token {at}. Which decision leaves them alone?"
    if spared < FEWER:
        return False, f"{said}. Spare {FEWER:.0%}: who should leave when the memory is full?"
    return True, f"{said}, and every token is the same."


def _two(answer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from moelab.runs.compare import Comparison

    if not isinstance(answer, Comparison) or len(answer.recordings) != 2:
        raise RefusedError(f"give what lab.what_if(run, ...) returns; this is {answer!r}")
    was, then = (recording.document for recording in answer.recordings.values())
    if len(was["ids"]) < TOKENS:
        raise RefusedError(f"the run has {len(was['ids'])} tokens; take one of {TOKENS}")
    return was, then
