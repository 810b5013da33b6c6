"""Everything a first token needs of a store's files, tried once when the store is opened.

A store may come from anybody: its files can be whole and still make no model. Whoever opens it is
told so then, by the file's name, and not in the middle of a run.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from moelab.engine.generation import NotFiniteError, Sampler, Sampling, Stream, begun_with
from moelab.models.tokenizer_trial import try_tokenizer
from moelab.runs.session import Session
from moelab.store.foreign import foreign
from moelab.store.manifest import StoreError, digest_file
from moelab.store.paths import cache_dir
from moelab.store.store import Store


def tokenizer_of(store: Store) -> Any:
    """The store's tokenizer, its file tried elsewhere before it is read here.

    Raises
    ------
    StoreError
        It cannot be used, or another store has taken this one's place.
    """
    store.check_in_place()
    file = store.checkpoint_dir / "tokenizer.json"
    with foreign(file):
        if file.is_file():
            _try_once(file)
        return store.tokenizer()


def _try_once(file: Path) -> None:
    """Every content of a file is tried once on a machine."""
    mark = cache_dir() / "tried" / digest_file(file)
    if mark.is_file():
        return
    try_tokenizer(file)
    with suppress(OSError):  # then it is tried again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def trial(store: Store, session: Session) -> None:
    """Encode, decode, compute two tokens without experts, draw; the session is closed on failure.

    Raises
    ------
    StoreError
        A file cannot be used, or another store has taken this one's place meanwhile.
    """
    try:
        _try(store.checkpoint_dir, session)
        store.check_in_place()
    except BaseException:
        session.close()
        raise


def _try(folder: Path, session: Session) -> None:
    engine = session.engine
    with foreign(folder / "tokenizer.json"):
        session.tokenizer.decode(session.encode("Hello, world! 12"))
    with foreign(folder / "generation_config.json"):
        ends = session.eos(chat=True)
        if not all(isinstance(token, int) for token in ends):
            raise ValueError(f"eos_token_id is {ends}, not numbers of tokens")
    with foreign(folder / "config.json"), engine.full_precision(lambda _: 0):
        try:
            ids = begun_with(engine.model, [0, 0])
            logits = Stream(engine, ids.source).forward(ids)[-1]
        except NotFiniteError as error:
            raise StoreError(f"{folder.parent}: {error}") from error
    with foreign(folder / "generation_config.json"):
        for own in ({"temperature": 0.0}, {"temperature": 1.0}):
            how = Sampling.of(engine.model, **own)
            Sampler(engine.model, how, ids).draw(ids, logits)
