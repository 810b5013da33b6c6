"""For everyone: names, keys, contrast, high contrast, little motion, few words, any screen.

The dashboard stands on a bare page here, its kernel replaced by a double that keeps what it is
told: none of this needs JupyterLab.
"""

from __future__ import annotations

import base64
import time

import pytest

from browser import ARTIFACTS, shot
from fake_lab import FakeLab
from moelab.runs.saved import SavedRuns
from moelab.widgets import Dashboard

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = """<!doctype html><html lang="en"><head><title>moelab</title></head>
<body style="margin:0;background:var(--jp-layout-color0,#fff)"><main></main></body></html>"""
START = """async ({ state, esm, css }) => {
  document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
  const url = URL.createObjectURL(new Blob([esm], { type: "text/javascript" })),
    bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)),
    heard = {};
  const raw = (frame) => ({
    ...frame,
    values: bytes(frame.values),
    map: Object.fromEntries(Object.entries(frame.map).map(([k, v]) => [k, bytes(v)])),
  });
  window.model = {
    sent: [],
    get: (key) => state[key],
    set: (key, value) => {
      state[key] = key === "frame" ? raw(value) : value;
      for (const hear of heard[`change:${key}`] ?? []) hear();
    },
    hear: (content, raw) => {
      const buffers = raw.map((text) => new DataView(bytes(text).buffer));
      for (const hear of heard["msg:custom"] ?? []) hear(content, buffers);
    },
    save_changes: () => {},
    send: (said) => {
      model.sent.push(said);
      const answer = () => model.set("controls", { ...state.controls, answered: said.n });
      if (said.n) queueMicrotask(answer);
    },
    on: (event, hear) => (heard[event] ??= []).push(hear),
    off: (event, hear) => (heard[event] = (heard[event] ?? []).filter((h) => h !== hear)),
  };
  state.frame = raw(state.frame);
  const { default: widget } = await import(url);
  widget.render({ model, el: document.querySelector("main") });
}"""
DARK = ":root { --jp-layout-color0: #111; --jp-ui-font-color0: rgba(255, 255, 255, 1); }"


def coded(frame):
    """A frame as JSON can carry it."""
    text = {k: base64.b64encode(v).decode() for k, v in frame["map"].items()}
    return {**frame, "values": base64.b64encode(frame["values"]).decode(), "map": text}


class Bare:
    """A dashboard of a made-up lab on a page of its own."""

    def __init__(self, page, *, dark=False, **lab):
        self.page, self.lab = page, FakeLab(token_ms=0, **lab)
        self.lab.start("Once upon a time", max_new_tokens=60, measure_kl=True).join()
        self.lab.update(low_bits=4, prefetch=1)
        self.dashboard = Dashboard(self.lab)
        state = self.dashboard.get_state()
        kept = {k: state[k] for k in ("options", "controls", "form", "error", "runs") if k in state}
        kept["frame"] = coded(self.dashboard.frame)
        page.set_content(PAGE)
        if dark:
            page.add_style_tag(content=DARK)
        page.evaluate(START, {"state": kept, "esm": Dashboard._esm, "css": Dashboard._css})
        self.root = page.locator(".moe-dash")
        page.wait_for_timeout(100)

    def more(self, **changes):
        """A new frame, after one more token."""
        self.lab.step(len(self.lab.run.tokens))
        self.dashboard._seq += 1
        frame = {"seq": self.dashboard._seq, **self.dashboard._frames().build(), **changes}
        self.page.evaluate("frame => model.set('frame', frame)", coded(frame))

    def go_back(self):
        """Show the first tokens, with an expert's life beside: the kernel sends its recording."""
        told = []
        self.dashboard._queries._send = lambda content, raw=(): told.append((content, raw))
        self.dashboard._queries.hear({"do": "recording"})
        while not told:
            time.sleep(0.01)
        content, raw = told[0]
        raw = [base64.b64encode(bytes(b)).decode() for b in raw]
        self.root.get_by_label("Token shown").press("ArrowLeft")
        self.page.evaluate("([content, raw]) => model.hear(content, raw)", [content, raw])
        self.root.locator(".moe-map canvas").click(position={"x": 60, "y": 12})
        self.root.get_by_label("Token shown").press("Home")
        self.page.wait_for_timeout(300)
        assert self.root.get_attribute("data-past") == "0"

    def compare(self):
        """Open the drawer of runs, with two saved and beside each other."""
        self.lab.saved, told = SavedRuns(), []
        for device in "disk", "hdd":
            self.lab.update(device=device)
            run = self.lab.start("Once upon a time", max_new_tokens=20, measure_kl=True)
            run.join()
            self.lab.saved.add(run)
        runs = self.dashboard._drawer
        runs._send = told.append
        runs.refresh()
        set_to = "([name, value]) => model.set(name, value)"
        self.page.evaluate(set_to, ["runs", self.dashboard.runs])
        self.page.evaluate("model.set('form', { ...model.get('form'), runs: true, whatif: true })")
        for box in self.root.locator(".moe-table input[type=checkbox]").all():
            box.check()
        runs.hear({"ask": "beside", "names": list(self.lab.saved)})
        self.page.evaluate("content => model.hear(content, [])", told[-1])
        self.root.locator(".moe-beside").wait_for()

    def sent(self, do):
        return [m for m in self.page.evaluate("model.sent") if m["do"] == do]


def tree(page):
    """What a screen reader is told: every node that is not passed over."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    for node in (n for n in nodes if not n["ignored"]):
        about = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
        yield node["role"]["value"], node.get("name", {}).get("value", ""), about


def test_whatever_takes_the_focus_has_a_role_and_a_name_of_its_own(page):
    bare = Bare(page)
    bare.root.get_by_role("button", name="decisions").click()
    page.evaluate("model.set('form', { ...model.get('form'), decisions: true })")
    bare.go_back()
    focusable = [(role, name) for role, name, about in tree(page) if about.get("focusable")]
    assert len(focusable) > 20
    assert all(name.strip() for _, name in focusable), focusable
    allowed = {"RootWebArea", "textbox", "combobox", "button", "slider", "spinbutton", "checkbox"}
    allowed |= {"radio", "application", "group", "gridcell", "MenuListPopup", "option", "menuitem"}
    assert {role for role, _ in focusable} <= allowed
    own = [pair for pair in focusable if pair[0] not in {"option", "gridcell", "MenuListPopup"}]
    assert len(own) == len(set(own)), "two controls of one name"


FOCUSED = """() => {
  window.reached ??= new Set();
  const shown = document.activeElement,
    ring = shown.closest(".moe-switch label") ?? shown,
    { outlineStyle, outlineWidth } = getComputedStyle(ring);
  if (reached.has(shown) || !shown.closest(".moe-dash")) return null;
  reached.add(shown);
  return [shown.outerHTML.slice(0, 80), outlineStyle === "none" ? 0 : parseFloat(outlineWidth)];
}"""


def test_the_tab_key_reaches_every_control_and_the_focus_is_seen(page):
    bare = Bare(page)
    page.evaluate("model.set('form', { ...model.get('form'), decisions: true })")
    wanted = bare.root.locator(
        ":is(button, input:not([type=radio]), select, textarea, canvas, [tabindex='0'])"
        ":not(:disabled):visible"
    ).count()
    page.locator("body").press("Tab")
    seen = []
    while focused := page.evaluate(FOCUSED):
        seen.append(focused)
        page.keyboard.press("Tab")
    assert not [what for what, ring in seen if ring < 2]
    assert len(seen) == wanted + 1, "and one radio button for its group"


CONTRAST = """() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number);
    const scale = c.startsWith("color(") ? 255 : 1;
    return [m[0] * scale, m[1] * scale, m[2] * scale, m[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (node) => { const layers = [];
    for (let n = node; n; n = n.parentElement)
      layers.push(parse(getComputedStyle(n).backgroundColor));
    return layers.reverse().reduce((b, a) => over(a, b), [255, 255, 255, 1]); };
  const low = [];
  const walk = document.createTreeWalker(document.querySelector(".moe-dash"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode, node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility({ visibilityProperty: true })) continue;
    if (node.closest(":disabled, [aria-disabled=true], option, optgroup")) continue;
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const big = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    let faint = 1;
    for (let n = node; n; n = n.parentElement) faint *= getComputedStyle(n).opacity;
    const under = ground(node), ink = parse(style.color);
    ink[3] *= faint;
    const [a, b] = [light(over(ink, under)), light(under)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (big ? 3 : LEAST))
      low.push([node.className || node.tagName, text.data.slice(0, 30), +ratio.toFixed(2)]);
  }
  return low;
}"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("contrast", "least"), [("no-preference", 4.5), ("more", 7)])
def test_text_stands_out_from_its_ground(page, dark, contrast, least):
    page.emulate_media(contrast=contrast)
    bare = Bare(page, dark=dark)
    page.evaluate("model.set('form', { ...model.get('form'), decisions: true })")
    page.wait_for_timeout(300)
    assert bare.root.get_attribute("data-theme") == ("dark" if dark else "light")
    check = CONTRAST.replace("LEAST", str(least))
    assert not page.evaluate(check)
    bare.go_back()
    assert not page.evaluate(check)
    shot(page, f"bare-{'dark' if dark else 'light'}-{contrast}")
    bare.compare()
    assert not page.evaluate(check)
    bare.root.screenshot(path=ARTIFACTS / f"runs-{'dark' if dark else 'light'}-{contrast}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_with_forced_colours_nothing_is_lost(page, scheme):
    page.emulate_media(forced_colors="active", color_scheme=scheme)
    bare = Bare(page)
    page.wait_for_timeout(200)
    assert bare.root.get_attribute("data-theme") == scheme
    drawn = """(root, of) => [...root.querySelectorAll(of)].filter((node) => {
      const { backgroundColor, backgroundImage } = getComputedStyle(node);
      return backgroundImage !== "none" || !/, 0\\)$|^transparent$/.test(backgroundColor);
    }).length"""
    assert bare.root.evaluate(drawn, ".moe-legend .moe-cell") >= 8, "the legend has its colours"
    assert bare.root.evaluate(drawn, "span[data-token]") >= 20, "tokens are shaded"
    assert bare.root.evaluate(drawn, ".moe-figures .moe-bar") == 2
    assert not page.evaluate(CONTRAST.replace("LEAST", "4.5"))
    shot(page, f"bare-forced-{scheme}")
    bare.compare()
    assert not page.evaluate(CONTRAST.replace("LEAST", "4.5"))
    bare.root.locator(".moe-runs").scroll_into_view_if_needed()
    bare.root.screenshot(path=ARTIFACTS / f"runs-forced-{scheme}.png")


def test_nothing_moves_by_itself_where_motion_is_not_welcome(page):
    page.emulate_media(reduced_motion="reduce")
    bare = Bare(page)
    bare.more()
    page.wait_for_timeout(300)  # until it is drawn
    picture = "document.querySelector('.moe-map canvas').toDataURL()"
    before = page.evaluate(picture)
    page.wait_for_timeout(600)
    assert page.evaluate(picture) == before
    for part in page.evaluate("""() => [...document.querySelectorAll(".moe-dash *")]
          .map((node) => getComputedStyle(node).transitionDuration)"""):
        assert part == "0s"


SPOKEN = """() => {
  window.spoken = [];
  const live = [...document.querySelectorAll("[aria-live], output, [role=status], [role=alert]")]
    .filter((node) => node.getAttribute("aria-live") !== "off");
  for (const node of live) new MutationObserver(() => spoken.push(node.textContent))
    .observe(node, { childList: true, characterData: true, subtree: true });
  return live.length;
}"""


def test_a_run_is_announced_when_it_begins_and_ends_and_not_between(page):
    bare = Bare(page)
    assert page.evaluate(SPOKEN) >= 1
    for _ in range(20):
        bare.more(running=True)
        page.wait_for_timeout(40)
    slider = bare.root.locator("input[name=budget]")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")  # the slider says its own value
    bare.more(running=False)
    page.wait_for_timeout(400)
    assert page.evaluate("spoken") == ["running", "all 60 tokens asked for"]


def test_a_number_of_tokens_out_of_reach_is_brought_back_and_said(page):
    bare = Bare(page)
    field = bare.root.get_by_role("spinbutton", name="max tokens")
    note = bare.root.locator(".moe-limit")
    for typed, kept, said in (("99999999", "10000", "limit 10000"), ("-5", "1", "at least 1")):
        field.fill(typed)
        field.press("Tab")
        assert field.input_value() == kept
        assert note.inner_text() == said
    field.fill("0")
    field.press("Shift+Tab")
    bare.root.get_by_label("Prompt", exact=True).press("Control+Enter")
    assert bare.sent("run")[-1]["form"]["max_new_tokens"] == 1


def test_kl_is_measured_as_often_as_its_drop_down_says(page):
    bare = Bare(page)
    every = bare.root.locator("select[name=measure_kl]")
    asked = "n => model.sent.at(-1).changes?.measure_kl === n"
    for n, words in ((4, "1 in 4"), (16, "1 in 16"), (0, "off"), (1, "each token")):
        every.select_option(label=words)
        page.wait_for_function(asked, arg=n)
        bare.dashboard._handle_custom_msg(bare.sent("update")[-1], [])
        assert bare.lab.settings.measure_kl == n
        page.evaluate("now => model.set('controls', now)", bare.dashboard.controls)
        assert every.input_value() == str(n)


def test_a_legend_says_where_times_are_from_and_where_settings_changed(page):
    bare = Bare(page)
    keys = {"measured", "emulated", "settings changed"}

    def shown():
        page.wait_for_timeout(100)
        return keys & set(bare.root.locator(".moe-bars .moe-key:visible").all_inner_texts())

    assert shown() == {"measured"}
    (disk,) = bare.dashboard.frame["origins"]
    hdd = disk | {"token": 30, "emulated": True}
    bare.more(origins=[disk, hdd], changes=[{"first": 30, "last": 30, "label": "device hdd"}])
    assert shown() == keys


CLIPPED = """(root, of) => [...root.querySelectorAll(of)].filter((n) => n.checkVisibility())
  .filter((n) => n.scrollWidth > n.clientWidth + 1 || n.scrollHeight > n.clientHeight + 2)
  .map((n) => `${n.className} ${n.textContent}`)"""
WHOLE = ".moe-head :not(.moe-voice), .moe-tile *, .moe-account p, .moe-key, .moe-chip, h3"


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(6, 16, 2), (30, 16, 8)])
def test_beside_a_file_browser_nothing_is_cut_off_and_nothing_is_covered(
    page, layers, experts, top_k
):
    page.set_viewport_size({"width": 848, "height": 800})  # as JupyterLab leaves it of 1280
    bare = Bare(page, layers=layers, experts=experts, top_k=top_k)
    bare.more(running=True)
    plot = bare.root.locator(".moe-bars canvas").bounding_box()
    assert plot["height"] >= 168, "bars can be told apart"
    assert not bare.root.evaluate(CLIPPED, WHOLE)
    tall = bare.root.bounding_box()["height"]
    bare.more(running=True, sentence="disk-bound: nearly all of it waits; " * 20)
    page.wait_for_timeout(100)
    assert bare.root.bounding_box()["height"] == tall, "a long sentence moves nothing"
    assert bare.root.locator(".moe-says").get_attribute("title").count("waits; ") == 20
    for name in ("Save", "What if", "Export", "Saved runs"):
        box = bare.root.get_by_role("button", name=name, exact=True).bounding_box()
        assert box["x"] + box["width"] <= 848, name
    bare.more()
    bare.go_back()
    assert not bare.root.evaluate(CLIPPED, WHOLE)
    wide = "".join(f"<th>a term of many words {i}</th>" for i in range(9))
    bare.root.locator(".moe-leaving").evaluate(
        "(n, heads) => { n.hidden = false; n.innerHTML = `<table><tr>${heads}</tr></table>`; }",
        wide,
    )
    why, right = (bare.root.locator(f".moe-{n}").bounding_box() for n in ("leaving", "right"))
    assert why["x"] + why["width"] <= right["x"], "why it left does not cover what the token cost"


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize(("layers", "experts"), [(8, 32), (48, 128)])
def test_it_fits_a_laptop_and_is_read_from_the_back_of_the_room(page, width, layers, experts):
    page.set_viewport_size({"width": width, "height": 1080})
    bare = Bare(page, layers=layers, experts=experts)
    bare.compare()
    page.wait_for_timeout(200)
    wide, room = bare.root.evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert wide <= room
    least = bare.root.evaluate("""(root) => {
      const says = (n) => [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
      const shown = [...root.querySelectorAll("*")].filter((n) => n.checkVisibility() && says(n));
      return Math.min(...shown.map((n) => parseFloat(getComputedStyle(n).fontSize)));
    }""")
    assert least >= (12 if width == 1920 else 10)
    shot(page, f"bare-{width}-{layers}x{experts}")
    bare.root.screenshot(path=ARTIFACTS / f"runs-{width}-{layers}x{experts}.png")
