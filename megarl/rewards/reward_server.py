"""A reward model that a running vLLM or SGLang serves: the exact token ids of prompt and response in, one number out."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from megarl.config.api_keys import authorization
from megarl.config.schema import ScorerConfig
from megarl.errors import RewardError, one_line, shortened, with_fix
from megarl.rewards.worker import checked_score
from megarl.server_answers import parse_answer, read_text

MAX_ANSWER_BYTES = 16 << 20
PROBE_TIMEOUT = 60.0  # seconds; the first request may compile kernels
START_WITH = {
    "vllm": "vllm serve MODEL --runner pooling",
    "sglang": "python -m sglang.launch_server --model-path MODEL --is-embedding",
}


class RewardServer:
    """Client of one scorer of type reward_server; used from one event loop, closed at the end.

    Scores are the model's raw output, without sigmoid or softmax.
    """

    def __init__(self, scorer: ScorerConfig, name: str) -> None:
        """``name`` is that of the scorer in messages."""
        assert scorer.url is not None and scorer.engine is not None
        self._url = scorer.url.rstrip("/") + "/classify"
        self._engine = scorer.engine
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
            fix = f"it must serve a ...ForSequenceClassification with one label: {START_WITH[self._engine]}"
            raise RewardError(with_fix(problem, fix)) from error

    async def score(self, token_ids: Sequence[int]) -> float:
        """The score of one sequence, read at its last token.

        Raises:
            ValueError: the answer is not one finite number; the message is one line.
            aiohttp.ClientError: there is none.
        """
        if self._session is None:
            # how many requests there are at a time is for rewards.concurrency to say, and how long one takes for rewards.timeout
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        ids = list(token_ids)
        body = {"input": ids, "use_activation": False} if self._engine == "vllm" else {"input_ids": ids}
        async with self._session.post(self._url, json=body) as response:
            text = await read_text(response, MAX_ANSWER_BYTES)
        if response.status in (401, 403):
            raise ValueError(f"it answered {response.status}: name the variable with its key as api_key_env")
        if response.status != 200:
            raise ValueError(f"the server answered {response.status}: {shortened(text, 80)}")
        return checked_score(_only_number(parse_answer(text), self._engine))

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def _only_number(answer: Any, engine: str) -> Any:
    """The number in vLLM's ``{"data": [{"probs": [2.5], …}]}`` or SGLang's ``{"embedding": [2.5], …}``."""
    try:
        scores = answer["data"][0]["probs"] if engine == "vllm" else answer["embedding"]
        (score,) = scores
        if isinstance(score, bool):  # a number for Python
            raise TypeError
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"the server's answer is not one score: {shortened(str(answer), 60)}") from None
    return score
