"""Tokenizers of model folders against the tokenizers library on their tokenizer.json."""

import pytest
from tokenizers import Tokenizer

from megarl.data.tokenizer import load_tokenizer
from tokenizer_shapes import SHAPES, write_tokenizer

TEXTS = [
    "Be short:\n  2 + 2 = é?",
    "The answer is 42.",
    " leading, trailing ",
    "\n\n\tx  y\r\n z 123456 3.14",
    "isn't IT'S , . !",
    "中文 and 한국어 🙂 e\u0301",
    "<think>\nwhy?\n</think>\n\n<answer>4</answer>",
    "",
]


@pytest.mark.parametrize("name", SHAPES)
def test_encodes_and_decodes_as_tokenizer_json_does(name, tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES[name])
    loaded, right = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = [token.content for token in right.get_added_tokens_decoder().values()]
    for text in [*TEXTS, *added, *(f"a{token} b {token}\nc" for token in added)]:
        for with_special in (False, True):
            expected = right.encode(text, add_special_tokens=with_special).ids
            assert loaded.encode(text, add_special_tokens=with_special) == expected, text
            for skips in (False, True):
                assert loaded.decode(expected, skip_special_tokens=skips) == right.decode(expected, skip_special_tokens=skips)
    assert len(loaded) == right.get_vocab_size(with_added_tokens=True)
    assert loaded.eos_token_id is not None and right.id_to_token(loaded.eos_token_id) == loaded.eos_token
