"""From a question or a conversation to token ids, by the chat template of the model's tokenizer.

An instruct model expects its template's marks around a message; without them it continues the text
instead of answering. An encoder-decoder is given a source, and begins its text with a token of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``[{"role": "user", "content": "Hello"}, ...]``."""
Text = str | tuple[str, str]
"""A text; of an encoder-decoder a source and what it is to make of it."""
Texts = Text | Sequence[Text]
"""One or several."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, from its own files only.

    Raises
    ------
    ValueError
        The checkpoint brought none that can be used.
    """
    from transformers import AutoTokenizer

    from moelab.models.skeleton import LOCAL, read_config

    config = read_config(folder)
    reason = "it knows no word"  # such a one transformers makes where there is no file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, **LOCAL)
        if tokenizer("Hello", add_special_tokens=False).input_ids:
            return tokenizer
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
    raise ValueError(
        f"{folder} has no usable tokenizer ({reason}); put tokenizer.json beside the "
        "checkpoint's config.json and pack it again"
    )


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def messages(tokenizer: Any, prompt: str | Messages, chat: bool | None) -> tuple[dict, ...]:
    """The conversation that is asked for; empty where the prompt is plain text to continue.

    Parameters
    ----------
    tokenizer
        The model's.
    prompt
        A text is one message of the user's.
    chat
        None: as a chat wherever there is a template.

    Raises
    ------
    ValueError
        A chat without a template, a conversation that is none, or one that is to be plain text.
    """
    plain = isinstance(prompt, str)
    if not plain and not (
        isinstance(prompt, Sequence) and prompt and all(map(_is_message, prompt))
    ):
        raise ValueError(
            f"prompt={str(prompt)[:80]}: give one text or a conversation; its messages are a list "
            "like [{'role': 'user', 'content': 'Hello'}, ...]"
        )
    if chat is None:
        chat = not plain or has_template(tokenizer)
    if not chat:
        if not plain:
            raise ValueError("chat=False continues a text; give a text instead of messages")
        return ()
    if not has_template(tokenizer):
        raise ValueError("this model's tokenizer has no chat template; give a text and chat=False")
    found = ({"role": "user", "content": prompt},) if plain else tuple(map(dict, prompt))
    if not found[-1]["content"].strip():
        raise ValueError("the prompt is empty; give at least one word")
    return found


def _is_message(one: Any) -> bool:
    return (
        isinstance(one, Mapping)
        and {"role", "content"} <= set(one)
        and all(isinstance(s, str) for s in one.values())
    )


def encode(tokenizer: Any, conversation: Messages) -> list[int]:
    """Token ids of a conversation, up to where the model is to answer.

    Raises
    ------
    ValueError
        The template refuses the conversation, goes beyond its bounds, or makes nothing of it.
    """
    from moelab.models.template import within_bounds

    roles = ", ".join(one["role"] for one in conversation)
    try:
        with within_bounds(tokenizer.get_chat_template()):
            text = tokenizer.apply_chat_template(
                list(conversation), add_generation_prompt=True, tokenize=False
            )
    except ValueError as error:
        raise ValueError(
            f"{error}; it was given messages of {roles}: leave out the role that it does not know, "
            "or give a text and chat=False"
        ) from error
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(
            f"this model's chat template makes no text of messages of {roles}; give a text and "
            "chat=False"
        )
    return ids


def listed(text: Texts) -> list[Text]:
    """One or several as a list; a tuple of two texts is one pair."""
    several = isinstance(text, list) or (isinstance(text, tuple) and not _is_pair(text))
    return list(text) if several else [text]  # pyright: ignore[reportReturnType]


def takes_pairs(model: Any) -> bool:
    """Whether a model's texts are (source, target) pairs: it is an encoder-decoder."""
    return bool(model.config.is_encoder_decoder)


def pair_of(source: str, written: str) -> tuple[str, str]:
    """A pair to score of a source and what was written of it; the source twice if that is blank."""
    return source, written if written.strip() else source


def check_text(text: Text, *, two: bool) -> Text:
    """Refuse a text for an encoder-decoder (``two``), and a pair for any other model.

    Raises
    ------
    ValueError
        The message says what to give.
    """
    if not (_is_pair(text) if two else isinstance(text, str)):
        ask = "(source, target) pairs of texts" if two else "texts"
        raise ValueError(f"{str(text)[:60]!r}: this model is measured on {ask}; give those")
    if two and not all(part.strip() for part in text):
        raise ValueError(f"{str(text)[:60]}: source and target need at least one word each")
    return text


def _is_pair(text: Any) -> bool:
    of_two = isinstance(text, list | tuple) and len(text) == 2
    return of_two and all(isinstance(part, str) for part in text)


def start_token(model: Any) -> int:
    """The token that an encoder-decoder's text begins with.

    Raises
    ------
    ValueError
        It has none, or one that is no token.
    """
    asked = [(of, "decoder_start_token_id") for of in (model.generation_config, model.config)]
    asked.append((model.generation_config, "bos_token_id"))
    start = next((s for of, name in asked if (s := getattr(of, name, None)) is not None), None)
    words = len(model.get_input_embeddings().weight)
    if type(start) is not int or not 0 <= start < words:
        raise ValueError(
            f"decoder_start_token_id is {start!r}, and a token from 0 to {words - 1} is to begin "
            "the text; put it into the checkpoint's generation_config.json and pack it again"
        )
    return start
