"""The chat template of a model's folder, which is a program: rendered in a sandboxed worker, with limits (docs/sandbox.md)."""

from collections.abc import Mapping, Sequence
from datetime import date
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megarl.config.schema import SandboxConfig
from megarl.errors import DataError
from megarl.workers.answers import BrokenAnswer, Failure
from megarl.workers.client import CallTimeout, Client

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TIMEOUT = 10.0  # seconds for one chat; templates of published models take less than a millisecond
_SANDBOX = SandboxConfig(memory_gib=1.0, processes=0)


class TemplateRefusal(DataError):
    """The template raised, e.g. for a role that it does not know."""


class ChatRenderer:
    """Renders chats as the tokenizer's ``apply_chat_template`` would."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str, advice: str) -> None:
        """Prepare for one tokenizer; ``name`` and ``advice`` are the template's in error messages."""
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._name = name
        self._advice = advice
        self._client = Client("megarl.data.template_worker:build_renderer", None, _SANDBOX)

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        today: date,
        options: Mapping[str, Any] = MappingProxyType({}),
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the chat's text.

        Args:
            template: its Jinja text.
            messages: at least one.
            today: what ``strftime_now`` takes for the current date.
            options: more variables of the template.
            add_generation_prompt: end with the beginning of the model's next turn.

        Raises:
            TemplateRefusal: it raised; the message is the reason.
            DataError: it does not end in time, wants too much memory or gives too long a text.
        """
        chat = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        variables = {"tools": None, "documents": None, **self._special_tokens, **options, **chat}
        try:
            return str(self._client.ask((template, variables, today.isoformat()), _TIMEOUT))
        except CallTimeout:
            raise DataError(f"the {self._name} does not end within {_TIMEOUT:g} seconds; {self._advice}") from None
        except BrokenAnswer as broken:
            raise DataError(f"the {self._name} cannot be rendered: {broken}; {self._advice}") from None
        except Failure as failure:
            if str(failure).startswith("MemoryError"):
                memory = f"{_SANDBOX.memory_gib:g} GiB of memory"
                raise DataError(f"the {self._name} wants more than {memory}; {self._advice}") from None
            raise TemplateRefusal(str(failure)) from None
