"""A reward function that works for a while."""

from collections.abc import Mapping
from typing import Any

calls: list[str] = []


async def fails_later(response: str, reference: Mapping[str, Any]) -> float:
    """Async, so that it runs in the trainer's own process and can count."""
    calls.append(response)
    if len(calls) > 30:
        raise ValueError("no more scores")
    return float(len(response))
