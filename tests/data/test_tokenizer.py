"""Tokenizers of model folders against the tokenizers library on their tokenizer.json."""

import json

import pytest
from tokenizers import Tokenizer

from megarl.config.schema import Config
from megarl.config.tokenizer_files import check_vocabulary
from megarl.data.tokenizer import find_end_tokens, load_tokenizer, response_decoder
from megarl.errors import DataError, MegaRLError
from megarl.weights.export import copy_side_files
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


def test_an_export_has_the_runs_tokenizer_and_the_models_config(tmp_path):
    model = write_tokenizer(tmp_path / "model", SHAPES["Qwen 2"], chat_template="the model's")
    (model / "added_tokens.json").write_text("{}")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", SHAPES["Llama 3"])
    (tokenizer / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "out").mkdir()
    copy_side_files(model, tokenizer, tmp_path / "out")
    exported = load_tokenizer(tmp_path / "out")
    assert exported.encode(TEXTS[0]) == Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(TEXTS[0]).ids
    assert exported.chat_template is None
    assert (tmp_path / "out" / "config.json").read_text() == (model / "config.json").read_text()
    assert not (tmp_path / "out" / "added_tokens.json").exists()


@pytest.mark.parametrize(
    ("generation", "of_model"),
    [({}, [302]), ({"eos_token_id": 300}, [300, 302]), ({"eos_token_id": [302, 300, 7]}, [7, 300, 302])],
)
def test_every_end_token_stops_a_response_and_none_is_shown(generation, of_model, tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["Qwen 3"])
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(folder)
    rollout = {"stop_token_ids": [304]}
    data = {"train": {"type": "jsonl", "path": "rows.jsonl"}}
    config = Config.model_validate({"kind": "rl", "steps": 1, "model": {"path": str(folder)}, "data": data, "rollout": rollout})
    ends = find_end_tokens(config, tokenizer)
    assert list(ends.of_model) == of_model
    assert set(ends.stopping) == {*of_model, 304}
    assert len(ends.notices) == (7 in of_model)
    text = "<think>\nwhy\n</think>\n\n4 <|im_start|>"
    decode = response_decoder(config, tokenizer, ends)
    assert decode([*tokenizer.encode(text), *(one for one in of_model if one != 7)]) == text
    skipping = config.model_copy(update={"rollout": config.rollout.model_copy(update={"show_special_tokens": False})})
    assert response_decoder(skipping, tokenizer, ends)(tokenizer.encode(text)) == "<think>\nwhy\n</think>\n\n4 "


@pytest.mark.parametrize("value", ["x", [1, "x"], True, -1, {}, 5000])
def test_end_tokens_that_are_none_are_refused(value, tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["Qwen 3"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    data = {"train": {"type": "jsonl", "path": "rows.jsonl"}}
    config = Config.model_validate({"kind": "rl", "steps": 1, "model": {"path": str(folder)}, "data": data})
    with pytest.raises(MegaRLError, match=r"generation_config.json: eos_token_id .* correct it"):
        find_end_tokens(config, load_tokenizer(folder))


def test_tokens_beyond_the_embedding_are_named(tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["Qwen 3"])
    assert list(check_vocabulary(folder, 306)) == []
    (line,) = check_vocabulary(folder, 304)
    assert "vocab_size" in line and "'</think>' = 304" in line
    pads = write_tokenizer(tmp_path, SHAPES["Qwen 3"], pad_token="<tool_call>")
    assert list(check_vocabulary(pads, 305)) == []  # it is never read


def test_a_folder_without_tokenizer_json_is_converted_or_refused(tmp_path):
    folder = write_tokenizer(tmp_path, SHAPES["GPT 2"])
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    right = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json, nor tokenizer\.model, nor vocab\.json"):
        load_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 300}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    names = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    loaded = load_tokenizer(folder)
    for text in TEXTS:
        assert loaded.encode(text, add_special_tokens=False) == right.encode(text).ids
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(DataError, match="does not encode"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(folder)
