"""Stand-in for the one operator that SGLang borrows from vLLM on CPUs without its own kernels."""
