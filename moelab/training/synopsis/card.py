"""Measure what the synopsis model's card says, on the held-out test pairs, and write the card.

`python -m moelab.training.synopsis.card` writes `synopsis.json` (the measurements), `SYNOPSIS.md`
and `synopsis_curve.svg` (made of them by `page`).  Rouge of greedy synopses beside baselines and a
dense model of the same active size (`train --experts 1`); the routing of what was read and written.
Stock transformers computes the bf16 weights in float32; everything is deterministic.

N pairs, L sparse layers (the encoder's first), E experts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from moelab.demo import HERE
from moelab.demo.synopsis import checkpoint
from moelab.demo.synopsis import pairs as bundled
from moelab.runs.rouge import f_measures
from moelab.scheduling.writing import write_atomically
from moelab.store.paths import cache_dir
from moelab.training.page import curve_svg
from moelab.training.routing import chosen, entropy, information, reuse, rounded, skew
from moelab.training.synopsis.baselines import WORD, baselines
from moelab.training.synopsis.corpus import Corpus, Pair, group, prepare
from moelab.training.synopsis.page import (
    DRAWS,
    LEAST,
    METRICS,
    MODELS,
    OTHERS,
    SEED,
    curves,
    render,
)
from moelab.training.synopsis.train import IGNORED, PADDING, Batch

PERMUTATIONS = 10  # of the sections, for what is information by chance
SAMPLES = 8


class Opened(NamedTuple):
    """A checkpoint, ready to write."""

    folder: Path
    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, folder: Path) -> Opened:
        """Read a checkpoint folder; its bf16 weights become float32."""
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(folder, model, AutoTokenizer.from_pretrained(folder))


class Written(NamedTuple):
    """What a model made of N descriptions."""

    sources: list[list[int]]
    targets: list[list[int]]  # with the end of text, if it came
    texts: list[str]


@torch.no_grad()
def write(opened: Opened, texts: Sequence[str], batch: int = 64) -> Written:
    """Greedy synopses, in batches of sources of like length."""
    _, model, tokenizer = opened
    sources, end = tokenizer(list(texts)).input_ids, model.config.eos_token_id
    order = sorted(range(len(texts)), key=lambda at: len(sources[at]))
    targets: list[list[int]] = [[]] * len(texts)
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        source = Batch.of([(sources[at], [end]) for at in part]).source
        made = model.generate(source, attention_mask=(source != PADDING).long(), do_sample=False)
        for at, (_start, *ids) in zip(part, made.tolist(), strict=True):
            targets[at] = ids[: ids.index(end) + 1] if end in ids else ids
    found = tokenizer.batch_decode(targets, skip_special_tokens=True)
    return Written(sources, targets, [text.strip() for text in found])


class Routed(NamedTuple):
    """Which expert each token chose, of one pair."""

    encoder: Tensor  # [layers, source tokens, 1]
    decoder: Tensor  # [layers, written tokens, 1]


@torch.no_grad()
def routing_of(model: Any, written: Written, batch: int = 64) -> list[Routed]:
    """The choices while the descriptions were read and the synopses written, teacher-forced."""
    rows = list(zip(written.sources, written.targets, strict=True))
    order = sorted(range(len(rows)), key=lambda at: len(rows[at][0]))
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _inputs, out: seen.append(out[2].argmax(-1)))
        for _, module in routers(model)
    ]
    found: list[Any] = [None] * len(rows)
    try:
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            source, target = Batch.of([rows[at] for at in part])
            seen.clear()
            model(input_ids=source, attention_mask=(source != PADDING).long(), labels=target)
            half = len(seen) // 2
            sides = torch.stack(seen[:half], 1), torch.stack(seen[half:], 1)  # [B, L / 2, tokens]
            masks = source != PADDING, target != IGNORED
            for row, at in enumerate(part):
                kept = [side[row][:, m[row], None] for side, m in zip(sides, masks, strict=True)]
                found[at] = Routed(*kept)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def routers(model: Any) -> list[tuple[str, Any]]:
    """The sparse layers' routers by name (``encoder 1``), in the order in which they are asked."""
    found = [(name.split("."), m) for name, m in model.named_modules() if name.endswith(".router")]
    return [(f"{side} {block}", module) for (side, _, block, *_), module in found]


def interval(differences: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Mean difference [N] and its 95 % interval, by a bootstrap of whole groups."""
    of = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(of, differences), np.bincount(of)
    drawn = np.random.default_rng(SEED).integers(0, len(sums), (DRAWS, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    figures = {"difference": differences.mean(), "low": low, "high": high}
    return {name: round(float(value), 4) for name, value in figures.items()}


def _figures(each: np.ndarray) -> dict[str, float]:
    """The means of scores [n, 3] by name."""
    return dict(zip(METRICS, each.mean(0).round(4).tolist(), strict=True))


def of_words(texts: Sequence[str], sources: Sequence[str]) -> dict[str, float]:
    """Mean number of words, and the share of them that the description has."""
    found = [WORD.findall(text.lower()) for text in texts]
    known = [set(WORD.findall(text.lower())) for text in sources]
    copied = sum(word in has for words, has in zip(found, known, strict=True) for word in words)
    count = sum(map(len, found))
    return {"words": round(count / len(texts), 2), "copied": round(copied / max(count, 1), 4)}


def sections(pairs: Sequence[Pair], least: int = LEAST) -> list[str]:
    """Each pair's section; `OTHERS` for a section with fewer than `least` of them."""
    counts = Counter(pair.section for pair in pairs)
    return [pair.section if counts[pair.section] >= least else OTHERS for pair in pairs]


def quality(test: Sequence[Pair], texts: dict[str, list[str]], labels: list[str]) -> dict[str, Any]:
    """Rouge of each writer's texts, intervals of the differences, and Rouge by section."""
    references, sources = [p.synopsis for p in test], [p.text for p in test]
    each = {name: f_measures(written, references) for name, written in texts.items()}
    rouge = {n: _figures(e) | of_words(texts[n], sources) for n, e in each.items()}
    ours, dense = MODELS
    best = max((n for n in texts if n not in MODELS), key=lambda n: rouge[n]["rouge2"])
    groups, second = [group(p.source) for p in test], METRICS.index("rouge2")
    by_size = [n for n, _ in Counter(labels).most_common() if n != OTHERS]
    places = {name: np.array(labels) == name for name in [*by_size, OTHERS] if name in labels}
    return {
        "rouge": rouge,
        "reference": of_words(references, sources),
        "identical": round(float(np.equal(texts[ours], references).mean()), 4),
        "best_baseline": best,
        "against": {
            name: interval(each[ours][:, second] - each[name][:, second], groups)
            for name in (best, dense)
        },
        "groups": len(set(groups)),
        "by_section": {
            section: {
                "pairs": int(at.sum()),
                **_figures(each[ours][at]),
                "others": {n: _figures(each[n][at])["rouge2"] for n in (dense, best)},
            }
            for section, at in places.items()
        },
    }


def routing(model: Any, routed: Sequence[Routed], labels: list[str]) -> dict[str, Any]:
    """How uneven, how local and how special to a section the routing is, by sparse layer."""
    experts = model.config.num_experts
    counts = torch.stack([torch.cat([chosen(s, experts).sum(1) for s in pair]) for pair in routed])
    names = list(dict.fromkeys(sorted(labels, key=lambda name: (name == OTHERS, name))))

    def by_section(order: Tensor) -> Tensor:  # [sections, L, E]
        of = torch.tensor([names.index(label) for label in labels])[order]
        return torch.zeros(len(names), *counts.shape[1:]).index_add_(0, of, counts)

    drawn = torch.Generator().manual_seed(SEED)
    shuffled = [torch.randperm(len(labels), generator=drawn) for _ in range(PERMUTATIONS)]
    chance = [information(by_section(order)) for order in shuffled]
    each = by_section(torch.arange(len(labels)))
    load = counts.sum(0) / counts.sum((0, -1))[:, None]
    reused = [reuse(side, experts) for side in zip(*routed, strict=True)]
    return {
        "layers": [name for name, _ in routers(model)],
        "load": [rounded(layer) for layer in load],
        "entropy_bits": rounded(entropy(load)),
        **skew(dict(zip(names, each, strict=True))),
        "between_domains_bits_by_chance": rounded(torch.stack(chance).mean(0)),
        "reuse": rounded(torch.cat(reused)),
        "reuse_by_chance": rounded(load.square().sum(-1)),
    }


def sizes(opened: Opened) -> dict[str, Any]:
    """What a model is made of, in layers, parameters and bytes."""
    folder, model, _ = opened
    config = model.config
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    return {
        "architecture": type(model).__name__,
        "encoder_layers": config.num_layers,
        "decoder_layers": config.num_decoder_layers,
        "sparse_layers": len(routers(model)),
        "experts": config.num_experts,
        "hidden": config.d_model,
        "ffn": config.d_ff,
        "vocabulary": config.vocab_size,
        "parameters": model.num_parameters(),
        "expert_parameters": experts,
        "active_parameters": model.num_parameters() - experts + experts // config.num_experts,
        "file_bytes": (folder / "model.safetensors").stat().st_size,
    }


def samples(test: Sequence[Pair], texts: list[str]) -> list[dict[str, Any]]:
    """The first pair of each of the first sections, in the split's order."""
    first: dict[str, int] = {}
    for at, pair in enumerate(test):
        first.setdefault(pair.section, at)
    return [
        {
            **{name: getattr(test[at], name) for name in ("package", "section", "text")},
            "synopsis": test[at].synopsis,
            "written": texts[at],
            "rouge2": _figures(f_measures([texts[at]], [test[at].synopsis]))["rouge2"],
        }
        for at in list(first.values())[:SAMPLES]
    ]


def take(model: Path, dense: Path, corpus: Corpus) -> dict[str, Any]:
    """Measure a checkpoint beside a dense one; what `synopsis.json` holds."""
    test, opened = corpus.parts["test"], [Opened.of(folder) for folder in (model, dense)]
    labels, sources = sections(test), [pair.text for pair in test]
    written = []
    for name, one in zip(MODELS, opened, strict=True):
        print(f"{name} writes", flush=True)
        written.append(write(one, sources))
    texts = {name: made.texts for name, made in zip(MODELS, written, strict=True)}
    print("baselines", flush=True)
    for name, rule in baselines(corpus.parts["train"]).items():
        texts[name] = [rule(text) for text in sources]
    tokens = {
        "source": round(sum(map(len, written[0].sources)) / len(test), 1),
        "written": round(sum(map(len, written[0].targets)) / len(test), 1),
    }
    return {
        "models": {name: sizes(one) for name, one in zip(MODELS, opened, strict=True)},
        "corpus": {
            "pairs": {name: len(rows) for name, rows in corpus.parts.items()},
            "sources": {n: len({p.source for p in rows}) for n, rows in corpus.parts.items()},
            "sections": len({pair.section for pair in test}),
            "bundled": sum(
                len(p) for part in ("validation", "test") for p in bundled(part).values()
            ),
        },
        "training": {
            name: json.loads((one.folder / "training.json").read_text())
            for name, one in zip(MODELS, opened, strict=True)
        },
        "tokens": tokens,
        "limit": opened[0].model.generation_config.max_new_tokens,
        **quality(test, texts, labels),
        "routing": routing(opened[0].model, routing_of(opened[0].model, written[0]), labels),
        "samples": samples(test, written[0].texts),
    }


def main(
    model: Annotated[Path | None, typer.Option(help="checkpoint folder (the bundled one)")] = None,
    dense: Annotated[Path | None, typer.Option(help="of the dense model (user cache)")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
    out: Annotated[Path, typer.Option(help="where to write")] = HERE,
) -> None:
    """Measure the model and write synopsis.json, SYNOPSIS.md and synopsis_curve.svg."""
    torch.set_num_threads(1)
    dense = dense or cache_dir() / "synopsis" / "dense" / "model"
    if not (dense / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{dense} has no dense model to compare with: train it with "
            "`python -m moelab.training.synopsis.train --experts 1`, or name its folder (--dense)"
        )
    card = take(model or checkpoint(), dense, prepare(data))
    files = {
        "synopsis.json": json.dumps(card, indent=1, ensure_ascii=False) + "\n",
        "SYNOPSIS.md": render(card),
        "synopsis_curve.svg": curve_svg(curves(card)),
    }
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    print(f"wrote {out / 'SYNOPSIS.md'}")


if __name__ == "__main__":
    typer.run(main)
