"""Scorers whose scores come from elsewhere: a function of the user's own, a reward model behind a server."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from megarl.builtin.scorers.base import BaseScorer, RunApart, Scorer
from megarl.section import key
from megarl.user_functions import FUNCTION_PATTERN, import_function

FUNCTION_EXAMPLE = "for example my_package.rewards:score"


class PythonScorer(BaseScorer):
    """What a function of your own returns."""

    type: Literal["python"] = key("python", "-", "Calls a function.")
    function: str = key(
        ...,
        "module:function",
        "Called with (response: str, reference: mapping), sync or async, returns a number; with step_separator called with (steps: "
        "list of str, reference) and returns a list with a number for each.",
        give=FUNCTION_EXAMPLE,
    )
    step_separator: str | None = key(
        None, "text", "The response is divided into steps after each such text, and each step is scored.", min_length=1
    )

    @property
    def step_end(self) -> str | None:
        """The separator after which a step ends."""
        return self.step_separator

    @property
    def user_module(self) -> str | None:
        """The module of the user's own that it imports."""
        return self.function.partition(":")[0]

    def mistakes(self) -> Iterator[str]:
        """Yield a line for each mistake that its own keys show."""
        if not FUNCTION_PATTERN.fullmatch(self.function):
            yield f"function: {self.function!r} is not module:function for type python; give {FUNCTION_EXAMPLE}"

    def load(self) -> Callable[..., Any]:
        """Import the function; raises ConfigError where it cannot be imported or called."""
        return import_function(self.function, f"scorer '{self.log_name}'")

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        return self.load()


class RewardServerScorer(BaseScorer):
    """The score of a reward model that a running server serves, without sigmoid or softmax."""

    type: Literal["reward_server"] = key("reward_server", "-", "Asks a server.")
    url: str = key(
        ...,
        "URL",
        "A running server of a ...ForSequenceClassification with one label that reads the policy's tokens.",
        give="for example http://127.0.0.1:8000",
    )
    engine: Literal["vllm", "sglang"] = key(..., "-", "Whose server it is.", give="vllm or sglang")
    api_key_env: str | None = key(
        None,
        "environment variable",
        "Holds the server's key, which is sent as Authorization: Bearer; no key when not given.",
    )

    def key_variables(self) -> Iterator[tuple[str, str | None]]:
        """Yield the key that names a server's environment variable, and its value."""
        yield "api_key_env", self.api_key_env
