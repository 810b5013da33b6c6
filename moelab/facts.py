"""The model and what fits: the facts that a person reads before choosing a budget."""

from __future__ import annotations

from typing import Any

from moelab.engine.engine import Engine
from moelab.scheduling.budget import minimum_budget
from moelab.settings import Settings
from moelab.store.store import Store


def facts(name: str, store: Store, settings: Settings, engine: Engine) -> dict[str, Any]:
    """Sizes in bytes and counts of experts, by name."""
    s, shape = settings, engine.shape
    return {
        "name": name,
        "architecture": store.manifest.architecture,
        "layers": shape.layers,
        "experts_per_layer": max(shape.experts),
        "top_k": shape.top_k,
        "tiers": tuple(sorted(shape.nbytes, reverse=True)),
        "expert_bytes": dict(shape.nbytes),
        "all_experts_bytes": shape.all_bytes(max(shape.nbytes)),
        "token_cycle_bytes": shape.token_cycle_bytes(s.bits),
        "minimum_budget_bytes": minimum_budget(shape, s.strategy, s.knobs()),
        "budget_bytes": s.budget_bytes,
        "budget_experts": s.budget_bytes // shape.nbytes[s.bits],
        "resident_bytes": engine.arena.held_bytes,
        "reference_bits": max(shape.nbytes),
        "direct_io": engine.loader.direct,
        "non_expert_parameters": sum(
            p.numel() for p in engine.model.parameters() if p.device.type != "meta"
        ),
        "store": str(store.path),
    }
