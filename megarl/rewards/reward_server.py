"""A reward model that a running vLLM or SGLang serves: the exact token ids of prompt and response in, one number out."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from megarl.config.schema import ScorerConfig
from megarl.errors import RewardError
from megarl.rewards.scorers import one_line
from megarl.rewards.worker import checked_score

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
            reason = late if isinstance(error, TimeoutError) else one_line(error)
            raise RewardError(
                f"scorer '{self._name}': {self._url} scores nothing ({reason}); it must be a {self._engine} server of a "
                f"...ForSequenceClassification with one label: {START_WITH[self._engine]}"
            ) from error

    async def score(self, token_ids: Sequence[int]) -> float:
        """The score of one sequence, read at its last token.

        Raises:
            ValueError: the answer is not one finite number.
            aiohttp.ClientError: there is none.
        """
        if self._session is None:
            # how many requests there are at a time is for rewards.concurrency to say, and how long one takes for rewards.timeout
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        ids = list(token_ids)
        body = {"input": ids, "use_activation": False} if self._engine == "vllm" else {"input_ids": ids}
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise ValueError(f"the server answered {response.status}: {(await response.text())[:300]}")
            answer = await response.json(content_type=None)
        return checked_score(_only_number(answer, self._engine))

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
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"the server's answer is not one score: {str(answer)[:300]}") from None
    return score
