"""The past: what a token cost, the cache as it was, an expert's life; live and in an exported page.

What the views show is compared with a replay of the run's events made here.
"""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

import moelab
from browser import kernel, shot
from fake_lab import FakeLab
from moelab.runs.schema import pack
from moelab.runs.snapshot import RunReader
from moelab.scheduling.events import CODES
from moelab.views.report import html
from moelab.widgets.queries import with_buffers
from test_accessibility import Bare
from test_browser import Dash, dash, theme  # noqa: F401 the second is a fixture

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]
CELLS = 1  # the dashboard
TOKENS = 40
IN_KERNEL = """
import json, numpy as np
from moelab.scheduling.events import CODES
{source}
run = lab.run
print(json.dumps(as_it_was(run.log.records(), run.trace, {token}, {layer})))
"""


def as_it_was(events, trace, token, layer):
    """How many experts were resident when this layer had been decided, and a digest of their bits.

    Events are applied one by one from the first on: nothing the views do is used here.
    """
    bits = np.zeros((trace.shape.layers, max(trace.shape.experts)), np.uint8)
    for key, b in trace.resident:
        bits[trace.shape.place(key)] = b
    before = (events["token"] < token) | ((events["token"] == token) & (events["at"] <= layer))
    for e in events[: int(before.sum())]:
        if e["kind"] in (CODES["load"], CODES["prefetch"]):
            bits[e["layer"], e["expert"]] = e["bits"]
        elif e["kind"] == CODES["evict"]:
            bits[e["layer"], e["expert"]] = 0
    digest = 0x811C9DC5
    for b in bits.ravel().tolist():  # FNV-1a
        digest = (digest ^ b) * 0x01000193 % 2**32
    return [int((bits > 0).sum()), f"{digest:08x}"]


class Time:
    """The time axis of a dashboard or an exported page."""

    def __init__(self, dash):  # noqa: F811
        self.dash, self.page, self.root = dash, dash.page, dash.root
        self.token = self.root.get_by_role("slider", name="Token shown")
        self.layer = self.root.get_by_role("slider", name="Layer shown")
        self.blame = self.root.locator(".moe-blame")
        self.life = self.root.locator(".moe-life")

    def shown(self):
        """(token, layer) in the past; None where the newest is shown."""
        at = self.root.evaluate("root => [root.dataset.past, root.dataset.layer]")
        return tuple(map(int, at)) if at[0] else None

    def resident(self):
        return self.root.evaluate("root => [+root.dataset.resident, root.dataset.bits]")

    def until(self, token, layer):
        self.dash.until(lambda: self.shown() == (token, layer), f"token {token}, layer {layer}")

    def click(self, token):
        self.dash.text.locator(f"span[data-token='{token}']").click()

    def drag(self, slider, share):
        """Take a thumb by the mouse and let go at a share of the way."""
        box = slider.bounding_box()
        top, reach = float(slider.get_attribute("max")), box["width"] - 16
        x0, y = box["x"] + 8, box["y"] + box["height"] / 2
        begin = x0 + reach * float(slider.input_value()) / top
        self.page.mouse.move(begin, y)
        self.page.mouse.down()
        for i in range(1, 9):
            self.page.mouse.move(begin + (x0 + reach * share - begin) * i / 8, y)
            self.page.wait_for_timeout(20)
        self.page.mouse.up()

    def an_evicted_expert(self, layers, experts):
        """Open the life of the first expert that was ever evicted, by clicks on the map."""
        box = self.root.locator(".moe-map canvas").bounding_box()
        wide, tall = (box["width"] - 24) / experts, (box["height"] - 16) / layers
        for layer in range(layers):
            for expert in range(experts):
                x = box["x"] + 22 + (expert + 0.5) * wide
                self.page.mouse.click(x, box["y"] + (layer + 0.5) * tall)
                who = f"{layer},{expert}"
                self.dash.until(
                    lambda w=who: self.life.get_attribute("data-expert") == w, f"the life of {who}"
                )
                self.dash.until(lambda: self.life.get_attribute("data-loads"), "its figures")
                if int(self.life.get_attribute("data-evictions")):
                    return layer, expert
        raise AssertionError("nothing was evicted")


# -- the exported page: no kernel, no network ------------------------------------------------------


@pytest.fixture(scope="module")
def run(demo_store):
    with moelab.open(demo_store, budget="25%", strategy="hobbit", device="tx2_ssd") as lab:
        run = lab.start("Once upon a time", max_new_tokens=TOKENS, measure_kl=True, ignore_eos=True)
        while len(run.token_reports) < TOKENS // 2:
            run._done.wait(0.01)
        lab.update(budget="12%")
        yield run.join()


@pytest.fixture(scope="module")
def exported(run, chromium, tmp_path_factory):
    """A page opened from disk with the network off; `faults` are errors and requests."""
    path = tmp_path_factory.mktemp("exported") / "run.html"
    run.report(str(path), png=False, csv=False, parquet=False)
    context = chromium.new_context(viewport={"width": 1280, "height": 940}, offline=True)
    page, page.faults = context.new_page(), []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.route("http*://**", lambda route: (page.faults.append(route.request.url), route.abort()))
    page.goto(path.as_uri())
    page.locator(".moe-dash[data-past]").wait_for()
    yield page
    context.close()


@pytest.fixture
def past(exported):
    yield Time(Dash(exported))
    assert not exported.faults


def truth(run, token, layer):
    return as_it_was(run.log.records(), run.trace, token, layer)


def test_an_exported_page_opens_at_the_token_that_waited_longest(past, run):
    waits = [sum(r.stall_ms.values()) for r in run.token_reports]
    dearest = 1 + int(np.argmax(waits[1:]))
    assert past.shown() == (dearest, run.trace.shape.layers - 1)
    assert float(past.blame.get_attribute("data-wait")) == pytest.approx(waits[dearest], rel=1e-3)
    assert int(past.blame.get_attribute("data-bytes")) == run.token_reports[dearest].bytes
    assert "emulated" in past.root.locator(".moe-badge").inner_text()
    assert "hobbit, 25 %" in past.root.locator(".moe-lead").inner_text()
    shot(past.page, "export-light")


def test_every_moment_of_an_exported_page_is_as_the_events_say(past, run):
    layers = run.trace.shape.layers
    past.token.focus()
    past.page.keyboard.press("Home")
    past.until(0, layers - 1)
    assert past.resident() == truth(run, 0, layers - 1)
    for token in (1, 2, 3):
        past.page.keyboard.press("ArrowRight")
        past.until(token, layers - 1)
        assert past.resident() == truth(run, token, layers - 1)
    past.layer.focus()
    for layer in range(layers - 2, -2, -1):
        past.page.keyboard.press("ArrowLeft")
        past.until(3, layer)
        assert past.resident() == truth(run, 3, layer)
    for share in (0.9, 0.31, 0.62):
        past.drag(past.token, share)
        token, layer = past.shown()
        assert abs(token - share * (TOKENS - 1)) < 3
        assert past.resident() == truth(run, token, layer)
    past.drag(past.layer, 0.5)
    assert past.resident() == truth(run, *past.shown())


def test_a_click_on_a_token_says_what_became_of_each_expert(past, run):
    token = TOKENS // 2 + 3
    past.click(token)
    past.until(token, run.trace.shape.layers - 1)
    told = run.blame(token)
    chips = past.blame.locator(".moe-chip:visible")
    kinds = chips.evaluate_all("all => all.map(c => c.dataset.kind)")
    words = {"prefetched": "prefetch"}
    expected = told.sort_values(["layer", "weight"], ascending=[True, False])
    assert sorted(kinds) == sorted(words.get(o, o) for o in expected.outcome)
    labels = " ".join(chips.evaluate_all("all => all.map(c => c.ariaLabel)"))
    for row in told.itertuples():
        assert f"layer {row.layer}, expert {row.expert}:" in labels
    assert float(past.blame.get_attribute("data-kl")) == pytest.approx(told.attrs["kl"], rel=1e-4)
    tops = past.blame.locator(".moe-top ol")
    for i, of in enumerate(("served", "full")):
        assert tops.nth(i).locator("li").count() == len(told.attrs[of])
    assert f"{told.attrs['served'][0][1]:.3f}".lstrip("0") in tops.nth(0).inner_text()
    assert past.dash.text.locator("[aria-current]").get_attribute("data-token") == str(token)


def test_figures_are_those_of_the_tokens_by_then(past, run):
    past.click(TOKENS // 4)
    past.until(TOKENS // 4, run.trace.shape.layers - 1)
    decoded = run.per_token.iloc[1 : TOKENS // 4 + 1]

    def of_the_run(term):
        words = past.root.locator(".moe-tile small", has_text=term).inner_text()
        assert "run" not in words, "what came later is not in it"
        return float(words.partition(f"up to {TOKENS // 4} ")[2].split()[0])

    rate = 1e3 * len(decoded) / decoded[["total_ms", "measuring_ms", "setup_ms"]].sum().sum()
    assert of_the_run("tokens/s") == pytest.approx(rate, rel=0.06)
    asked = decoded[["hits", "late", "loads", "skips", "substitutes"]].sum().sum()
    assert of_the_run("hit ratio") == pytest.approx(100 * decoded.hits.sum() / asked, abs=0.51)


def test_an_eviction_says_why_in_the_strategys_own_terms(past, run):
    shape = run.trace.shape
    layer, expert = past.an_evicted_expert(shape.layers, max(shape.experts))
    mine = run.events[(run.events.layer == layer) & (run.events.expert == expert)]
    assert int(past.life.get_attribute("data-evictions")) == (mine.kind == "evict").sum()
    assert int(past.life.get_attribute("data-loads")) == (mine.kind == "load").sum()
    lane, went = past.life.locator("canvas"), mine[mine.kind == "evict"].iloc[-1]
    lane.focus()
    past.page.keyboard.press("End")
    while "evicted" not in lane.get_attribute("aria-label"):
        past.page.keyboard.press("ArrowLeft")
    past.page.keyboard.press("Enter")
    past.until(int(went.token), int(went["at"]))
    assert past.resident() == truth(run, int(went.token), int(went["at"]))
    assert int(past.life.get_attribute("data-event")) == went.name
    why = past.life.locator(".moe-leaving")
    why.locator("tr.victim").wait_for()
    assert "HOBBIT" in why.inner_text()
    assert "nearness (FLD)" in why.inner_text()
    priority = why.locator("tbody tr").evaluate_all("all => all.map(r => +r.lastChild.innerText)")
    assert priority == sorted(priority), "who left had the lowest"
    shot(past.page, "export-light-life")
    past.page.keyboard.press("Escape")
    past.life.wait_for(state="hidden")
    past.root.locator(".moe-map canvas").focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        past.page.keyboard.press(key)
    past.dash.until(lambda: past.life.get_attribute("data-expert") == "1,0", "by keyboard too")
    past.page.keyboard.press("Escape")


def test_play_goes_through_the_layers_and_reduced_motion_from_token_to_token(past, run):
    layers = run.trace.shape.layers
    past.token.focus()
    past.page.keyboard.press("Home")
    past.until(0, layers - 1)
    play = past.root.get_by_role("button", name="Play")
    seen = []
    watch = """root => { globalThis.seen = []; new MutationObserver(() =>
      seen.push(`${root.dataset.past},${root.dataset.layer}`))
      .observe(root, { attributeFilter: ["data-bits", "data-layer", "data-past"] }); }"""
    past.root.evaluate(watch)
    play.press("Enter")
    past.dash.until(lambda: past.shown()[0] >= 3, "three tokens played")
    past.root.get_by_role("button", name="Pause").press("Enter")
    seen = past.page.evaluate("seen")
    assert {f"1,{layer}" for layer in range(layers)} <= set(seen)
    past.page.emulate_media(reduced_motion="reduce")
    past.page.evaluate("seen.length = 0")
    at, _ = past.shown()
    play.press("Enter")
    past.dash.until(lambda: past.shown()[0] >= at + 2, "two tokens more")
    past.root.get_by_role("button", name="Pause").press("Enter")
    last = layers - 1
    assert all(s.endswith(f",{last}") for s in past.page.evaluate("seen")[1:])
    past.page.emulate_media(reduced_motion="no-preference")


def test_what_is_shown_is_said_to_a_screen_reader(past, run):
    past.click(5)
    past.until(5, run.trace.shape.layers - 1)
    report = run.token_reports[5]
    counts = {"hit": report.hits, "load": report.loads}  # a late guess is no hit
    hits, loads = (f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in counts.items())
    said = f"token 5, layer {run.trace.shape.layers - 1}: {past.resident()[0]} experts resident"
    voice = past.root.locator(".moe-voice")
    past.dash.until(lambda: voice.inner_text() == f"{said}, {hits}, {loads}", "the live region")
    assert "token 5 of" in past.token.get_attribute("aria-valuetext")


def test_an_exported_page_in_the_dark(past):
    past.page.emulate_media(color_scheme="dark")
    past.dash.until(lambda: past.root.get_attribute("data-theme") == "dark", "dark colours")
    assert past.dash.inked(".moe-map") > 3
    shot(past.page, "export-dark")
    past.page.emulate_media(color_scheme="light", forced_colors="active")
    shot(past.page, "export-high-contrast")
    past.page.emulate_media(forced_colors="none")


def test_a_browser_that_is_too_old_says_so(exported):
    page = exported.context.new_page()
    page.add_init_script("delete globalThis.DecompressionStream")
    page.goto(exported.url)
    assert "Chrome" in page.locator("#moelab-note").inner_text()
    assert page.locator("#moelab-page img").count() == 1, "the static picture is still there"
    page.close()


# -- a large model: 48 layers of 128 experts, top 8 ------------------------------------------------


SCRUB = """async (steps) => {
  const sliders = document.querySelectorAll(".moe-dash input[type=range]"); // token and layer
  for (let i = 0; i < steps; i++) {
    const slider = sliders[i % 3 ? 0 : 1];
    slider.value = (i * 37) % (+slider.max + 1);
    slider.dispatchEvent(new Event("input"));
    await new Promise(requestAnimationFrame); // called behind what draws
  }
}"""


def script_ms(trace):
    """Processor time of each animation frame's scripts, of those that drew."""
    frames = [e for e in json.loads(trace)["traceEvents"] if e["name"] == "FireAnimationFrame"]
    return [e["tdur"] / 1e3 for e in frames if e.get("tdur", 0) > 500]


def test_scrubbing_a_large_model_keeps_up_and_keeps_no_memory(chromium, tmp_path):
    path = tmp_path / "large.html"
    run = FakeLab(layers=48, experts=128, top_k=8, token_ms=0).start("Once", max_new_tokens=60)
    page = html(pack(run.join().recording().document), title="large")
    path.write_text(page, encoding="utf-8")
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(path.as_uri())
    page.locator(".moe-dash[data-past]").wait_for()
    devtools = context.new_cdp_session(page)

    def kept():
        devtools.send("HeapProfiler.collectGarbage")
        return devtools.send("Runtime.getHeapUsage")["usedSize"], page.locator("*").count()

    page.evaluate(SCRUB, 60)
    heap, nodes = kept()
    page.evaluate(SCRUB, 200)
    after, now = kept()
    assert after - heap < 1_000_000
    assert now == nodes
    chromium.start_tracing(page=page, categories=["devtools.timeline"])
    page.evaluate(SCRUB, 60)
    steps = script_ms(chromium.stop_tracing())
    assert len(steps) >= 50
    assert np.median(steps) <= 16, "milliseconds of scripts for a step"
    shot(page, "export-large")
    context.close()
    assert not faults


# -- the dashboard: the same views over a kernel's run ---------------------------------------------


def in_kernel(page, token, layer):
    import inspect

    source = inspect.getsource(as_it_was)
    return json.loads(kernel(page, IN_KERNEL.format(source=source, token=token, layer=layer)))


def test_the_live_lab_goes_back_in_time_and_returns(dash):  # noqa: F811
    page, time = dash.page, Time(dash)
    dash.drag(0.12)
    dash.choose("device", "nvme")
    dash.run(tokens=300)
    dash.until(lambda: dash.data("token") > 12, "some tokens")
    assert time.shown() is None
    time.click(9)
    dash.until(lambda: time.shown() and time.shown()[0] == 9, "token 9, while the run goes on")
    assert dash.data("running") == "true"
    assert time.resident() == in_kernel(page, *time.shown())
    in_run = float(kernel(page, "print(lab.run.token_reports[9].kl)"))
    assert float(time.blame.get_attribute("data-kl")) == pytest.approx(in_run, rel=1e-3, abs=1e-6)
    shot(page, "past-light")
    dash.text.press("ArrowLeft")
    dash.until(lambda: time.shown()[0] == 8, "one token back, by keyboard")
    time.layer.focus()
    page.keyboard.press("Home")
    time.until(8, -1)
    assert time.resident() == in_kernel(page, 8, -1)
    newest = dash.data("token")
    dash.until(lambda: dash.data("token") > newest, "the run goes on")
    assert time.shown() == (8, -1), "and the moment shown stays"
    dash.until(lambda: float(time.token.get_attribute("max")) > newest, "the axis grows")

    layer, expert = time.an_evicted_expert(6, 16)
    lane = time.life.locator("canvas")
    lane.focus()
    page.keyboard.press("Home")
    while "evicted" not in lane.get_attribute("aria-label"):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    time.life.locator("tr.victim").wait_for()
    assert f"layer {layer}, expert {expert}" in time.life.locator("tr.victim").inner_text()
    assert "least recently used" in time.life.locator(".moe-leaving").inner_text()
    assert time.resident() == in_kernel(page, *time.shown())
    theme(page, "Dark")
    dash.until(lambda: dash.root.get_attribute("data-theme") == "dark", "dark colours")
    dash.root.scroll_into_view_if_needed()
    shot(page, "past-dark-life")
    theme(page, "Light")

    dash.root.get_by_role("button", name="Back to the newest token").press("Enter")
    dash.until(lambda: time.shown() is None, "live again")
    time.drag(time.token, 0.4)
    dash.until(lambda: time.shown() is not None, "back by mouse")
    page.keyboard.press("Escape")
    dash.until(lambda: time.shown() is None, "Esc leads back to live")
    dash.stop()
    time.click(3)
    dash.until(lambda: time.shown() == (3, 5), "token 3 of a run that has ended")
    measure = dash.root.get_by_label("measure KL")
    measure.select_option("off")
    dash.run(tokens=4)
    dash.until(lambda: time.shown() is None, "a new run is shown live")
    assert not time.life.is_visible()
    dash.until(lambda: dash.data("running") == "false", "4 tokens")
    time.click(2)
    time.until(2, 5)
    assert "choose “KL: each token”" in time.blame.inner_text()
    assert not time.blame.get_attribute("data-kl")
    measure.select_option("each token")
    page.keyboard.press("Escape")


def test_an_answer_to_another_view_leaves_no_hole_in_this_ones_past(page):
    """Views of one widget hear the same answers; one that came later has asked for nothing yet."""
    bare = Bare(page, layers=4, experts=8)
    heard = """([content, raw]) => model.hear(content, raw)"""
    later, whole = answer(bare, rows=200), answer(bare, rows=0)
    bare.root.get_by_label("Token shown").press("ArrowLeft")
    page.evaluate(heard, later)
    assert not bare.root.get_attribute("data-past"), "the first 200 events are not held here"
    page.evaluate(heard, whole)
    page.wait_for_function("document.querySelector('.moe-dash').dataset.past")
    run = bare.lab.run
    token, layer = (int(bare.root.get_attribute(f"data-{name}")) for name in ("past", "layer"))
    assert Time(bare).resident() == as_it_was(run.log.records(), run.trace, token, layer)


def answer(bare, *, rows):
    """What the kernel sends to a view that holds so many events."""
    content, raw = with_buffers(RunReader(bare.lab.run).read(rows))
    content |= {"run": bare.dashboard.frame["run"], "from": rows, "running": False}
    return [{"recording": content}, [base64.b64encode(bytes(b)).decode() for b in raw]]
