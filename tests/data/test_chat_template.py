"""Chat templates: options, files, the clock, what they begin a response with, and what they cannot do."""

import json
from datetime import date

import pytest

from megarl.data.chat_template import ChatSettings, ChatTemplate
from megarl.data.sources import Row
from megarl.data.template import PromptTemplate
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import DataError, MegaRLError
from tokenizer_shapes import CHATML, SHAPES, write_tokenizer

THINKING = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
R1 = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# as Qwen 3 writes it: thoughts of the last turn alone stay
KEEPS_THOUGHTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TAGGED_ROLES = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA_3_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ 'Today: ' + date_string + '\n' }}"
) + CHATML
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def row(prompt="2+2?", answer="4", rejected=None):
    return Row(row_id="train/17", prompt=prompt, answer=answer, rejected=rejected, task="train", reference={"answer": answer})


@pytest.fixture
def with_template(tmp_path):
    def build(template, name="Qwen 3", **settings):
        return load_tokenizer(write_tokenizer(tmp_path / "model", SHAPES[name], chat_template=template, **settings))

    return build


def render(tokenizer, **settings):
    return ChatTemplate(tokenizer, ChatSettings(**settings), "fix it").render(CHAT, "a chat")


@pytest.mark.parametrize(
    ("template", "options"),
    [(THINKING, {"enable_thinking": False}), (LLAMA_3_DATE, {"date_string": "1 Jan 2000"}), (TOOLS, {"tools": [TOOL]})],
)
def test_options_reach_the_template(with_template, template, options):
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False, **options)
    assert render(tokenizer, options=options) == expected != render(tokenizer)
    prompt = PromptTemplate(tokenizer, "chat", ChatSettings(options=options)).encode_prompt(row(CHAT))
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **options)


def test_the_clock_stands_still(with_template):
    tokenizer = with_template(LLAMA_3_DATE)
    assert render(tokenizer).startswith("Today: 26 Jul 2024\n")
    assert render(tokenizer, today=date(2025, 2, 3)).startswith("Today: 03 Feb 2025\n")


def test_a_file_takes_the_place_of_the_tokenizers_template(with_template, tmp_path):
    tokenizer = with_template(None)
    (tmp_path / "own.jinja").write_text("{{ messages[-1]['content'] }} é\n")
    assert render(tokenizer, file=tmp_path / "own.jinja") == "2+2? é"  # transformers leaves the last line break out


def test_a_template_file_counts_more_than_the_config(tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["Qwen 2"], chat_template="config")
    assert load_tokenizer(folder).chat_template == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).chat_template == "file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    tokenizer = load_tokenizer(folder)
    assert render(tokenizer) == "file"
    assert render(tokenizer, options={"tools": [TOOL]}) == "1 tools"


@pytest.mark.parametrize(
    ("template", "options", "prefill"),
    [
        (CHATML, {}, ""),
        (THINKING, {}, ""),
        (THINKING, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (R1, {}, "<think>\n"),
        (KEEPS_THOUGHTS, {}, "<think>\n"),
        (TAGGED_ROLES, {}, ""),
        ("Q: {prompt} A: ", {}, ""),
        ("Q: {prompt} A: <think>", {}, "<think>"),
        ("<b>{prompt}</b> Sure:\n<answer>\n", {}, "<answer>\n"),
        ("<q>{prompt}</q>", {}, ""),
    ],
)
def test_what_begins_the_response_is_found(with_template, template, options, prefill):
    is_chat = "{prompt}" not in template
    tokenizer = with_template(template if is_chat else CHATML)
    arguments = (tokenizer, "chat" if is_chat else template, ChatSettings(options=options))
    prompt = PromptTemplate(*arguments).encode_prompt(row())
    assert prompt.prefill == prefill
    assert prompt.text.endswith(prefill)
    assert PromptTemplate(*arguments, shows_prefill=False).encode_prompt(row()).prefill == ""


@pytest.mark.parametrize("answer", ["<think>\nwhy\n</think>4", "<think>why\n</think>4", "why\n</think>4"])
def test_an_example_does_not_repeat_what_the_prompt_ends_with(with_template, answer):
    tokenizer = with_template(R1)
    example = PromptTemplate(tokenizer, "chat").encode_example(row(answer=answer), "", 1000)
    text = tokenizer.decode(example.token_ids)
    assert text.endswith("assistant\n<think>\nwhy\n</think>4<|im_end|>")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_a_text_begins_with_one_bos_where_the_tokenizer_adds_it(name, add_bos, tmp_path):
    shape = SHAPES[name]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, shape))
    if add_bos and tokenizer.bos_token is None:
        with pytest.raises(DataError, match="has no BOS token"):
            PromptTemplate(tokenizer, "{prompt}", add_bos=True)
        return
    wanted = [shape.bos or tokenizer.bos_token] if (shape.bos if add_bos is None else add_bos) else []
    plain = tokenizer.encode("The answer", add_special_tokens=False)
    prompt = PromptTemplate(tokenizer, "{prompt}", add_bos=add_bos).encode_prompt(row("The answer"))
    assert list(prompt.token_ids) == tokenizer.convert_tokens_to_ids(wanted) + plain
    if wanted:
        written = PromptTemplate(tokenizer, wanted[0] + "{prompt}", add_bos=add_bos).encode_prompt(row("The answer"))
        assert written.token_ids.count(prompt.token_ids[0]) == 1
        tokenizer.chat_template = "{{ bos_token }}" + CHATML
        chat = PromptTemplate(tokenizer, "chat", add_bos=add_bos).encode_prompt(row("The answer"))
        assert chat.token_ids.count(prompt.token_ids[0]) == 1


@pytest.mark.parametrize(
    ("template", "options", "words"),
    [
        ("{% if %}", {}, "is no Jinja template .*Expected an expression"),
        ("{{ foo() }}", {}, "refuses prompt train/17: UndefinedError: 'foo' is undefined"),
        ("{{ raise_exception('no system') }}", {}, "refuses prompt train/17: TemplateError: no system"),
        ("{{ messages[7].content.x }}", {}, "refuses prompt train/17"),
        ("{{ ''.__class__.__mro__ }}", {}, "refuses prompt train/17: SecurityError"),
        ("{# nothing #}", {}, "writes nothing for prompt train/17"),
        ("{{ range(10**4) | random }}", {}, "writes the same chat differently each time"),
        (CHATML, {"enable_thinking": False}, "does not use enable_thinking; it has no options"),
        (THINKING, {"enable_thinkng": False}, "does not use enable_thinkng; its options are enable_thinking"),
        (CHATML, {"messages": []}, "does not use messages"),
        (TOOLS, {"tools": ["add"]}, "tools: is ..add.., not a list of mappings"),
        (TOOLS, {"tools": 7}, "tools: is 7, not a list of mappings"),
        ({"a": CHATML, "b": CHATML}, {}, "has the chat templates a, b and none named default"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_in_one_line(with_template, template, options, words):
    tokenizer = with_template(template)
    with pytest.raises(DataError, match=words) as error:
        PromptTemplate(tokenizer, "chat", ChatSettings(options=options)).encode_prompt(row())
    line = str(error.value)
    assert "\n" not in line
    assert len(line) <= 300


@pytest.mark.parametrize("template", [7, [CHATML], [{"name": "default"}], {"default": None}])
def test_a_template_that_is_no_text_is_refused(with_template, template):
    with pytest.raises(DataError, match=r"tokenizer_config.json: chat_template is neither a text nor a list"):
        with_template(template)


def test_a_template_file_that_is_no_text_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["Qwen 2"])
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(DataError, match=r"chat_template.jinja is not UTF-8"):
        load_tokenizer(folder)


MALFORMED = {
    "tokenizer.json": [
        ("", "is not valid JSON"),
        ("[]", "holds list, not an object"),
        ("{}", "model.vocab is missing"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"model": {"vocab": ' + "9" * 5000 + "}}", "is not valid JSON"),
        (lambda file: file["added_tokens"][0].update(id=3), "id 3; each token needs one id"),
        (lambda file: file["added_tokens"][0].update(id=file["added_tokens"][1]["id"]), "each token needs one id"),
        (lambda file: file["added_tokens"][0].update(id=5000), "has id 5000, which the tokenizers library reads as 300"),
        (lambda file: file["added_tokens"][0].update(id=-1), "is no token with an id"),
        (lambda file: file["added_tokens"][0].update(content=4), "is no token with an id"),
        (lambda file: file.update(added_tokens=7), "added_tokens is no list"),
        (lambda file: file["model"].update(vocab=None), "model.vocab is missing"),
        (lambda file: file["model"].update(merges=[["a", "§§"]]), "is malformed"),
        (lambda file: file.update(pre_tokenizer={"type": "Magic"}), "is malformed"),
    ],
    "tokenizer_config.json": [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "nested more than 64 deep"),
        (lambda file: file.update(eos_token=7), "eos_token is 7, not a text"),
        (lambda file: file.update(eos_token=["</s>"]), "not a text"),
        (lambda file: file.update(eos_token="</s>"), "has no token '</s>', which .* names as eos_token"),
        (lambda file: file.update(bos_token="<s>"), "has no token '<s>', which .* names as bos_token"),
        (lambda file: file.update(added_tokens_decoder=[1]), "added_tokens_decoder is no object"),
        (lambda file: file.update(added_tokens_decoder={"x": "y"}), "has at 'x' no token"),
        (lambda file: file.update(added_tokens_decoder={"310": {"content": "<new>"}}), "tokenizer.json has no such token"),
        (lambda file: file.update(added_tokens_decoder={"310": {"content": "<|im_end|>"}}), "tokenizer.json has it as 302"),
    ],
    "special_tokens_map.json": [("7", "holds int, not an object"), ('{"eos_token": {"content": 3}}', "not a text")],
}


@pytest.mark.parametrize(("name", "change", "words"), [(name, *case) for name, cases in MALFORMED.items() for case in cases])
def test_malformed_files_are_named_in_one_line(name, change, words, tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["Qwen 2"])
    if isinstance(change, str):
        (folder / name).write_text(change)
    else:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(MegaRLError, match=words) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) <= 250
