"""Transformer Engine's attention and context parallelism in PackedAttention's place; this import fails without it.

It cuts packed sequences into the same zigzag chunks ("DualChunkSwap" in its context_parallel.py), so nothing else changes.
"""

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class TransformerEngineAttention(TEDotProductAttention):
    """core_attention for megatron-core's SelfAttention; arguments and result are PackedAttention's, on a GPU in 16 bits."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any) -> None:
        is_hybrid = config.context_parallel_size > 1 and config.cp_comm_type == "a2a+p2p"
        if is_hybrid:
            kwargs["cp_comm_type"] = "p2p"  # for hybrid megatron-core looks for the process groups of parallel_state
        super().__init__(config, layer_number, attn_mask_type, attention_type, **kwargs)
        if is_hybrid:
            groups = kwargs["pg_collection"]
            ranks = dist.get_process_group_ranks(groups.cp)
            self.set_context_parallel_group(groups.hcp, ranks, TEDotProductAttention.cp_stream, config.cp_comm_type)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, attn_mask_type: object, **options: object
    ) -> Tensor:
        """Attend to packed sequences; the boundaries of the packing go to the GPU, where this implementation reads them."""
        packing: PackedSeqParams = options.pop("packed_seq_params")
        boundaries = packing.cu_seqlens_q_padded.to(query.device, non_blocking=True)
        names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
        on_device = replace(packing, **dict.fromkeys(names, boundaries))
        return super().forward(query, key, value, attention_mask, attn_mask_type, packed_seq_params=on_device, **options)
