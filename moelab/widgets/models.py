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

    A lab that was opened here is handed over as `Dashboard.lab`, so it is not closed here: it goes
    when nobody holds it. As long as somebody does, its name comes back to it.

    Parameters
    ----------
    lab
        The one shown first.
    running
        Whether a run of the lab that is shown is going on.
    bind
        Called on a thread with a lab that is to be shown from now on; gives the line of code that
        binds it in the notebook.
    tell
        Called with what the view needs: now, offered, opening, asks (a name), error and note
        (words), code and said (a count).
    """

    def __init__(
        self,
        lab: Any,
        running: Callable[[], bool],
        bind: Callable[[Any], str],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._now = self._first = lab.info()["name"]
        self._labs = weakref.WeakValueDictionary({self._first: lab})
        self._running, self._bind, self._tell = running, bind, tell
        self._working, self._stop = threading.Lock(), threading.Event()
        self._said, self._step_said, self._refused = 0, "", False
        self.thread: threading.Thread | None = None
        self._say()

    def choose(self, content: Mapping[str, Any]) -> None:
        """Open the model the view asks for, one at a time, or stop opening it.

        Where that would end a run, the view has to ask first and to say ``ends_run``.
        """
        if content.get("stop"):
            self._stop.set()
            return
        name = str(content["name"])
        if name == self._now:
            self._say()
        elif name not in self._names():
            self._say(error=f"no model {name!r} is offered here; open it with moelab.open")
        elif missing := offered().get(name):
            self._say(error=missing)
        elif self._running() and not content.get("ends_run"):
            self._say(asks=name)
        elif self._working.acquire(blocking=False):
            self._stop.clear()
            self._say(opening=f"opening {name}")
            work = {"target": self._work, "args": (name,), "name": "moelab-open"}
            self.thread = threading.Thread(**work, daemon=True)
            self.thread.start()

    def settle(self) -> None:
        """Forget what was refused: something runs on the model that is shown."""
        if self._refused:
            self._say()

    def leave(self) -> None:
        """Go back to the lab shown first, if it is still there."""
        self._stop.set()
        first = self._labs.get(self._first)
        if self._now != self._first and first is not None:
            self._bind(first)
            self._now = self._first
            self._say()

    def close(self) -> None:
        """Open no more."""
        self._stop.set()

    def _work(self, name: str) -> None:
        told: dict[str, str] = {}
        try:
            known = self._labs.get(name)
            lab = self._opened(name) if known is None or known.closed else known
            told["code"] = self._bind(lab)
            self._now, self._labs[name] = name, lab
        except _Stopped:
            told["note"] = f"{name} was not opened: stopped"
        except Exception as e:  # noqa: BLE001 whatever it is, the user must see it
            told["error"] = in_words(e)
        finally:
            self._working.release()
            self._say(**told)

    def _opened(self, name: str) -> Any:
        import moelab

        options = {"budget": ROOMY} if name == SMOLLM2 else {}
        lab = moelab.open(name, progress=self._step, **options)
        if self._stop.is_set():
            lab.close()  # nobody has seen it
            raise _Stopped
        return lab

    def _step(self, words: str) -> None:
        if self._stop.is_set():
            raise _Stopped
        if words != self._step_said:  # a model has many experts and a hundred percent
            self._step_said = words
            self._say(opening=words)

    def _say(self, **told: str) -> None:
        known = offered()
        rows = [{"name": name, "missing": known.get(name, "")} for name in self._names()]
        self._refused = "error" in told
        self._said += 1  # the same refusal again must reach the drop-down, which went ahead
        self._tell({"now": self._now, "offered": rows, "said": self._said, **told})

    def _names(self) -> list[str]:
        """The offered ones, then the one shown and the first where they are others."""
        known = list(offered())
        return known + sorted({self._now, self._first} - set(known))
