"""What servers of others send, read within limits: a text, a value, or one plain reason why not."""

from typing import Any

import aiohttp

from megarl.errors import shortened
from megarl.json_text import parse_json


async def read_text(response: aiohttp.ClientResponse, max_bytes: int) -> str:
    """Return an answer's text, with what is not UTF-8 replaced.

    Raises:
        ValueError: it is longer than ``max_bytes``, or cut.
    """
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > max_bytes:
                raise ValueError(f"its answer is longer than {max_bytes >> 20} MiB")
    except aiohttp.ClientPayloadError:
        raise ValueError("its answer is cut or damaged on the way") from None
    return body.decode(errors="replace")


def parse_answer(text: str) -> Any:
    """Return the value of an answer's JSON; ValueError, which quotes how the answer begins, where it is none."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"its answer is no JSON ({error}): {shortened(text, 60)!r}") from None
