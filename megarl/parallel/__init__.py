"""Layouts, process groups, the CPU backend, packed context-parallel attention and vocab-parallel log-probabilities."""

import megarl.parallel.cpu_backend  # noqa: F401  (must come before the first import of megatron)
