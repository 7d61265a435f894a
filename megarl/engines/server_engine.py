"""What the engines behind a server have in common: start, health, and weight updates that never leave a half-updated server."""

import asyncio
import itertools
import logging
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy
from torch import Tensor
from transformers import AutoConfig

from megarl.config.api_keys import authorization, bearer
from megarl.config.schema import Config, EngineServerConfig
from megarl.engines.protocol import Generation, SamplingParams
from megarl.engines.routed_experts import reported_experts
from megarl.engines.server_connection import LateError, ServerConnection, abandon
from megarl.engines.server_launch import KEY_VARIABLE
from megarl.engines.server_process import ServerProcess, free_port
from megarl.engines.weight_checklist import WeightChecklist
from megarl.engines.weight_sender import WeightSender, in_buckets
from megarl.errors import MegaRLError, RolloutError
from megarl.families.base.rope_scaling import NAMES
from megarl.families.registry import read_architecture
from megarl.sockets import LOCALHOST

T = TypeVar("T")

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT = 10.0  # seconds
POLL_SECONDS = 0.25
UNAUTHORIZED = 401
CUT_SECONDS = 0.5  # a request that was on its way when others were given up is given up that much later


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """How a server divides the model: ``tp`` ranks cut attention, ``ep`` ranks share the experts (1: each is cut instead)."""

    tp: int
    ep: int

    @property
    def num_workers(self) -> int:
        """Processes that hold a part of the weights."""
        return max(self.tp, self.ep)


class SliceSender(Protocol):
    """Rank 0's part in sending every worker its own slices of the weights. Its calls block."""

    host: str
    port: int
    world_size: int
    first_worker: int  # workers come last in the group

    def join(self) -> None:
        """Wait until all of the group are there."""

    def send(self) -> None:
        """Send what this rank has to."""


class ServerEngine(ABC):
    """RolloutEngine over HTTP to a server process in an environment of its own, or to one given by URL.

    An update waits for the requests in flight, sends the weights, and drops what the server has cached before the new version is
    served. An update that fails at any point ends the server: half-updated weights are never served.
    """

    name: ClassVar[str]
    section: ClassVar[str]  # of the configuration, below rollout
    hint: ClassVar[str]  # what a server that the trainer did not start must be started with

    def __init__(self, config: Config, run_dir: Path, weight_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Log to ``run_dir``/engine.log, the next server's output to engine.2.log; ``weight_shapes`` says what updates bring."""
        self.config = config
        self._weight_shapes = weight_shapes
        self.settings: EngineServerConfig = getattr(config.rollout, self.section)
        self._run_dir = run_dir
        self._server: ServerConnection | None = None
        self._experts = read_architecture(config.model.path).moe if config.rollout.routing_replay else None
        model = AutoConfig.from_pretrained(config.model.path)
        self._vocabulary_size: int = model.vocab_size
        self._rope_parameters: dict[str, Any] = model.rope_parameters
        self._sender: WeightSender | None = None
        self._in_flight: set[asyncio.Future[list[Generation]]] = set()
        self._version: int | None = None
        self._unusable = "it has no weights yet; call update_weights first"

    @abstractmethod
    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a server on ``port``."""

    @abstractmethod
    async def sample(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` different responses; one at temperature 0."""

    @abstractmethod
    async def give_up(self) -> None:
        """Have the server answer the requests that it has with what there is of them."""

    @abstractmethod
    async def pause(self) -> None:
        """Let the requests in flight finish and start no others."""

    @abstractmethod
    async def sizes(self) -> EngineSizes:
        """Ask how the server divides the model, before the first weight update.

        Raises:
            RolloutError: in a way that weight updates do not know, or it rotates positions otherwise than the trainer.
        """

    @abstractmethod
    async def join(self, sender: WeightSender) -> None:
        """Let every worker join the sender's group for whole tensors."""

    @abstractmethod
    async def join_slices(self, sender: SliceSender) -> None:
        """Let every worker join the sender's group for slices."""

    @abstractmethod
    async def transfer(
        self, sender: WeightSender, messages: Iterable[list[tuple[str, Tensor]]], finish: Callable[[], None]
    ) -> None:
        """Send and load all messages; ``finish`` raises WeightsError when they were not a whole set."""

    @abstractmethod
    async def receive_slices(self) -> None:
        """Let every worker receive and load one whole set of slices."""

    @abstractmethod
    async def reset_prefix_cache(self) -> None:
        """Drop keys and values of the old weights."""

    @abstractmethod
    async def resume(self) -> None:
        """Let the engine answer requests again."""

    async def start(self) -> None:
        """Start the server, or find the one at the section's ``url``, and wait until it is healthy.

        A server that is not healthy in time writes to its log what its processes are doing, and another is started.

        Raises:
            RolloutError: it ended, or was late at its last attempt.
        """
        for attempts_left in reversed(range(1 if self.settings.url else self.settings.start_attempts)):
            try:
                await self._start_once()
                return
            except LateError as error:
                if attempts_left == 0:
                    raise
                logger.warning("%s; starting another", error)

    async def _start_once(self) -> None:
        log_path = _new_log(self._run_dir)
        process = None
        url = (self.settings.url or "").rstrip("/")
        headers = authorization(self.settings.api_key_env)
        if not url:
            port = free_port(LOCALHOST, self.settings.port, f"rollout.{self.section}.port")
            url = f"http://{LOCALHOST}:{port}"
            command, environment = self.command(port)
            key = secrets.token_urlsafe(32)  # known to this process and the server's alone, and to each server another
            process = ServerProcess(self.name, command, environment | {KEY_VARIABLE: key}, log_path)
            await process.start()
            headers = bearer(key)
        self._server = ServerConnection(self.name, url, process, log_path, self.hint, headers)
        try:
            setting = f"rollout.{self.section}.start_timeout"
            await self._server.watch(self._until_healthy(), "start", self.settings.start_timeout, setting)
        except BaseException as error:
            await self._server.end_process(write_stacks=isinstance(error, LateError))
            await self.close()
            raise

    async def health(self) -> None:
        """Raise RolloutError when the engine cannot answer."""
        if self._server is not None and self._server.death is not None:
            raise self._server.death
        if self._version is None:
            raise RolloutError(f"{self.name} cannot answer: {self._unusable}")
        await self.server.watch(self.server.call("GET", "/health"), "answer /health", HEALTH_TIMEOUT)

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` responses to one prompt, in order."""
        if self._version is None:
            raise RolloutError(f"{self.name} cannot answer: {self._unusable}")
        vocabulary = self._vocabulary_size
        if not prompt_token_ids or not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocabulary:  # kills some servers
            raise RolloutError(
                f"{self.name} got a prompt of {len(prompt_token_ids)} tokens that is empty or has ids outside 0..{vocabulary - 1}; "
                f"does the tokenizer belong to {self.config.model.path}?"
            )
        request = asyncio.ensure_future(self.sample(prompt_token_ids, sampling))
        self._in_flight.add(request)
        request.add_done_callback(self._in_flight.discard)
        generations = await self.server.watch(request, "answer a prompt", None)
        # Greedy samples are all the same, and some servers refuse several of one request.
        return generations * sampling.num_samples if sampling.temperature == 0 else generations

    async def abort(self) -> None:
        """End the requests in flight at the next token; returns when all have answered.

        Raises:
            RolloutError: the server died, or took longer than the section's ``update_timeout``.
        """
        await self.limited(self._abort(), "give up its requests")

    async def _abort(self) -> None:
        while requests := set(self._in_flight):
            await self.give_up()
            await asyncio.wait(requests, timeout=CUT_SECONDS)

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send a whole new set of weights to every worker; requests in flight finish on the old weights first.

        Raises:
            WeightsError: a parameter is missing, unknown or mis-shaped.
            RolloutError: the server died, refused, or took longer than the section's ``update_timeout``.
        """
        try:
            async with self._updating(version):
                sender = self._sender or await self._open_group()
                checklist = WeightChecklist(self._weight_shapes)
                accepted = ((name, tensor) for name, tensor in weights if checklist.accepts(name, tensor))
                await self.transfer(sender, in_buckets(accepted), lambda: checklist.finish(self.name))
        finally:
            for _ in weights:  # read to its end: making it is a collective of all trainer ranks
                pass

    async def join_transfer(self, sender: SliceSender) -> None:
        """Let every worker join the sender's group for slices.

        Raises:
            RolloutError: the server died, refused, or took longer than the section's ``update_timeout``.
        """
        await self._together(self.join_slices(sender), sender.join, "join the weight-transfer group")

    async def update_slices(self, sender: SliceSender, version: int) -> None:
        """Let every worker take its slices of a whole new set of weights from all trainer ranks, which send at the same time.

        Raises:
            RolloutError: the server died, refused, or took longer than the section's ``update_timeout``.
        """
        async with self._updating(version):
            await self._together(self.receive_slices(), sender.send, "receive and load the new weights")

    async def restart(self) -> None:
        """Start a new server in place of one that died.

        Raises:
            RolloutError: it cannot be started, or the dead one was given by URL.
        """
        if self.settings.url:
            raise RolloutError(f"{self.name} at {self.settings.url} is not this run's to restart; do so and resume the run")
        await self.close()
        self._sender = None
        await self.start()

    async def close(self) -> None:
        """End the server and all its processes; a server given by URL is left alone."""
        self._version, self._unusable = None, "it is closed"
        if self._server is not None:
            await self._server.close()

    @property
    def server(self) -> ServerConnection:
        """The server, once it is started."""
        if self._server is None:
            raise RolloutError(f"{self.name} was not started")
        return self._server

    async def limited(self, work: Awaitable[T], task: str, partner: asyncio.Future[Any] | None = None) -> T:
        """Run a part of a weight update within its time-out; ``partner`` is its other end."""
        return await self.server.watch(work, task, self.settings.update_timeout, f"rollout.{self.section}.update_timeout", partner)

    async def sent(self, send: Callable[..., None], *arguments: Any, task: str, partner: asyncio.Future[Any] | None = None) -> None:
        """Do one blocking step of the sender, in a thread, while ``partner`` receives."""
        await self.limited(self._in_thread(send, *arguments), task, partner)

    def routed_experts(self, report: "numpy.ndarray[Any, Any] | None", num_tokens: int) -> Tensor | None:
        """Read ``Generation.routed_experts`` of a response of ``num_tokens`` with its prompt from the server's report.

        Raises:
            RolloutError: rollout.routing_replay is set and the report is missing or not of this model.
        """
        return None if self._experts is None else reported_experts(self.name, report, num_tokens, self._experts)

    def require_same_rope(self, reported: Mapping[str, Any]) -> None:
        """Refuse a server whose model rotates positions otherwise than the trainer's.

        Args:
            reported: ``rope_parameters`` of the model's config in the server.

        Raises:
            RolloutError: they differ from those of the trainer's config.json.
        """
        theirs, ours = _comparable_rope(reported), _comparable_rope(self._rope_parameters)
        if theirs != ours:
            raise RolloutError(
                f"{self.name} scales RoPE by {theirs}, and the trainer by {ours} (model.rope_scaling, or config.json of "
                f"{self.config.model.path}); start the server with this config.json"
            )

    @asynccontextmanager
    async def _updating(self, version: int) -> AsyncIterator[None]:
        """Do all of an update but the transfer. If anything fails, the server is ended."""
        self._version, self._unusable = None, f"its update to weight version {version} did not complete"
        try:
            await self.pause()
            yield
            await self.reset_prefix_cache()
            setting = self.server.call("POST", "/update_weight_version", {"new_version": str(version)})
            await self.limited(setting, "set the weight version")
            await self.resume()
        except BaseException:
            if self._server is not None:
                await self._server.end_process()
            raise
        self._version = version

    async def _together(self, work: Coroutine[Any, Any, None], send: Callable[[], None], task: str) -> None:
        """Return what the workers give while the sender, in a thread, does its part."""
        working = asyncio.ensure_future(work)
        try:
            await self.sent(send, task=task, partner=working)
            await self.limited(working, task)
        finally:
            abandon(working)

    async def _open_group(self) -> WeightSender:
        """Make the group of this process and the server's workers."""
        num_workers = (await self.sizes()).num_workers
        sender = WeightSender(self.server.own_address(), num_workers, self.settings.update_timeout)
        await self._together(self.join(sender), sender.join, "join the weight-transfer group")
        self._sender = sender
        return sender

    async def _until_healthy(self) -> None:
        while True:
            try:
                await self.server.call("GET", "/health")
                break
            except RolloutError:
                await asyncio.sleep(POLL_SECONDS)
        if self.server.process is not None and await self.server.status_without_key("/v1/models") != UNAUTHORIZED:
            raise RolloutError(f"{self.name} answers requests without the run's key; it did not load MegaRL's plugin; see its log")

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking call in a daemon thread: unlike asyncio's own pool, one that hangs in gloo cannot hold up the exit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():  # given up by its caller
                return
            if error is None:
                future.set_result(cast(T, result))
            elif isinstance(error, MegaRLError):
                future.set_exception(error)
            else:
                failure = RolloutError(f"weight transfer to {self.name} failed: {' '.join(str(error).split())[:500]}")
                failure.__cause__ = error
                future.set_exception(failure)

        def run() -> None:
            result, error = None, None
            try:
                result = function(*arguments)
            except Exception as raised:
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, daemon=True, name="weight-transfer").start()
        return await future


def _new_log(run_dir: Path) -> Path:
    """Choose the file of a server's log: every server of a run, of its stages and of the run resumed has one of its own."""
    names = itertools.chain(["engine.log"], (f"engine.{number}.log" for number in itertools.count(2)))
    return next(run_dir / name for name in names if not (run_dir / name).exists())


def _comparable_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE parameters that count: without engines' older name of the type and own type for latent attention."""
    rope_type = str(parameters["rope_type"]).removeprefix("deepseek_")
    needed, optional = NAMES.get(rope_type, ((), ()))
    names = ("rope_theta", *needed, *optional)
    return {"rope_type": rope_type} | {name: parameters[name] for name in names if parameters.get(name) is not None}


def token_versions(engine: str, spans: Sequence[Mapping[str, Any]] | None, num_tokens: int) -> tuple[int, ...]:
    """Return the weight version of each token of a response, from its spans ``{"version": …, "start": …, "end": …}``.

    Raises:
        RolloutError: a token has no version, or one that this run did not set.
    """
    versions: list[int] = []
    for span in spans or ():
        if span["start"] != len(versions) or not str(span["version"]).isdecimal():
            break
        versions += [int(span["version"])] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise RolloutError(f"{engine} does not tell which weights sampled each of {num_tokens} tokens; its spans are {spans}")
    return tuple(versions)
