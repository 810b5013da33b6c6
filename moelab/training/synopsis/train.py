"""Train the model that writes synopses: Debian's package lists → pairs → a Switch Transformer.

`python -m moelab.training.synopsis.train` does all of it; stopped with Ctrl-C and started again it
goes on where it was.  `Recipe` holds everything that decides the result.  With `--experts 1` it
trains the dense model of the same active size that the card compares with: top-1 of one expert is
a plain feed-forward layer.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from moelab.store.paths import cache_dir
from moelab.training import loop
from moelab.training.synopsis.copying import begin_to_copy
from moelab.training.synopsis.corpus import VOCABULARY, Corpus, prepare
from moelab.training.synopsis.reward import Rewarded, rewarded

PADDING = 0
IGNORED = -100
"""The target of a position that has none."""
COMMON = 600
"""Tokens before this one are bytes and the first that the tokenizer learnt: parts of most words."""
NO_LIMIT = 4096
"""Tokens that an expert may take in one sequence: more than any sequence has."""
Tokens = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the corpus."""

    layers: int = 6  # of the encoder, and of the decoder; every second one is sparse
    experts: int = 16
    hidden: int = 192
    ffn: int = 256
    heads: int = 6
    head_dim: int = 32
    vocabulary: int = VOCABULARY
    epochs: int = 4
    longest: int = 128  # tokens of a source; the rest of a longer one is left out of the training
    pairs: int = 32  # in a batch
    lr: float = 2e-3
    embedding_lr: float = 5.0  # times lr
    spike: float = 10.0  # this and the next three: see `begin_to_copy`
    match: float = 0.7
    loud: float = 2.0
    quiet: float = 0.1
    warmup_steps: int = 50
    leads: float = 0.3  # share of the targets that are leads, at last: see `Training.lead_share`
    renamed: float = 0.2  # of the tokens that are not `COMMON`, see `renamed`
    reward_steps: int = 600  # after the epochs, see `reward`
    reward_lr: float = 6e-4  # at first; linearly to 0
    draws: int = 4  # of each pair
    dropout: float = 0.05
    balance: float = 0.01
    z: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"experts": 1, "epochs": 1, "pairs": 1, "reward_steps": 0, "draws": 2}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name}={getattr(self, name)}: {limit} or more")
        if min(self.lr, self.reward_lr) <= 0:
            raise ValueError(f"lr={self.lr}, reward_lr={self.reward_lr}: above 0")


def build_model(recipe: Recipe) -> Any:
    """The model as transformers draws its weights but for what `begin_to_copy` sets."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=recipe.vocabulary,
        d_model=recipe.hidden,
        d_kv=recipe.head_dim,
        d_ff=recipe.ffn,
        num_layers=recipe.layers,
        num_decoder_layers=recipe.layers,
        num_sparse_encoder_layers=recipe.layers // 2,
        num_sparse_decoder_layers=recipe.layers // 2,
        num_heads=recipe.heads,
        num_experts=recipe.experts,
        expert_capacity=NO_LIMIT,
        router_jitter_noise=0.0,
        router_aux_loss_coef=recipe.balance,
        router_z_loss_coef=recipe.z,
        dropout_rate=recipe.dropout,
        pad_token_id=PADDING,
        eos_token_id=1,
        decoder_start_token_id=PADDING,  # pyright: ignore[reportCallIssue]
    )
    torch.manual_seed(recipe.seed)
    model = SwitchTransformersForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            setattr(module, "dropout", 0.0)  # noqa: B010  of attention weights: a quarter of a step
    begin_to_copy(model, recipe)
    return model


class Batch(NamedTuple):
    """B pairs: sources [B, S] padded with `PADDING`, targets [B, T] with `IGNORED`."""

    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, rows: Tokens) -> Batch:
        """The pairs of token ids as tensors."""
        sources, targets = ([torch.tensor(ids) for ids in part] for part in zip(*rows, strict=True))
        return cls(pad_sequence(sources, True, PADDING), pad_sequence(targets, True, IGNORED))


class StepLoss(NamedTuple):
    """What `step_loss` returns; `total.backward()` makes the gradients."""

    cross_entropy: Tensor  # nats per target token
    total: Tensor  # cross-entropy + balance · auxiliary + z · z-loss
    shares: Tensor  # [sparse layers, E] fraction of the tokens each expert got

    def told(self) -> dict[str, float]:
        """Its figures, as the curve names them; the least share is of an even one."""
        least = float(self.shares.min()) * self.shares.shape[1]
        return {"train_loss": float(self.cross_entropy), "least_share": least}


def renamed(batch: Batch, share: float, vocabulary: int) -> Batch:
    """The batch with that share of the vocabulary's rarer tokens replaced by others at random.

    Where a target repeats a token of its source it still does: what a summary takes from its source
    is to be read there, not remembered of names seen before.
    """
    every = torch.arange(vocabulary)
    chosen = (torch.rand(vocabulary) < share) & (every >= COMMON)
    other = torch.where(
        chosen, torch.randint(min(COMMON, vocabulary - 1), vocabulary, (vocabulary,)), every
    )
    repeats = (batch.target[:, :, None] == batch.source[:, None]).any(2)
    target = torch.where(repeats, other[batch.target.clamp_min(0)], batch.target)
    return Batch(other[batch.source], target)


def step_loss(model: Any, batch: Batch) -> StepLoss:
    """Loss of a batch, with the balancing loss (Switch Transformer, eq. 4) and the router z-loss.

    Both are summed over the sparse layers and leave padding out, which transformers' own count in.
    """
    routers: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: routers.append(output[2]))
        for name, module in model.named_modules()
        if name.endswith(".router")
    ]
    mask = batch.source != PADDING
    out = model(input_ids=batch.source, attention_mask=mask.long(), labels=batch.target)
    for hook in hooks:
        hook.remove()
    written = batch.target != IGNORED
    half = len(routers) // 2
    balance, z, shares = [], [], []
    for router, kept in zip(routers, [mask] * half + [written] * half, strict=True):
        logits = router.float()[kept]
        probability = logits.softmax(-1)
        share = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(0)
        balance.append(logits.shape[-1] * (share * probability.mean(0)).sum())
        z.append(logits.logsumexp(-1).square().mean())
        shares.append(share)
    config = model.config
    total = out.loss + config.router_aux_loss_coef * torch.stack(balance).sum()
    total = total + config.router_z_loss_coef * torch.stack(z).sum()
    return StepLoss(out.loss.detach(), total, torch.stack(shares))


@torch.no_grad()
def validation_loss(model: Any, rows: Tokens, pairs: int = 64) -> float:
    """Mean cross-entropy in nats per target token."""
    model.eval()
    rows, total, count = sorted(rows, key=lambda row: len(row[0])), 0.0, 0
    for at in range(0, len(rows), pairs):
        batch = Batch.of(rows[at : at + pairs])
        tokens = int((batch.target != IGNORED).sum())
        total += float(step_loss(model, batch).cross_entropy) * tokens
        count += tokens
    model.train()
    return total / count


def batches(rows: Tokens, epoch: int, pairs: int, seed: int) -> list[list[int]]:
    """The epoch's batches, as indices of `rows`: sources of like length together, all shuffled."""
    rng = np.random.default_rng([seed, epoch])
    lengths = np.array([len(source) for source, _ in rows])
    order = np.argsort(lengths + rng.uniform(0, 8, len(rows)), kind="stable")
    cut = [order[at : at + pairs].tolist() for at in range(0, len(order), pairs)]
    return [cut[at] for at in rng.permutation(len(cut))]


class Training:
    """One training in the folder `out`: `state.safetensors`, then `model/`.

    A folder that holds a state goes on from there.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe, out: Path) -> None:
        self.corpus, self.recipe, self.out = corpus, recipe, out
        out.mkdir(parents=True, exist_ok=True)
        self.model = build_model(recipe).train()
        of = dict(self.model.named_parameters())
        inner = {name for name in of if name.split(".")[-2] in ("q", "k", "v", "o")}
        table = of.pop("shared.weight")
        groups = [
            {"params": [p for name, p in of.items() if name not in inner], "factor": 1.0},
            {"params": [table], "factor": recipe.embedding_lr},
        ]
        matrices = [{"params": [of[name] for name in inner], "factor": 1.0}]
        decay = 0.01
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=decay, fused=True),
            torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        ]
        self._state = out / "state.safetensors"
        self._trained = dict(self.model.named_parameters())
        self.at = loop.resume(self._state, self._trained, *self._optimizers)
        asked = asdict(recipe)
        if self.at.recipe and self.at.recipe != asked:
            raise ValueError(f"{out} was started with {self.at.recipe}: use another --out")
        self.at.recipe = asked
        end = [self.model.config.eos_token_id]
        cut = recipe.longest - 1
        rows = self._rows = [
            (source if len(source) <= recipe.longest else source[:cut] + end, target)
            for source, target in corpus.tokens["train"]
        ]
        self._epoch, self._order = -1, [[0]]
        self._steps = recipe.epochs * -(-len(rows) // recipe.pairs)
        every = range(self._steps, self._steps + recipe.reward_steps)
        self.tokens = recipe.epochs * sum(len(source) for source, _ in rows)
        self.tokens += sum(len(rows[index][0]) for step in every for index in self._indices(step))
        file = corpus.folder / "tokenizer" / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: delete {corpus.folder}, it is made again")
        self._tokenizer = Tokenizer.from_file(str(file))

    def train(self, *, progress: bool = True) -> bool:
        """Go on to the end; False when it was interrupted, and can be resumed."""

        def save() -> None:
            loop.save(self._state, self._trained, self.at, *self._optimizers)

        return loop.run(self.at, self._step, save, tokens=self.tokens, progress=progress)

    def lead_share(self) -> float:
        """Share of the targets that are leads: all at first, then fewer.

        Some stay to the end: a synopsis that the model is not sure of is better begun as a lead.
        """
        return max(self.recipe.leads, 1 - 4 * self.at.steps / self._steps)

    def _indices(self, step: int) -> list[int]:
        """The pairs of a step's batch."""
        recipe = self.recipe
        epoch, at = divmod(step, self._steps // recipe.epochs)
        if epoch != self._epoch:
            order = batches(self._rows, epoch, recipe.pairs, recipe.seed)
            self._epoch, self._order = epoch, order
        return self._order[at]

    def _likely(self) -> StepLoss:
        """Cross-entropy of the step's batch, in which some targets are leads and tokens renamed."""
        leads = self.lead_share()
        chosen = [
            (
                self._rows[index][0],
                self.corpus.leads[index] if float(torch.rand(())) < leads else self._rows[index][1],
            )
            for index in self._indices(self.at.steps)
        ]
        batch = renamed(Batch.of(chosen), self.recipe.renamed, self.recipe.vocabulary)
        return step_loss(self.model.train(), batch)

    def _rewarded(self) -> Rewarded:
        """`rewarded` of the step's batch."""
        indices = self._indices(self.at.steps)
        source, _ = Batch.of([self._rows[index] for index in indices])
        references = [self.corpus.parts["train"][index].synopsis for index in indices]
        return rewarded(self.model, source, references, self.decode, self.recipe.draws)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Token ids as texts."""
        return self._tokenizer.decode_batch(rows)

    def _step(self) -> dict[str, str]:
        recipe, at = self.recipe, self.at
        torch.manual_seed(at.steps)  # what is drawn is the same after a resumption
        later = at.steps - self._steps
        if later < 0:
            warm = min(1.0, (at.steps + 1) / recipe.warmup_steps)
            lr = recipe.lr * warm * (1 - at.steps / self._steps)
        else:
            lr = recipe.reward_lr * (1 - later / recipe.reward_steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._likely() if later < 0 else self._rewarded()
        loss.total.backward()
        norm = clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * (group["factor"] if later < 0 else 1.0)
            optimizer.step()
            optimizer.zero_grad()
        at.seen += sum(len(self._rows[index][0]) for index in self._indices(at.steps))
        at.steps += 1
        told = loss.told()
        last = at.steps in (self._steps, self._steps + recipe.reward_steps)
        if last or at.steps % (500 if later < 0 else 100) == 0:
            self._note(told | {"lr": lr, "gradient_norm": float(norm)})
        return {name: f"{figure:.3f}" for name, figure in told.items()} | {"lr": f"{lr:.1e}"}

    def _note(self, figures: dict[str, float]) -> None:
        """Add this step and the validation loss to the curve."""
        figures |= {"validation": validation_loss(self.model, self.corpus.tokens["validation"])}
        at = {"tokens": self.at.seen, "seconds": round(self.at.seconds)}
        entry = at | {name: round(figure, 6) for name, figure in figures.items()}
        self.at.losses.append(entry)
        tqdm.write(json.dumps(entry))

    def export(self) -> Path:
        """Write the bf16 checkpoint, its tokenizer and `training.json` to `model/`."""
        pairs = {name: len(rows) for name, rows in self.corpus.parts.items()}
        tokenizer = self.corpus.folder / "tokenizer"
        limit = {"max_new_tokens": 48}
        return loop.export(self.out, self.model, tokenizer, limit, self.at, pairs=pairs)


def main(
    out: Annotated[Path | None, typer.Option(help="folder of the training (user cache)")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the corpus (user cache)")] = None,
    experts: Annotated[int, typer.Option(help="per sparse layer; 1: dense")] = Recipe.experts,
    epochs: Annotated[int, typer.Option(help="how often every pair is seen")] = Recipe.epochs,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = Recipe.lr,
    threads: Annotated[int, typer.Option(help="of torch; 0: one a core", min=0)] = 0,
) -> None:
    """Train the synopsis model from Debian's package lists; resumes when run again."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(experts=experts, epochs=epochs, lr=lr)
    default = cache_dir() / "synopsis" / ("run" if experts > 1 else "dense")
    training = Training(prepare(data), recipe, out or default)
    if training.train():
        print(f"trained: {training.export()}")
    else:
        print(f"interrupted at {training.at.seen:,} tokens; run the same command to go on")


if __name__ == "__main__":
    typer.run(main)
