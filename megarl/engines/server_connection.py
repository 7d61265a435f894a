"""Requests to an engine's server, none of which waits longer than the server lives."""

import asyncio
import json
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from megarl.engines.server_process import ServerProcess
from megarl.errors import RolloutError, shortened, with_fix
from megarl.json_text import parse_json
from megarl.server_answers import parse_answer, read_text
from megarl.sockets import address_towards

T = TypeVar("T")

MAX_ANSWER_BYTES = 1 << 30  # reports of experts are long
DEATH_NOTICE = 20.0  # seconds; a dying server drops its connections a moment before its exit code is known


class RefusedError(RolloutError):
    """The server is well and says that the request is wrong."""


class LateError(RolloutError):
    """The server did not do in time what it was asked to."""


class ServerConnection:
    """One server: the HTTP session with it and, where the trainer started it, its process."""

    def __init__(
        self, name: str, url: str, process: ServerProcess | None, log_path: Path, hint: str, headers: Mapping[str, str]
    ) -> None:
        """Take ``hint``, said after refusals of a server that the trainer did not start, and ``headers`` of every request."""
        self.name = name
        self.url = url
        self.process = process
        self._log_path = log_path
        self._hint = hint
        # One connection per prompt in flight; the collector bounds these.
        # Each serves one request: a server closes idle ones after some seconds, and a request sent at that moment would be lost.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), headers=headers)

    @property
    def _who(self) -> str:
        return self.name if self.process is not None else f"{self.name} at {shortened(self.url, 80)}"

    @property
    def death(self) -> RolloutError | None:
        """Why the server is gone; None while it lives, and always for one that the trainer did not start."""
        exited = self.process.exited if self.process is not None else None
        return self.process.death() if self.process is not None and exited is not None and exited.done() else None

    async def close(self) -> None:
        """End the session, and the server with all its processes where the trainer started it."""
        await self._session.close()
        await self.end_process()

    async def end_process(self, *, write_stacks: bool = False) -> None:
        """End the server with all its processes where the trainer started it; ``write_stacks`` as ServerProcess.close has it."""
        if self.process is not None:
            await self.process.close(write_stacks=write_stacks)

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send one HTTP request and return the value of its JSON answer; None for an answer without JSON.

        Raises:
            RolloutError: it is not answered, not with status 200, or with what is no JSON and says that it is.
        """
        where = f"{method} {path.partition('?')[0]}"
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                text = await read_text(response, MAX_ANSWER_BYTES)
                if response.status != 200:
                    raise self._refusal(where, response.status, text)
                return parse_answer(text) if response.content_type == "application/json" and text else None
        except (aiohttp.ClientError, OSError) as error:
            reason = shortened(str(error), 100) or type(error).__name__
            raise RolloutError(f"{self.name} at {shortened(self.url, 80)} does not answer {where}: {reason}") from error
        except ValueError as error:
            raise RolloutError(self._with_fix(f"{self._who} answered {where}, but {error}")) from error

    async def status_without_key(self, path: str) -> int:
        """Return the status of the answer to a stranger's GET."""
        async with aiohttp.ClientSession() as stranger, stranger.get(self.url + path) as response:
            return response.status

    @contextmanager
    def understanding(self, path: str, answer: Any) -> Iterator[None]:
        """Turn what goes wrong in reading an answer into a RolloutError that tells what it was."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            begin = shortened(json.dumps(answer, default=str), 60)
            problem = f"{self._who} answered {path} with what is not {self.name}'s: {begin} ({shortened(str(error), 50)})"
            raise RolloutError(self._with_fix(problem)) from error

    def _with_fix(self, problem: str) -> str:
        return problem if self.process is not None else with_fix(problem, self._hint)

    def _refusal(self, where: str, status: int, text: str) -> RolloutError:
        problem = f"{self._who} answered {where} with {status}: {shortened(_message(text), 170)}"
        if status in (401, 403) and self.process is None:
            fix = f"name the environment variable with its key as rollout.{self.name.lower()}.api_key_env"
            return RefusedError(with_fix(problem, fix))
        if status >= 500:
            return RolloutError(problem)
        return RefusedError(self._with_fix(problem))

    async def watch(
        self, work: Awaitable[T], task: str, seconds: float | None, key: str = "", partner: asyncio.Future[Any] | None = None
    ) -> T:
        """Wait for ``work``, but no longer than the server lives, ``seconds`` last, or ``partner`` (its other end) works.

        Args:
            work: what is waited for; cancelled when given up.
            task: what the server has to do, for the message of the time-out.
            seconds: time-out; None for none.
            key: configuration key of the time-out, for its message.
            partner: something else that must not fail meanwhile.

        Raises:
            RolloutError: the server's death where it died, else the failure of ``work`` or ``partner``, else the time-out.
        """
        future = asyncio.ensure_future(work)
        exited = self.process.exited if self.process is not None else None
        watched = {future} | ({exited} if exited else set()) | ({partner} if partner else set())
        try:
            done, _ = await asyncio.wait(watched, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if partner in done and future not in done:
                await asyncio.wait({future}, timeout=0 if partner.exception() else seconds)
            failed = next((one for one in (future, partner) if one is not None and one.done() and one.exception()), None)
            if failed is not None and exited is not None and not isinstance(failed.exception(), RefusedError):
                await asyncio.wait({exited}, timeout=DEATH_NOTICE)
            if self.death is not None and (failed is not None or not future.done()):
                raise self.death
            if failed is not None:
                failed.result()
            if not future.done():
                where = f" ({key})" if key else ""
                raise LateError(f"{self.name} at {self.url} did not {task} within {seconds:g} s{where}; see {self._log_path}")
            return future.result()
        finally:
            future.cancel()

    def own_address(self) -> str:
        """Return the address of this machine that the server can reach."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return address_towards(parts.hostname, parts.port or 80)


def abandon(call: asyncio.Future[Any]) -> None:
    """Cancel a call whose answer, or failure, no longer matters."""
    call.cancel()
    call.add_done_callback(lambda done: done.cancelled() or done.exception())  # an exception nobody reads is logged as a bug


def _message(text: str) -> str:
    """Return the message of an error answer."""
    try:
        answer = parse_json(text)
        answer = answer.get("error", answer)
        return str(answer["message"] if isinstance(answer, dict) else answer)
    except (ValueError, KeyError, AttributeError):
        return text  # not an engine's error form: show it as it is
