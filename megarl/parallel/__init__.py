"""Layouts, process groups, the CPU backend, packed context-parallel attention and vocab-parallel log-probs."""

import megarl.parallel.cpu_backend  # must come before the first import of megatron
import megarl.parallel.megatron_fixes  # noqa: F401
