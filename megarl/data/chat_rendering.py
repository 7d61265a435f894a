"""The chat template of a model's folder, which is a program: rendered in a sandboxed worker, with limits (docs/sandbox.md)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megarl.config.schema import SandboxConfig
from megarl.errors import DataError
from megarl.workers.answers import BrokenAnswer, Failure
from megarl.workers.client import CallTimeout, Client

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TIMEOUT = 10.0  # seconds for one chat; templates of published models take less than a millisecond
_SANDBOX = SandboxConfig(memory_gib=1.0, processes=0)


class TemplateRefusal(Exception):
    """The template raised, e.g. for a role that it does not know; the message is the reason."""


class ChatTemplate:
    """Renders chats as the tokenizer's ``apply_chat_template`` would."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """``tokenizer`` has a chat template."""
        self._tokenizer = tokenizer
        self._client = Client("megarl.data.template_worker:build_renderer", None, _SANDBOX)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The chat's text up to where the model's next turn begins.

        Args:
            messages: at least one.
            options: more variables of the template.

        Raises:
            TemplateRefusal: it raised.
            DataError: it does not end in time, wants too much memory or gives too long a text.
        """
        tokenizer = self._tokenizer
        tools, documents = options.pop("tools", None), options.pop("documents", None)
        variables = {
            **tokenizer.special_tokens_map,
            **options,
            "messages": list(messages),
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": True,
        }
        advice = "correct it or set data.template to a text with {prompt}"
        try:
            return str(self._client.ask((tokenizer.get_chat_template(tools=tools), variables), _TIMEOUT))
        except CallTimeout:
            raise DataError(
                f"the chat template of {tokenizer.name_or_path} does not end within {_TIMEOUT:g} seconds; {advice}"
            ) from None
        except BrokenAnswer as broken:
            raise DataError(f"the chat template of {tokenizer.name_or_path} cannot be rendered: {broken}; {advice}") from None
        except Failure as failure:
            if str(failure).startswith("MemoryError"):
                raise DataError(
                    f"the chat template of {tokenizer.name_or_path} wants more than {_SANDBOX.memory_gib:g} GiB of memory; {advice}"
                ) from None
            raise TemplateRefusal(str(failure)) from None
