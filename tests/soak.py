"""An hour of continuous running: does the memory of kernel or page grow?

Opens the dashboard in JupyterLab and Chromium, lets one run follow the other and changes a setting
every second: strategy, bits, low bits, budget, device, prefetch, measuring KL. Every half minute it
writes down, as CSV, what kernel and page hold; at the end it says how each figure grew, by the
median of the slopes between all pairs of rows (Theil and Sen), the warm-up left out.

    python tests/soak.py --minutes 60 --csv soak.csv

The device is an SD card most of the time, so that an hour costs little of the processor. The suite
runs twenty seconds of it (tests/test_browser.py).
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from browser import CHROMIUM, FLAGS, SHUT_DOWN, kernel, open_and_run_all, serving

CELL = "import moelab\nlab = moelab.open('demo', device='sd_card', progress=False)\nlab.dashboard()"
FIGURES = ("kernel_mb", "threads", "files", "heap_mb", "nodes", "listeners")
SETTINGS = ("strategy", "bits", "low_bits", "budget", "device", "prefetch", "measure_kl")
CHANGE = """(root, [name, where, often]) => {
  const control = root.querySelector(`[name=${name}]`),
    told = (type) => control.dispatchEvent(new Event(type, { bubbles: true }));
  if (name === "budget") {
    control.value = 40 + Math.round(360 * where);
    told("input");
    told("change");
  } else if (!control.disabled) {
    const offered = [...control.options].filter((o) => !o.disabled && !o.hidden);
    const slow = name === "device" && often < 0.7;
    control.value = slow ? "sd_card" : offered[Math.floor(where * offered.length)].value;
    told("change");
  }
  if (root.dataset.running !== "false") return 0;
  root.querySelector(".moe-run").click();
  return 1;
}"""
WARM_UP = 0.2
"""Of the rows: until every strategy and tier has been in use once."""


class Soak:
    """Changes settings of the dashboard on a page and measures what kernel and page hold."""

    def __init__(self, page, *, seed=0):
        self.page, self.rows = page, []
        self.root = page.locator(".moe-dash").first
        self.kernel = psutil.Process(int(kernel(page, "import os; print(os.getpid())")))
        self.chromium = page.context.new_cdp_session(page)
        self.random = random.Random(seed)
        self.runs = self.changes = 0

    def change(self):
        """Change one setting through its control, and press Run where no run is going on."""
        name = self.random.choice(SETTINGS)
        self.runs += self.root.evaluate(CHANGE, [name, self.random.random(), self.random.random()])
        self.changes += 1

    def measure(self, seconds):
        """Append a row: megabytes, threads, open files, and the page's after a collection."""
        for _ in range(2):
            self.chromium.send("HeapProfiler.collectGarbage")
        heap = self.chromium.send("Runtime.getHeapUsage")["usedSize"]
        counts = self.chromium.send("Memory.getDOMCounters")
        self.rows.append(
            {
                "seconds": round(seconds, 1),
                "runs": self.runs,
                "changes": self.changes,
                "seq": int(self.root.get_attribute("data-seq") or -1),
                "kernel_mb": round(self.kernel.memory_info().rss / 1e6, 2),
                "threads": self.kernel.num_threads(),
                "files": self.kernel.num_fds(),
                "heap_mb": round(heap / 1e6, 3),
                "nodes": counts["nodes"],
                "listeners": counts["jsEventListeners"],
            }
        )
        return self.rows[-1]

    def last(self, seconds, *, every=30.0, told=lambda row: None):
        """Go on for so long; ``told`` gets each row."""
        begun = time.monotonic()
        due = 0.0
        while (now := time.monotonic() - begun) < seconds:
            if now >= due:
                told(self.measure(now))
                due += every
            self.change()
            spent = time.monotonic() - begun - now
            self.page.wait_for_timeout(1000 * max(0.02, 1 - spent))
        told(self.measure(seconds))


def growth(rows):
    """Growth of each figure: by hour, and of its median over the time measured.

    Returns
    -------
    dict
        {figure: (per hour, median)}
    """
    kept = rows[int(WARM_UP * len(rows)) :]
    hours = np.array([row["seconds"] for row in kept]) / 3600
    a, b = np.triu_indices(len(kept), 1)
    grown = {}
    for name in FIGURES:
        values = np.array([row[name] for row in kept], float)
        slopes = (values[b] - values[a]) / (hours[b] - hours[a])
        grown[name] = float(np.median(slopes)) if len(slopes) else 0.0, float(np.median(values))
    return grown


def notebook():
    """The one cell that opens the lab, as a notebook."""
    cell = {"cell_type": "code", "id": "soak", "metadata": {}, "outputs": []}
    cell |= {"execution_count": None, "source": CELL}
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return {"cells": [cell], "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def soak(address, path, *, minutes, every):
    """Soak for so many minutes and write the rows to ``path``; returns them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, path.open("w", newline="") as file:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: print("fault:", error, flush=True))
        open_and_run_all(page, address, "soak", notebook())
        page.locator(".moe-dash").wait_for(timeout=600_000)  # the model may have to be packed
        one = Soak(page)
        writer = None

        def told(row):
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()

        try:
            one.last(60 * minutes, every=every, told=told)
        finally:
            page.evaluate(SHUT_DOWN)
            browser.close()
    return one.rows


def main():
    """Soak as asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two rows")
    parser.add_argument("--csv", type=Path, default=Path("soak.csv"))
    asked = parser.parse_args()
    home = tempfile.TemporaryDirectory(prefix="moelab-soak-")
    with home as folder, serving(Path(folder)) as address:
        rows = soak(address, asked.csv, minutes=asked.minutes, every=asked.every)
    print(f"{len(rows)} rows, {rows[-1]['runs']} runs, {rows[-1]['changes']} changes")
    for name, (slope, median) in growth(rows).items():
        print(f"{name:10} median {median:9.2f}, growth {slope:+9.3f} an hour")


if __name__ == "__main__":
    sys.exit(main())
