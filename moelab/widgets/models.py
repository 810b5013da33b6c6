"""The models a dashboard offers, and the opening of another one while the page stays alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from moelab.catalogue import SMOLLM2, offered
from moelab.spelling import in_words

ROOMY = "75%"
"""Of its 16 experts a layer 8 are used for each token: with 25 % every request would be a miss."""


class _Stopped(Exception):  # noqa: N818 nothing went wrong
    """The user does not want the other model any more."""


class Models:
    """Which model is shown, which others there are, and what is being done to open one.

    Parameters
    ----------
    lab
        The one shown first; choosing its name again comes back to it.
    bind
        Called on a thread with a lab that is to be shown from now on.
    tell
        Called with what the view needs: now, offered, opening, error and stopped (words) and
        said (a count).
    """

    def __init__(
        self, lab: Any, bind: Callable[[Any], None], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._first, self._own = weakref.ref(lab), None
        self._now, self._bind, self._tell = lab.info()["name"], bind, tell
        self._working, self._closed, self._said = threading.Lock(), False, 0
        self._stop, self._step_said = threading.Event(), ""
        self.thread: threading.Thread | None = None
        self._say()

    def choose(self, content: Mapping[str, Any]) -> None:
        """Open the model the view asks for, one at a time, or stop opening it."""
        if content.get("stop"):
            self._stop.set()
            return
        name = str(content["name"])
        if name == self._now:
            return
        if name not in self._names():
            self._say(error=f"no model {name!r} is offered here; open it with moelab.open")
            return
        if missing := offered().get(name):
            self._say(error=missing)
            return
        if not self._working.acquire(blocking=False):
            return
        self._stop.clear()
        self._say(f"opening {name}")
        self.thread = threading.Thread(
            target=self._work, args=(name,), name="moelab-open", daemon=True
        )
        self.thread.start()

    def leave(self) -> None:
        """Go back to the lab shown first, and close the one that was opened here, if any."""
        self._stop.set()
        own, self._own = self._own, None
        if own is None:
            return
        if (first := self._first()) is not None:
            self._bind(first)
            self._now = first.info()["name"]
        own.close()
        self._say()

    def close(self) -> None:
        """Close the lab that was opened here, and none is opened any more."""
        self._closed = True
        self._stop.set()
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def _work(self, name: str) -> None:
        error = stopped = ""
        try:
            lab, before = self._found(name), self._own
            mine = lab is not self._first()
            try:
                self._go_on()
                self._bind(lab)
            except BaseException:
                if mine:
                    lab.close()
                raise
            self._now, self._own = name, lab if mine else None
            if self._closed:
                self.close()
            if before is not None:
                before.close()
        except _Stopped:
            stopped = f"{name} was not opened: stopped"
        except Exception as e:  # noqa: BLE001 whatever it is, the user must see it
            error = in_words(e)
        finally:
            self._working.release()
            self._say(error=error, stopped=stopped)

    def _found(self, name: str) -> Any:
        import moelab

        first = self._first()
        if first is not None and name == first.info()["name"] and not first.closed:
            return first
        options = {"budget": ROOMY} if name == SMOLLM2 else {}
        return moelab.open(name, progress=self._step, **options)

    def _step(self, words: str) -> None:
        self._go_on()
        if words != self._step_said:  # a model has many experts and a hundred percent
            self._step_said = words
            self._say(words)

    def _go_on(self) -> None:
        """Between two steps: whether they are still wanted."""
        if self._stop.is_set() or self._closed:
            raise _Stopped

    def _say(self, opening: str = "", *, error: str = "", stopped: str = "") -> None:
        known = offered()
        rows = [{"name": name, "missing": known.get(name, "")} for name in self._names()]
        self._said += 1  # the same refusal again must reach the drop-down, which went ahead
        told = {"now": self._now, "offered": rows, "opening": opening, "error": error}
        self._tell(told | {"stopped": stopped, "said": self._said})

    def _names(self) -> list[str]:
        """The offered ones, then the one shown and the first where they are others."""
        known, first = list(offered()), self._first()
        own = {self._now} | ({first.info()["name"]} if first is not None else set())
        return known + sorted(own - set(known))
