"""``rotary_embedding`` in torch: without the package sgl-kernel SGLang imports it from vLLM, which is not in its environment."""

from torch import Tensor


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cos_sin_cache: Tensor, is_neox: bool
) -> None:
    """Rotate ``query`` and ``key`` [tokens, heads × head_size] in place, as vLLM's operator of this name does.

    ``cos_sin_cache`` is [positions, rotary size]: cosines, then sines. With ``is_neox`` the two halves of a head are rotated
    against each other, else neighbouring pairs.
    """
    cos, sin = cos_sin_cache[positions.flatten()].float().unsqueeze(1).chunk(2, dim=-1)
    rotary_size = cos_sin_cache.shape[-1]
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.view(positions.numel(), -1, head_size)[..., :rotary_size]
        if is_neox:
            first, second = heads.chunk(2, dim=-1)
        else:
            first, second = heads[..., ::2], heads[..., 1::2]
        rotated = first.float() * cos - second.float() * sin, second.float() * cos + first.float() * sin
        first.copy_(rotated[0])
        second.copy_(rotated[1])
