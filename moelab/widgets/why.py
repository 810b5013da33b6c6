"""Why a resident expert would stay or go: the decision's own terms, beside its neighbours'."""

from __future__ import annotations

import math
from typing import Any

from moelab.runs.words import in_words, plain
from moelab.scheduling.strategy import part_title


def reasons(lab: Any, layer: int, expert: int) -> dict[str, Any]:
    """Each term of the decision by name: its value, lowest and highest in this layer.

    Returns
    -------
    dict
        ``terms`` is empty for an expert that is not resident; ``error`` says what a policy of
        somebody's own raised.
    """
    evict = lab.settings.strategy.parts["evict"]
    policy, texts = part_title(evict), getattr(evict, "explained", {})
    answer = {"layer": layer, "expert": expert, "policy": policy, "terms": [], "error": ""}
    try:
        terms = lab.why(layer)
    except Exception as error:  # noqa: BLE001 whatever it is, the user must see it
        return answer | {"error": in_words(error)}
    told = []
    for name, value in terms.get(expert, {}).items():
        every = [other[name] for other in terms.values() if name in other]
        finite = [float(x) for x in every if math.isfinite(x)]  # JSON has no others
        told.append(
            {
                "name": name,
                "text": texts.get(name, ""),
                "value": plain(float(value)),
                "low": min(finite, default=None),
                "high": max(finite, default=None),
            }
        )
    return answer | {"terms": told}
