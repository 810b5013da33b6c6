"""The dashboard: one widget whose controls write settings and whose views draw frames.

A publisher thread reads the lab about twelve times a second while a run is going on and replaces
the trait `frame` whole: the newest wins. A view acknowledges what it has drawn, and until then the
next frame is held back, so a slow browser lowers the rate instead of falling behind. Callbacks may
come on any thread; they only call `Lab.update`, `Lab.start`, `Lab.why` and `Run.stop`. What those
refuse is drawn beside the control, because print and raise in a callback are invisible.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from moelab.widgets.frame import Framer, controls, in_words, options
from moelab.widgets.report import Report
from moelab.widgets.why import reasons

STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    *("look", "figures", "why", "cells", "bars", "text"),
    *("ask", "budget", "fault", "parameters", "decisions", "settings", "dashboard"),
)
STYLES = ("controls", "decisions", "views", "dashboard")
FRAMES_PER_S = 12.0
IN_FLIGHT = 3
"""Frames that may be under way: the view draws only the newest, so they cost no delay."""

PATIENCE_S = 0.3
"""Without an acknowledgement (a busy kernel, no browser) a frame goes out this often."""

IDLE_S = 0.25


class Dashboard(anywidget.AnyWidget):
    """Live view of a lab: controls, streaming text, cache map, latency bars, running figures.

    Parameters
    ----------
    lab
        Whose settings the controls change and whose newest run is shown, whoever started it.

    Examples
    --------
    >>> dashboard = Dashboard(lab)  # doctest: +SKIP
    >>> dashboard.report()  # a picture of the last frame that needs no kernel  # doctest: +SKIP
    """

    _esm = "\n".join((STATIC / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    _css = "\n".join((STATIC / f"{name}.css").read_text(encoding="utf-8") for name in STYLES)

    options = traitlets.Dict().tag(sync=True)
    controls = traitlets.Dict().tag(sync=True)
    form = traitlets.Dict().tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)
    error = traitlets.Dict().tag(sync=True)

    def __init__(self, lab: Any) -> None:
        import moelab

        info = lab.info()
        self._lab = lab
        self._framer = Framer(lab, info, moelab.devices())
        self._told: tuple[Any, dict[str, Any]] = (None, {})
        self._seq = self._acked = -1
        self._sent_at = 0.0
        self._views: set[str] = set()
        self._lock = threading.RLock()  # over traits, frames and the thread: callbacks come anyhow
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._answered = -1
        offered = options(lab, info, moelab.devices())
        super().__init__(
            options=offered,
            controls=self._controls(),
            form=_first_form(offered),
            frame=self._next_frame(),
        )
        self.on_msg(self._on_message)

    # -- what the view says ---------------------------------------------------------------------

    def _on_message(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        answer = {
            "ack": self._ack,
            "hello": self._hello,
            "gone": self._gone,
            "update": self._update,
            "why": self._why,
            "dismiss": self._dismiss,
            "run": self._start_run,
            "stop": self._stop_run,
        }.get(content.get("do", ""))
        if answer is None:
            return
        try:
            answer(content)
        except Exception as error:  # noqa: BLE001 whatever it is, the user must see it
            self._show_error(content.get("where", "run"), error)
        if answer not in (self._ack, self._gone, self._why):
            self._wake.set()

    def _ack(self, content: dict[str, Any]) -> None:
        self._acked = max(self._acked, int(content["seq"]))

    def _hello(self, content: dict[str, Any]) -> None:
        with self._lock:
            self._views.add(content["view"])
            self.start()

    def _gone(self, content: dict[str, Any]) -> None:
        with self._lock:
            self._views.discard(content["view"])
            if not self._views:
                self.stop()

    def _update(self, content: dict[str, Any]) -> None:
        try:
            self._lab.update(**content["changes"])
            self._clear_error()
        except Exception as error:  # noqa: BLE001
            self._show_error(content.get("where", next(iter(content["changes"]), "run")), error)
        with self._lock:
            self._answered = max(self._answered, int(content.get("n", -1)))
            self.controls = self._controls()

    def _dismiss(self, _content: dict[str, Any]) -> None:
        self._clear_error()

    def _why(self, content: dict[str, Any]) -> None:
        self.send({"why": reasons(self._lab, int(content["layer"]), int(content["expert"]))})

    def _start_run(self, content: dict[str, Any]) -> None:
        asked = content["form"]
        self._lab.start(asked["prompt"], max_new_tokens=int(asked["max_new_tokens"]))
        self._clear_error()

    def _stop_run(self, _content: dict[str, Any]) -> None:
        if self._lab.run is not None:
            self._lab.run.stop()

    def _show_error(self, where: str, error: Exception) -> None:
        self.error = {"where": where, "text": in_words(error)}

    def _clear_error(self) -> None:
        if self.error:
            self.error = {}

    # -- what the view is told ------------------------------------------------------------------

    def start(self) -> None:
        """Begin to publish; the first view does this by itself."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._wake = threading.Event()
                self._thread = threading.Thread(
                    target=self._publish, args=(self._wake,), name="moelab-dashboard", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """End the publisher thread; the run goes on."""
        with self._lock:
            self._thread = None
            self._wake.set()

    def close(self) -> None:
        """End the publisher thread and leave the page."""
        self.stop()
        super().close()

    def _publish(self, wake: threading.Event) -> None:
        me = threading.current_thread()
        while self._thread is me:
            begun = time.monotonic()
            try:
                self._offer()
                if self.error.get("where") == "dashboard":
                    self._clear_error()
            except Exception as error:  # noqa: BLE001 a view that stands still must say why
                self._show_error("dashboard", error)
            period = 1.0 / FRAMES_PER_S if self.frame.get("running") else IDLE_S
            wake.wait(max(0.0, period - (time.monotonic() - begun)))
            wake.clear()

    def _offer(self) -> bool:
        """Publish what is new if a frame is due; return whether one went out."""
        with self._lock:
            now = time.monotonic()
            behind = self._seq - self._acked >= IN_FLIGHT
            wait = PATIENCE_S if behind else 0.5 / FRAMES_PER_S
            if now - self._sent_at < wait:
                return False
            told = self._controls()
            if told != self.controls:
                self.controls = told
            frame = self._framer.build()
            if frame == {k: v for k, v in self.frame.items() if k != "seq"}:
                return False
            self._seq += 1
            self._sent_at = now
            self.frame = {"seq": self._seq, **frame}
            return True

    def _next_frame(self) -> dict[str, Any]:
        with self._lock:
            self._seq += 1
            return {"seq": self._seq, **self._framer.build()}

    def _controls(self) -> dict[str, Any]:
        """What holds now; worked out anew only where the settings have changed."""
        with self._lock:
            settings = self._lab.settings
            if settings is not self._told[0]:
                self._told = settings, controls(settings, self._lab.info())
            return {**self._told[1], "answered": self._answered}

    # -- what stays when the kernel is gone -----------------------------------------------------

    def report(self) -> Report:
        """Return a picture of the newest run and the settings now, which needs no kernel."""
        with self._lock:
            frame = self._framer.build()
            return Report(frame=frame, controls=self._controls(), options=self.options)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        self.start()
        data, metadata = bundle
        return {**data, "text/html": self.report().html()}, metadata


def _first_form(offered: dict[str, Any]) -> dict[str, Any]:
    prompts = [p for domain in offered["prompts"].values() for p in domain]
    return {
        "prompt": prompts[0] if prompts else "Once upon a time",
        "max_new_tokens": 200,
        "shade": "cost",
        "decisions": False,
    }
