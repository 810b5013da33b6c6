"""Make the README's animated picture from screenshots of the live lab: it is a run, not a drawing.

`python tests/animated_picture.py notebooks/live_lab.gif` drives JupyterLab in Chromium as a person
would and keeps what is on the screen. The hand is drawn, since a headless browser has none. It
needs Pillow, which nothing else here does.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from browser import CHROMIUM, FLAGS, SHUT_DOWN, kernel, open_and_run_all, serving, shipped

WIDTH, COLOURS, MOST_BYTES = 1040, 96, 2_000_000
HAND = """() => {
  const hand = document.createElement("div");
  hand.id = "hand";
  hand.style.cssText = "position:fixed;z-index:99999;width:22px;height:22px;margin:-11px;" +
    "border-radius:50%;background:#d55e0055;border:2px solid #d55e00;pointer-events:none;";
  document.body.append(hand);
  document.addEventListener("pointermove", (e) => {
    hand.style.left = e.clientX + "px"; hand.style.top = e.clientY + "px";
  }, true);
  document.addEventListener("pointerdown", () => { hand.style.background = "#d55e00cc"; }, true);
  document.addEventListener("pointerup", () => { hand.style.background = "#d55e0055"; }, true);
}"""


class Film:
    """Frames of one dashboard, each with the time it is to be shown."""

    def __init__(self, page) -> None:
        self.page, self.frames = page, []
        self.root = page.locator(".moe-dash").first
        self.at, self.clip = (600.0, 400.0), None

    def frame(self) -> None:
        """The picture's edges: the notebook from the first cell of code on."""
        cell = self.page.locator(".jp-CodeCell").first
        cell.evaluate("e => e.scrollIntoView({ block: 'start' })")
        self.page.wait_for_timeout(500)
        top, panel = cell.bounding_box(), self.page.locator(".jp-NotebookPanel").bounding_box()
        tall = panel["y"] + panel["height"] - top["y"]
        self.clip = {"x": panel["x"], "y": top["y"], "width": panel["width"] - 14, "height": tall}

    def keep(self, ms: int = 120) -> None:
        shot = self.page.screenshot(clip=self.clip)
        picture = Image.open(io.BytesIO(shot)).convert("RGB")
        size = (WIDTH, round(picture.height * WIDTH / picture.width))
        self.frames.append((picture.resize(size, Image.Resampling.LANCZOS), ms))

    def hold(self, ms: int) -> None:
        picture, shown = self.frames[-1]
        self.frames[-1] = (picture, shown + ms)

    def until(self, token: int) -> None:
        while int(self.root.get_attribute("data-token")) < token:
            self.page.wait_for_timeout(50)

    def watch(self, frames: int, every: int = 350) -> None:
        for _ in range(frames):
            self.page.wait_for_timeout(every)
            self.keep(140)

    def go(self, x: float, y: float, steps: int = 5) -> None:
        (x0, y0), self.at = self.at, (x, y)
        for i in range(1, steps + 1):
            self.page.mouse.move(x0 + (x - x0) * i / steps, y0 + (y - y0) * i / steps)
            self.keep(60)

    def drag(self, name: str, share: float, steps: int = 8) -> None:
        slider = self.root.locator(f"input[name={name}]")
        box = slider.bounding_box()
        top, reach = float(slider.get_attribute("max")), box["width"] - 16
        x0, y = box["x"] + 8, box["y"] + box["height"] / 2
        begin = x0 + reach * float(slider.input_value()) / top
        self.go(begin, y, 3)
        self.page.mouse.down()
        for i in range(1, steps + 1):
            self.at = (begin + (x0 + reach * share - begin) * i / steps, y)
            self.page.mouse.move(*self.at)
            self.page.wait_for_timeout(150)
            self.keep(140)
        self.page.mouse.up()

    def click(self, locator) -> None:
        box = locator.bounding_box()
        self.go(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        self.keep(150)
        self.page.mouse.up()
        self.page.wait_for_timeout(700)
        self.keep(200)

    def write(self, path: Path) -> int:
        sheets = [picture for picture, _ in self.frames]
        wide, tall = sheets[0].size
        strip = Image.new("RGB", (wide, tall * 3))
        for i, sheet in enumerate((sheets[0], sheets[len(sheets) // 2], sheets[-4])):
            strip.paste(sheet, (0, i * tall))
        palette = strip.quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
        flat = [s.quantize(palette=palette, dither=Image.Dither.NONE) for s in sheets]
        times = [ms for _, ms in self.frames]
        flat[0].save(
            path, save_all=True, append_images=flat[1:], duration=times, loop=0, optimize=True
        )
        return path.stat().st_size


def act(film: Film) -> None:
    """A run, less memory, a costly token, the time axis back, the life of an expert, live again."""
    page, root = film.page, film.root
    root.get_by_role("button", name="Run", exact=True).click()
    film.until(12)
    film.watch(8)
    film.drag("budget", 0.14)
    film.watch(14)
    root.get_by_role("button", name="Stop", exact=True).click()
    page.wait_for_timeout(1500)  # the text stands still
    film.keep(600)
    costs = root.locator(".moe-text [data-token]")
    last = [float(costs.nth(i).get_attribute("data-ms")) for i in range(-20, -2)]
    film.click(costs.nth(last.index(max(last)) - 20))
    film.hold(2500)
    film.drag("past_token", 0.35)
    film.hold(1200)
    box = root.locator(".moe-map canvas").bounding_box()
    film.go(box["x"] + box["width"] * 0.42, box["y"] + box["height"] * 0.35)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(900)
    film.keep(3000)
    page.keyboard.press("Escape")
    page.wait_for_timeout(500)
    film.watch(3)
    film.hold(900)


def main(path: Path) -> None:
    home = tempfile.mkdtemp(prefix="moelab-picture-")
    with serving(Path(home)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 1480, "height": 1180}).new_page()
        page.set_default_timeout(300_000)
        open_and_run_all(page, address, "start_here", shipped("00_start_here"))
        film = Film(page)
        film.root.wait_for()
        page.locator(".jp-OutputArea img").last.wait_for()  # the notebook has run through
        for command in ("application:toggle-left-area", "application:toggle-right-area"):
            page.evaluate("c => window.jupyterapp.commands.execute(c)", command)
        kernel(page, "lab.update(strategy='hobbit', device='sd_card', budget='60%')")
        film.root.get_by_role("spinbutton", name="max tokens").fill("900")
        film.frame()
        page.evaluate(HAND)
        act(film)
        page.evaluate(SHUT_DOWN)
        browser.close()
    size = film.write(path)
    print(f"{path}: {len(film.frames)} frames, {size / 1e6:.2f} MB")
    assert size <= MOST_BYTES


if __name__ == "__main__":
    main(Path(sys.argv[1]))
