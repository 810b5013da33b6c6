"""What a person sees and does with several runs: save, sort, compare, copy, ask what if."""

from __future__ import annotations

import re

import pytest

import moelab
from browser import kernel, shot
from test_browser import dash, theme  # noqa: F401 the first is a fixture

SLIDE = """(slider, share) => {
  slider.value = share * slider.max;
  for (const kind of ["input", "change"]) slider.dispatchEvent(new Event(kind));
}"""
ALL_BYTES = 6 * 16 * 221_184
pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]
CELLS = 1  # the dashboard


class Drawer:
    """The drawer of runs, opened."""

    def __init__(self, dash):  # noqa: F811
        self.dash, self.node = dash, dash.root.locator(".moe-runs")
        if not self.node.is_visible():
            dash.root.get_by_role("button", name="Saved runs", exact=False).first.click()
        self.node.wait_for()
        self.what = dash.root.get_by_role("group", name="What if", exact=True)
        if not self.what.is_visible():
            dash.root.get_by_role("button", name="What if", exact=True).click()
        self.beside = self.node.locator(".moe-beside")

    def save(self):
        before = int(self.node.get_attribute("data-saved") or 0)
        self.dash.root.get_by_role("button", name="Save", exact=True).click()
        self.until(lambda: self.count() == before + 1, "one run more")

    def count(self):
        return int(self.node.get_attribute("data-saved") or 0)

    def until(self, condition, what):
        self.dash.until(condition, what)

    def column(self, key):
        return self.node.locator(f"tbody td[data-key={key}]").all_inner_texts()

    def names(self):
        rows = self.node.locator(".moe-both tbody tr")
        return [rows.nth(i).get_attribute("data-name") for i in range(rows.count())]

    def figures(self, key):
        """A figure of the two beside each other, and the difference."""
        return self.beside.locator(f"td[data-key={key}]").all_inner_texts()

    def set(self, *, share=None, bits=16, device="disk"):
        """Settings, and wait until the lab has them."""
        dash = self.dash  # noqa: F811
        dash.choose("bits", str(bits))
        dash.choose("device", device)
        if share is not None:
            dash.slider.evaluate(SLIDE, share)
            near = lambda: abs(dash.data("budget") / ALL_BYTES - share) < 0.012  # noqa: E731
            self.until(near, f"a budget of {share:.1%}")
        asked = f"{bits} bit, {device}"
        self.until(lambda: dash.root.get_attribute("data-asked") == asked, asked)

    def run(self, tokens):
        self.dash.run(tokens=tokens)
        self.until(lambda: self.dash.data("running") == "false", "the run has ended")


@pytest.fixture
def drawer(dash):  # noqa: F811
    drawer = Drawer(dash)
    while drawer.count():
        before = drawer.count()
        drawer.node.get_by_role("button", name="Remove").first.click()
        drawer.until(lambda n=before: drawer.count() == n - 1, "one run less")
    yield drawer
    drawer.node.get_by_role("button", name="Close saved runs").click()


def test_two_runs_are_saved_sorted_compared_and_copied(drawer):
    dash, page = drawer.dash, drawer.dash.page  # noqa: F811
    drawer.set(share=0.5)
    drawer.run(24)
    drawer.save()
    drawer.set(bits=2, device="hdd")
    drawer.run(24)
    drawer.save()
    first, second = drawer.names()
    assert re.fullmatch(r"lru, [45].* %, 16 bit, disk", first)
    assert re.fullmatch(r"lru, [45].* %, 2 bit, HDD", second)
    assert drawer.node.locator(".moe-badge").all_inner_texts() == ["measured", "emulated"]

    memory = drawer.node.locator("thead button", has_text="peak MB")
    memory.focus()
    page.keyboard.press("Enter")
    drawer.until(lambda: drawer.names() == [second, first], "sorted by memory")
    assert page.evaluate("document.activeElement.textContent").startswith("peak MB"), "focus stays"
    page.keyboard.press("Enter")
    drawer.until(lambda: drawer.names() == [first, second], "the other way round")
    assert drawer.node.locator("th[aria-sort=descending]").inner_text().startswith("peak MB")

    for box in drawer.node.locator(".moe-both input[type=checkbox]").all():
        box.check()
    drawer.beside.wait_for()
    assert drawer.beside.locator("mark").count() == 2, "two bits write something else"
    at = int(drawer.beside.get_attribute("data-at"))
    assert f"first different token: {at}" in drawer.beside.inner_text()
    *_, difference = drawer.figures("tokens_per_s")
    assert difference == "", "no difference of a measured and an emulated speed"
    *_, difference = drawer.figures("peak_resident_bytes")
    assert difference.startswith("\N{MINUS SIGN}")
    shot(page, "compare-light")

    points = drawer.node.locator(".moe-plane .point")
    assert points.count() == 2
    assert points.nth(0).locator("path").last.get_attribute("d") != points.nth(1).locator(
        "path"
    ).last.get_attribute("d"), "measured and emulated differ by shape"
    points.nth(0).focus()
    tip = dash.root.get_by_role("tooltip")
    for words in ("tokens/s", "hit ratio", "read/token", "stall share", "peak MB", "mean KL"):
        assert words in tip.inner_text()
    pressed = points.nth(0).get_attribute("aria-pressed")
    page.keyboard.press("Enter")
    drawer.until(lambda: points.nth(0).get_attribute("aria-pressed") != pressed, "Enter unticks")
    drawer.beside.wait_for(state="hidden")

    name = drawer.node.get_by_role("textbox", name="Name of run 2")
    name.fill("two bits & an HDD")
    name.press("Enter")
    drawer.until(lambda: drawer.names()[1] == "two bits & an HDD", "renamed")
    drawer.node.get_by_role("button", name="Code of two bits").click()
    code = drawer.node.locator(".moe-copy pre").inner_text()
    assert 'moelab.open("demo"' in code
    assert "bits=2" in code
    assert 'device="hdd"' in code
    compile(code, "copied", "exec")
    said = drawer.node.locator(".moe-copy [role=status]")
    drawer.until(lambda: "cop" in said.inner_text().lower(), "copied, or ready to be")
    drawer.node.get_by_role("button", name="Close code").click()


def test_export_saves_the_newest_run_as_a_page_that_opens_without_a_network(drawer, tmp_path):
    dash, page = drawer.dash, drawer.dash.page  # noqa: F811
    drawer.set(share=0.5)
    drawer.run(12)
    with page.expect_download() as coming:
        dash.root.get_by_role("button", name="Export").click()
    assert coming.value.suggested_filename == "moelab-12-tokens.html"
    path = tmp_path / "run.html"
    coming.value.save_as(path)
    text = kernel(page, "print(lab.run.text)")
    assert moelab.Recording.load(path).text.strip() == text
    context = page.context.browser.new_context(offline=True)
    opened = context.new_page()
    opened.goto(path.as_uri())
    opened.locator(".moe-dash[data-past]").wait_for()
    assert opened.get_by_role("slider", name="Token shown").get_attribute("max") == "11"
    context.close()


def test_what_if_makes_the_run_again_and_shows_both(drawer):
    dash, page, what = drawer.dash, drawer.dash.page, drawer.what  # noqa: F811
    theme(page, "Dark")
    drawer.set(share=0.5)
    drawer.run(24)
    again = what.get_by_role("button", name="Make it again")
    drawer.until(lambda: again.get_attribute("aria-disabled") == "true", "nothing changed yet")
    dash.choose("bits", "2")
    drawer.until(lambda: what.get_attribute("data-changes") == "bits=2", "what has changed")
    again.focus()
    page.keyboard.press("Enter")
    drawer.until(lambda: what.get_attribute("data-state") == "done", "made again")
    drawer.beside.wait_for()
    assert "what if bits=2" in drawer.names()
    first, second, difference = drawer.figures("kl_mean")
    assert float(second) > 1e-3
    assert first == "0"
    assert difference.startswith("+")
    assert drawer.beside.locator("mark").count(), "the first different token is marked"
    texts = drawer.beside.locator(".moe-text").all_inner_texts()
    assert texts[0] != texts[1]
    drawer.node.scroll_into_view_if_needed()
    shot(page, "compare-dark-what-if")

    drawer.set()  # as it was: what is kept is all that differs
    dash.root.locator(".moe-map canvas").click(position={"x": 60, "y": 30})
    keep = what.get_by_role("checkbox")
    drawer.until(keep.is_enabled, "an expert is chosen on the map")
    keep.check()
    what.get_by_role("combobox", name="Bits it is pinned at").select_option("8")
    again.click()
    drawer.until(lambda: drawer.count() == 3, "made again with an expert pinned")
    assert any("pin={(" in name for name in drawer.names())
    page.keyboard.press("Escape")


def test_a_what_if_can_be_stopped_and_a_refusal_is_drawn(drawer):
    dash, what = drawer.dash, drawer.what  # noqa: F811
    drawer.set(share=0.5)
    drawer.run(200)
    drawer.set(share=0.06, device="hdd")
    again = what.get_by_role("button", name="Make it again")
    drawer.until(lambda: again.get_attribute("aria-disabled") == "false", "something changed")
    again.click()
    drawer.until(lambda: what.get_attribute("data-state") == "running", "under way")
    dash.root.get_by_role("button", name="Run", exact=True).click()
    alert = dash.root.locator(".moe-error")
    alert.wait_for()
    assert "a run is going on" in alert.inner_text()
    what.get_by_role("button", name="Stop").click()
    drawer.until(lambda: what.get_attribute("data-state") == "done", "stopped")
    dash.root.get_by_role("button", name="Dismiss").click()

    canvas = dash.root.locator(".moe-map canvas")
    canvas.click(position={"x": 60, "y": 30})
    drawer.set(share=0.026)  # room for one token's two experts, and not for a third beside them
    keep = what.get_by_role("checkbox")
    drawer.until(keep.is_enabled, "an expert is chosen on the map")
    keep.check()
    again.click()
    refused = drawer.node.get_by_role("alert")
    refused.wait_for()
    assert "beside 1 pinned expert" in refused.inner_text()
    canvas.click(position={"x": 60, "y": 30})
