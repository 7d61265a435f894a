"""One two-way weight map per model family, Hugging Face safetensors in and out, and checkpoints."""

import megarl.parallel.cpu_backend  # noqa: F401  (must come before the first import of megatron)
