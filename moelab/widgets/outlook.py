"""The dashboard's outlook: memory, speed and loss of all settings at once, predicted from one run.

It works in a thread of its own and in a second lab; what is set stays. How far it is, the points,
and what was refused go to the views as messages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from moelab.runs.plan import surface
from moelab.spelling import in_words, plain


class Outlook:
    """Answers one dashboard's question for all settings at once.

    Parameters
    ----------
    lab
        Gives the lab that is shown.
    send
        Sends an answer to the views.
    """

    def __init__(self, lab: Callable[[], Any], send: Callable[[dict[str, Any]], None]) -> None:
        self._lab, self._send = lab, send
        self._thread: threading.Thread | None = None

    def hear(self, _content: Any) -> None:
        """Begin, where it has not begun yet."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._work, args=(self._lab(),), name="moelab-outlook", daemon=True
            )
            self._thread.start()

    def _work(self, lab: Any) -> None:
        try:
            run = lab.run
            usable = run is not None and not run.running and len(run.tokens) > 1
            found = surface(lab, run if usable else None, told=lambda done: self._tell(done=done))
            points = [{k: plain(v) for k, v in row.items()} for row in found.to_dict("records")]
            self._tell(
                points=points, device=lab.settings.device, done=1.0, off=found.attrs["error"]
            )
        except BaseException as error:  # noqa: BLE001 a thread has nobody else to tell
            self._tell(error=in_words(error))

    def _tell(self, **told: Any) -> None:
        self._send({"outlook": told})
