"""The training engine and the roles built on it."""

import megarl.parallel.cpu_backend  # noqa: F401  (must come before the first import of megatron)
