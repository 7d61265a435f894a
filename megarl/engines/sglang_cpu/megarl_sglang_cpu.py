"""SGLang plugin that lets its seeded sampling, and its report of experts, run on CPU.

SGLang draws with a request's own seed only under ``--enable-deterministic-inference``, and offers that only with attention back
ends and kernels for GPUs. It finds this file, in each of its processes, by the entry point in the folder beside it
(sglang/srt/plugins/__init__.py). Without batch-invariant kernels a sample can change where rounding decides between two tokens.
"""

from megarl_murmur_hash import murmur_hash32
from sglang.srt.arg_groups.choices import (
    add_deterministic_attention_backend_choices,
    add_radix_supported_deterministic_attention_backend_choices,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register() -> None:
    """Register what SGLang calls at the start of every process."""
    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    for target, replacement in (
        ("sglang.kernels.ops.sampling.murmur_hash.murmur_hash32", murmur_hash32),
        ("sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", _leave_torch_alone),
        ("sglang.srt.mem_cache.pool_host.common._cuda_host_register", _leave_memory_alone),
    ):
        HookRegistry.register(target, replacement, HookType.REPLACE)


def _leave_torch_alone() -> None:
    """Install SGLang's batch-invariant sampling without its GPU kernels."""


def _leave_memory_alone(buffer: object, *arguments: object) -> None:
    """Instead of pinning for the GPU the host memory that keeps every token's experts."""
