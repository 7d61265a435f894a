"""What a worker process of chat templates answers. It is started for every run, so it stays light: jinja2, but no transformers.

The environment of a template is that of transformers' ``apply_chat_template`` (``utils/chat_template_utils.py`` of version 5).
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 2**24  # of one rendered chat; a longer one has more tokens than any model reads


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model says; the text is the same."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the statements between the tags; as transformers has them, in a scope of their own."""
        line = next(parser.stream).lineno
        return [jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)]


def build_renderer(argument: None) -> Callable[[tuple[str, Mapping[str, Any], str]], str]:
    """Return the function that answers requests ``(template, variables, today's date)`` with the text."""

    def render(request: tuple[str, Mapping[str, object], str]) -> str:
        template, variables, today = request
        # the clock of templates stands still: a resumed run must read the prompts that the interrupted one read
        text = _compiled(template).render(strftime_now=datetime.fromisoformat(today).strftime, **variables)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it gives {len(text)} characters, above {MAX_CHARACTERS}")
        return text

    return render


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
