"""Write rows and environments' messages for the model: prompts, supervised examples, what stands between two turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megarl.builtin.environments import BaseEnvironment
from megarl.config.schema import Config
from megarl.data.chat_template import ChatSettings, ChatTemplate, chat_settings, opened_tags
from megarl.data.sources import Row
from megarl.data.tokenizer import bos_prefix
from megarl.data.tokenizer import load_tokenizer as load_tokenizer
from megarl.errors import ConfigError, DataError
from megarl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PLACEHOLDER = "{prompt}"
_OBSERVATION = "{observation}"
_SHOWN_CHARACTERS = 80
_ADVICE = "set rollout.environment.observation_template to a text with {observation}"
_ANSWER = "what the policy said"
_MESSAGE = 'what the\nenvironment "said"'  # a template that changes it, e.g. to JSON, cannot be followed token by token


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTExample:
    """One supervised example.

    Attributes:
        row_id: the row it was made from.
        token_ids: prompt, answer, response suffix and end-of-sequence token.
        num_prompt_tokens: how many of them are the prompt, which is not trained on; at least 1.
    """

    row_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two responses to one prompt, of which the chosen one is preferred."""

    chosen: SFTExample
    rejected: SFTExample


def prompt_template(config: Config, tokenizer: "PreTrainedTokenizerBase") -> "PromptTemplate":
    """Return the template of a run; raises like ``PromptTemplate``."""
    return PromptTemplate(
        tokenizer,
        config.data.template,
        chat_settings(config),
        add_bos=config.data.add_bos,
        shows_prefill=config.rollout.show_prefill,
    )


class PromptTemplate:
    """Turns rows into tokens, the same for RL, SFT and evaluation.

    The prompt and the response are always tokenised apart: a policy that samples after the prompt's tokens never sees the
    merges that a tokenizer would make across their border, so supervised examples must not have them either.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        chat: ChatSettings | None = None,
        *,
        add_bos: bool | None = None,
        shows_prefill: bool = True,
    ) -> None:
        """Prepare for one tokenizer.

        Args:
            tokenizer: of the model.
            template: 'chat' or a text with {prompt}.
            chat: of the chat template; as the tokenizer has it when not given.
            add_bos: as in ``data.add_bos``.
            shows_prefill: prompts say what of them is the beginning of the response.

        Raises:
            ConfigError: the text has no {prompt}.
            DataError: the tokenizer lacks a chat template, an end-of-sequence or a BOS token that is needed.
        """
        if template != "chat" and _PLACEHOLDER not in template:
            raise ConfigError(f"data.template {template!r} has no {_PLACEHOLDER}; write 'chat' or a text with {_PLACEHOLDER} in it")
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has no eos_token, so no response would end; name one in its "
                "tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._chat: ChatTemplate | None = None
        if template == "chat":
            advice = "set data.template to a text with {prompt}, or data.chat_template to a file"
            self._chat = ChatTemplate(tokenizer, chat or ChatSettings(), advice)
            self._prefill = self._chat.prefill
        else:
            self._prefill = opened_tags(template.rpartition(_PLACEHOLDER)[2])
        self._shows_prefill = shows_prefill
        # a chat template writes a BOS token where its chats have one
        adds_bos = add_bos if self._chat is None else bool(add_bos)
        self._bos = bos_prefix(tokenizer, adds_bos)

    def encode_prompt(self, row: Row, max_prompt_tokens: int | None = None) -> Prompt:
        """Encode the prompt as the model reads it.

        Raises:
            DataError: it is longer than ``max_prompt_tokens``, or cannot be written with this template.
        """
        text = self._render(row)
        token_ids = self._prompt_tokens(row, text)
        if max_prompt_tokens is not None and len(token_ids) > max_prompt_tokens:
            raise DataError(
                f"prompt {row.row_id} has {len(token_ids)} tokens, above rollout.max_prompt_tokens = {max_prompt_tokens}; "
                "raise the limit or leave the row out"
            )
        return Prompt(
            prompt_id=row.row_id,
            token_ids=token_ids,
            text=text,
            reference=row.reference,
            task=row.task,
            prefill=self._prefill if self._shows_prefill else "",
        )

    def encode_example(self, row: Row, response_suffix: str, max_tokens: int) -> SFTExample:
        """Encode the prompt with the row's answer, ``response_suffix`` and the end-of-sequence token as its response.

        Raises:
            DataError: it is longer than ``max_tokens``, or cannot be written with this template.
        """
        example = self._example(row, row.answer + response_suffix)
        _check_length(example, f"example {row.row_id}", max_tokens, "sft.max_tokens")
        return example

    def encode_pair(self, row: Row, response_suffix: str, max_tokens: int) -> PreferencePair:
        """Encode the prompt with the chosen response (the row's answer) and with the rejected one, each as ``encode_example`` does.

        Raises:
            DataError: one is longer than ``max_tokens``, or cannot be written with this template.
        """
        assert row.rejected is not None
        pair = PreferencePair(
            chosen=self._example(row, row.answer + response_suffix), rejected=self._example(row, row.rejected + response_suffix)
        )
        _check_length(pair.chosen, f"the chosen response of row {row.row_id}", max_tokens, "preference.max_tokens")
        _check_length(pair.rejected, f"the rejected response of row {row.row_id}", max_tokens, "preference.max_tokens")
        return pair

    def _example(self, row: Row, text: str) -> SFTExample:
        prompt = self._prompt_tokens(row, self._render(row))
        response = (*self._encode(self._without_prefill(text)), self._tokenizer.eos_token_id)
        return SFTExample(row_id=row.row_id, token_ids=prompt + response, num_prompt_tokens=len(prompt))

    def _without_prefill(self, text: str) -> str:
        """Return a given response without its beginning where the prompt ends with that already."""
        beginning = self._prefill.strip()
        if text.startswith(self._prefill) or not beginning:
            return text.removeprefix(self._prefill)
        return text.lstrip().removeprefix(beginning) if text.lstrip().startswith(beginning) else text

    def _render(self, row: Row) -> str:
        if self._chat is None:
            if not isinstance(row.prompt, str):
                raise DataError(f"prompt {row.row_id} is a list of chat messages; set data.template to 'chat' or give a string")
            return self._template.replace(_PLACEHOLDER, row.prompt)
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        return self._chat.render(messages, f"prompt {row.row_id}")

    def _prompt_tokens(self, row: Row, text: str) -> tuple[int, ...]:
        token_ids = self._encode(text)
        if not token_ids:
            raise DataError(
                f"prompt {row.row_id} has no tokens: the tokenizer knows none of {text[:_SHOWN_CHARACTERS]!r}; change the prompt "
                "or the template"
            )
        return token_ids if token_ids[: len(self._bos)] == self._bos else self._bos + token_ids

    def _encode(self, text: str) -> tuple[int, ...]:
        token_ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(token_ids)


def _check_length(example: SFTExample, words: str, max_tokens: int, limit: str) -> None:
    num_tokens, num_prompt = len(example.token_ids), example.num_prompt_tokens
    if num_tokens > max_tokens:
        raise DataError(
            f"{words} has {num_tokens} tokens, {num_prompt} prompt + {num_tokens - num_prompt} response, above "
            f"{limit} = {max_tokens}; raise the limit or leave the row out"
        )


class ObservationTemplate:
    """Turns an environment's message into the tokens that follow a turn of the policy.

    What is put around the message is tokenised once, the message alone, and nothing ever again: the tokens of the turns before
    stay what the policy sampled. With the tokenizer's chat template the parts around are found by difference: a chat of a
    question, an answer and a message is rendered, and what stands between answer and message, and behind the message up to the
    policy's next turn, is what is put around. Where the first token of the former is the stop token that the policy has just
    sampled, it is not repeated.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: BaseEnvironment, chat: ChatSettings | None = None) -> None:
        """Use ``config.observation_template``, or the chat template, as ``chat`` says, when it is not given.

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
            before, after = text.split(_OBSERVATION)
            self.prefill = opened_tags(after)
        self._before, self._after = self._encode(before), self._encode(after)
        self._closes_turn = text is None

    def encode(self, observation: str, last_token: int | None) -> tuple[int, ...]:
        """Encode the message after a turn that ended with ``last_token``, or after the prompt (None).

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
    """Return what the chat template puts before and after a message that follows an answer."""
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
