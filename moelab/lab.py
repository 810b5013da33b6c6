"""The lab: open a model, change settings, generate, score, watch.

>>> import moelab
>>> lab = moelab.open("demo", budget="25%")
>>> run = lab.generate("Once upon a time", max_new_tokens=8)
>>> sorted(run.summary())[:2]
['budget_bytes', 'byte_hit_ratio']
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

import moelab
from moelab.calibration.probes import to_score
from moelab.calibration.profile import Profile, Strategies
from moelab.catalogue import bundled_probes, bundled_prompts, describe
from moelab.engine.engine import Engine
from moelab.models.chat import Messages, Text, Texts, has_template
from moelab.runs.compare import Comparison
from moelab.runs.quality import Score
from moelab.runs.run import Run
from moelab.runs.saved import SavedRuns
from moelab.runs.session import Changes, Lengths, Session
from moelab.runs.summaries import score
from moelab.runs.trial import tokenizer_of, trial
from moelab.runs.what_if import REPEATS, WhatIf, repeated
from moelab.settings import Settings, known_only, refuse_unknown
from moelab.spelling import shown, valued
from moelab.store.store import Store

if TYPE_CHECKING:
    from moelab.runs.recording import Recording
    from moelab.widgets.dashboard import Dashboard


class Lab:
    """A model, its engine, and the settings a person may change at any time.

    Use `open`; a lab is also a context manager that closes itself.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        name: str = "",
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        dense_bits: int = 16,
        strategies: Strategies | None = None,
        progress: bool = True,
    ) -> None:
        self._store, self._shape, self._progress = store, store.shape, progress
        self.name = name or store.manifest.source
        self._tokenizer = tokenizer = tokenizer_of(store)
        self._engine = Engine(store, settings, dtype, threads, dense_bits)
        weakref.finalize(self, self._engine.loader.close)
        self._strategies = strategies or Strategies(store)
        self._session = Session(self._engine, self._strategies, tokenizer, self.name)
        self._encode = self._session.encode
        self._saved = SavedRuns()
        trial(store, self._session)

    @property
    def settings(self) -> Settings:
        """The settings in force from the next token on."""
        return self._session.settings

    @property
    def run(self) -> Run | None:
        """The newest run."""
        return self._session.run

    @property
    def follows(self) -> bool:
        """Whether the budget follows the machine: ``lab.update(budget="auto")``."""
        return self._session.auto is not None

    def update(self, **changes: Any) -> Settings:
        """Change settings at any time, from any thread; the next token obeys.

        Parameters
        ----------
        changes
            Any of `Settings`, ``budget`` (``"auto"``: what the machine can spare, from now on), a
            decision of the strategy (``evict="hobbit"``, or an object of your own), a parameter of
            its parts (``w_lru=0.4``), or ``pin``: experts to keep for good,
            ``{(layer, expert): bits}``. A part brings its own parameters.

        Raises
        ------
        ValueError
            A value is refused; no setting changes.

        Examples
        --------
        >>> lab.update(budget="50%", bits=4).bits
        4
        """
        return self._session.update(**changes)

    # -- generating -------------------------------------------------------------------------

    @known_only
    def start(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        measure_kl: int | None = None,
        ignore_eos: bool = False,
        chat: bool | None = None,
        changes: Changes | None = None,
        draft_bits: int | str | None = None,
        draft_length: Lengths = 4,
    ) -> Run:
        """Generate in the background and return at once.

        Parameters
        ----------
        prompt
            Text of at least one token, or a conversation:
            ``[{"role": "user", "content": "Why is the sky blue?"}]``.
        max_new_tokens
            Upper limit; the model's end-of-text token ends earlier unless ``ignore_eos``.
        temperature, top_p, top_k, repetition_penalty
            Default: the model's own generation config; ``temperature=0`` is greedy, ``top_k=0`` is
            off. What else that config asks of the logits (``no_repeat_ngram_size``,
            ``suppress_tokens``, ...) is done by transformers' own processors.
        seed
            Of sampling; default the ``seed`` setting.
        measure_kl
            Changes the setting of that name.
        chat
            Put the prompt into the tokenizer's chat template, so that an instruct model answers it
            instead of continuing it; default: wherever there is a template.
        changes
            Settings to change on the way, just before a token: ``{12: {"bits": 4}}`` as in
            `update`, or a `Settings` as a whole. One that is refused ends the run.
        draft_bits, draft_length
            All experts at this tier, in memory beside the budget, write so many tokens ahead (0 to
            7, ``"auto"``, ``{0: 4, 9: 2}``); one pass verifies them: greedy text is the same.

        Raises
        ------
        RuntimeError
            Another run is going on in this lab.
        ValueError
            An empty prompt, or a value out of range.

        Examples
        --------
        >>> run = lab.start("Once upon a time", max_new_tokens=8, changes={4: {"bits": 4}})
        >>> run.join().changes
        [(4, {'bits': '4'})]
        """
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        return self._session.start(
            prompt,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            chat=chat,
            measure_kl=measure_kl,
            changes=changes,
            draft=(draft_bits, draft_length),
            repetition_penalty=repetition_penalty,
            **drawn,
        )

    def generate(self, prompt: str | Messages, **options: Any) -> Run:
        """Generate and wait; options as in `start`. Ctrl-C stops the run."""
        refuse_unknown("lab.generate()", options, Lab.start)
        return self.start(prompt, **options).join()

    @known_only
    def score(
        self, text: Texts | None = None, *, max_tokens: int = 48, progress: bool | None = None
    ) -> Score:
        """Quality under the current settings against the store's best tier, teacher-forced.

        Every position is decoded through the engine, so misses are downgraded as they would be in
        a run. An emulated device is not waited for, unless the strategy goes by what has landed.
        An encoder-decoder also writes each source's summary under either, for its Rouge.

        Parameters
        ----------
        text
            One or a list; of an encoder-decoder pairs ``(source, reference)``. Default: the
            model's own held-out texts.
        max_tokens
            Tokens taken of each text, and of a summary at most.
        progress
            Show a bar; default as the lab was opened.

        Raises
        ------
        RuntimeError
            A run is going on.
        ValueError
            A text has fewer than two tokens, is none of this model's kind, or is not given for a
            model without probes.

        Examples
        --------
        >>> lab.score("Once upon a time there was a man who", progress=False).tokens
        9
        """
        bar = self._progress if progress is None else progress
        return self._scored(text, max_tokens, progress=bar)

    def calibrate(
        self, strategy: str, *, again: bool = False, progress: bool | None = None, **options: Any
    ) -> Profile:
        """Measure of this model what a strategy needs to know; saved beside the store.

        An interrupted calibration goes on where it stopped. What was saved is used as long as it
        was made from the same store, texts and options. What this returns is what the strategy is
        made with when it is next chosen by name.

        Parameters
        ----------
        strategy
            One of ``moelab.calibration.NAMES``.
        again
            Make it anew whatever there is.
        progress
            Show a bar; default as the lab was opened.
        options
            Of that calibration.

        Raises
        ------
        RuntimeError
            A run is going on.
        ValueError
            The strategy has no calibration, or an option is refused.
        """
        from moelab import calibration

        bar = self._progress if progress is None else progress
        with self._session.claimed() as engine:
            try:
                made = calibration.calibrate(self, strategy, again=again, progress=bar, **options)
                self._strategies.renew(strategy)
            finally:
                engine.loader.use(self.settings.device)
        return made

    # -- looking ----------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Sizes in bytes, counts of experts; ``roofs`` once `moelab.bench.roofline` measured."""
        found = describe(self.name, self._store, self.settings, self._engine)
        return found | {"chat": has_template(self._tokenizer), "roofs": dict(self._session.roofs)}

    def cache_map(self) -> dict[str, np.ndarray]:
        """What is resident now, arrays ``[L, E + free]``: experts without weights come last.

        ``bits`` uint8 (0: not resident), ``in_flight`` bool, ``loaded`` and ``used`` int32 (last
        token of this run that did so, -1: none; with a draft ``used`` is a pass), ``uses`` int32.

        Examples
        --------
        >>> lab.cache_map()["bits"].shape
        (6, 16)
        """
        return self._session.cache_map()

    def why(self, layer: int, expert: int | None = None) -> dict[Any, Any]:
        """The evict decision's own terms for resident experts; also during a run.

        Returns
        -------
        dict
            {name of the term: value} of the expert, or where that is None of each of the layer's,
            ``{expert: {name: value}}``.

        Raises
        ------
        ValueError
            There is no such layer, or the expert is not resident.
        RuntimeError
            The lab is closed.
        """
        if not 0 <= layer < self._shape.layers:
            raise ValueError(f"there is no layer {layer}; there are 0 to {self._shape.layers - 1}")
        terms = self._session.why(layer)
        if expert is not None and expert not in terms:
            raise ValueError(f"expert {expert} of layer {layer} is not resident now")
        return terms if expert is None else terms[expert]

    # -- comparing --------------------------------------------------------------------------

    def what_if(self, run: Run, *, repeats: int = REPEATS, **changes: Any) -> Comparison:
        """The same run once more with other settings, in a second lab, beside what it was.

        The second lab is over the same store: for as long as this takes, both budgets and the
        non-expert weights twice are in memory. It begins with the residents and all that the
        strategy had learnt when ``run`` began, and goes through the same changes at the same tokens
        with ``changes`` on top: with none, decisions and text are the same. Ctrl-C stops it.

        Parameters
        ----------
        run
            A run of this lab that has ended.
        repeats
            How often each is made, in turn: where their times meet they are not told apart.
        changes
            As in `update`; ``pin={(5, 3): 8}`` keeps expert 3 of layer 5 resident at 8 bit.

        Returns
        -------
        Comparison
            Of ``"as it was"`` and the second one.

        Raises
        ------
        ValueError
            A change is refused, for instance as the budget cannot hold what is to be kept.
        RuntimeError
            A run is going on.
        """
        return WhatIf(self, run, changes, repeats).compare()

    def repeat(self, *names: str, repeats: int = REPEATS) -> Comparison:
        """Make saved runs again in turn, all or those named, to know what is noise."""
        return repeated(self, names or tuple(self.saved), repeats)

    @property
    def saved(self) -> SavedRuns:
        """The runs saved by `save_run`, by name; ``lab.saved.save(folder)`` writes them."""
        return self._saved

    def save_run(self, run: Run | Recording | None = None, name: str = "") -> str:
        """Put a run beside others, to compare: the newest by default; returns its name.

        Raises
        ------
        ValueError
            There is no run yet.

        Examples
        --------
        >>> run = lab.generate("The", max_new_tokens=4)
        >>> lab.save_run(name="first")
        'first'
        """
        return self.saved.add(run or self.run, name)

    pins, pin = saved, save_run  # their names up to version 0.3

    def prompts(self) -> dict[str, list[str]]:
        """Prompts by domain; empty for models that bring none."""
        return bundled_prompts(self.name)

    def probes(self) -> dict[str, Text]:
        """Held-out text (of an encoder-decoder a pair) by domain; empty where a model has none."""
        return bundled_probes(self.name)

    def dashboard(self) -> Dashboard:
        """The live view: show it as the last line of a notebook cell."""
        return moelab.Dashboard(self)

    closed = property(lambda self: self._session.closed, doc="Whether `close` was called.")

    def close(self) -> None:
        """Stop the run, the loader and let go of the experts' memory."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        words = ", ".join(f"{k}={valued(k, v)}" for k, v in shown(self.settings).items())
        return f"<Lab {self.name}: {words}>"

    def _beside(self, settings: Settings) -> Lab:
        """A second lab on the same store, with memory and weights of its own."""
        how = self._engine.opened | {"name": self.name, "strategies": self._strategies}
        return Lab(self._store, settings, **how)

    def _scored(self, text: Texts | None, most: int = 48, **how: bool) -> Score:
        """`score`; ``summaries=False`` leaves these and their Rouge out."""
        found = to_score(self, text, most)
        with self._session.claimed():
            return score(self._session, *found, most, **how)
