"""From a question or a conversation to token ids, by the chat template of the model's tokenizer.

An instruct model expects its template's marks around a message; without them it continues the text
instead of answering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``[{"role": "user", "content": "Hello"}, ...]``."""


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
        The template refuses the conversation, or makes nothing of it.
    """
    roles = ", ".join(one["role"] for one in conversation)
    try:
        ids = tokenizer.apply_chat_template(
            list(conversation), add_generation_prompt=True, return_dict=True
        )["input_ids"]
    except Exception as error:  # whatever a template does: it came with the checkpoint
        raise ValueError(
            f"this model's chat template refuses messages of {roles}: {error}; leave out the role "
            "that it does not know, or give a text and chat=False"
        ) from error
    if not ids:
        raise ValueError(
            f"this model's chat template makes no text of messages of {roles}; give a text and "
            "chat=False"
        )
    return list(ids)
