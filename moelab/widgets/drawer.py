"""The dashboard's drawer of saved runs: a row each, two of them beside each other, and what if.

The trait ``runs`` holds what the drawer shows: the rows, and the what-if that is under way or was
last. The view's questions come to `hear` on any thread; a what-if works in a thread of its own,
and how far it is goes out with the dashboard's frames. What is refused is shown in the drawer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moelab.runs.compare import Comparison, code_of, given, settings_of
from moelab.runs.what_if import WhatIf, since
from moelab.spelling import brief, changed, in_words, plain

if TYPE_CHECKING:
    from moelab.settings import Settings

FIGURES = ("tokens_per_s", "hit_ratio", "bytes_per_token", "stall_share", "kl_mean", "timing")
IDLE: dict[str, Any] = {"state": "", "words": "", "done": 0, "total": 0, "error": ""}


class Drawer:
    """Answers the drawer of one dashboard.

    Parameters
    ----------
    lab
        Gives the lab whose saved runs these are.
    publish
        Takes what the drawer is to show.
    send
        Sends an answer to the views.
    """

    def __init__(
        self,
        lab: Callable[[], Any],
        publish: Callable[[dict[str, Any]], None],
        send: Callable[[dict[str, Any]], None],
    ) -> None:
        self._lab, self._publish, self._send = lab, publish, send
        self._lock = threading.RLock()
        self._what: WhatIf | None = None
        self._again, self._error = dict(IDLE), ""
        self._shown: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._of_saved: Any = None
        self._told: dict[str, Any] = {}

    def hear(self, content: Mapping[str, Any]) -> None:
        """Do what the view asks."""
        answer = {
            "save": lambda _: self._lab().save_run(),
            "remove": lambda c: self._lab().saved.remove(c["name"]),
            "rename": lambda c: self._lab().saved.rename(c["name"], c["new"]),
            "beside": self._beside,
            "since": self._since,
            "whatif": self._begin,
            "stop": lambda _: self.stop(),
            "dismiss": lambda _: None,
        }[content["ask"]]
        try:
            with self._lock:
                self._error = ""
                answer(content)
        except Exception as error:  # noqa: BLE001 whatever it is, the user must see it
            self._error = _words(error)
        self.refresh()

    def refresh(self) -> None:
        """Publish what is new; the dashboard calls this as often as it looks for a new frame."""
        saved = getattr(self._lab(), "saved", None)
        if saved is None:
            return
        with self._lock:
            if saved is not self._of_saved:  # another model is shown
                self._of_saved, self._shown, self._again = saved, (-1, []), dict(IDLE)
            if saved.version != self._shown[0]:
                self._shown = saved.version, rows(saved)
            what = self._what
            if what is not None and what.run is not None:
                self._again["done"] = what.done
            told = {"saved": self._shown[1], "again": dict(self._again), "error": self._error}
            if told != self._told:
                self._told = told
                self._publish(told)

    def stop(self) -> None:
        """End the what-if that is under way."""
        if self._what is not None:
            self._what.stop()

    # -- what the view asks ---------------------------------------------------------------------

    def _beside(self, content: Mapping[str, Any]) -> None:
        saved = self._lab().saved
        beside = Comparison({name: saved[name] for name in content["names"]})
        table = beside.table().drop("settings")
        documents = [recording.document for recording in beside.recordings.values()]
        told = {
            "names": beside.names,
            "at": beside.diverges_at,
            "verdict": beside.verdict(),
            "prompts": list(map(given, documents)),
            "pieces": [d["pieces"] for d in documents],
            "settings": list(map(settings_of, documents)),
            "figures": [list(map(plain, row)) for row in table.itertuples()],
        }
        self._send({"beside": told})

    def _since(self, content: Mapping[str, Any]) -> None:
        """What a what-if would change now, in words."""
        words = error = ""
        try:
            run, settings = self._of(content), self._lab().settings
            changes = since(run, settings)
            words = spoken(run.history[-1][1], settings) if changes else ""
        except (ValueError, RuntimeError) as e:
            error = in_words(e)
        self._send({"since": {"of": content.get("of", ""), "words": words, "error": error}})

    def _begin(self, content: Mapping[str, Any]) -> None:
        if self._again["state"] == "running":
            raise RuntimeError("a what-if is under way; stop it first")
        lab, run = self._lab(), self._of(content)
        changes = since(run, lab.settings)
        if content.get("keep"):  # the expert chosen on the cache map
            layer, expert, bits = map(int, content["keep"])
            changes["pin"] = {**lab.settings.strategy.pinned, (layer, expert): bits}
        if not changes:
            raise ValueError(
                "nothing differs from that run yet: change a setting above, or choose an expert in "
                "the cache map to pin"
            )
        what = WhatIf(lab, run, changes)
        words = spoken(run.history[-1][1], what.settings)
        self._what = what
        self._again = IDLE | {"state": "running", "words": words, "total": what.total}
        thread = threading.Thread(target=self._work, args=(what, words), daemon=True)
        thread.name = "moelab-what-if"
        thread.start()

    def _of(self, content: Mapping[str, Any]) -> Any:
        """The run it is about: a saved one by name, else the newest."""
        lab, name = self._lab(), content.get("of", "")
        run = lab.saved.run(name) if name else lab.run
        if run is None and name:
            raise ValueError(f"{name!r} was loaded from a file: run its code here to ask what if")
        if run is None:
            raise ValueError("no run yet: press Run first")
        return run

    def _work(self, what: WhatIf, words: str) -> None:
        """Make the second run and save both; in a thread of its own."""
        try:
            second = what.go()
            saved = what.lab.saved
            names = [saved.add(what.was), saved.add(second, f"what if {words}")]
            ended = {"state": "done", "words": words, "names": names}
        except BaseException as error:  # noqa: BLE001 a thread has nobody else to tell
            ended = {"state": "failed", "words": words, "error": _words(error)}
        with self._lock:
            self._what, self._again = None, IDLE | ended
        self.refresh()


def spoken(old: Settings, new: Settings) -> str:
    """What differs, as in ``lab.update``, but for bytes, which nobody reads."""
    nbytes = r"\bbudget=([\d_]+)"
    return re.sub(nbytes, lambda m: f"budget={brief(int(m[1]) / 1e6)} MB", changed(old, new))


def rows(saved: Any) -> list[dict[str, Any]]:
    """A row for each saved run."""
    if not len(saved):
        return []
    beside = saved.compare()  # as they are now: a what-if may save others meanwhile
    front = beside.front()
    ranges = {name: beside.ranges(name) for name in beside.names}
    return [_row(name, saved, beside, name in front) | {"range": ranges[name]} for name in ranges]


def _row(name: str, saved: Any, beside: Comparison, best: bool) -> dict[str, Any]:
    import moelab

    doc, summary = beside.recordings[name].document, beside.figures(name)
    device = moelab.devices().get(summary["device"])
    return {
        "name": name,
        "settings": settings_of(doc),
        "prompt": doc["prompt"],
        "tokens": len(doc["ids"]),
        **{key: plain(summary[key]) for key in FIGURES},
        "peak": summary["peak_resident_bytes"],
        "device": device.title if device else summary["device"],
        "emulated": summary["timing"] == "emulated",
        "best": best,
        "code": code_of(doc),
        "again": saved.run(name) is not None,
    }


def _words(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else in_words(error)  # pyright: ignore[reportArgumentType]
