"""Charts: what a figure holds, that colour is never the only cue, and what a mistake is told."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from moelab.views import charts

FRAME = pd.DataFrame(
    {
        "budget": [50, 25, 25, 50],
        "speed": [20.0, 9.0, 12.0, 30.0],
        "who": ["lru", "lru", "hobbit", "hobbit"],
        "where": ["sd", "sd", "nvme", "nvme"],
    }
)


@pytest.fixture(scope="module")
def figures() -> dict:
    return {
        "heat_map": charts.heat_map(np.arange(12).reshape(3, 4), title="heat", unit="nats"),
        "curve": charts.curve(FRAME, "budget", "speed", color="who", title="curve", mark=30),
        "bars": charts.bars(FRAME, "budget", "speed", color="who", title="bars"),
        "scatter": charts.scatter(FRAME, "budget", "speed", color="who", title="scatter"),
    }


def test_every_figure_has_its_title_lets_the_page_through_and_fits_a_laptop(figures):
    for name, figure in figures.items():
        layout = figure.layout
        assert layout.title.text == name.split("_", maxsplit=1)[0]
        assert layout.height <= charts.TALLEST
        shared = layout.template.layout
        assert shared.paper_bgcolor == shared.plot_bgcolor == charts.PAPER
        assert shared.font.color == charts.INK


def test_axes_and_legend_are_named_after_the_columns(figures):
    for name in ("curve", "bars", "scatter"):
        layout = figures[name].layout
        titles = (x.title.text for x in (layout.xaxis, layout.yaxis, layout.legend))
        assert tuple(titles) == ("budget", "speed", "who")


def test_a_few_whole_numbers_get_a_tick_each_and_no_fractions():
    frame = pd.DataFrame({"layer": [0, 1, 2], "share": [0.5, 0.6, 0.7]})
    whole, broken = (
        charts.curve(frame, x, y, title="").layout.xaxis.tickvals
        for x, y in (("layer", "share"), ("share", "layer"))
    )
    assert (whole, broken) == ((0, 1, 2), None)
    bits = charts.heat_map([[2, 4, 4], [4, 2, np.nan]], title="", unit="bits")
    assert bits.layout.coloraxis.colorbar.tickvals == (2, 4)


def test_colour_is_never_the_only_cue(figures):
    lines = figures["curve"].data
    assert len({(t.line.dash, t.marker.symbol) for t in lines}) == len(lines) == 2
    hatched = [t.marker for t in figures["bars"].data]
    assert len({m.pattern.shape for m in hatched}) == 2
    assert all(m.pattern.bgcolor == m.color != m.pattern.fgcolor for m in hatched)
    assert len({t.marker.symbol for t in figures["scatter"].data}) == 2


def test_fifteen_groups_stay_apart_by_colour_and_shape():
    many = pd.DataFrame({"x": range(15), "y": range(15), "who": [f"s{i}" for i in range(15)]})
    drawn = charts.scatter(many, "x", "y", color="who", title="many").data
    assert len({(t.marker.color, t.marker.symbol) for t in drawn}) == 15


def test_a_heat_map_shows_layer_0_on_top_and_every_value(figures):
    (drawn,) = figures["heat_map"].data
    assert np.asarray(drawn.z).tolist() == np.arange(12).reshape(3, 4).tolist()
    assert figures["heat_map"].layout.yaxis.autorange == "reversed"
    assert figures["heat_map"].layout.coloraxis.colorbar.title.text == "nats"
    tall = charts.heat_map(np.zeros((48, 128)), title="tall", unit="")
    assert tall.layout.height == charts.TALLEST


def test_a_curve_is_drawn_from_left_to_right_and_marked(figures):
    lru = figures["curve"].data[0]
    assert (lru.name, list(lru.x), list(lru.y)) == ("lru", [25, 50], [9.0, 20.0])
    (line,) = figures["curve"].layout.shapes
    assert line.x0 == line.x1 == 30
    marks = [(30, "T1"), (40, "T2")]
    layout = charts.curve(FRAME, "budget", "speed", title="", mark=marks).layout
    assert [(a.x, a.y, a.text) for a in layout.annotations] == [(30, 1, "T1"), (40, 1, "T2")]
    figure = charts.curve(FRAME, "budget", "speed", title="", mark=(25, "here"), log_x=True)
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.shapes[0].x0 == 25  # plotly takes shapes in data units
    assert figure.layout.annotations[0].x == pytest.approx(np.log10(25))  # and notes in powers


def test_bars_stand_side_by_side_and_say_their_value_or_the_words_given(figures):
    assert figures["bars"].layout.barmode == "group"  # stacked, 9 and 12 would look like 21
    (plain,) = charts.bars(FRAME, "who", "speed", title="").data
    assert list(plain.text) == ["20", "9", "12", "30"]
    (worded,) = charts.bars(FRAME, "who", "speed", title="", text="where").data
    assert list(worded.text) == ["sd", "sd", "nvme", "nvme"]


def test_a_scatter_takes_shape_and_words_from_other_columns():
    figure = charts.scatter(
        FRAME, "budget", "speed", color="who", symbol="where", label="who", title="", log_y=True
    )
    assert [t.marker.symbol for t in figure.data] == ["circle", "square"]
    assert list(figure.data[0].text) == ["lru", "lru"]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == (None, "log")


def test_a_comparison_is_a_plain_frame():
    rows = [("s/token", "0.789 (TX2)", 0.061234), ("loss", 0.02, None)]
    frame = charts.compare(rows, title="EdgeMoE")
    assert frame.columns.tolist() == ["theirs, on their device", "ours, here"]
    assert frame.loc["s/token"].tolist() == ["0.789 (TX2)", "0.0612"]
    assert frame.loc["loss"].tolist() == ["0.02", ""]
    assert "EdgeMoE" in frame.to_html()


@pytest.mark.parametrize("draw", [charts.curve, charts.bars])
def test_a_missing_column_is_named_with_those_there_are(draw):
    with pytest.raises(ValueError, match=r"no column 'fast'; there are budget, speed, who, where"):
        draw(FRAME, "budget", "fast", title="")
    with pytest.raises(ValueError, match=r"need a table \[rows\]\[columns\]"):
        charts.heat_map([1, 2], title="", unit="")


def test_without_plotly_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.express", None)
    with pytest.raises(ImportError, match=r"pip install 'moelab\[lab\]'"):
        charts.bars(FRAME, "who", "speed", title="")
