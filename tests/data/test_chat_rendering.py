"""Chat templates in their worker: the text that transformers gives, and an end to those that have none."""

import os
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.data import chat_template
from megarl.data.chat_template import ChatRenderer, TemplateRefusal
from megarl.errors import DataError

pytestmark = pytest.mark.timeout(60)

CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": 'What is <2 & "2">, é?\ud800'},
    {"role": "assistant", "content": "4", "reasoning": {"steps": [1, 2.5, None, True]}},
    {"role": "user", "content": ["a", {"type": "text", "text": "b"}]},
]
TEMPLATES = {
    "loops and white space": """
        {%- for message in messages %}
            {%- if loop.first and message.role == 'system' %}
<<{{ message['content'] | trim }}>>
                {%- continue %}
            {%- endif %}
    {{ '<|' + message.role + '|>' }}{{ message.content }}
    {% if loop.index > 2 %}{% break %}{% endif %}
        {%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
""",
    "JSON": "{{ messages | tojson }}{{ messages[2] | tojson(indent=2) }}{{ tools | tojson }}{{ documents }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unknown }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}\n{% endgeneration %}{% endfor %}{{ x }}",
    "namespace and macro": (
        "{%- macro write(m) -%}[{{ m.role }}]{%- endmacro -%}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ write(m) }}{{ ns.n }}{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y-%m-%d') }} {{ date_string | default('none') }} {{ enable_thinking is defined }}",
}
TODAY = date(2024, 7, 26)
OPTIONS: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "f<"}}], "enable_thinking": False}


def renderer(tokenizer: Any) -> ChatRenderer:
    return ChatRenderer(tokenizer, "chat template", "correct it")


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, options: dict[str, Any], tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(
        CHAT, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False, strftime_now=TODAY.strftime, **options
    )
    assert renderer(tokenizer).render(TEMPLATES[name], CHAT, TODAY, options) == expected


ENDLESS = {
    "loops": "".join("{% for i in range(99999) %}" for _ in range(3)) + "{% endfor %}" * 3,
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursion without output": "{% macro f(n) %}{% for i in range(99999) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "9 * 10^8 characters": "{{ 'x' * (9 * 10 ** 8) }}",
    "10^9 characters": "{{ 'x' * 10 ** 9 }}",
    "10^12 characters": "{{ 'x' * 10 ** 12 }}",
    "10^8 characters": "{{ 'x' * 10 ** 8 }}",
    "many pieces": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'xxxxxxxx' }}{% endfor %}{% endfor %}",
    "a list that grows": "{% set l = [0] %}{% for a in range(99) %}{% set ns = namespace(l=l * 99999 * 99999) %}{% endfor %}",
    "format": "{{ '%99999999999d' % 1 }}",
    "deep": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_refused_in_one_line(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_RENDER_TIMEOUT", 2.0)
    template = renderer(tokenizer)
    with pytest.raises(DataError) as error:
        template.render(ENDLESS[name], CHAT, TODAY)
    assert len(str(error.value)) <= 300 and str(error.value).isprintable()
    assert template.render("fine", CHAT, TODAY) == "fine"


HOSTILE = (
    "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ tojson.__globals__ }}",
    "{{ 1 / 0 }}",
    "{% unknown %}",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_template_may_not_do_is_a_refusal(text: str, tokenizer: Any, tmp_path: Path) -> None:
    try:
        assert renderer(tokenizer).render(text.replace("FILE", f"{tmp_path}/fired"), CHAT, TODAY) == ""  # undefined, so nothing
    except TemplateRefusal as refusal:
        assert str(refusal).isprintable()
    assert not (tmp_path / "fired").exists()


def test_a_killed_worker_and_a_fork_cost_nothing(tokenizer: Any) -> None:
    others = psutil.Process().children()
    template, text = renderer(tokenizer), "{{ messages[0].content }}"
    assert template.render(text, [{"content": "one"}], TODAY) == "one"
    workers = [child for child in psutil.Process().children() if child not in others]
    assert workers
    for process in workers:
        process.kill()
    assert template.render(text, [{"content": "two"}], TODAY) == "two"
    fork = os.fork()
    if fork == 0:
        os._exit(0 if template.render(text, [{"content": "child"}], TODAY) == "child" else 1)
    assert os.waitpid(fork, 0)[1] == 0
    assert template.render(text, [{"content": "three"}], TODAY) == "three"
    del template
    mine = [child for child in psutil.Process().children() if child not in others]
    assert not [child for child in mine if child.status() != psutil.STATUS_ZOMBIE]
