"""New weights into the engine after every update, and another engine in place of one that such an update has cost."""

import ipaddress
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megarl.config.schema import Config
from megarl.engines.protocol import RolloutEngine
from megarl.engines.server_engine import EngineSizes, ServerEngine
from megarl.errors import ConfigError, MegaRLError, TransferError
from megarl.families.base.engine_rules import EngineLayout
from megarl.models.transformer_config import DTYPES
from megarl.reshard.barrier import AbsentRankError, Barrier
from megarl.reshard.engine_transfer import EngineTransfer, EngineTransferSettings, plan_engine_transfer
from megarl.train.learner import Learner


@dataclass(frozen=True, slots=True)
class MainRankEngine:
    """The engine as rank 0 has it.

    Attributes:
        engine: started.
        run: runs a coroutine of the engine to its end.
        warn: called with one line when something needs a person's eye.
    """

    engine: RolloutEngine
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    warn: Callable[[str], None]


class WeightSync:
    """Brings the policy's weights to the engine. Every rank calls every method.

    A server gets slices: what each of its workers holds, from the trainer ranks that hold it (``EngineTransfer``), unless
    ``rollout.weight_transfer.method`` says otherwise. An update that fails anywhere ends the server, so that mixed weights are
    never served; all ranks then hear why, and rank 0 starts another server, which gets everything anew.
    """

    def __init__(self, config: Config, policy: Learner, main: MainRankEngine | None) -> None:
        """``main``: on rank 0."""
        self._config, self._policy, self._main = config, policy, main
        self._settings = config.rollout.weight_transfer
        self._transfer: EngineTransfer | None = None
        name = [uuid4().hex]
        dist.broadcast_object_list(name, src=0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._barrier = Barrier(name[0], distributed_c10d._get_default_group(), device, config.distributed_timeout)

    def push(self, version: int) -> None:
        """Give the policy's weights to the engine; afterwards every response reports ``version``.

        Raises:
            ConfigError: the transport that was asked for cannot reach the engine's workers.
            MegaRLError: the engine could not be updated, not even after restarts, or a trainer rank is missing.
        """
        if self._config.rollout.server is None or self._settings.method == "broadcast":
            self._push_whole_tensors(version)
            return
        for restarts_left in reversed(range(self._settings.max_restarts + 1)):
            try:
                self._push_slices(version)
                return
            except AbsentRankError:
                raise
            except TransferError as error:
                self._drop_transfer()
                if restarts_left == 0:
                    raise
                self._restart(error)

    @property
    def bytes_sent(self) -> int:
        """By this rank in each update with slices; 0 before the first."""
        return self._transfer.bytes_sent if self._transfer is not None else 0

    @property
    def transport(self) -> str:
        """That brings the slices; empty before the first update."""
        return self._transfer.transport if self._transfer is not None else ""

    def _push_whole_tensors(self, version: int) -> None:
        tensors = self._policy.hugging_face_tensors()
        if self._main is not None:
            self._main.run(self._main.engine.update_weights(tensors, version))
        else:
            for _ in tensors:
                pass

    def _push_slices(self, version: int) -> None:
        if self._transfer is None:
            self._transfer = self._plan_transfer()
        if not self._transfer.is_joined:
            self._join(self._transfer)
        with self._meeting("weight update"), self._policy.engine.weights.on_device():
            if self._main is not None:
                self._main.run(_server(self._main).update_slices(self._transfer, version))
            else:
                self._transfer.send()

    def _join(self, transfer: EngineTransfer) -> None:
        refusal: ConfigError | None = None
        with self._meeting("joining of the engine's workers"):
            try:
                if self._main is not None:
                    self._main.run(_server(self._main).join_transfer(transfer))
                else:
                    transfer.join()
            except ConfigError as error:  # all ranks find the same, and another engine would not change it
                refusal = error
        if refusal is not None:
            raise refusal

    def _plan_transfer(self) -> EngineTransfer:
        box: list[tuple[EngineSizes, str] | None] = [None]
        with self._meeting("question how the engine divides the model"):
            if self._main is not None:
                server = _server(self._main)
                box = [(self._main.run(server.sizes()), _address(server.server.own_address()))]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        (sizes, address), engine, section = box[0], self._config.rollout.server_engine, self._config.rollout.server
        assert engine is not None and section is not None
        return plan_engine_transfer(
            self._policy.weight_map,
            (self._policy.engine.chunks, self._policy.engine.layout),
            EngineLayout(engine=engine, tp=sizes.tp, ep=sizes.ep),
            DTYPES[section.dtype or self._config.model.dtype],
            address,
            EngineTransferSettings(
                transport=self._settings.transport,
                bucket_bytes=self._settings.bucket_mib << 20,
                gpus_per_node=torch.cuda.device_count() or dist.get_world_size(),
                timeout_seconds=section.update_timeout,
            ),
        )

    def _drop_transfer(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
        self._transfer = None

    def _restart(self, error: TransferError) -> None:
        with self._meeting("restart of the engine"):
            if self._main is not None:
                self._main.warn(f"warning: {error}; starting another {_server(self._main).name}")
                self._main.run(_server(self._main).restart())

    @contextmanager
    def _meeting(self, where: str) -> Iterator[None]:
        """Something that may fail on some ranks, and then fails on all."""
        problem = ""
        try:
            yield
        except MegaRLError as error:
            problem = str(error)
        self._barrier.wait(where, problem)


def check_transport(config: Config) -> None:
    """Refuse, before an engine is started, a transport between GPUs where there is none.

    Raises:
        ConfigError: there is none.
    """
    transport = config.rollout.weight_transfer.transport
    if transport in ("nccl", "cuda_ipc") and not torch.cuda.is_available():
        raise ConfigError(f"rollout.weight_transfer.transport: {transport} goes between GPUs, and training has none; use auto")


def _server(main: MainRankEngine) -> ServerEngine:
    assert isinstance(main.engine, ServerEngine)
    return main.engine


def _address(server_view: str) -> str:
    """Return this machine's address for workers and ranks on others: where the server is local, that of the rendezvous."""
    if not ipaddress.ip_address(server_view).is_loopback:
        return server_view
    store = distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, dist.TCPStore) else server_view
