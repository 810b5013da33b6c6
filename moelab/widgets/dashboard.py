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
import weakref
from typing import Any, ClassVar

import anywidget
import traitlets

import moelab
from moelab.runs.snapshot import RunReader
from moelab.spelling import in_words, sentence, size
from moelab.views.report import Report
from moelab.views.scripts import STYLES, script, styles
from moelab.widgets.drawer import Drawer
from moelab.widgets.frame import Framer, controls, options
from moelab.widgets.models import Models
from moelab.widgets.notebook import hear_in_subshell, name_of, take_place
from moelab.widgets.outlook import Outlook
from moelab.widgets.queries import RunQueries, explained_now

FRAMES_PER_S = 12.0
IN_FLIGHT = 8
"""Frames that may be under way: the view draws only the newest, so they cost no delay. It says
four times a second what it has drawn."""

PATIENCE_S = 0.3
"""Without an acknowledgement (a busy kernel, no browser) a frame goes out this often."""

IDLE_S = 0.25
CHECK_S = 0.004
"""How often it is looked for the first token under new settings, which is shown at once."""


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

    _esm = script("dashboard")
    _css = styles(STYLES)

    options = traitlets.Dict().tag(sync=True)
    controls = traitlets.Dict().tag(sync=True)
    form = traitlets.Dict().tag(sync=True)
    frame = traitlets.Dict().tag(sync=True)
    error = traitlets.Dict().tag(sync=True)
    runs = traitlets.Dict().tag(sync=True)
    models = traitlets.Dict().tag(sync=True)

    _newest: ClassVar[Any] = None

    def __init__(self, lab: Any) -> None:
        self._lab_ref, self._held = weakref.ref(lab), lab
        self._framer: Framer | None = None
        self._mine: Any = None  # the run that was started here, weakly
        Dashboard._newest = weakref.ref(self)
        self._told: tuple[Any, dict[str, Any]] = (None, {})  # controls, and of which settings
        self._seq = self._acked = -1
        self._sent_at = 0.0
        self._awaited = False  # the first token under new settings
        self._refused_at = 0  # the run that was the newest when the error was said
        self._views: set[str] = set()
        self._queries = RunQueries(self._newest_run, self.send)
        self._drawer = Drawer(
            lambda: self._lab, lambda told: self.set_trait("runs", told), self.send
        )
        self._outlook = Outlook(lambda: self._lab, self.send)
        self._lock = threading.RLock()  # over traits, frames and the thread: callbacks come anyhow
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._answered = -1
        offered = _offered(lab)
        frame = {"seq": self._next(), **self._frames().build()}
        super().__init__(
            options=offered, controls=self._controls(), form=_first_form(offered), frame=frame
        )
        self._models = Models(
            lab, self._is_running, self._show, lambda told: self.set_trait("models", told)
        )
        self.on_msg(self._on_message)
        hear_in_subshell(self.comm)

    # -- what the view says ---------------------------------------------------------------------

    def _on_message(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        if content.get("do") == "ack":
            self._acked = max(self._acked, int(content["seq"]))
            return
        answer = {
            "hello": self._hello,
            "gone": self._gone,
            "update": self._update,
            "why": self._why,
            **dict.fromkeys(("recording", "eviction", "page"), self._queries.hear),
            "runs": self._drawer.hear,
            "outlook": self._outlook.hear,
            "model": self._models.choose,
            "run": self._start_run,
            "stop": lambda _: self._lab.run and self._lab.run.stop(),
            "draft": self._draft,
            "dismiss": lambda _: self._clear_error(),
        }.get(content.get("do", ""))
        if answer is None:
            return
        try:
            answer(content)
        except Exception as error:  # noqa: BLE001 whatever it is, the user must see it
            self._show_error(content.get("where", "run"), error)
        if "n" in content:  # the view waits for an answer, to know whether the kernel listens
            with self._lock:
                self._answered = max(self._answered, int(content["n"]))
                self.controls = self._controls()
        if content["do"] in ("hello", "update", "runs", "model", "dismiss", "run", "stop"):
            self._wake.set()

    def _hello(self, content: dict[str, Any]) -> None:
        with self._lock:
            self.start()
            self._views.add(content["view"])

    def _gone(self, content: dict[str, Any]) -> None:
        with self._lock:
            self._views.discard(content["view"])
            if not self._views:
                self.stop()
                if Dashboard._newest() is not self:
                    self._let_go()

    def _update(self, content: dict[str, Any]) -> None:
        changes = content["changes"]
        try:
            self._lab.update(**changes)
        except ValueError as error:
            stays = size(self._lab.settings.budget_bytes)
            raise ValueError(
                f"{error}; it stays at {stays}" if "budget" in changes else error
            ) from error
        self._awaited = True
        self._clear_error()

    def _why(self, content: dict[str, Any]) -> None:
        self.send({"why": explained_now(self._lab, int(content["layer"]), int(content["expert"]))})

    def _start_run(self, content: dict[str, Any]) -> None:
        asked = content["form"]
        chat = {"chat": bool(asked.get("chat"))} if self.options["chat"] else {}
        length = int(asked["max_new_tokens"])
        if bits := int(asked.get("draft_bits") or 0):  # what is verified is greedy text
            ahead = {"draft_bits": bits, "draft_length": asked.get("draft_length", "auto")}
            chat |= {"temperature": 0, **ahead}
        run = self._lab.start(asked["prompt"], max_new_tokens=length, **chat)
        self._mine = weakref.ref(run)
        self._clear_error()

    def _draft(self, content: dict[str, Any]) -> None:
        run = self._lab.run
        if run is not None and run.running and run.request.draft_bits is not None:
            run.draft_length = content["length"]
        self._clear_error()

    def _show_error(self, where: str, error: Exception) -> None:
        self._refused_at = self._framer.newest()[0] if self._framer else 0
        self.error = {"where": where, "text": in_words(error)}

    def _clear_error(self) -> None:
        if self.error:
            self.error = {}

    # -- what the view is told ------------------------------------------------------------------

    def start(self) -> None:
        """Begin to publish; the first view does this by itself."""
        with self._lock:
            self._held = self._lab
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
        self._let_go()
        self._queries.close()
        self._models.close()
        super().close()

    @classmethod
    def newest(cls) -> Dashboard:
        """The dashboard that was made last."""
        return cls._newest()

    @property
    def lab(self) -> Any:
        """The lab that is shown: the one this was made for, or another that was chosen since."""
        return self._lab

    def _is_running(self) -> bool:
        run = self._lab.run
        return run is not None and bool(run.running)

    def _show(self, lab: Any) -> str:
        """Show another lab from now on; returns the line of code that binds it."""
        with self._lock:
            self._leave()
            self._lab_ref, self._held = weakref.ref(lab), lab
            offered = _offered(lab)
            with self.hold_sync():
                self.options, self.controls = offered, self._controls()
                self.form, self.error = {**self.form, **_first_form(offered)}, {}
                self.frame = {"seq": self._next(), **self._frames().build()}
        return f"lab = {name_of(self) or 'moelab.Dashboard.newest()'}.lab"

    @property
    def _lab(self) -> Any:
        lab = self._lab_ref()
        if lab is None:
            raise RuntimeError("the lab of this dashboard is gone; run its cell again")
        return lab

    def _let_go(self) -> None:
        """No view is left and a newer dashboard is there: the lab may go, with what it holds.

        Jupyter keeps every widget that was ever made; as long as somebody else keeps the lab, a
        view that comes back finds all as it was.
        """
        with self._lock:
            self._models.leave()
            self._leave()
            self._held = None
            self.frame = {}

    def _leave(self) -> None:
        """Forget the lab's runs; what was started here ends, as nobody could stop it any more."""
        run = self._mine and self._mine()
        if run is not None:
            run.stop()
        self._drawer.stop()
        self._queries.forget()
        self._framer, self._told = None, (None, {})

    def _frames(self) -> Framer:
        """What builds the frames; kept for as long as the lab is."""
        framer = self._framer or Framer(self._lab, self._lab.info())
        self._framer = framer if self._held is not None else None
        return framer

    def _newest_run(self) -> tuple[int, RunReader | None]:
        with self._lock:
            return self._frames().newest()

    def _publish(self, wake: threading.Event) -> None:
        me, at_once = threading.current_thread(), False
        while self._thread is me:
            begun = time.monotonic()
            try:
                self._offer(at_once=at_once)
                self._drawer.refresh()
                if not self._awaited:
                    with self._lock:
                        framer = self._frames()
                    framer.follow(self.frame, 1 / FRAMES_PER_S)
                if self.error.get("where") == "dashboard":
                    self._clear_error()
            except Exception as error:  # noqa: BLE001 a view that stands still must say why
                self._awaited = False
                self._show_error("dashboard", error)
            period = 1.0 / FRAMES_PER_S if self.frame.get("running") else IDLE_S
            at_once = self._rest(wake, begun + period)
            wake.clear()

    def _rest(self, wake: threading.Event, until: float) -> bool:
        """Wait for the next frame's time; return whether a token is to be shown at once.

        That is the first one under new settings. A frame on its way to the screen would delay it,
        so that none is sent while it is awaited, unless its own time has come.
        """
        while (left := until - time.monotonic()) > 0:
            if wake.wait(min(left, CHECK_S) if self._awaited else left):
                wake.clear()
                if not self._awaited:
                    return False
            elif self._awaited and self._obeyed():
                self._awaited = False
                return True
        return False

    def _obeyed(self) -> bool:
        """Whether a token under the settings now in force is there."""
        run = self._lab.run
        if run is None or not run.running:
            return True
        token, settings = run.history[-1]
        return settings is self._lab.settings and len(run.token_reports) > token

    def _offer(self, *, at_once: bool) -> None:
        """Publish what is new if a frame is due."""
        with self._lock:
            now = time.monotonic()
            behind = self._seq - self._acked >= IN_FLIGHT
            wait = PATIENCE_S if behind else 0.5 / FRAMES_PER_S
            if now - self._sent_at < wait and not at_once:
                return
            if (told := self._controls()) != self.controls:
                self.controls = told
            frame = self._frames().build()
            if frame["run"] != self.frame.get("run"):  # it began here or in a cell
                self._models.settle()
            ended = self.frame.get("running") and not frame["running"]
            if self.error.get("where") == "run" and (ended or frame["run"] != self._refused_at):
                self._clear_error()  # "a run is going on", "the prompt is empty"
            if frame != {k: v for k, v in self.frame.items() if k != "seq"}:
                self._sent_at, self.frame = now, {"seq": self._next(), **frame}

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _controls(self) -> dict[str, Any]:
        """What holds now; worked out anew only where the settings have changed."""
        with self._lock:
            settings = self._lab.settings
            if settings is not self._told[0]:
                self._told = settings, controls(settings, self._lab.info())
            return {**self._told[1], "auto": self._lab.follows, "answered": self._answered}

    # -- what stays when the kernel is gone -----------------------------------------------------

    def report(self) -> Report:
        """Return a picture of the newest run, or of what holds now, which needs no kernel."""
        if (run := self._lab.run) is not None:
            return Report.of(run.recording())
        words = sentence(self._lab.settings, self._lab._shape)
        with self._lock:
            return Report(self._frames().build(), self.options, words)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        self.start()
        for old in take_place(self):
            self._succeed(old)
            old.close()
        data, metadata = bundle
        return {**self.report()._repr_mimebundle_(), **data}, metadata

    def _succeed(self, old: Dashboard) -> None:
        """The cell was run again: runs that its former lab of this model had saved stay."""
        former = getattr(old._lab_ref(), "saved", None)
        if former is not None and old.options["name"] == self.options["name"]:
            self._lab.saved.take_over(former)


def _offered(lab: Any) -> dict[str, Any]:
    return options(lab, lab.info(), moelab.devices())


def _first_form(offered: dict[str, Any]) -> dict[str, Any]:
    prompts = [p for domain in offered["prompts"].values() for p in domain]
    return {
        "prompt": prompts[0] if prompts else "Once upon a time",
        "max_new_tokens": 48 if offered["encoder_layers"] else 200,
        "chat": offered["chat"],
        "shade": "cost",
        "decisions": False,
        "draft_bits": 0,
    }
