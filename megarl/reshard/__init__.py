"""Moving weights from one layout to another: the plan, which is arithmetic only, and what carries it out."""

import megarl.parallel.cpu_backend  # noqa: F401  (must come before the first import of megatron)
