"""Trainer ranks that bring a random model to receivers of the engine plugin, each of which runs in a thread of one of the ranks."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine_plugin import load_plugin
from megarl.reshard import engine_transfer
from megarl.reshard.engine_transfer import EngineTransfer, EngineTransferSettings
from megarl.reshard.packed_messages import flat_parts
from megarl.reshard.transport_choice import Location
from transfers import Transfer

receiver_module = load_plugin("megarl_slice_receiver")
TIMEOUT = 20.0
CPU = torch.device("cpu")


class Parameters:
    """An engine's, all of which begin as something else than the trainer sends."""

    def __init__(self, needed: dict[str, Tensor]) -> None:
        self.needed = needed
        self.tensors = {name: torch.full_like(tensor, -7) for name, tensor in needed.items()}

    def open(self, name: str) -> Tensor:
        return self.tensors[name]

    def finish(self, name: str) -> None:
        assert torch.equal(self.tensors[name], self.needed[name]), name

    def check(self) -> None:
        assert all(torch.equal(self.tensors[name], tensor) for name, tensor in self.needed.items())


class Crew:
    """This rank's part. Worker w of the plan runs beside rank w."""

    def __init__(self, case: Transfer, asked: str, locations: Sequence[Location], timeout: float = TIMEOUT) -> None:
        """``locations``: where all ranks and then all workers say that they are."""
        self.rank = dist.get_rank()
        self.case, self.locations, self.timeout = case, locations, timeout
        engine_transfer.own_location = lambda device: locations[self.rank]
        settings = EngineTransferSettings(bucket_bytes=0, gpus_per_node=8, timeout_seconds=timeout, transport=asked)
        held = flat_parts(case.held[self.rank])
        self.transfer = EngineTransfer(case.plan, lambda: held, {8: torch.int64}, "127.0.0.1", settings)
        self.pool = ThreadPoolExecutor(1)
        self.receiver: Any = None

    @property
    def has_worker(self) -> bool:
        return self.rank < len(self.case.needed)

    def join(self) -> None:
        joining = self.pool.submit(self.join_worker) if self.has_worker else None
        self.transfer.join()
        if joining is not None:
            self.receiver = joining.result(self.timeout)

    def join_worker(self) -> Any:
        number = self.transfer.first_worker + self.rank
        receiver_module.own_location = lambda device: asdict(self.locations[number])
        address = (self.transfer.host, self.transfer.port, self.transfer.world_size, number)
        return receiver_module.SliceReceiver(*address, self.timeout, CPU)

    def update(self, parameters: Parameters | None = None) -> None:
        """Bring the weights to the workers and compare."""
        parameters = parameters or (Parameters(self.case.needed[self.rank]) if self.has_worker else None)
        receiving = self.receive(parameters)
        self.transfer.send()
        if receiving is not None and parameters is not None:
            receiving.result(self.timeout)
            parameters.check()

    def receive(self, parameters: Parameters | None) -> Future[None] | None:
        return self.pool.submit(self.receiver.receive, parameters) if parameters is not None else None


def before_pack(transfer: EngineTransfer, hook: Callable[[int], None]) -> None:
    """Call ``hook`` with the number of its bucket before each packed message of this rank is packed."""
    pack = transfer._pack

    def pack_after_hook(held: Any, packed: Any, data: Tensor) -> None:
        hook(packed.bucket)
        pack(held, packed, data)

    transfer._pack = pack_after_hook
