"""A training step for `Qwen3MoeForCausalLM` that is fast on a CPU core.

Same parameters and same mathematics as the stock model (a test holds loss and gradients to
1e-5), arranged for the CPU: tokens are sorted by expert so that each expert is one matrix
product forward and three backward; cross-entropy makes its gradient in the forward pass, chunk by
chunk, so that no [N, V] matrix lives on; RMSNorm saves only what its gradient needs.  It knows
dense causal attention without padding, and SwiGLU experts in every layer, nothing else.

N tokens of the batch, B sequences, T length, E experts, K active, D model, F ffn, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


class _Experts(torch.autograd.Function):
    """Σₖ weightₖ · down(silu(gate x) ⊙ up x), tokens sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor, w13: Tensor, w2: Tensor):
        tokens, active = index.shape
        ffn = w2.shape[2]
        order = index.flatten().argsort(stable=True)  # [N·K]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        token = order.div(active, rounding_mode="floor")
        counts = torch.bincount(index.flatten(), minlength=len(w13)).tolist()
        rows = x.index_select(0, token)  # [N·K, D]
        gate_up = rows.new_empty(len(rows), 2 * ffn)
        for e, part in _parts(counts):
            torch.mm(rows[part], w13[e].t(), out=gate_up[part])
        gate, up = gate_up.split(ffn, 1)
        hidden = F.silu(gate) * up  # [N·K, F]
        out = torch.empty_like(rows)
        for e, part in _parts(counts):
            torch.mm(hidden[part], w2[e].t(), out=out[part])
        by_token = out.index_select(0, inverse).view(tokens, active, -1)  # [N, K, D]
        ctx.save_for_backward(
            rows, gate_up, hidden, by_token, weight, order, token, inverse, w13, w2
        )
        ctx.counts = counts
        return torch.bmm(weight.unsqueeze(1), by_token).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        rows, gate_up, hidden, by_token, weight, order, token, inverse, w13, w2 = ctx.saved_tensors
        tokens, active, _ = by_token.shape
        d_weight = torch.bmm(by_token, grad.unsqueeze(2)).squeeze(2)
        d_out = grad.index_select(0, token)
        d_out.mul_(weight.flatten().index_select(0, order).unsqueeze(1))
        d_hidden, d_w2, d_w13 = (
            torch.empty_like(hidden),
            torch.empty_like(w2),
            torch.empty_like(w13),
        )
        for e, count in enumerate(ctx.counts):
            if not count:
                d_w2[e].zero_()
                d_w13[e].zero_()
        for e, part in _parts(ctx.counts):
            torch.mm(d_out[part], w2[e], out=d_hidden[part])
            torch.mm(d_out[part].t(), hidden[part], out=d_w2[e])
        gate, up = gate_up.split(w2.shape[2], 1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.split(w2.shape[2], 1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        torch.mul(d_hidden, silu, out=d_up)
        torch.mul(d_hidden.mul_(up), sigmoid.addcmul(silu, 1 - sigmoid), out=d_gate)
        d_rows = d_out
        for e, part in _parts(ctx.counts):
            torch.mm(d_gate_up[part], w13[e], out=d_rows[part])
            torch.mm(d_gate_up[part].t(), rows[part], out=d_w13[e])
        d_x = d_rows.index_select(0, inverse).view(tokens, active, -1).sum(1)
        return d_x, d_weight, None, d_w13, d_w2


def _parts(counts: list[int]):
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ head.T; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, target: Tensor, chunk: int):
        d_x, d_head = torch.empty_like(x), torch.zeros_like(head)
        total = 0.0
        for start in range(0, len(x), chunk):
            rows, wanted = x[start : start + chunk], target[start : start + chunk, None]
            logits = rows @ head.t()  # [chunk, V]
            top = logits.amax(1, keepdim=True)
            right = logits.gather(1, wanted) - top
            logits.sub_(top).exp_()
            norm = logits.sum(1, keepdim=True)
            total += (norm.log() - right).sum().item()
            logits.div_(norm * len(x))  # softmax / N, then minus one-hot / N
            logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1 / len(x)))
            torch.mm(logits, head, out=d_x[start : start + chunk])
            d_head.addmm_(logits.t(), rows)
        ctx.save_for_backward(d_x, d_head)
        return x.new_tensor(total / len(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        d_x, d_head = ctx.saved_tensors
        return d_x * grad, d_head * grad, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = grads
        normed, scale, weight = ctx.saved_tensors
        d_weight = (grad * normed).flatten(0, -2).sum(0)
        scaled = grad * weight
        shared = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed * shared).mul_(scale), d_weight, None


def _norm(module: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _rotary(length: int, config: Any) -> tuple[Tensor, Tensor]:
    theta = config.rope_parameters["rope_theta"]
    speed = theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angle = torch.outer(torch.arange(length).float(), speed).repeat(1, 2)  # [T, head]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attention(module: Any, x: Tensor, cos: Tensor, sin: Tensor, config: Any) -> Tensor:
    batch, length, _ = x.shape
    shape = (batch, length, -1, config.head_dim)
    q = _norm(module.q_norm, module.q_proj(x).view(shape)).transpose(1, 2)
    k = _norm(module.k_norm, module.k_proj(x).view(shape)).transpose(1, 2)
    v = module.v_proj(x).view(shape).transpose(1, 2)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return module.o_proj(mixed.transpose(1, 2).flatten(2))


class StepLoss(NamedTuple):
    """What `step_loss` returns; `total.backward()` makes the gradients."""

    cross_entropy: Tensor  # nats per token
    total: Tensor  # cross-entropy + balance · auxiliary + z · z-loss
    shares: Tensor  # [layers, E] fraction of the activations each expert got


def step_loss(
    model: Any, ids: Tensor, targets: Tensor, *, balance: float = 0.0, z: float = 0.0
) -> StepLoss:
    """Loss of a batch.

    Parameters
    ----------
    model
        A `Qwen3MoeForCausalLM` with `norm_topk_prob`, in fp32.
    ids, targets
        Token ids [B, T]; `targets` are `ids` shifted by one.
    balance
        Weight of the load-balancing loss (Switch Transformer eq. 4), mean over layers.
    z
        Weight of the router z-loss (ST-MoE eq. 5), mean over layers.
    """
    config, core = model.config, model.model
    experts, active = config.num_experts, config.num_experts_per_tok
    cos, sin = _rotary(ids.shape[1], config)
    x = core.embed_tokens(ids)  # [B, T, D]
    shares, balance_loss, z_loss = [], x.new_zeros(()), x.new_zeros(())
    for layer in core.layers:
        x = x + _attention(layer.self_attn, _norm(layer.input_layernorm, x), cos, sin, config)
        h = _norm(layer.post_attention_layernorm, x).flatten(0, 1)  # [N, D]
        logits = F.linear(h, layer.mlp.gate.weight)  # [N, E]
        probability = logits.softmax(-1)
        weight, index = probability.topk(active, -1)  # [N, K]
        weight = weight / weight.sum(-1, keepdim=True)
        share = torch.bincount(index.flatten(), minlength=experts).float() / index.numel()
        shares.append(share)
        balance_loss = balance_loss + experts * (share * probability.mean(0)).sum()
        z_loss = z_loss + logits.logsumexp(-1).square().mean()
        bank = layer.mlp.experts
        y = _Experts.apply(h, weight, index, bank.gate_up_proj, bank.down_proj)
        x = x + y.view_as(x)
    h = _norm(core.norm, x).flatten(0, 1)
    cross_entropy = _CrossEntropy.apply(h, model.lm_head.weight, targets.flatten(), 512)
    extra = (balance * balance_loss + z * z_loss) / len(core.layers)
    return StepLoss(cross_entropy.detach(), cross_entropy + extra, torch.stack(shares))
