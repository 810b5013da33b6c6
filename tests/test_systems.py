"""Every system in one table, and the roofs over a prompt's length."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest

import moelab
from moelab.bench import as_json, as_record, roofline, systems
from moelab.store.devices import DEVICES

CLAIM = systems.System("X", "lfu", "lru", "hits", 1.2, "hits 1.2x", "because")


def made(rows, *given) -> str:
    chosen = [dataclasses.asdict(one) for one in given]
    frame = pd.DataFrame(rows, columns=["place", "contender", "speed", "hits", "loss"])
    frame.attrs = {"complete": True, "repeats": 1, "tokens": 4, "systems": chosen}
    frame.attrs |= {"forms": [], "places": {"a": "25%"}}
    return systems.report(frame)


@pytest.mark.parametrize(
    ("hits", "said"), [((0.56, 0.55), "holds"), ((0.5, 0.5), "does not"), ((0.6, 0.5), "cannot")]
)
def test_half_of_the_gain_at_every_place_is_what_holds(hits, said):
    rows = [("a", "lru", 1.0, 0.5, 0.0), ("b", "lru", 1.0, 0.5, math.nan)]
    rows += [("a", "lfu", 1.0, hits[0], 0.0), ("b", "lfu", 1.0, hits[1], math.nan)]
    assert f"| {said}" in made(rows, CLAIM)


def test_a_loss_is_judged_by_what_is_harmless_and_other_scales_are_not():
    rows = [("a", "lru", 1.0, 0.5, 0.0), ("a", "lfu", 1.0, 0.5, 0.3)]
    of_loss = systems.System("X", "lfu", "lru", "loss", 1.0, "unchanged", "because")
    assert "KL 0.300" in (page := made(rows, of_loss))
    assert "does not hold" in page
    other = systems.System("X", "lfu", "lru", "loss", None, "Rouge", "another scale")
    assert "KL 0.300 against 0.000" in (page := made(rows, other))
    assert "cannot be told here" in page


def test_two_systems_are_measured_live_and_by_replay(demo_store):
    chosen = [one for one in systems.SYSTEMS if one.name in ("Pre-gated MoE", "eMoE")]
    frame = systems.systems(
        chosen, {"demo": "50%"}, tokens=3, repeats=1, replayed=2, progress=False
    )
    assert frame.attrs["complete"]
    by_place = frame.groupby("place")["contender"].agg(set)
    assert by_place["demo"] == {"pregated", "emoe", "on_demand", "lru"}
    assert by_place[systems.ROUTED] == {"on_demand", "lru"}, "the others change the output"
    assert frame.query("place == 'demo'")["speed"].min() > 0
    page = systems.report(frame)
    assert "demo at 50%" in page
    assert as_json(as_record(frame))
    assert "| Pre-gated MoE |" in page
    assert "KL " in page


def test_every_contender_is_one():
    for one in systems.SYSTEMS:
        assert systems.contender(one.ours)["strategy"] in moelab.strategies.NAMES
        assert systems.contender(one.against)["strategy"] in moelab.strategies.NAMES


def test_roofs_by_hand_and_a_prompt_beside_them(demo_lab):
    found = roofline.roofline(demo_lab, (1, 4, 4096), measured=False)
    rows = found.roofs.set_index("tokens")
    # One token asks for its 2 experts; 4 for 16 (1 - (7/8)^4) = 6.62, of which each is read once.
    assert rows["disk"][4] / rows["disk"][1] == pytest.approx(4 * 2 / (16 * (1 - (7 / 8) ** 4)))
    assert rows["memory"][4] / rows["memory"][1] == pytest.approx(rows["disk"][4] / rows["disk"][1])
    assert set(rows["computing"]) == {rows["computing"][1]}
    lowest = rows[list(roofline.ROOFS)].idxmin(axis=1)
    assert rows["limit"].tolist() == lowest.tolist()
    assert found.sentence() in repr(found)
    told = demo_lab.info()["roofs"][demo_lab.settings.bits]
    assert told["tokens"] == [1, 4, 4096]
    assert told["disk"] == rows["disk"].tolist()
    assert "measured" not in told
    (measured,) = roofline.roofline(demo_lab, (8,)).roofs["measured"]
    assert measured > 0
    assert demo_lab.info()["roofs"][16]["measured"] == [measured]


def test_the_third_roof_is_the_device_of_the_lab_where_that_is_slower_than_the_disk(demo_lab):
    assert demo_lab.info()["roofs"] == {}
    demo_lab.update(device="sd_card")
    found = roofline.roofline(demo_lab, (1, 4), measured=False)
    flop_of_a_byte = demo_lab.info()["expert_bytes"][16] * 2 * 6
    assert found.roofs["disk"][0] == pytest.approx(
        DEVICES["sd_card"].bandwidth_bytes_s / flop_of_a_byte
    )
    assert found.turns is None
    assert DEVICES["sd_card"].title in found.sentence()
    assert demo_lab.info()["roofs"][16]["device"] == "sd_card"
