"""The policy's weights into the workers of a running engine: every trainer rank sends its share of a plan straight to them."""

import datetime
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from megarl.errors import ConfigError, TransferError, listed
from megarl.families.base.engine_rules import EngineLayout
from megarl.models.build import CausalLM
from megarl.parallel.axis_sizes import axis_sizes
from megarl.parallel.layout import Layout
from megarl.reshard.barrier import first_line
from megarl.reshard.engine_transports import Crew, GroupTransport, SharedTransport, Transport
from megarl.reshard.megatron import TransferSettings
from megarl.reshard.packed_messages import FlatPart, PackedMessage, digest, flat_parts
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.plan import Plan, build_plan
from megarl.reshard.plan.shard_layout import megatron_shard_layout, tensor_table
from megarl.reshard.receive_plan import element_size, receive_plan
from megarl.reshard.transport_choice import SHARED, Location, choose_transport, own_location
from megarl.sockets import serve_store
from megarl.weights.mapping import WeightMap
from megarl.weights.transfer import global_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTransferSettings(TransferSettings):
    """How a transfer to an engine is carried out.

    Attributes:
        transport: ``rollout.weight_transfer.transport``.
    """

    transport: str


class EngineTransfer:
    """Sends the weights of a policy to the workers of one engine, as often as asked.

    Trainer ranks and workers are a gloo group of their own, the workers last. When all have said where they are, the transport is
    chosen (``transport_choice.py``) and made (``engine_transports.py``). Each worker gets its receive plan once, through the
    group's store. Its end is engines/plugin/megarl_slice_receiver.py: what arrives changed, does not fit or does not come is an
    error there.

    Attributes:
        plan: what each rank sends to each worker.
        transport: the chosen one, when all have joined.
        bytes_sent: by this rank each time.
        host, port: of the store.
        world_size, first_worker: of the group.
    """

    def __init__(
        self,
        plan: Plan,
        held: Callable[[], dict[str, FlatPart]],
        dtypes: dict[int, torch.dtype],
        address: str,
        settings: EngineTransferSettings,
    ) -> None:
        """Open the store; collective over the trainer's world, whose ranks are the plan's source ranks.

        Args:
            held: gives this rank's parameters.
            dtypes: of the engine's weights, by the size of a number in bytes.
            address: of rank 0's machine, for all ranks and workers.
        """
        self.plan, self._held, self._dtypes, self._settings = plan, held, dtypes, settings
        self._timeout = datetime.timedelta(seconds=settings.timeout_seconds)
        self._rank, self.first_worker = dist.get_rank(), plan.source.num_ranks
        self.world_size = self.first_worker + plan.destination.num_ranks
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._transport: Transport | None = None
        self.transport = ""
        self.bytes_sent = int(plan.message_bytes[plan.sender == self._rank].sum())
        self.host = address
        self._store = self._open_store()
        self.port = self._store.port

    @property
    def is_joined(self) -> bool:
        """Whether all have joined."""
        return self._transport is not None

    def join(self) -> None:
        """Meet all trainer ranks and workers, and choose the transport.

        Raises:
            TransferError: some did not come within the time-out.
            ConfigError: on every rank, the transport that was asked for cannot join them.
        """
        with self._on_device():
            locations = self._gather_locations()
            try:
                transport = choose_transport(
                    self._settings.transport, locations[: self.first_worker], locations[self.first_worker :]
                )
            except ConfigError:
                self._send_receive_plans(lambda worker: {"transport": None, "parameters": [], "buckets": []})
                raise
            self._send_receive_plans(lambda worker: receive_plan(self.plan, worker, self._dtypes, locations, transport))
            try:
                group = ProcessGroupGloo(PrefixStore("slices", self._store), self._rank, self.world_size, self._timeout)
                staging = self._device if transport in ("nccl", "cuda_ipc") else torch.device("cpu")
                crew = Crew(self.plan, self._rank, group, staging, self._timeout)
                self._transport = (
                    SharedTransport(crew, self._store, locations, transport)
                    if transport in SHARED
                    else GroupTransport(crew, self._store)
                )
            except RuntimeError as error:
                raise TransferError(f"rank {self._rank} did not meet the engine's workers: {first_line(error)}") from error
        self.transport = transport

    @torch.no_grad()
    def send(self) -> None:
        """Send the weights as they are now; every trainer rank calls this while the workers receive.

        Raises:
            TransferError: a worker died or was too slow.
        """
        assert self._transport is not None
        held = self._held()
        with self._on_device():
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # on rank 0 this is another thread than the optimizer's
            self._transport.send(lambda packed, data: self._pack(held, packed, data))

    def close(self) -> None:
        """End what a failed update has left under way."""
        if self._transport is not None:
            self._transport.close()

    def _pack(self, held: dict[str, FlatPart], packed: PackedMessage, data: Tensor) -> None:
        regions = [held[copy.source_parameter].region(copy.source) for copy in packed.copies]
        staged = [
            data[offset : offset + copy.num_bytes].view(self._dtypes[element_size(copy)]).view(region.shape)
            for copy, offset, region in zip(packed.copies, packed.offsets, regions, strict=True)
        ]
        torch._foreach_copy_(staged, regions)
        words = data.view(torch.int64)
        words[-1] = digest(words[:-1])

    def _on_device(self) -> AbstractContextManager[Any]:
        """Choose the device in a thread, which begins on GPU 0 whatever the process has chosen."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _gather_locations(self) -> list[Location]:
        """Collect the locations of all ranks and workers, in order. Rank 0 asks for them and tells the others."""
        self._store.set(f"location/{self._rank}", json.dumps(asdict(own_location(self._device))))
        keys = [f"location/{rank}" for rank in range(self.world_size)]
        try:
            if self._rank == 0:
                try:
                    self._store.wait(keys, self._timeout)
                    found = [json.loads(location) for location in self._store.multi_get(keys)]
                except RuntimeError:
                    found = [self._name(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                self._store.set("locations", json.dumps(found))
            self._store.wait(["locations"], 2 * self._timeout)
            found = json.loads(self._store.get("locations"))
        except RuntimeError as error:
            raise TransferError(f"rank {self._rank} did not hear from rank 0 who has joined: {first_line(error)}") from error
        if isinstance(found[0], str):
            raise TransferError(f"{listed(found)} did not join within {self._timeout.total_seconds():g} s")
        return [Location(**location) for location in found]

    def _name(self, rank: int) -> str:
        return f"rank {rank}" if rank < self.first_worker else f"worker {rank - self.first_worker} of the engine"

    def _send_receive_plans(self, receive_plan_of: Callable[[int], dict[str, object]]) -> None:
        """Tell every worker what it will get."""
        if self._rank == 0:
            for worker in range(self.first_worker, self.world_size):
                self._store.set(f"receive_plan/{worker}", json.dumps(receive_plan_of(worker)))

    def _open_store(self) -> TCPStore:
        """Open the group's store, which rank 0 serves."""
        port = [0]
        store = None
        if self._rank == 0:
            store = serve_store(self.host, 0, self.world_size, self._timeout)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        return store or TCPStore(self.host, port[0], self.world_size, is_master=False, timeout=self._timeout)


def plan_engine_transfer(
    weight_map: WeightMap,
    source: tuple[list[CausalLM], Layout],
    engine: EngineLayout,
    dtype: torch.dtype,
    address: str,
    settings: EngineTransferSettings,
) -> EngineTransfer:
    """Plan the transfer from a policy to the workers of one engine; collective over the trainer's world.

    Args:
        dtype: of the engine's weights.
        address: of rank 0's machine, for all ranks and workers.

    Raises:
        ConfigError: the engine's layout does not divide the model.
    """
    tensors = tensor_table(weight_map, dtype.itemsize)
    chunks, layout = source
    plan = build_plan(
        megatron_shard_layout(weight_map, axis_sizes(layout.config, len(layout.ranks)), tensors).in_world(
            layout.ranks, dist.get_world_size()
        ),
        engine_shard_layout(weight_map.architecture, engine, tensors),
        tensors,
        Machines(gpus_per_node=settings.gpus_per_node),
        settings.bucket_bytes,
    )
    dtypes = {4: torch.float32, dtype.itemsize: dtype}
    return EngineTransfer(plan, lambda: flat_parts(global_parameters(chunks, weight_map, layout)), dtypes, address, settings)
