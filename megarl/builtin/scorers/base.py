"""What every scorer has in common."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from megarl.section import Section, key

Scorer = Callable[[Any, Mapping[str, Any]], Any]
"""Called with the decoded response and the prompt's reference; gives a number, or, called with a list of steps, one for each.
Whatever it raises is a failure."""
RunApart = Callable[..., Any]
"""Calls a function with arguments in a process of its own, where what it executes does no harm."""


class WorkerScorer(Protocol):
    """What a worker process is told of a scorer."""

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer; its libraries are imported here, so that no response's time-out pays for that.

        Args:
            run_apart: None where there is no sandbox.
        """


class BaseScorer(Section):
    """One reward; the reward of a response is the weighted sum of all."""

    type: str = key(..., "-", "Which scorer.")
    name: str | None = key(None, "-", "Name in the log; the type when not given.")
    weight: float = key(1.0, "-", "Factor of this score in the reward.")

    @property
    def log_name(self) -> str:
        """Its name in the log."""
        return self.name or self.type

    @property
    def step_end(self) -> str | None:
        """The text after which a step ends, each of which is scored; None where the response is scored as a whole."""
        return None

    @property
    def user_module(self) -> str | None:
        """The module of the user's own that it imports."""
        return None

    def log_names(self) -> tuple[str, ...]:
        """Return every name under which it logs a score."""
        return (self.log_name,)

    def key_variables(self) -> Iterator[tuple[str, str | None]]:
        """Yield its keys that name the environment variable with a server's key, and their values."""
        yield from ()

    def mistakes(self) -> Iterator[str]:
        """Yield one line for each mistake that its own keys show, beginning with the key."""
        yield from ()

    def build(self, run_apart: RunApart | None) -> Scorer:
        """See WorkerScorer; those that run on the event loop have none."""
        raise NotImplementedError(f"{self.type} runs in no worker")


def pattern_mistakes(name: str, pattern: str | None, needs_group: str = "") -> Iterator[str]:
    """Refuse what is no regular expression, or has no group where ``needs_group`` says what it is for."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield f"{name}: {pattern!r} is not a regular expression ({error}); correct it"
        return
    if needs_group and groups == 0:
        yield f"{name}: {pattern!r} has no group to take the {needs_group} from; put the {needs_group}'s part in ( )"
