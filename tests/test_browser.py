"""What a person sees and does: the live lab in JupyterLab, driven by mouse and keyboard."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from browser import kernel, record, reload, run_cell, share, shot
from soak import Soak, growth

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 120
CELLS = 1  # the dashboard


class Dash:
    """The dashboard on a page, through what is on the screen and its data attributes."""

    def __init__(self, page):
        self.page = page
        self.root = page.locator(".moe-dash").first
        self.root.wait_for()
        self.slider = self.root.locator("input[name=budget]")
        self.text = self.root.locator(".moe-text")

    def data(self, name):
        value = self.root.get_attribute(f"data-{name}")
        return float(value) if value and value not in {"true", "false"} else value

    def until(self, condition, what):
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {SECONDS} s"
            self.page.wait_for_timeout(50)

    def run(self, *, tokens):
        """Press Run, by mouse, for so many tokens."""
        self.until(lambda: self.data("running") == "false", "the run before has ended")
        before = self.data("run")
        count = self.root.get_by_role("spinbutton", name="max tokens")
        count.fill(str(tokens))
        count.press("Tab")
        self.root.get_by_role("button", name="Run", exact=True).click()
        self.until(lambda: self.data("run") > before and self.data("token") >= 0, "a new run")

    def stop(self):
        button = self.root.get_by_role("button", name="Stop", exact=True)
        button.click(force=True)  # the model may have ended its text at this very moment
        self.until(lambda: self.data("running") == "false", "stopped")

    def choose(self, name, value):
        self.root.locator(f"select[name={name}]").select_option(value)

    def drag(self, share):
        """Take the thumb by the mouse and drag it to a share of all experts."""
        self.root.scroll_into_view_if_needed()
        box = self.slider.bounding_box()
        top, reach = float(self.slider.get_attribute("max")), box["width"] - 16
        x0, y = box["x"] + 8, box["y"] + box["height"] / 2
        begin = x0 + reach * float(self.slider.input_value()) / top
        mouse = self.page.mouse
        mouse.move(begin, y)
        mouse.down()
        for i in range(1, 11):
            mouse.move(begin + (x0 + reach * share - begin) * i / 10, y)
            self.page.wait_for_timeout(60)
        mouse.up()

    def open(self, wanted=True):
        """Fold the five decisions out, or away."""
        button = self.root.get_by_role("button", name="decisions")
        if (button.get_attribute("aria-expanded") == "true") != wanted:
            button.click()
        panel = self.root.locator(".moe-decide")
        self.until(lambda: panel.is_visible() == wanted, "the five decisions")

    def inked(self, part):
        """How many different colours a canvas has: none is drawn with fewer than three."""
        return self.root.locator(f"{part} canvas").evaluate(
            """c => new Set(new Uint32Array(
                 c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer)).size"""
        )

    def pixels(self, part):
        return self.root.locator(f"{part} canvas").evaluate("c => c.toDataURL()")


@pytest.fixture
def dash(live_page, request):
    """The dashboard at rest: nothing runs, a quarter of the experts at 16 bit on the real disk."""
    live_page.faults.clear()
    dash = Dash(live_page)
    if dash.data("running") == "true":
        dash.stop()
    theme(live_page, "Light")
    dash.root.get_by_label("Prompts by domain").select_option(index=1)
    dash.open(False)
    dash.choose("strategy", "lru")
    dash.until(lambda: dash.root.get_attribute("data-strategy") == "lru", "the plain strategy")
    for name, value in (("device", "disk"), ("low_bits", ""), ("prefetch", "0"), ("bits", "4")):
        dash.choose(name, value)
    dash.drag(0.25)
    dash.choose("bits", "16")
    dash.root.locator(".moe-switch").get_by_text("cost").click()
    yield dash
    shot(live_page, f"end-{request.node.name}")
    assert not live_page.faults


def theme(page, name):
    command = "name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })"
    page.evaluate(command, f"JupyterLab {name}")


def test_dragging_the_budget_during_a_run_changes_everything_on_screen(dash):
    dash.choose("device", "hdd")
    dash.choose("bits", "16")
    dash.drag(0.5)
    dash.run(tokens=900)
    dash.until(lambda: dash.data("token") > 20, "a filled cache")
    dash.until(lambda: dash.root.locator(".moe-badge.emulated").count() == 2, "the emulated badge")
    full, before, shown = dash.data("resident"), dash.data("stall"), dash.pixels(".moe-map")
    marks = dash.data("changes")
    shot(dash.page, "lab-light-half-budget")

    dash.drag(0.06)
    dash.until(lambda: dash.data("budget") < 0.08 / 0.5 * full * 221_184, "the budget")
    dash.until(lambda: dash.data("resident") < 0.4 * full, "a smaller cache map")
    dash.until(lambda: dash.data("stall") > before, "more stall in the running figures")
    dash.until(lambda: dash.data("changes") > marks, "a mark on the time axis")
    assert dash.pixels(".moe-map") != shown
    at, bars = dash.data("token"), dash.root.locator(".moe-bars").get_attribute("data-bars")
    dash.until(lambda: dash.data("token") > at + 3, "the run goes on")
    assert int(dash.root.locator(".moe-bars").get_attribute("data-bars")) >= int(bars)
    shot(dash.page, "lab-light-small-budget")

    spans = dash.text.locator("span[data-token]")
    cost = [float(s) for s in spans.evaluate_all("all => all.map(s => s.dataset.ms)")]
    assert spans.count() > 20
    last, first = cost[-3:], cost[5:20]
    assert sum(last) / 3 > sum(first) / 15, "tokens under the small budget cost more"
    dash.stop()


def test_quality_follows_the_bits_and_is_shaded(dash):
    dash.choose("device", "disk")
    dash.drag(1.0)
    dash.choose("bits", "16")
    dash.root.locator(".moe-switch").get_by_text("KL").click()
    dash.run(tokens=900)
    dash.until(lambda: (dash.data("kl") or 0) < 1e-6 and dash.data("token") > 20, "no KL at 16 bit")
    dash.choose("bits", "2")
    dash.until(lambda: (dash.data("kl") or 0) > 1e-3, "KL at 2 bit")
    at = dash.data("token")
    dash.until(lambda: dash.data("token") > at + 5, "shaded tokens")
    shades = dash.text.locator("span[data-token]").evaluate_all(
        "all => all.map(s => s.style.background)"
    )
    assert shades[10] == ""
    assert any("--moe-kl" in shade for shade in shades[-6:])
    shot(dash.page, "lab-light-kl")
    dash.stop()


def test_errors_are_drawn_and_go_when_mended(dash):
    dash.drag(0.0)
    alert = dash.root.get_by_role("alert")
    alert.wait_for()
    assert "raise it to" in alert.inner_text()
    assert dash.slider.get_attribute("aria-invalid") == "true"
    dash.until(lambda: float(dash.slider.input_value()) > 0, "the thumb shows what holds")
    shot(dash.page, "lab-light-error")
    dash.drag(0.5)
    alert.wait_for(state="hidden")
    assert dash.slider.get_attribute("aria-invalid") is None

    prompt = dash.root.get_by_label("Prompt", exact=True)
    prompt.fill("")
    dash.root.get_by_role("button", name="Run", exact=True).click()
    alert.wait_for()
    prompt.fill("The")
    alert.wait_for(state="hidden")
    dash.run(tokens=3)


def test_everything_can_be_done_with_the_keyboard(dash):
    page, held = dash.page, dash.data("budget")
    dash.slider.focus()
    page.keyboard.press("ArrowRight")
    dash.until(lambda: dash.data("budget") > held, "arrow keys move the budget")
    page.keyboard.press("End")
    dash.until(lambda: dash.data("budget") > 2 * held, "End gives everything")
    reached = set()
    dash.root.get_by_label("Prompt", exact=True).focus()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.name || document.activeElement.textContent")
        )
    assert {
        "Run",
        "Stop",
        "budget",
        "bits",
        "low_bits",
        "strategy",
        "decisions",
        "device",
        "prefetch",
    } <= reached
    cells = page.locator(".jp-Cell").count()
    dash.root.locator("select[name=strategy]").focus()
    for key in ("x", "d", "d", "a", "b"):  # JupyterLab's own shortcuts for cells
        page.keyboard.press(key)
    assert page.locator(".jp-Cell").count() == cells

    before = dash.data("run")
    dash.choose("device", "sd_card")
    dash.root.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    dash.until(lambda: dash.data("run") > before and dash.data("token") > 0, "Ctrl+Enter runs")
    dash.root.get_by_role("button", name="Stop", exact=True).focus()
    page.keyboard.press("Enter")
    dash.until(lambda: dash.data("running") == "false", "Enter on Stop stops")

    dash.root.locator(".moe-map canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    tip = dash.root.get_by_role("tooltip")
    assert "layer 1, expert 0" in tip.inner_text()
    page.keyboard.press("Escape")
    dash.text.focus()
    page.keyboard.press("ArrowLeft")
    assert "computing" in tip.inner_text()


KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
BUSY = f"""async (how) => {{
  {KERNEL}.commsOverSubshells = how;
  await new Promise((done) => setTimeout(done, 500));
  const code = "import time; time.sleep(60)";
  window.cell = {KERNEL}.requestExecute({{ code, store_history: false }});
}}"""
CELL_GOES_ON = "() => Promise.race([cell.done.then(() => false, () => false), true])"


def test_controls_work_while_a_cell_is_busy(dash):
    """Where the page and the kernel know subshells: JupyterLab 4.4 with ipykernel 7."""
    dash.choose("device", "hdd")
    dash.run(tokens=2000)
    dash.page.evaluate(BUSY, "perCommTarget")
    try:
        dash.choose("bits", "8")
        dash.until(lambda: dash.root.get_attribute("data-asked").startswith("8 bit"), "8 bit")
        dash.stop()
        assert dash.page.evaluate(CELL_GOES_ON)
        assert not dash.root.locator(".moe-deaf").is_visible()
    finally:
        dash.page.evaluate(f"() => {KERNEL}.interrupt()")


def test_a_kernel_that_is_busy_with_a_cell_is_noticed_and_can_be_interrupted(dash):
    dash.choose("device", "hdd")
    dash.run(tokens=2000)
    stop = dash.root.get_by_role("button", name="Stop", exact=True)
    dash.page.evaluate(BUSY, "disabled")  # as with an older kernel
    try:
        assert stop.get_attribute("aria-disabled") == "false"
        lies = dash.slider.bounding_box()
        dash.choose("bits", "8")
        deaf = dash.root.locator(".moe-deaf")
        deaf.wait_for()
        assert dash.slider.bounding_box() == lies  # it moves nothing under a hand
        assert "busy with a cell; changes apply when it ends" in deaf.inner_text()
        assert stop.get_attribute("aria-disabled") == "true", "it would not be heard"
        shot(dash.page, "lab-light-busy-kernel")
        deaf.get_by_role("button", name="Interrupt the cell").click()
        dash.until(lambda: dash.root.get_attribute("data-asked").startswith("8 bit"), "8 bit")
        deaf.wait_for(state="hidden")
        assert stop.get_attribute("aria-disabled") == "false"
        dash.stop()
    finally:
        dash.page.evaluate(f"() => {{ {KERNEL}.commsOverSubshells = 'perCommTarget' }}")


def test_shadows_move_while_it_writes_and_a_click_puts_one_in_force(dash):
    dash.choose("device", "hdd")
    dash.run(tokens=900)
    bars = dash.root.locator(".moe-shadow")
    dash.until(lambda: bars.count() >= 7, "this run, five others and the best")
    first = bars.all_inner_texts()
    dash.until(lambda: bars.all_inner_texts() != first, "they follow the run")
    assert dash.data("running") == "true"
    shot(dash.page, "lab-light-shadows")
    assert "Belady" in dash.root.locator("[data-shadow=belady]").get_attribute("title")
    begun = dash.data("token")
    dash.root.locator("[data-shadow=lfu]").click()
    dash.until(lambda: dash.root.get_attribute("data-strategy") == "lfu", "LFU is in force")
    dash.until(lambda: dash.data("changes") >= 1, "the next token has obeyed")
    dash.until(lambda: dash.data("token") > begun + 3, "it goes on")
    theme(dash.page, "Dark")
    dash.until(lambda: dash.root.get_attribute("data-theme") == "dark", "dark")
    shot(dash.page, "lab-dark-shadows")
    dash.stop()


def test_all_settings_at_once_are_points_and_a_click_applies_one(dash):
    dash.run(tokens=24)
    dash.until(lambda: dash.data("running") == "false", "the run has ended")
    wonder = dash.root.get_by_role("button", name="What if", exact=True)
    wonder.click()
    dash.root.get_by_role("button", name="All settings at once").click()
    plane = dash.root.locator(".moe-outlook")
    plane.wait_for(timeout=1000 * SECONDS)
    assert int(plane.get_attribute("data-points")) > 20
    shot(dash.page, "lab-light-all-settings")
    theme(dash.page, "Dark")
    dash.until(lambda: dash.root.get_attribute("data-theme") == "dark", "dark")
    shot(dash.page, "lab-dark-all-settings")
    point = plane.locator("g.point[data-name^='lfu, 4 bit'], g.point[data-name^='lru, 4 bit']").last
    strategy = point.get_attribute("data-name").split(",")[0]
    point.press("Enter")
    dash.until(lambda: dash.root.get_attribute("data-asked").startswith("4 bit"), "4 bit")
    dash.until(lambda: dash.root.get_attribute("data-strategy") == strategy, strategy)
    wonder.click()


def test_the_label_follows_after_a_drag_that_ends_where_it_began(dash):
    dash.drag(0.25)
    label = dash.root.locator("output.moe-value")
    dash.until(lambda: "· 24 experts at 16 bit" in label.inner_text(), "experts at 16 bit")
    dash.choose("bits", "4")
    dash.until(lambda: "· 81 experts at 4 bit" in label.inner_text(), "experts at 4 bit")


def test_hover_says_what_is_under_the_pointer(dash):
    dash.run(tokens=24)
    dash.until(lambda: dash.data("running") == "false", "24 tokens")
    dash.root.scroll_into_view_if_needed()
    tip = dash.root.get_by_role("tooltip")
    dash.root.locator(".moe-map canvas").hover()
    assert "uses" in tip.inner_text()
    dash.text.locator("span[data-token]").nth(3).hover()
    assert "token 3" in tip.inner_text()
    assert "computing" in tip.inner_text()
    shot(dash.page, "lab-light-hover")


def test_a_drafts_tokens_are_told_apart_and_its_length_acts_on_the_next(dash):
    dash.choose("draft_bits", "2")
    dash.choose("draft_length", "4")
    dash.run(tokens=900)
    rejected = dash.text.locator(".moe-rejected")
    dash.until(lambda: rejected.count() > 1, "a rejected token")
    assert dash.text.locator("span.drafted").count() > 3
    tile = dash.root.locator(".moe-tile").filter(has_text="drafts accepted")
    assert "tokens a pass" in tile.inner_text()
    assert dash.root.bounding_box()["height"] <= 800
    shot(dash.page, "lab-light-draft")
    before = dash.data("changes")
    dash.choose("draft_length", "2")
    dash.until(lambda: dash.data("changes") == before + 1, "the next draft has obeyed")
    theme(dash.page, "Dark")
    dash.until(lambda: dash.root.get_attribute("data-theme") == "dark", "dark")
    shot(dash.page, "lab-dark-draft")
    dash.until(lambda: dash.data("passes") > 12, "passes")
    dash.stop()
    said = kernel(
        dash.page, "print([n for _, n in lab.run.draft_lengths], lab.run.prompt + lab.run.text)"
    )
    assert said.startswith("[4, 2] ")
    copied = dash.text.evaluate(
        """node => { const all = new Range(); all.selectNodeContents(node);
            getSelection().removeAllRanges(); getSelection().addRange(all);
            const text = `${getSelection()}`; getSelection().removeAllRanges(); return text; }"""
    )
    assert copied.split() == said.removeprefix("[4, 2] ").split()
    rejected.first.click()
    note = dash.root.locator(".moe-for-draft")
    dash.until(note.is_visible, "what the token cost")
    assert "drafted accepted" in note.inner_text()
    shot(dash.page, "lab-dark-draft-blame")
    dash.choose("draft_bits", "0")
    theme(dash.page, "Light")


def test_dark_theme_and_all_in_one_view(dash):
    theme(dash.page, "Dark")
    dash.until(lambda: dash.root.get_attribute("data-theme") == "dark", "dark colours")
    dash.choose("device", "tx2_ssd")
    dash.choose("low_bits", "2")
    dash.choose("prefetch", "1")
    dash.run(tokens=900)
    dash.until(lambda: dash.data("token") > 8, "tokens")
    begun, seq = time.monotonic(), dash.data("seq")
    dash.page.wait_for_timeout(3000)
    assert (dash.data("seq") - seq) / (time.monotonic() - begun) > 2, "frames keep coming"
    assert dash.root.bounding_box()["height"] <= 800
    assert dash.inked(".moe-map") > 3
    assert dash.inked(".moe-bars") > 3
    dash.root.scroll_into_view_if_needed()
    shot(dash.page, "lab-dark")
    dash.stop()


def test_running_the_cell_again_leaves_no_thread_behind(dash):
    assert publishers(dash.page) == 1
    for _ in range(2):
        run_cell(dash.page, "dashboard = lab.dashboard(); dashboard")
        dash.until(lambda: publishers(dash.page) == 1, "one publisher")
    Dash(dash.page).choose("bits", "8")
    dash.until(lambda: dash.root.locator("select[name=bits]").input_value() == "8", "alive")


def publishers(page):
    """Ask the kernel how many dashboards are being published."""
    count = (
        "import threading\nprint(sum(t.name == 'moelab-dashboard' for t in threading.enumerate()))"
    )
    return int(kernel(page, count))


def test_running_the_cell_again_lets_the_former_lab_go(dash):
    cell = "import moelab\nlab = moelab.open('demo', progress=False)\nlab.dashboard()"
    for _ in range(2):
        run_cell(dash.page, cell)
        dash.until(lambda: labs(dash.page) == 1, "one lab")
    run_cell(dash.page, "dashboard = lab.dashboard(); dashboard")
    dash.until(lambda: dash.data("seq") is not None, "a frame")


def labs(page):
    """Ask the kernel how many labs there are, the garbage collected."""
    count = "import gc\nfrom moelab.lab import Lab\ngc.collect()\n"
    return int(kernel(page, count + "print(sum(type(o) is Lab for o in gc.get_objects()))"))


DRAWN = """(root, ms) => new Promise((done) => {
  const begun = performance.now();
  let drawn = 0;
  const watch = new MutationObserver(() => drawn++);
  watch.observe(root, { attributes: true, attributeFilter: ["data-seq"] });
  setTimeout(() => {
    watch.disconnect();
    done((1000 * drawn) / (performance.now() - begun));
  }, ms);
})"""
SYNTHETIC = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_lab import FakeLab
fake = FakeLab(layers=%d, experts=%d, top_k=%d, token_ms=0.2)
run = fake.start("Once", max_new_tokens=100_000)
from moelab.widgets import Dashboard
Dashboard(fake)"""


@pytest.mark.parametrize(("layers", "experts", "top_k", "least"), [(8, 32, 4, 10), (48, 128, 8, 7)])
def test_frames_are_drawn_often_enough(dash, layers, experts, top_k, least):
    """Frames a second of a processor that is shared with others, in proportion to our part of it.

    At 48 x 128, 11 were measured with nothing beside it and 7.2 to 7.4 beside other tests.
    """
    before = share()
    run_cell(dash.page, SYNTHETIC % (layers, experts, top_k))
    try:
        dash.until(lambda: dash.data("running") == "true" and dash.data("token") > 100, "tokens")
        drawn = dash.root.evaluate(DRAWN, 4000)
        shot(dash.page, f"synthetic-{layers}-{experts}")
        kernel(dash.page, "run.stop()")
        dash.until(lambda: dash.data("running") == "false", "stopped")
        ours = (before + share()) / 2
        record("frames", layers=layers, experts=experts, per_s=drawn, share=ours)
        assert drawn >= least * ours
    finally:
        run_cell(dash.page, "dashboard = lab.dashboard(); dashboard")
        dash.until(lambda: dash.root.get_attribute("data-running") == "false", "the demo")


SLIDE = """async (root, [value, budget]) => {
  const slider = root.querySelector("input[name=budget]"),
    wanted = `${Math.fround(budget)}`;
  let begun;
  const drawn = new Promise((done) => {
    const watch = new MutationObserver(() => {
      if (root.dataset.under !== wanted) return;
      watch.disconnect();
      done(performance.now() - begun);
    });
    watch.observe(root, { attributes: true, attributeFilter: ["data-under"] });
  });
  slider.value = value;
  begun = performance.now();
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  return drawn;
}"""


def test_the_first_token_under_a_new_budget_is_drawn_within_a_quarter_of_a_second(dash):
    """From the slider's event to that token on the screen, at our part of the processor."""
    page = dash.page
    total = int(kernel(page, "print(lab.info()['all_experts_bytes'])"))
    start = "run = lab.start('Once upon a time', max_new_tokens=5000, ignore_eos=True)"
    took, before = [], share()
    kernel(page, start)
    dash.until(lambda: dash.data("running") == "true" and dash.data("token") > 20, "tokens")
    for value in (120, 220, 140, 240, 160, 260, 180, 280, 200, 300, 210):
        took.append(dash.root.evaluate(SLIDE, [value, round(total * value / 400)]))
        page.wait_for_timeout(300)
    token = float(kernel(page, "print(run.summary()['tpot_ms_median'])"))
    figures = {"median_ms": statistics.median(took), "most_ms": max(took), "token_ms": token}
    dash.stop()
    ours = (before + share()) / 2
    record("slider to token", **figures, share=ours)
    assert statistics.median(took) <= 250 / ours


def test_twenty_seconds_of_changing_settings_leave_nothing_behind(dash):
    """The short form of soak.py, which goes on for an hour."""
    kernel(dash.page, "lab.update(device='sd_card')")
    soak = Soak(dash.page)
    soak.last(6)  # what is needed once
    soak.rows.clear()
    soak.last(14, every=3.5)
    first, last = soak.rows[0], soak.rows[-1]
    record("soak", **{name: slope for name, (slope, _) in growth(soak.rows).items()})
    assert soak.changes >= 2
    assert last["threads"] <= first["threads"] + 2
    assert last["files"] <= first["files"] + 3
    assert last["listeners"] <= first["listeners"] + 60
    assert last["nodes"] <= first["nodes"] + 1000
    assert last["heap_mb"] <= first["heap_mb"] + 8
    if dash.data("running") == "true":
        dash.stop()
    dash.until(lambda: dash.data("running") == "false", "at rest")
    dash.choose("measure_kl", "0")


def test_a_decision_and_its_parameters_are_changed_in_the_middle_of_a_run(dash):
    dash.choose("device", "nvme")
    dash.open()
    assert dash.root.locator(".moe-parameter").count() == 0, "least recently used has none"
    dash.run(tokens=2000)
    marks = dash.data("changes")
    dash.choose("decide_evict", "hobbit")
    slider = dash.root.locator("input[name=w_lru]")
    slider.wait_for()
    assert dash.root.get_attribute("data-strategy") == "lru*"
    assert "LRU but for evict" in dash.root.locator(".moe-about").inner_text()
    dash.until(lambda: dash.data("changes") > marks, "a mark on the time axis")
    shot(dash.page, "lab-light-decisions")

    box = slider.bounding_box()
    dash.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    dash.page.mouse.down()
    for i in range(1, 9):
        x = box["x"] + box["width"] * (0.25 + 0.06 * i)
        dash.page.mouse.move(x, box["y"] + box["height"] / 2)
        dash.page.wait_for_timeout(60)
    dash.page.mouse.up()
    held = "print(lab.settings.strategy.evict.w_lru)"
    shown = float(slider.input_value())
    assert shown > 0.6
    dash.until(lambda: float(kernel(dash.page, held)) == shown, "the weight in the lab")
    slider.press("ArrowLeft")
    dash.until(lambda: float(kernel(dash.page, held)) == round(shown - 0.05, 2), "one step less")
    number = dash.root.locator("input[name=w_lru_number]")
    number.fill("0.125")
    number.press("Enter")
    dash.until(lambda: float(kernel(dash.page, held)) == 0.125, "the number typed")
    assert dash.data("running") == "true"

    dash.choose("decide_evict", "lru")
    slider.wait_for(state="detached")
    dash.stop()


def test_a_policy_of_ones_own_is_shown_and_can_be_tuned(dash):
    dash.open()
    own = """from moelab.strategies import Evict, Parameter
class Homely(Evict):
    parameters = (Parameter("near", "how much a low index counts", low=0, high=4, step=1),)
    near = 1
    def score(self, view):
        return -self.near * view.index_of
lab.update(evict=Homely())"""
    assert "Error" not in kernel(dash.page, own)
    chosen = dash.root.locator("select[name=decide_evict]")
    shown = "s => s.selectedOptions[0].textContent"
    dash.until(lambda: chosen.evaluate(shown) == "Homely", "its class name")
    dash.root.locator("input[name=near]").press("ArrowRight")
    near = "print(lab.settings.strategy.evict.near)"
    dash.until(lambda: kernel(dash.page, near) == "2", "its parameter")
    dash.run(tokens=8)
    dash.until(lambda: dash.data("running") == "false", "a run with it")


def test_an_error_moves_nothing_lies_beside_its_control_and_can_be_put_away(dash):
    dash.choose("strategy", "hobbit")
    dash.open()
    t1, alert = dash.root.locator("input[name=t1]"), dash.root.get_by_role("alert")
    t1.wait_for()
    before, held = dash.root.locator(".moe-figures").bounding_box(), t1.input_value()
    t1.press("End")
    alert.wait_for()
    assert "t1" in alert.inner_text()
    assert t1.get_attribute("aria-invalid") == "true"
    assert dash.root.locator(".moe-figures").bounding_box() == before
    at, of = alert.bounding_box(), t1.bounding_box()
    assert 0 < at["y"] - of["y"] - of["height"] < 20
    dash.until(lambda: t1.input_value() == held, "the thumb shows what holds")
    shot(dash.page, "lab-light-error-parameter")
    dash.root.get_by_role("button", name="Dismiss").press("Enter")
    alert.wait_for(state="hidden")
    dash.until(lambda: t1.get_attribute("aria-invalid") is None, "no more marked")
    t1.press("End")
    alert.wait_for()
    t1.press("Home")
    alert.wait_for(state="hidden")


def test_the_tip_says_why_a_resident_expert_would_stay_or_go(dash):
    dash.choose("strategy", "hobbit")
    dash.run(tokens=30)
    dash.until(lambda: dash.data("running") == "false", "30 tokens")
    canvas, tip = dash.root.locator(".moe-map canvas"), dash.root.get_by_role("tooltip")
    canvas.focus()
    for _ in range(16):
        dash.page.keyboard.press("ArrowRight")
        if "bit" in tip.inner_text():
            break
    why = tip.locator(".moe-why")
    why.wait_for()
    assert "HOBBIT" in why.inner_text()
    assert why.locator("dt").count() >= 4
    values = why.locator("dd:not([class])").all_inner_texts()
    assert all(float(value) >= 0 for value in values)
    assert "HOBBIT" in canvas.get_attribute("aria-label")
    shot(dash.page, "lab-light-why")
    dash.page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_every_strategy_fits_the_page(dash):
    dash.open()
    names = dash.root.locator("select[name=strategy] option:not([disabled])")
    alert = dash.root.get_by_role("alert")

    def told(name):
        return dash.root.get_attribute("data-strategy") == name or alert.is_visible()

    for name in names.evaluate_all("all => all.map(o => o.value)"):
        dash.choose("strategy", name)
        dash.until(lambda n=name: told(n), name)
        wide, room = dash.root.evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert wide <= room, name
        assert dash.root.locator(".moe-about").inner_text(), name


def test_a_reload_shows_the_current_state(dash):
    dash.choose("bits", "8")
    dash.open()
    dash.run(tokens=20)
    dash.until(lambda: dash.data("running") == "false", "a text")
    before = dash.text.inner_text()
    dash.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    dash.page.wait_for_timeout(2000)
    reload(dash.page, ".moe-dash")
    again = Dash(dash.page)
    again.until(lambda: again.text.inner_text() == before, "the same text")
    assert again.root.locator(".moe-decide").is_visible(), "the decisions are still open"
    assert again.root.locator("select[name=bits]").input_value() == "8"


def test_a_budget_can_follow_the_machine_until_it_is_set_by_hand(dash):
    auto = dash.root.get_by_label("auto")
    assert not auto.is_checked()
    held = dash.data("budget")
    auto.check()
    dash.until(lambda: dash.data("budget") > 1.5 * held, "it takes what is free")
    assert kernel(dash.page, "print(lab.follows)") == "True"
    shot(dash.page, "lab-light-auto")
    dash.drag(0.3)
    dash.until(lambda: not auto.is_checked(), "a drag ends it")
    assert kernel(dash.page, "print(lab.follows)") == "False"


def test_a_model_that_is_not_here_is_looked_at_from_the_list(dash):
    pick, line = dash.root.get_by_label("Model", exact=True), dash.root.locator(".moe-opening")
    was = pick.input_value()
    pick.select_option("granite-3.1-1b-a400m")
    dash.until(lambda: "timing this machine" in line.inner_text(), "it says what is being done")
    ghost = line.get_by_role("button", name="Open a ghost of it")
    dash.until(ghost.is_visible, "timed")
    assert "tokens/s" in line.inner_text()
    assert "(modelled)" in line.inner_text()
    dash.until(
        lambda: line.locator("img").evaluate("i => i.complete && i.naturalWidth") > 300, "drawn"
    )
    shot(dash.page, "lab-light-fit")
    line.get_by_role("button", name="Dismiss").click()
    dash.until(lambda: not line.is_visible(), "gone")
    dash.until(lambda: pick.input_value() == was, "the model shown stays")


def test_a_restart_of_the_kernel_is_said(dash, live_page):
    """The last test on this page: it leaves no lab behind."""
    dash.page.evaluate(f"() => {KERNEL}.restart()")
    words = dash.root.locator(".moe-deaf")
    dash.until(lambda: "is gone: run its cell again" in words.inner_text(), "its kernel is gone")
    dash.choose("bits", "8")
    assert not words.get_by_role("button").is_visible(), "there is no cell to interrupt"
    # JupyterLab's own, where it closes a widget's comm while its kernel is away.
    live_page.faults[:] = [fault for fault in live_page.faults if fault != "Cannot send"]
