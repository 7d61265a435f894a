"""The CPU backend must not change what torch does without CUDA."""

import torch

import megarl.parallel.cpu_backend  # noqa: F401


def test_device_context_still_reaches_factories() -> None:
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
        assert torch.empty(3, pin_memory=False).device.type == "meta"


def test_cuda_requests_land_on_the_cpu() -> None:
    assert not torch.cuda.is_available()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).to("cuda").device.type == "cpu"
    assert torch.zeros(2).to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"  # megatron-core's bucket names
    assert torch.zeros(2).type(torch.int32).dtype == torch.int32
