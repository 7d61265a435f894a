import json

import pytest

from megarl.data.sampler import RowSampler, build_evaluation_prompts, build_prompt_source, build_sft_source
from megarl.errors import CheckpointError, DataError


def gym(size, seed=0):
    return {"type": "reasoning_gym", "task": "chain_sum", "size": size, "seed": seed}


def jsonl(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return {"type": "jsonl", "path": str(path)}


def test_each_epoch_is_another_permutation():
    sampler = RowSampler(50, seed=1, shuffle=True)
    epochs = [sampler.next(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    assert RowSampler(50, seed=2, shuffle=True).next(50) != epochs[0]


def test_order_is_frozen():
    # A changed order would break the resumption of runs saved before the change.
    assert RowSampler(8, seed=0, shuffle=True).next(12) == [6, 3, 5, 0, 7, 2, 1, 4, 3, 1, 0, 4]


def test_without_shuffling_rows_come_in_order_across_epochs():
    assert RowSampler(3, seed=0, shuffle=False).next(8) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
def test_resumed_order_equals_uninterrupted(taken):
    sampler = RowSampler(7, seed=3, shuffle=True)
    sampler.next(taken)
    state = json.loads(json.dumps(sampler.state()))
    resumed = RowSampler(7, seed=3, shuffle=True)
    resumed.next(5)
    resumed.restore(state)
    assert resumed.next(15) == sampler.next(15)


def test_restoring_for_other_data_is_an_error():
    state = RowSampler(7, seed=3, shuffle=True).state()
    with pytest.raises(CheckpointError, match=r"num_rows = 7 for data.train but this run has 8"):
        RowSampler(8, seed=3, shuffle=True).restore(state)
    with pytest.raises(CheckpointError, match="seed = 3"):
        RowSampler(7, seed=4, shuffle=True).restore(state)
    with pytest.raises(CheckpointError, match="lacks epoch"):
        RowSampler(7, seed=3, shuffle=True).restore({name: value for name, value in state.items() if name != "epoch"})


def test_prompt_source_resumes(config, tokenizer):
    settings = config(gym(9))
    source = build_prompt_source(settings, tokenizer)
    source.take(4)
    resumed = build_prompt_source(settings, tokenizer)
    resumed.restore(source.state())
    expected = source.take(10)
    assert resumed.take(10) == expected
    assert len({prompt.prompt_id for prompt in expected}) > 5


def test_excluded_prompts_are_never_sampled_and_ids_name_the_sources_rows(config, tokenizer, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", "abcde")
    excluded = jsonl(tmp_path / "held_out.jsonl", "bdx")
    source = build_prompt_source(config(train, data={"exclude": [excluded]}), tokenizer)
    assert {(prompt.prompt_id, prompt.text) for prompt in source.take(3)} == {
        ("train/0", "Q: a A: "),
        ("train/2", "Q: c A: "),
        ("train/4", "Q: e A: "),
    }
    with pytest.raises(DataError, match=r"data.exclude leaves none of the 5 rows"):
        build_prompt_source(config(train, data={"exclude": [train]}), tokenizer)


def test_too_long_rows_are_found_before_training(config, tokenizer, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", ["a"] * 50 + ["a" * 30])
    with pytest.raises(DataError, match=r"prompt train/50 has 37 tokens"):
        build_prompt_source(config(train, rollout={"max_prompt_tokens": 36}), tokenizer)
    with pytest.raises(DataError, match=r"example train/50 has 39 tokens"):
        build_sft_source(config(train, sft={"max_tokens": 38}), tokenizer)
    assert len(build_sft_source(config(train, sft={"max_tokens": 39}), tokenizer).take(51)) == 51


def test_evaluation_prompts_come_in_order_or_not_at_all(config, tokenizer):
    prompts = build_evaluation_prompts(config(gym(3), evaluation={"data": gym(4, seed=9)}), tokenizer)
    assert [prompt.prompt_id for prompt in prompts] == [f"evaluation/{i}" for i in range(4)]
    assert build_evaluation_prompts(config(gym(3)), tokenizer) == []
