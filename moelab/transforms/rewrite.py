"""A checkpoint rewritten by one of the ideas: `transform`, which stock transformers loads again.

Layer by layer: one layer's experts are in memory, in float32, however large the model is. Each
layer becomes a file of its own and what else the model uses is copied, with its parts for pictures
and sound, in a folder beside the destination that takes its name at the very end. A writer that is
stopped leaves that folder, and the same call goes on after the last file that is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from moelab.catalogue import bundled
from moelab.models.config import make_config, read_json
from moelab.models.families import expert_parameter, find_moe
from moelab.models.inventory import inventory, of_senses
from moelab.models.shards import read_header
from moelab.models.skeleton import blank_of
from moelab.scheduling.writing import write_atomically
from moelab.settings import refuse_unknown
from moelab.store.destination import check_room, move, partial_folder, remove_stale
from moelab.store.paths import cache_dir
from moelab.store.source import is_hub_id, kept, refuse_formats, refuse_pointers, state
from moelab.transforms.activations import activations
from moelab.transforms.layers import Layers
from moelab.transforms.merge import Merge
from moelab.transforms.puzzle import Puzzle
from moelab.transforms.resmoe import ResMoE
from moelab.transforms.slim import Slim

Idea = Puzzle | ResMoE | Merge | Slim
IDEAS: dict[str, type[Idea]] = {"puzzle": Puzzle, "resmoe": ResMoE, "merge": Merge, "slim": Slim}
NOTE = "transform.json"
"""In the folder that is made: what was done, and what it would take."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NEURONS = ("moe_intermediate_size", "intermediate_size")


def transform(
    model: str | Path = "demo",
    how: str = "puzzle",
    to: str | Path | None = None,
    *,
    texts: Sequence[str] | None = None,
    tokens: int = 256,
    progress: bool | Callable[[str], None] = True,
    **options: Any,
) -> Path:
    """Rewrite a checkpoint's experts by an idea from a paper; stock transformers loads the result.

    What the idea shares or leaves out is written out in full, so the folder is about as large as
    the original; ``transform.json`` in it says how many bytes the idea itself would need.

    Parameters
    ----------
    model
        ``"demo"``, ``"smollm2-moe"`` or a checkpoint folder with safetensors.
    how
        ``"puzzle"``, ``"resmoe"``, ``"merge"`` or ``"slim"``.
    to
        Folder to make; default one in the user's cache.
    texts
        Sample text, for what an idea can weigh by activations; default: weights alone.
    tokens
        Taken of each text.
    progress
        Show a bar, or call this with what is being done; if it raises, the same call goes on later.
    options
        Of the idea, see `Puzzle`, `ResMoE`, `Merge` and `Slim`.

    Returns
    -------
    Path
        The folder. If it was made by the same call before, nothing is done.

    Raises
    ------
    ValueError
        An option is refused, the checkpoint cannot be rewritten, or the folder is taken.
    StoreError
        The disk is too small.

    Examples
    --------
    >>> folder = transform("demo", "merge", keep=0.5)  # doctest: +SKIP
    >>> moelab.open(folder, budget="50%")  # doctest: +SKIP
    """
    if how not in IDEAS:
        raise ValueError(f"how={how!r}: one of {', '.join(IDEAS)}")
    refuse_unknown(f"transform(how={how!r})", options, IDEAS[how])
    if how == "resmoe" and texts is not None:
        raise ValueError("resmoe looks at weights alone; leave texts out")
    idea, source = IDEAS[how](**options), _source(model, progress)
    note = {
        "how": how,
        "options": dataclasses.asdict(idea),
        "source": str(source),
        "state": _digest(repr(state(source))),
        "texts": None if texts is None else [_digest("\0".join(texts)), tokens],
    }
    key = _digest(json.dumps(note))
    folder = cache_dir() / "transforms" / f"{source.name}-{how}-{key}" if to is None else Path(to)
    folder = folder.expanduser().absolute()
    if _is_done(folder, note):
        return folder
    work = _Rewriting(Layers(source), idea)
    check_room(folder, sum(work.layers.checkpoint.sizes), "the checkpoint")
    remove_stale(folder, but=key)
    with partial_folder(folder, key=key) as partial:
        work.write(partial, texts, tokens, progress)
        write_atomically(partial / NOTE, json.dumps(note | work.sizes(), indent=1).encode())
        move(partial, folder, overwrite=False)
    return folder


def _source(model: str | Path, progress: bool | Callable[[str], None]) -> Path:
    if (own := bundled(model, progress)) is not None:
        return own
    if is_hub_id(model):
        raise ValueError(
            f"{model!r} is a hub id, and every tensor of it is needed: download it once with "
            f"`hf download {model} --local-dir folder` and give that folder"
        )
    folder = Path(model).expanduser().resolve()
    if (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is a store; give the checkpoint that it was packed from")
    refuse_formats(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    refuse_pointers([*kept(folder), *folder.glob("*.safetensors")])
    return folder


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_done(folder: Path, note: dict[str, Any]) -> bool:
    """Whether this very folder is there; refuses to write where anything else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    there = read_json(folder / NOTE) if (folder / NOTE).is_file() else {}
    if all(there.get(name) == value for name, value in note.items()):
        return True
    raise ValueError(f"{folder} holds something else; give another folder, or remove it")


class _Rewriting:
    """A checkpoint on its way through an idea; refused before a weight is read, if at all."""

    def __init__(self, layers: Layers, idea: Idea) -> None:
        self.layers, self.idea = layers, idea
        self.config = self._config()

    def sizes(self) -> dict[str, Any]:
        """Bytes of the experts: as the source has them at 16 bit, as written, as the idea needs."""
        weights = written = needed = 0
        for size in map(self.layers.size, range(len(self.layers.moe))):
            experts, neurons = self.idea.left(size)
            weights += size.weights
            written += 2 * experts * neurons * size.width
            needed += self.idea.needed_bytes(size)
        bits = round(8 * needed / weights, 4)
        sizes = {"source_bytes": 2 * weights, "written_bytes": written, "needed_bytes": needed}
        return sizes | {"bits_per_weight": bits}

    def write(
        self,
        folder: Path,
        texts: Sequence[str] | None,
        tokens: int,
        progress: bool | Callable[[str], None],
    ) -> None:
        """Everything but the note; what is whole in the folder already stays."""
        tell = progress if callable(progress) else lambda _: None
        seen = None
        if texts is not None:
            tell("activations")
            seen = activations(self.layers, texts, tokens)
        pieces = [*self._expert_files(seen), *self._other_files()]
        index, total = {}, 0
        for number, (what, make) in enumerate(
            tqdm(pieces, disable=progress is not True, desc=type(self.idea).__name__), 1
        ):
            tell(what)
            file = folder / f"model-{number:05}-of-{len(pieces):05}.safetensors"
            if not file.is_file():
                part = file.with_suffix(".part")
                save_file(make(), part, metadata={"format": "pt"})
                part.replace(file)
            found = read_header(file, 0)
            index |= dict.fromkeys(found, file.name)
            total += sum(info.nbytes for info in found.values())
        head = {"metadata": {"total_size": total}, "weight_map": index}
        write_atomically(folder / "model.safetensors.index.json", json.dumps(head).encode())
        for file in kept(self.layers.folder):
            shutil.copyfile(file, folder / file.name)
        write_atomically(folder / "config.json", json.dumps(self.config, indent=2).encode())
        made = Layers(folder)  # every expert is there, and every other tensor has its place
        inventory(made.model, made.moe, made.checkpoint, made.reader.found)

    def _expert_files(self, seen: Any) -> Iterator[tuple[str, Callable[[], dict]]]:
        for at in self.layers.moe:

            def make(layer: int = at.index) -> dict[str, torch.Tensor]:
                known = seen[layer] if seen else None
                points, groups = self.idea(self.layers.points(layer), known, layer)
                tensors = self.layers.tensors(layer, points)
                for key in self.layers.router(layer):
                    rows = self.layers.checkpoint.tensor(key)
                    if groups is not None:
                        means = [rows[group].float().mean(0) for group in groups]
                        rows = torch.stack(means).to(rows.dtype)
                    tensors[key] = rows
                return tensors

            yield f"layer {at.index}", make

    def _other_files(self) -> Iterator[tuple[str, Callable[[], dict]]]:
        checkpoint, found = self.layers.checkpoint, self.layers.reader.found
        routers = {key for at in self.layers.moe for key in self.layers.router(at.index)}
        rest = found.rest.keys() - routers | of_senses(self.layers.model, found)
        for shard in sorted({checkpoint.info[key].shard for key in rest}):
            keys = sorted(key for key in rest if checkpoint.info[key].shard == shard)
            yield (
                "other weights",
                lambda keys=keys: {key: checkpoint.tensor(key) for key in keys},
            )

    def _config(self) -> dict[str, Any]:
        """config.json afterwards; refused where it would change more than experts and routers."""
        before, first = self.layers.model, self.layers.moe[0]
        config = read_json(self.layers.folder / "config.json")
        experts, neurons = self.idea.left(self.layers.size(0))
        if experts != first.num_experts:
            text: Any = before.config
            if (getattr(text.get_text_config(), "n_group", 1) or 1) > 1:
                raise ValueError(
                    f"{config['model_type']} routes by groups of experts, which merging would tear "
                    "apart; choose another transform"
                )
            config |= {n: experts for n in _EXPERTS if config.get(n) == first.num_experts}
        if neurons != first.inner:
            name = next((n for n in _NEURONS if config.get(n) == first.inner), None)
            config |= {name: neurons} if name else {}
        after = blank_of(make_config(config))
        made, routers = find_moe(after), {id(at.router) for at in self.layers.moe}
        owners = [n for n, module in before.named_modules() if id(module) in routers]
        changed = [
            name
            for name, weight in after.state_dict().items()
            if expert_parameter(name, made) is None
            and name.rpartition(".")[0] not in owners
            and weight.shape != before.state_dict()[name].shape
        ]
        if changed or any((at.num_experts, at.inner) != (experts, neurons) for at in made):
            raise ValueError(
                f"{config['model_type']} cannot have {experts} experts of {neurons} neurons with "
                f"all else as it is ({', '.join(changed[:1]) or 'config.json does not say how'}); "
                "choose puzzle or resmoe, which keep every size"
            )
        return config
