"""Everything a first token needs of a store's files, tried once when the store is opened.

A store may come from anybody: its files can be whole and still make no model. Whoever opens it is
told so then, by the file's name, and not in the middle of a run.
"""

from __future__ import annotations

from moelab.engine.generation import Stream
from moelab.runs.session import Session
from moelab.store.foreign import foreign
from moelab.store.store import Store


def trial(store: Store, session: Session) -> None:
    """Encode, decode, and compute two tokens without experts.

    Raises
    ------
    StoreError
        A file cannot be used, or another store has taken this one's place meanwhile.
    """
    folder, engine = store.checkpoint_dir, session.engine
    with foreign(folder / "tokenizer.json"):
        session.tokenizer.decode(session.encode("Hello, world! 12"))
    with foreign(folder / "generation_config.json"):
        ends = session.eos(chat=True)
        if not all(isinstance(token, int) for token in ends):
            raise ValueError(f"eos_token_id is {ends}, not numbers of tokens")
    with foreign(folder / "config.json"), engine.full_precision(lambda _: 0):
        if not Stream(engine).forward([0, 0]).isfinite().all():
            raise ValueError("the weights besides the experts give no finite numbers")
    store.check_in_place()
