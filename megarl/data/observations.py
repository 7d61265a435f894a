"""How an environment's message is written for the model, between two turns of the policy."""

from typing import TYPE_CHECKING

from megarl.config.schema import EnvironmentConfig
from megarl.data.chat_rendering import ChatTemplate, TemplateRefusal
from megarl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "{observation}"
_ANSWER = "what the policy said"
_MESSAGE = 'what the\nenvironment "said"'  # a template that changes it, e.g. to JSON, cannot be followed token by token


class ObservationTemplate:
    """Turns an environment's message into the tokens that follow a turn of the policy.

    What is put around the message is tokenised once, the message alone, and nothing ever again: the tokens of the turns before
    stay what the policy sampled. With the tokenizer's chat template the parts around are found by difference: a chat of a
    question, an answer and a message is rendered, and what stands between answer and message, and behind the message up to the
    policy's next turn, is what is put around. Where the first token of the former is the stop token that the policy has just
    sampled, it is not repeated.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: EnvironmentConfig) -> None:
        """``config.observation_template``, or the tokenizer's chat template when it is not given.

        Raises:
            DataError: the chat template cannot be followed.
        """
        self._tokenizer = tokenizer
        text = config.observation_template
        before, after = _around(tokenizer, config.role) if text is None else text.split(_PLACEHOLDER)
        self._before, self._after = self._encode(before), self._encode(after)
        self._closes_turn = text is None

    def encode(self, observation: str, last_token: int | None) -> tuple[int, ...]:
        """The message's tokens after a turn that ended with ``last_token``, or after the prompt (None).

        A special token's text in the message is text: an environment can neither end its message early nor speak for the policy.
        """
        before = self._before
        if self._closes_turn and before[:1] == (last_token,):
            before = before[1:]
        message: list[int] = self._tokenizer.encode(observation, add_special_tokens=False, split_special_tokens=True)
        return (*before, *message, *self._after)

    def _encode(self, text: str) -> tuple[int, ...]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(token_ids)


def _around(tokenizer: "PreTrainedTokenizerBase", role: str) -> tuple[str, str]:
    """What the chat template puts before and after a message that follows an answer."""
    chat = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": _ANSWER},
        {"role": role, "content": _MESSAGE},
    ]
    advice = "set rollout.environment.observation_template to a text with {observation}"
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise DataError(f"the tokenizer of {name} has no chat template to write an environment's messages with; {advice}")
    try:
        text = ChatTemplate(tokenizer).render(chat)
    except TemplateRefusal as refusal:
        raise DataError(f"the chat template of {name} refuses a message of role {role}: {refusal}; {advice}") from refusal
    if text.count(_ANSWER) != 1 or text.count(_MESSAGE) != 1:
        raise DataError(f"the chat template of {name} changes the text of messages of role {role}; {advice}")
    before, after = text.split(_ANSWER)[1].split(_MESSAGE)
    return before, after
