"""A language model as judge of an answer, asked over the OpenAI-compatible HTTP interface of vLLM and SGLang."""

import asyncio
import re
from collections.abc import Mapping, Sequence

import aiohttp

from megarl.config.api_keys import authorization
from megarl.config.schema import JudgeConfig
from megarl.errors import RewardError, shortened, with_fix
from megarl.server_answers import parse_answer, read_text

_MAX_ANSWER_BYTES = 16 << 20
_RETRIED_STATUS = {408, 425, 429}  # beside all of 500 and above: the server may answer later
_PLACEHOLDER = re.compile(r"\{(question|answer|reference)\}")


class JudgeFailure(Exception):
    """The judge gave no usable reply; the message has its URL and the reason."""


class _Busy(Exception):
    """The server cannot answer now; the message is what it said."""


class Judge:
    """One judge; used from one event loop, closed at the end.

    It bounds the time of a question, not their number: ``rewards.concurrency`` does, as at most one is open for a response.

    Attributes:
        config: its settings.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._name = f"judge {shortened(config.url, 80)}"
        self._headers = authorization(config.api_key_env)
        self._session: aiohttp.ClientSession | None = None

    async def check(self) -> str:
        """Return the reply to a question whose answer is plain, so that nothing is found out later.

        Raises:
            RewardError: no reply came.
        """
        try:
            return await self.ask("What is 2 + 2?", "4", ["4"])
        except JudgeFailure as failure:
            raise RewardError(with_fix(str(failure), "start it, or correct the judge settings of rewards.scorers")) from failure

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, question: str, answer: str, references: Sequence[str]) -> str:
        """Return the judge's reply to one answer at temperature 0.

        A server that is away, late or overloaded is asked again after ``retry_delay``, which doubles each time.

        Raises:
            JudgeFailure: it refused, answered something else, or did not answer after all retries.
        """
        config = self.config
        delay = config.retry_delay
        body = self._body(question, answer, references)
        for attempt in range(config.retries + 1):
            try:
                return await self._request(body)
            except TimeoutError:
                problem = f"no answer within {config.timeout:g} seconds"
            except (_Busy, aiohttp.ClientError, OSError) as error:
                problem = shortened(str(error), 120) or type(error).__name__
            if attempt < config.retries:
                await asyncio.sleep(delay)
                delay *= 2
        raise JudgeFailure(f"{self._name} failed in {config.retries + 1} requests: {problem}")

    def _body(self, question: str, answer: str, references: Sequence[str]) -> dict[str, object]:
        values = {"question": question, "answer": answer, "reference": " or ".join(references)}
        # One pass: an answer that holds "{reference}" must not have it filled in.
        prompt = _PLACEHOLDER.sub(lambda found: values[found[1]], self.config.prompt)
        return {
            **self.config.arguments,
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": self.config.max_tokens,
        }

    async def _request(self, body: Mapping[str, object]) -> str:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self.config.timeout)
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        async with self._session.post(f"{self.config.url.rstrip('/')}/chat/completions", json=body) as response:
            try:
                text = await read_text(response, _MAX_ANSWER_BYTES)
            except ValueError as error:
                raise _Busy(str(error)) from error
        begin = shortened(text, 80)
        if response.status in _RETRIED_STATUS or response.status >= 500:
            raise _Busy(f"it answered with {response.status}: {begin}")
        if response.status in (401, 403):
            raise JudgeFailure(f"{self._name} refused with {response.status}; name the variable with its key as judge.api_key_env")
        if response.status != 200:
            raise JudgeFailure(f"{self._name} refused model {shortened(self.config.model, 60)} with {response.status}: {begin}")
        try:
            choice = parse_answer(text)["choices"][0]
            reply, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JudgeFailure(f"{self._name} answered what is no chat completion: {begin!r}") from error
        if not isinstance(reply, str) or reason == "length":
            raise JudgeFailure(
                f"{self._name} did not finish its reply within max_tokens {self.config.max_tokens}: {begin!r}; raise it"
            )
        return reply
