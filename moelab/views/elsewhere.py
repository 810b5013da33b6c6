"""What a stream advises to set in other tools, and what it would hit there.

Settings are those of each tool's own documentation, named beside them and read in November 2026.
Hits are counted on the stream, as far as a placement or a policy is known to be the tool's; what a
tool takes for a token is not known here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import pandas as pd

from moelab.scheduling.budget import size
from moelab.scheduling.trace import Trace

LLAMA = "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"
INFINITY = "https://github.com/EfficientMoE/MoE-Infinity/blob/main/README.md"
KT = "https://github.com/kvcache-ai/ktransformers/blob/main/doc/en/kt-kernel/experts-sched-Tutorial.md"


def elsewhere(
    trace: Trace, budget_bytes: int, expert_bytes: int, hits: Mapping[str, float]
) -> pd.DataFrame:
    """A row a setting: ``tool``, ``set``, ``hits`` on this stream, ``because``, ``source``.

    Parameters
    ----------
    trace, budget_bytes, expert_bytes
        A stream; the memory, of a GPU where the tool speaks of one; and what an expert takes of it.
    hits
        Hit ratios of strategies by name, for tools whose policy is one of them.
    """
    shape = trace.shape
    whole, room = 0, budget_bytes // expert_bytes
    for experts in reversed(shape.experts):
        if room < experts:
            break
        whole, room = whole + 1, room - experts
    each = budget_bytes // (expert_bytes * shape.layers)
    by_use, alike = placed(trace, each), each / max(shape.experts)
    memory, moved = size(budget_bytes), shape.layers - whole
    why = {
        "layers": f"{memory} hold all experts of {whole} layers; every layer asks for as many, so "
        "which layers is all the same (add the dense layers that come first)",
        "cache": "experts stay in RAM and some are cached on the GPU; its documentation does not "
        "say by which rule, so no hits are named",
        "ratio": "the share of GPU memory that caches experts; hits are its paper's policy's",
        "use": "as many in every layer, by how often they were used: placed by the first half of "
        f"this stream, counted on the second; placed without statistics {alike:.0%}",
    }
    statistics = "--kt-expert-placement-strategy frequency --init-expert-location STATISTICS.pt"
    mib, share = budget_bytes // 2**20, f'"device_memory_ratio": {memory} / memory of your GPU'
    rows = [
        ("llama.cpp", f"-ngl all --n-cpu-moe {moved}", whole / shape.layers, why["layers"], LLAMA),
        ("llama.cpp", f"-ngl all --cpu-moe --moe-cache-mib {mib}", None, why["cache"], LLAMA),
        ("MoE-Infinity", share, hits.get("moe_infinity"), why["ratio"], INFINITY),
        ("ktransformers", f"--kt-num-gpu-experts {each} {statistics}", by_use, why["use"], KT),
    ]
    return pd.DataFrame(rows, columns=["tool", "set", "hits", "because", "source"])


def placed(trace: Trace, each: int) -> float:
    """Hits of the second half with each layer's ``each`` most used experts of what came before."""
    decoded = [step for step in trace.steps if not step.prefill]
    layers = len(trace.shape.path())
    half = len(decoded) // (2 * layers) * layers
    before = [step for step in trace.steps if step.prefill] + decoded[:half]
    uses: dict[int, Counter[int]] = defaultdict(Counter)
    for step in before:
        uses[step.layer].update(expert for row in step.experts for expert in row)
    kept = {layer: {e for e, _ in of.most_common(each)} for layer, of in uses.items()}
    asked = [(s.layer, r.expert) for s in decoded[half:] for r in s.requests()]
    return sum(expert in kept.get(layer, ()) for layer, expert in asked) / max(1, len(asked))
