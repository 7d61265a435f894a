"""The chat template of a tokenizer: its files, its options, and writing a chat with it.

A template is a program. It is rendered in a sandboxed worker, with limits (docs/sandbox.md).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta

from megarl.config.schema import Config, SandboxConfig
from megarl.config.tokenizer_files import TOKENIZER_CONFIG
from megarl.errors import DataError, listed, one_line, quoted, shortened
from megarl.workers.answers import BrokenAnswer, Failure
from megarl.workers.client import CallTimeout, Client

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of named ones, e.g. tool_use.jinja
# what a template writes at the start of a response, at the end of a prompt: <think>, or <think></think> to answer without
_OPENED_TAGS = re.compile(r"<([A-Za-z][\w.-]*)>\s*(?:</\1>\s*)?\Z")
_QUESTION, _ANSWER = {"role": "user", "content": "a question"}, "what the policy said"
_REASON_CHARACTERS = 80
_RENDER_TIMEOUT = 10.0  # seconds for one chat; templates of published models take less than a millisecond
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
        messages: Sequence[Mapping[str, object]],
        today: date,
        options: Mapping[str, object] = MappingProxyType({}),
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
            return str(self._client.ask((template, variables, today.isoformat()), _RENDER_TIMEOUT))
        except CallTimeout:
            raise DataError(f"the {self._name} does not end within {_RENDER_TIMEOUT:g} seconds; {self._advice}") from None
        except BrokenAnswer as broken:
            raise DataError(f"the {self._name} cannot be rendered: {broken}; {self._advice}") from None
        except Failure as failure:
            if str(failure).startswith("MemoryError"):
                memory = f"{_SANDBOX.memory_gib:g} GiB of memory"
                raise DataError(f"the {self._name} wants more than {memory}; {self._advice}") from None
            raise TemplateRefusal(str(failure)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How a run uses the chat template.

    Attributes:
        file: with another template than the tokenizer's.
        options: variables of the template, e.g. ``enable_thinking``.
        today: what the template takes for the current date.
    """

    file: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    today: date = date(2024, 7, 26)


def chat_settings(config: Config) -> ChatSettings:
    """Return what ``config.data`` says of the chat template."""
    data = config.data
    return ChatSettings(
        file=data.chat_template, options=data.chat_template_options, today=date.fromisoformat(data.chat_template_date)
    )


class ChatTemplate:
    """Writes chats as text.

    Args:
        tokenizer: of the model, whose template it is unless ``settings`` name another.
        settings: of the run.
        advice: what to do where there is no template, or one that cannot be used.

    Raises:
        DataError: there is no template, it is no Jinja, it does not know an option, or it writes the same chat in different ways.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ChatSettings, advice: str) -> None:
        self._settings = settings
        self._advice = advice
        if settings.file is not None:
            self.name = f"chat template {settings.file}"
            self._text = read_template_file(settings.file)
        else:
            self.name = f"chat template of {tokenizer.name_or_path}"
            self._text = _chosen(tokenizer, settings.options, advice)
        self._renderer = ChatRenderer(tokenizer, self.name, advice)
        self._check_options()
        self._check_repeatable()
        self.prefill = self._find_prefill()

    def render(self, messages: Sequence[Mapping[str, object]], what: str, *, add_generation_prompt: bool = True) -> str:
        """Return a chat as text, with the beginning of the assistant's next turn unless that is not wanted.

        Args:
            messages: of the chat.
            what: is written, for messages of errors.
            add_generation_prompt: write that beginning.

        Raises:
            TemplateRefusal: the template refuses the chat or writes nothing.
            DataError: it does not end in time, or gives too much.
        """
        settings = self._settings
        try:
            text = self._renderer.render(
                self._text, messages, settings.today, settings.options, add_generation_prompt=add_generation_prompt
            )
        except TemplateRefusal as refusal:  # e.g. for a role that it does not know
            reason = shortened(str(refusal), _REASON_CHARACTERS)
            raise TemplateRefusal(f"the {self.name} refuses {what}: {reason}; {self._advice}") from refusal
        if not text:
            raise TemplateRefusal(f"the {self.name} writes nothing for {what}; {self._advice}")
        return text

    def _check_options(self) -> None:
        environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _GenerationTag])  # what transformers reads
        try:
            known = jinja2.meta.find_undeclared_variables(environment.parse(self._text))
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"the {self.name} is no Jinja template ({_reason(error)}); {self._advice}") from None
        own = {"messages", "add_generation_prompt", "strftime_now", "raise_exception"}
        if unknown := [name for name in self._settings.options if name not in known - own]:
            options = f"its options are {listed(sorted(known - own))}" if known - own else "it has no options"
            raise DataError(f"data.chat_template_options: the {self.name} does not use {listed(unknown)}; {options}")
        for name in ("tools", "documents"):  # of which transformers knows what they are
            items = self._settings.options.get(name) or []
            if not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
                raise DataError(
                    f"data.chat_template_options.{name}: is {quoted(items)}, not a list of mappings; give one for each, e.g. "
                    "{name: add, description: ...}"
                )

    def _check_repeatable(self) -> None:
        try:
            texts = {self.render([_QUESTION], "a question") for _ in range(3)}
        except TemplateRefusal:  # it may want other messages than this one
            return
        if len(texts) > 1:
            raise DataError(f"the {self.name} writes the same chat differently each time; {self._advice}")

    def _find_prefill(self) -> str:
        """Find what is written at the start of a response: what a next turn's beginning has beyond one taken before."""
        said = {"role": "assistant", "content": _ANSWER}
        try:
            asked = self.render([_QUESTION], "a question", add_generation_prompt=False)
            begun = self.render([_QUESTION], "a question")
        except TemplateRefusal:
            return ""
        beginning = begun.removeprefix(asked) if begun.startswith(asked) else ""
        try:
            whole = self.render([_QUESTION, said, _QUESTION], "a chat", add_generation_prompt=False)
        except TemplateRefusal:
            return opened_tags(beginning)
        header = whole.removeprefix(asked).partition(_ANSWER)[0]
        if whole.startswith(asked) and _ANSWER in whole and beginning.startswith(header):
            prefill = beginning.removeprefix(header)
            return prefill if prefill.strip() else ""
        return opened_tags(beginning)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, with which a template marks what the assistant said."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it on the instance)

    def parse(self, parser: Any) -> Any:
        """Return the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def opened_tags(text: str) -> str:
    """Return the opening tag that a text ends with, the empty pair of tags, or nothing."""
    found = _OPENED_TAGS.search(text)
    return "" if found is None else found.group()


def _chosen(tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, object], advice: str) -> str:
    """Return the tokenizer's template; of several the one for tools where some are given, else the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        name = "tool_use" if options.get("tools") and "tool_use" in templates else "default"
        if name not in templates:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} has the chat templates {listed(sorted(templates))} and none named "
                f"default; {advice}"
            )
        return str(templates[name])
    if not templates:
        raise DataError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; {advice}")
    return str(templates)


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template of a tokenizer folder, templates by name where it has several, or None.

    Files of their own count more than what ``settings``, the folder's tokenizer_config.json, says, as in transformers.

    Raises:
        DataError: a template is no text or cannot be read.
    """
    files = {"default": folder / CHAT_TEMPLATE} if (folder / CHAT_TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if files:
        return _one_or_several({name: read_template_file(file) for name, file in files.items()})
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    texts = [*template, *template.values()] if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is neither a text nor a list of texts with names; correct it, or give the "
            f"folder a {CHAT_TEMPLATE}"
        )
    return _one_or_several(template) if isinstance(template, dict) else template


def read_template_file(file: Path) -> str:
    """Return the text of a template file; DataError where it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"chat template {file} cannot be read ({error.strerror}); give another file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"chat template {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _one_or_several(templates: dict[str, str]) -> str | dict[str, str]:
    return templates["default"] if list(templates) == ["default"] else templates


def _reason(error: BaseException) -> str:
    return one_line(error)[:_REASON_CHARACTERS]
