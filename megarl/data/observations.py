"""How an environment's message is written for the model, between two turns of the policy."""

from typing import TYPE_CHECKING

from megarl.builtin.environments import BaseEnvironment
from megarl.data.chat_template import ChatSettings, ChatTemplate, opened_tags
from megarl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "{observation}"
_ADVICE = "set rollout.environment.observation_template to a text with {observation}"
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

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: BaseEnvironment, chat: ChatSettings | None = None) -> None:
        """``config.observation_template``, or the chat template, used as ``chat`` says, when it is not given.

        Attributes:
            prefill: end of what follows a message that is the beginning of the policy's next turn, e.g. ``"<think>\\n"``.

        Raises:
            DataError: the chat template cannot be followed.
        """
        self._tokenizer = tokenizer
        text = config.observation_template
        if text is None:
            if not tokenizer.chat_template and (chat is None or chat.file is None):
                name = tokenizer.name_or_path
                raise DataError(f"the tokenizer of {name} has no chat template to write an environment's messages with; {_ADVICE}")
            template = ChatTemplate(tokenizer, chat or ChatSettings(), _ADVICE)
            before, after = _around(template, config.role)
            self.prefill = template.prefill if after.endswith(template.prefill) else ""
        else:
            before, after = text.split(_PLACEHOLDER)
            self.prefill = opened_tags(after)
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


def _around(template: ChatTemplate, role: str) -> tuple[str, str]:
    """What the chat template puts before and after a message that follows an answer."""
    chat = [
        {"role": "user", "content": "a question"},
        {"role": "assistant", "content": _ANSWER},
        {"role": role, "content": _MESSAGE},
    ]
    text = template.render(chat, f"a message of role {role}")
    if text.count(_ANSWER) != 1 or text.count(_MESSAGE) != 1:
        raise DataError(f"the {template.name} changes the text of messages of role {role}; {_ADVICE}")
    before, after = text.split(_ANSWER)[1].split(_MESSAGE)
    return before, after
