"""Lets megatron-core run where there is no CUDA: gloo, local layers, torch optimizers.

megatron-core asks ``torch.cuda`` for the device to allocate on and for streams, generators and counters. On a machine without
CUDA this module answers with the CPU and with objects that do nothing, then mends the places of megatron-core that
still cannot work. Importing it is enough, and it must come before the first import of megatron: the ``__init__`` of each
package that imports megatron does so. With CUDA present it changes nothing. Nothing else in MegaRL knows about it.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


class _Idle:
    """Stands for a stream or event: every method does nothing, queries say 'finished'."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Idle"]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> "_Idle":
        return self

    def __exit__(self, *args: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


class _CpuGenerators:
    """``torch.cuda.default_generators`` with the CPU's generator at every index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _on_cpu(device: Any) -> Any:
    return CPU if device is not None and torch.device(device).type == "cuda" else device


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _redirect_factory(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _constant(CPU)
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "_lazy_init", "reset_peak_memory_stats"):
        setattr(cuda, name, _constant(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "device_count"):
        setattr(cuda, name, _constant(0))
    cuda.memory_stats = lambda *args, **kwargs: {}
    cuda.Stream = cuda.Event = _Idle
    cuda.current_stream = cuda.default_stream = _constant(_Idle())
    cuda.stream = cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _constant(None)
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = _CpuGenerators()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    cuda.manual_seed = cuda.manual_seed_all = manual_seed


def _redirect_tensors() -> None:
    # torch looks its factories up once for `with torch.device(...)`; it must know the originals, which the redirected ones call
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "zeros_like", "ones_like", "empty_like"):
        setattr(torch, name, _redirect_factory(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    original_to, original_type = tensor.to, tensor.type

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, torch.device)):
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original_to(self, *args, **kwargs)

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core sorts gradients into buckets by the name of their CUDA type
        return original_type(self, *args, **kwargs) if args or kwargs else original_type(self).replace("torch.", "torch.cuda.")

    tensor.to, tensor.type = to, type_


def _allow_sequence_parallel_torch_norm() -> None:
    """Let the torch norm do sequence parallelism; it is exact once its parameters are marked for the gradient all-reduce."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> torch.nn.Module:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, hidden_size, eps, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def _mend_mixture_of_experts() -> None:
    """Mend the dispatcher: it makes its counts numpy arrays only when they come from a GPU, and gloo neither gathers nor scatters
    parts of unequal length (expert tensor parallelism)."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    original_gather, original_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(part: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original_gather(part, group, output_split_sizes, *args, **kwargs)
        longest = part.new_zeros((max(output_split_sizes), *part.shape[1:]))
        longest[: len(part)] = part
        padded = original_gather(longest, group).split(len(longest))
        return torch.cat([rows[:length] for rows, length in zip(padded, output_split_sizes, strict=True)])

    def reduce_scatter(whole: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original_scatter(whole, group, input_split_sizes, *args, **kwargs)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


def install() -> None:
    """Redirect CUDA to the CPU and mend megatron-core; does nothing where CUDA is present."""
    if torch.cuda.is_available():
        return
    for absent in ("Transformer Engine and Apex are not installed", "Apex is not installed"):
        warnings.filterwarnings("ignore", message=absent)
    _redirect_cuda_module()
    _redirect_tensors()
    _allow_sequence_parallel_torch_norm()
    _mend_mixture_of_experts()


install()
