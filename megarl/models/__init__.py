"""Hugging Face config to megatron-core model."""

import megarl.parallel.cpu_backend  # noqa: F401  (must come before the first import of megatron)
