"""A reward model that a running vLLM or SGLang serves: the exact token ids of prompt and response in, one number out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from megarl.builtin.scorers import RewardServerScorer
from megarl.config.api_keys import authorization
from megarl.errors import RewardError, one_line, shortened, with_fix
from megarl.rewards.worker import checked_score
from megarl.server_answers import parse_answer, read_text

MAX_ANSWER_BYTES = 16 << 20
PROBE_TIMEOUT = 60.0  # seconds; the first request may compile kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """How an engine's server is asked for scores.

    Attributes:
        start: the command that starts such a server.
        body: makes a request of token ids.
        scores: finds the scores in an answer; raises LookupError or TypeError where there are none.
    """

    start: str
    body: Callable[[list[int]], dict[str, object]]
    scores: Callable[[Any], Any]


INTERFACES = {
    "vllm": Interface(
        start="vllm serve MODEL --runner pooling",
        body=lambda ids: {"input": ids, "use_activation": False},
        scores=lambda answer: answer["data"][0]["probs"],
    ),
    "sglang": Interface(
        start="python -m sglang.launch_server --model-path MODEL --is-embedding",
        body=lambda ids: {"input_ids": ids},
        scores=lambda answer: answer["embedding"],
    ),
}


class RewardServer:
    """Client of one scorer of type reward_server; used from one event loop, closed at the end.

    Scores are the model's raw output, without sigmoid or softmax.
    """

    def __init__(self, scorer: RewardServerScorer, name: str) -> None:
        """Prepare the client of a scorer that messages call ``name``."""
        self._url = scorer.url.rstrip("/") + "/classify"
        self._interface = INTERFACES[scorer.engine]
        self._headers = authorization(scorer.api_key_env)
        self._name = name
        self._session: aiohttp.ClientSession | None = None

    async def check(self) -> None:
        """Let the server score one token.

        Raises:
            RewardError: it does not answer with one number.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await self.score([0])
        except Exception as error:
            late = f"no answer within {PROBE_TIMEOUT:g} seconds"
            reason = late if isinstance(error, TimeoutError) else shortened(one_line(error), 90)
            problem = f"scorer '{shortened(self._name, 30)}': {shortened(self._url, 80)} scores nothing ({reason})"
            fix = f"it must serve a ...ForSequenceClassification with one label: {self._interface.start}"
            raise RewardError(with_fix(problem, fix)) from error

    async def score(self, token_ids: Sequence[int]) -> float:
        """Return the score of one sequence, read at its last token.

        Raises:
            ValueError: the answer is not one finite number; the message is one line.
            aiohttp.ClientError: there is none.
        """
        if self._session is None:
            # how many requests there are at a time is for rewards.concurrency to say, and how long one takes for rewards.timeout
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        async with self._session.post(self._url, json=self._interface.body(list(token_ids))) as response:
            text = await read_text(response, MAX_ANSWER_BYTES)
        if response.status in (401, 403):
            raise ValueError(f"it answered {response.status}: name the variable with its key as api_key_env")
        if response.status != 200:
            raise ValueError(f"the server answered {response.status}: {shortened(text, 80)}")
        return checked_score(_only_number(parse_answer(text), self._interface))

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _only_number(answer: object, interface: Interface) -> object:
    """Return the number in vLLM's ``{"data": [{"probs": [2.5], …}]}`` or SGLang's ``{"embedding": [2.5], …}``."""
    try:
        (score,) = interface.scores(answer)
        if isinstance(score, bool):  # a number for Python
            raise TypeError
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"the server's answer is not one score: {shortened(str(answer), 60)}") from None
    return score
