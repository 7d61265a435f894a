import copy

import pytest

from megarl.data.sources import Row
from megarl.data.template import PromptTemplate, load_tokenizer
from megarl.errors import ConfigError, DataError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def row(prompt="2+2?", answer="4", rejected=None):
    return Row(row_id="train/17", prompt=prompt, answer=answer, rejected=rejected, task="train", reference={"answer": answer})


def test_text_template_is_not_a_format_string(tokenizer):
    prompt = PromptTemplate(tokenizer, "{x} {{Q}}: {prompt}\nA:").encode_prompt(row("{a}"), 100)
    assert prompt.text == "{x} {{Q}}: {a}\nA:"
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert prompt.prompt_id == "train/17"
    assert prompt.reference == {"answer": "4"}


@pytest.mark.parametrize("prompt", ["2+2?", CHAT])
def test_chat_template_gives_the_tokenizers_own_ids(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    encoded = PromptTemplate(tokenizer, "chat").encode_prompt(row(prompt), 100)
    assert list(encoded.token_ids) == expected
    assert encoded.text.endswith("user: 2+2?\nassistant: ")


@pytest.mark.parametrize("template", ["chat", "Q: {prompt} A: "])
def test_example_is_the_prompt_then_answer_suffix_and_eos(tokenizer, template):
    templates = PromptTemplate(tokenizer, template)
    example = templates.encode_example(row(), response_suffix="!\n", max_tokens=100)
    assert example.token_ids[: example.num_prompt_tokens] == templates.encode_prompt(row(), 100).token_ids
    response = example.token_ids[example.num_prompt_tokens :]
    assert tokenizer.decode(response[:-1]) == "4!\n"
    assert response[-1] == tokenizer.eos_token_id


def test_lengths_are_checked_to_the_token(tokenizer):
    templates = PromptTemplate(tokenizer, "{prompt}")
    assert len(templates.encode_prompt(row("12345"), 5).token_ids) == 5
    with pytest.raises(DataError, match=r"prompt train/17 has 6 tokens, above rollout.max_prompt_tokens = 5"):
        templates.encode_prompt(row("123456"), 5)
    assert len(templates.encode_example(row("12345", "67"), "", 8).token_ids) == 8
    with pytest.raises(DataError, match=r"example train/17 has 9 tokens, 5 prompt \+ 4 response, above sft.max_tokens = 8"):
        templates.encode_example(row("12345", "67"), "\n", 8)


def test_what_a_template_cannot_do_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match=r"has no \{prompt\}"):
        PromptTemplate(tokenizer, "question")
    with pytest.raises(DataError, match="list of chat messages"):
        PromptTemplate(tokenizer, "Q: {prompt}").encode_prompt(row(CHAT), 100)
    without_chat = copy.deepcopy(tokenizer)
    without_chat.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template; set data.template"):
        PromptTemplate(without_chat, "chat")
    without_eos = copy.deepcopy(tokenizer)
    without_eos.eos_token = None
    with pytest.raises(DataError, match="has no eos_token"):
        PromptTemplate(without_eos, "{prompt}")
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(DataError, match=r"refuses prompt train/17: .*only users speak"):
        PromptTemplate(strict, "chat").encode_prompt(row(), 100)


def test_unreadable_tokenizer_is_one_line(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load a tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
