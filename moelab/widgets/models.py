"""The models a dashboard offers, and the opening of another one while the page stays alive.

Of a known model that is not here it says what it would be on this machine (`moelab.fit`), and
offers to open a ghost of it (`moelab.ghost`) with the settings that were chosen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from moelab.catalogue import SMOLLM2, known, offered
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
        Called with what the view needs: now, offered, known (models that are not here), opening,
        asks (a name), fits (a name), error and note (words), picture (an address), code and said
        (a count).
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
        self._chosen: dict[str, dict[str, Any]] = {}  # by a known model, what fit chose
        self.thread: threading.Thread | None = None
        self._say()

    def choose(self, content: Mapping[str, Any]) -> None:
        """Open the model the view asks for, one at a time, or stop opening it.

        Where that would end a run, the view has to ask first and to say ``ends_run``. A known model
        that is not here is looked at first, and opened as a ghost where the view says ``ghost``.
        """
        if content.get("stop"):
            self._stop.set()
            return
        name = str(content["name"])
        if name == self._now:
            self._say()
        elif name not in (*self._names(), *known()):
            self._say(error=f"no model {name!r} is offered here; open it with moelab.open")
        elif missing := offered().get(name):
            self._say(error=missing)
        elif self._running() and not content.get("ends_run"):  # a run would be timed with the rest
            self._say(asks=name, ghost=bool(content.get("ghost")))
        elif name in self._names() or (name in self._chosen and content.get("ghost")):
            self._begin(name, self._open, f"opening {name}")
        else:
            self._begin(name, self._fit, f"timing this machine for {name}")

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

    def _begin(self, name: str, do: Callable[[str], dict[str, Any]], words: str) -> None:
        if self._working.acquire(blocking=False):
            self._stop.clear()
            self._say(opening=words)
            work = {"target": self._work, "args": (name, do), "name": "moelab-open"}
            self.thread = threading.Thread(**work, daemon=True)
            self.thread.start()

    def _work(self, name: str, do: Callable[[str], dict[str, Any]]) -> None:
        told: dict[str, Any] = {}
        try:
            told = do(name)
        except _Stopped:
            told["note"] = f"{name} was not opened: stopped"
        except Exception as e:  # noqa: BLE001 whatever it is, the user must see it
            told["error"] = in_words(e)
        finally:
            self._working.release()
            self._say(**told)

    def _open(self, name: str) -> dict[str, Any]:
        lab = self._labs.get(name)
        lab = self._opened(name) if lab is None or lab.closed else lab
        told = {"code": self._bind(lab)}
        self._now, self._labs[name] = name, lab
        return told

    def _fit(self, name: str) -> dict[str, Any]:
        """What a model would be here, in a sentence and a picture."""
        import moelab

        found = moelab.fit(name, progress=False)
        if self._stop.is_set():
            raise _Stopped
        self._chosen[name] = found.chosen
        fits = {"fits": name} if found.chosen else {}
        return {"note": f"{name}: {found.sentence()}", "picture": found.picture().address(), **fits}

    def _opened(self, name: str) -> Any:
        import moelab

        if name in self._chosen:
            lab = moelab.ghost(name, progress=self._step, **self._chosen[name])
        else:
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

    def _say(self, **told: Any) -> None:
        missing = offered()
        rows = [{"name": name, "missing": missing.get(name, "")} for name in self._names()]
        self._refused = "error" in told
        self._said += 1  # the same refusal again must reach the drop-down, which went ahead
        others = [name for name in known() if name not in self._names()]
        self._tell({"now": self._now, "offered": rows, "known": others, "said": self._said, **told})

    def _names(self) -> list[str]:
        """The offered ones, then the one shown and the first where they are others."""
        bundled = list(offered())
        return bundled + sorted({self._now, self._first} - set(bundled))
