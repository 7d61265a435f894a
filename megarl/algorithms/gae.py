"""Generalised advantage estimation (arXiv 1506.02438) over packed sequences, without a loop over tokens."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

BLOCK_TOKENS = 1 << 20  # sequences worked on together: their temporaries stay in the cache and padding stays small
CHUNK = 64  # steps done by one matrix product
SHORT = 8  # steps that are cheaper done one by one


def generalised_advantages(
    token_rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    loss_mask: Tensor,
    *,
    discount: float,
    trace_decay: float | Tensor,
) -> Tensor:
    """Return Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t (arXiv 1506.02438, equations 11 and 16).

    Tokens outside the mask (the environment's) are skipped: t + 1 is the next trained token of the sequence, and V behind the last
    one is 0. λ = 0 gives δ, λ = 1 the Monte Carlo return minus V. The critic's target is Â + V; with decoupled λ (VAPO, arXiv
    2504.05118) it comes from a second call with the critic's λ.

    Args:
        token_rewards: float [num_tokens], the outcome's reward at the last trained token included.
        values: float [num_tokens], the critic's V before each token.
        cu_seqlens: int64 [num_sequences + 1].
        loss_mask: bool [num_tokens].
        discount: γ.
        trace_decay: λ, one for all or float [num_sequences].

    Returns:
        float [num_tokens], 0 where the mask is False.
    """
    num_sequences = cu_seqlens.numel() - 1
    decay = torch.as_tensor(trace_decay, dtype=values.dtype, device=values.device).expand(num_sequences)
    advantages = torch.zeros_like(token_rewards)
    starts = cu_seqlens.tolist()
    first = 0
    while first < num_sequences:
        last = first + 1
        while last < num_sequences and starts[last + 1] - starts[first] <= BLOCK_TOKENS:
            last += 1
        tokens = slice(starts[first], starts[last])
        advantages[tokens] = _block_advantages(
            token_rewards[tokens],
            values[tokens],
            cu_seqlens[first : last + 1] - starts[first],
            loss_mask[tokens],
            discount,
            decay[first:last],
        )
        first = last
    return advantages


def _block_advantages(
    token_rewards: Tensor, values: Tensor, cu_seqlens: Tensor, loss_mask: Tensor, discount: float, decay: Tensor
) -> Tensor:
    """Compute the same for a few sequences, with λ as float [num_sequences].

    The tokens are cut into spans, trained or not, that never cross sequences: spans are copied much faster than single tokens.
    """
    cuts = torch.cat([(loss_mask[1:] != loss_mask[:-1]).nonzero()[:, 0] + 1, cu_seqlens]).unique()
    sizes, starts = cuts.diff(), cuts[:-1]
    trained = loss_mask[starts]
    numbers = torch.searchsorted(cu_seqlens, starts, right=True) - 1
    lengths = torch.zeros_like(cu_seqlens[1:]).index_add_(0, numbers, sizes * trained)
    if not trained.any():
        return torch.zeros_like(token_rewards)
    spans = list(zip(sizes.tolist(), trained.tolist(), numbers.tolist(), strict=True))

    def trained_tokens(tokens: Tensor) -> Tensor:
        return torch.cat([part for part, (_, is_trained, _) in zip(tokens.split(sizes.tolist()), spans, strict=True) if is_trained])

    rewards, values = trained_tokens(token_rewards), trained_tokens(values)
    following = pad(values[1:], (0, 1))
    following[lengths.cumsum(0)[lengths > 0] - 1] = 0.0
    errors = torch.add(rewards, following, alpha=discount).sub_(values)
    rows = discounted_suffix_sums(pad_sequence(errors.split(lengths.tolist()), batch_first=True), discount * decay)

    position = [0] * lengths.numel()  # of the next trained token in its row
    parts = []
    for size, is_trained, number in spans:
        start = position[number]
        parts.append(rows[number, start : start + size] if is_trained else token_rewards.new_zeros(size))
        position[number] += size if is_trained else 0
    return torch.cat(parts)


def length_adaptive_trace_decay(lengths: Tensor, alpha: float) -> Tensor:
    """Return λ = 1 - 1 / (α l) for a response of l trained tokens, at least 0 (VAPO, arXiv 2504.05118, equation 8; α is 0.05
    there).

    Args:
        lengths: int64 [num_sequences].

    Returns:
        float32 [num_sequences].
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1))).clamp(min=0).float()


def discounted_suffix_sums(terms: Tensor, factor: Tensor) -> Tensor:
    """Return x_t = terms_t + factor · x_{t+1}, in chunks: the chunks' starts first, by the same recurrence over chunks, then all
    tokens.

    Args:
        terms: float [num_sequences, T]; rows shorter than T end in zeros.
        factor: float [num_sequences].

    Returns:
        float [num_sequences, T].
    """
    num_sequences, length = terms.shape
    if length <= SHORT:
        sums = terms.clone()
        for t in range(length - 2, -1, -1):
            sums[:, t] += factor * sums[:, t + 1]
        return sums
    num_chunks = -(-length // CHUNK)
    chunks = pad(terms, (0, num_chunks * CHUNK - length)).view(num_sequences, num_chunks, CHUNK)
    steps = torch.arange(CHUNK, device=terms.device)
    # [sequence, from, to]: what a term adds to the tokens at and before it in its chunk
    weights = factor[:, None, None].pow((steps[:, None] - steps).clamp(min=0)).tril()
    starts = discounted_suffix_sums(chunks.matmul(weights[:, :, :1])[:, :, 0], factor**CHUNK)
    chunks[:, :-1, -1] += factor[:, None] * starts[:, 1:]
    return chunks.bmm(weights).view(num_sequences, -1)[:, :length]
