"""Log-prob and entropy of chosen tokens from hidden states, without ever holding all logits.

The output layer is vocab-parallel: each tensor parallel rank holds a slice of the vocabulary. Rows (response tokens) are
worked on in chunks; the backward pass computes each chunk's logits again. At any time one chunk's float32 logits exist, so
the peak does not depend on the number of tokens. The gradients are written by hand:

    logp_t = z_t[target] - log Σ_v exp z_t[v],    d logp_t / d z_t[v] = 1[v = target] - p_t[v]
    H_t    = log Σ exp z_t - Σ_v p_t[v] z_t[v],   d H_t / d z_t[v]    = -p_t[v] (log p_t[v] + H_t)

with z = logits / temperature.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _reduce(tensor: Tensor, operation: object, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocabulary_start: int,
        num_valid: int,
        temperature: float,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        num_rows = hidden.size(0)
        logprobs = hidden.new_empty(num_rows, dtype=torch.float32)
        entropy, log_normaliser = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, num_rows, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(hidden[rows], weight, num_valid, temperature)
            maximum = logits.amax(-1) if num_valid else logits.new_full((logits.size(0),), -torch.inf)
            _reduce(maximum, dist.ReduceOp.MAX, group)
            local, owned = _local_targets(targets[rows], vocabulary_start, num_valid)
            target_logits = logits.gather(-1, local)[:, 0] * owned if num_valid else logits.new_zeros(logits.size(0))
            shifted = logits.sub_(maximum[:, None])
            exponents = shifted.exp()
            sum_exp = exponents.sum(-1)
            # Σ exp(z - max) (z - max); -inf never occurs here because padding columns are left out
            weighted = exponents.mul_(shifted).sum(-1)
            sums = torch.stack([sum_exp, weighted, target_logits])
            _reduce(sums, dist.ReduceOp.SUM, group)
            sum_exp, weighted, target_logits = sums
            log_sum = sum_exp.log()
            log_normaliser[rows] = maximum + log_sum
            logprobs[rows] = target_logits - log_normaliser[rows]
            entropy[rows] = log_sum - weighted / sum_exp
            del logits, shifted, exponents
        ctx.set_materialize_grads(False)  # an unused entropy has no gradient and costs nothing
        ctx.save_for_backward(hidden, weight, targets, log_normaliser, entropy)
        ctx.settings = (vocabulary_start, num_valid, temperature, chunk_tokens)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_normaliser, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        vocabulary_start, num_valid, temperature, chunk_tokens = ctx.settings
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.size(0), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _logits(hidden[rows], weight, num_valid, temperature)
            log_p = logits.sub_(log_normaliser[rows, None])
            p = log_p.exp()
            local, owned = _local_targets(targets[rows], vocabulary_start, num_valid)
            if grad_entropy is None:
                grad_logits = p.mul_(-grad_logprobs[rows, None])
            else:
                # -g_lp p - g_H p (log p + H), written as p · factor to keep two chunks alive, not three
                factor = log_p.add_(entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(grad_logprobs[rows, None])
                grad_logits = p.mul_(factor).neg_()
                del factor
            if num_valid:
                grad_logits.scatter_add_(-1, local, (grad_logprobs[rows] * owned)[:, None])
            grad_logits.div_(temperature)
            del log_p, logits
            grad_logits = grad_logits.to(weight.dtype)
            torch.mm(grad_logits, weight[:num_valid], out=grad_hidden[rows])
            if weight.dtype == torch.float32:
                grad_weight[:num_valid].addmm_(grad_logits.t(), hidden[rows])
            else:
                grad_weight[:num_valid] += grad_logits.t() @ hidden[rows]
            del grad_logits, p
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, num_valid: int, temperature: float) -> Tensor:
    logits = (hidden @ weight[:num_valid].t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _local_targets(targets: Tensor, vocabulary_start: int, num_valid: int) -> tuple[Tensor, Tensor]:
    """Return each target's column in this rank's slice, [rows, 1], clamped where another rank owns it; and which this one owns."""
    local = targets - vocabulary_start
    owned = (local >= 0) & (local < num_valid)
    return local.clamp(0, max(num_valid - 1, 0))[:, None], owned


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and entropy of its distribution, both differentiable.

    The gradient returned for ``hidden`` is this rank's vocabulary slice's share: the caller sums it over the group (as
    megatron-core's ``copy_to_tensor_model_parallel_region`` and ``gather_from_sequence_parallel_region`` do).

    Args:
        hidden: [rows, hidden size], equal on all ranks of the group.
        weight: [padded vocabulary / tp, hidden size], this rank's rows of the output layer.
        targets: int64 [rows], token ids.
        vocabulary_size: without padding; padded columns take no probability and no gradient.
        temperature: softmax temperature.
        chunk_tokens: rows whose logits exist at the same time.
        group: tensor parallel group; None means one rank.

    Returns:
        float32 [rows] log-probs and float32 [rows] entropies, in nats.
    """
    rank = 0 if group is None else group.rank()
    vocabulary_start = rank * weight.size(0)
    num_valid = min(max(vocabulary_size - vocabulary_start, 0), weight.size(0))
    return _ChunkedLogProbs.apply(hidden, weight, targets, vocabulary_start, num_valid, temperature, chunk_tokens, group)


class _SumOverGroup(torch.autograd.Function):
    """Every rank's loss may use the sum, so each rank's part has the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the elementwise sum over a group's ranks, equal on all of them.

    The loss of the group is the sum of its ranks' losses. Every rank must call it, and go backward through it, equally often.
    """
    return values if group.size() == 1 else _SumOverGroup.apply(values, group)
