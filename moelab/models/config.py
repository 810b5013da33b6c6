"""A model's configuration from config.json: sizes and switches, never code.

transformers makes an attribute of every key it finds, and some of its attributes choose code: which
attention (compiled for half a minute, or fetched from a hub), which experts, what to import. Only
keys that the family's own configuration class knows reach it, none of these among them, and numbers
that would build a model without an end are refused before one is built.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

MOST_BYTES = 8 << 20
MOST = {"layer": 2048, "layers": 2048, "experts": 65536}
"""Largest numbers of keys that end so: a model has a module for each layer, or each expert."""
ALWAYS = {"architectures", "quantization_config", "torch_dtype", "decoder_start_token_id"}
CHOOSES_CODE = {"attn_implementation", "auto_map", "distributed_config", "experts_implementation"}
CHOOSES_CODE |= {"fusion_config", "transformers_weights"}  # the last: which file is read
THINKS = {
    "qwen3_omni_moe": ("thinker_config", "Qwen3OmniMoeThinkerForConditionalGeneration"),
}
"""Of several models in a checkpoint the one that writes text: its key in config.json, its class."""
DTYPES = ("bfloat16", "float16", "float32", "float64")


def read_json(file: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises
    ------
    ValueError
        It is too large, or something else; names the file.
    """
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"{file} has {size} bytes, a file of its kind at most {most}; look at it")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({str(error)[:200]}); download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds no JSON object; download it again")  # noqa: TRY004
    return data


def make_config(data: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that the keys of a config.json make, as far as the family knows them.

    Raises
    ------
    ValueError
        transformers has no such family, a count is beyond `MOST`, or a part is no object.
    """
    kind = data.get("model_type")
    if isinstance(kind, str) and kind in THINKS:
        part, name = THINKS[kind]
        whole = {k: v for k, v in data.items() if k == "quantization_config"}
        if not isinstance(thinks := data.get(part) or {}, Mapping):
            raise ValueError(f"{part} is {str(thinks)[:100]!r}, no JSON object")
        own = {"model_type": f"{kind}_thinker", **thinks, "architectures": [name]}
        return make_config(whole | own)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {str(kind)[:100]!r}, which it does not have")
    for name, number in _counts(data):
        most = MOST.get(name.rpartition("_")[2])
        if most is not None and not -most <= number <= most:  # -1 is the last layer
            raise ValueError(f"{name}={number} is beyond {most}")
    data = PreTrainedConfig._decode_special_floats(dict(data))
    return CONFIG_MAPPING[kind].from_dict(_known(CONFIG_MAPPING[kind], data))


def _counts(data: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number and length of a list, with the key it stands under."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _counts(value, str(key))
    elif isinstance(data, list):
        yield name, len(data)
    elif isinstance(data, int):
        yield name, data


def _known(kind: type[PreTrainedConfig], data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a configuration class knows, and of its parts' configurations the same."""
    names, out = _names(kind), {}
    for key, value in data.items():
        part = (kind.sub_configs_defaults or {}).get(key)
        if part is not None and isinstance(value, Mapping):
            out[key] = _known(_class_of(part, value), value)
        elif key in names and (key not in ("dtype", "torch_dtype") or value in DTYPES):
            out[key] = _plain(value)
    return out


def _class_of(part: Any, value: Mapping[str, Any]) -> type[PreTrainedConfig]:
    """The class of a part's configuration, as transformers finds it."""
    if hasattr(part.config_class, "model_type"):  # else it is AutoConfig
        return part.config_class
    asked = value.get("model_type") or part.model_type
    known = isinstance(asked, str) and asked in CONFIG_MAPPING
    return CONFIG_MAPPING[asked] if known else PreTrainedConfig


def _plain(value: Any) -> Any:
    """A value as it is, without what chooses code at any depth."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k not in CHOOSES_CODE and not k.startswith("_")}
    return {key: _plain(one) for key, one in kept.items()}


@cache
def _names(kind: type[PreTrainedConfig]) -> frozenset[str]:
    """Fields, their other names, and what the class's own code reads of earlier versions' keys."""
    own = {field.name for field in dataclasses.fields(kind)}
    own |= {*kind.attribute_map, *kind.attribute_map.values()}
    for base in kind.__mro__[:-1]:
        for member in vars(base).values():
            if isinstance(member, FunctionType):
                own |= set(_texts(member.__code__))
    own |= {a + b for a in own if a.endswith("_") for b in own}  # f"swa_{name}"
    free = {name for name in own if not callable(getattr(kind, name, None))}  # no method of it
    return frozenset(name for name in free | ALWAYS if name[0] != "_") - CHOOSES_CODE


def _texts(code: CodeType) -> Iterator[str]:
    """The attributes and the keys that a function names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _texts(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from (c for c in constant if isinstance(c, str) and c.isidentifier())
