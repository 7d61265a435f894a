import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(
    "text", ["".join(map(chr, range(32, 127))) + "\n", "  two  spaces , it's n't .\n\n\tx ", "1 + 22 = 23", "naïve 数学 🙂"]
)
def test_every_text_round_trips_and_ascii_is_one_token_a_character(tokenizer, text):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(token_ids) == len(text.encode())
    assert tokenizer.decode([*token_ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_model_loads_and_depends_on_the_seed_only(make_model, tmp_path):
    size = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 48}
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(tmp_path / name, seed=seed, **size)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    token_ids = torch.arange(2, 20)[None]
    first, same, other = (model(token_ids).logits for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert models[0].config.vocab_size == first.shape[-1] == 258


def test_default_size_is_one_to_three_million(make_model, tmp_path):
    assert 1e6 < make_model(tmp_path) < 3e6
