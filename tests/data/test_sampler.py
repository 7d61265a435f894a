import json

import pytest

from groups import answered
from megarl.data.sampler import build_evaluation_prompts, build_prompt_source, build_sft_source
from megarl.errors import CheckpointError, DataError


def gym(size, seed=0):
    return {"type": "reasoning_gym", "task": "chain_sum", "size": size, "seed": seed}


def jsonl(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return {"type": "jsonl", "path": str(path)}


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


def mixture(*tasks):
    return {"type": "mixture", "tasks": [{"name": name, **settings} for name, settings in tasks]}


def test_a_mixture_names_its_tasks_and_resumes_with_what_is_known_of_its_prompts(config, tokenizer, tmp_path):
    data = mixture(("sums", {"weight": 3, "source": gym(9)}), ("letters", {"source": jsonl(tmp_path / "letters.jsonl", "abcdefg")}))
    settings = config(data, data={"sampling": {"order": "prioritised"}})
    source = build_prompt_source(settings, tokenizer)
    first = source.take(24)
    assert {(prompt.task, prompt.prompt_id.rpartition("/")[0]) for prompt in first} == {("sums", "sums"), ("letters", "letters")}
    assert {prompt.text for prompt in first if prompt.task == "letters"} <= {f"Q: {letter} A: " for letter in "abcdefg"}
    source.record([answered(prompt, [1.0, float(number % 2)]) for number, prompt in enumerate(first)], 1.0)
    state = json.loads(json.dumps(source.state()))
    resumed = build_prompt_source(settings, tokenizer)
    resumed.restore(state)
    assert resumed.metrics() == source.metrics() and 0 < source.metrics()["data/seen_share"] <= 1
    expected = source.take(30)
    assert resumed.take(30) == expected
    # without what was recorded the draws are others
    state["tasks"]["sums"]["success"] = build_prompt_source(settings, tokenizer).state()["tasks"]["sums"]["success"]
    resumed.restore(state)
    assert resumed.take(30) != expected
    assert source.prompt("letters/3").text == "Q: d A: "
    other = build_prompt_source(config(mixture(("sums", {"source": gym(9)}))), tokenizer)
    with pytest.raises(CheckpointError, match=r"made with the tasks sums, letters in data.train but this run has sums"):
        other.restore(state)


def test_success_is_counted_by_row_whatever_is_excluded(config, tokenizer, tmp_path):
    train, excluded = jsonl(tmp_path / "train.jsonl", "abcde"), jsonl(tmp_path / "held_out.jsonl", "bd")
    source = build_prompt_source(config(train, data={"exclude": [excluded]}), tokenizer)
    by_text = {prompt.text: prompt for prompt in source.take(3)}
    source.record([answered(by_text["Q: c A: "], [1.0, 0.5, 0.4, 0.0]), answered(by_text["Q: e A: "], [0.9, 1.0])], 0.5)
    assert source.metrics() == {"data/seen_share": 2 / 3, "data/success_rate_mean": 0.75}
    source.record([answered(by_text["Q: c A: "], [0.0])], 0.5)  # 0.5 and then 0: half of each
    assert source.metrics()["data/success_rate_mean"] == 0.625


def test_success_is_of_the_row_that_was_answered(config, tokenizer, tmp_path):
    train, excluded = jsonl(tmp_path / "train.jsonl", "abcde"), jsonl(tmp_path / "held_out.jsonl", "bd")
    sampling = {"order": "prioritised", "priority_floor": 1e-9}
    source = build_prompt_source(config(train, data={"exclude": [excluded], "sampling": sampling}), tokenizer)
    for _ in range(10):  # a solved row is not drawn while there are others
        source.record([answered(prompt, [float(prompt.text == "Q: c A: ")]) for prompt in source.take(3)], 1.0)
    assert {prompt.text for prompt in source.take(2)} == {"Q: a A: ", "Q: e A: "}


def test_curriculum_takes_easy_rows_first_and_needs_the_field_in_every_row(config, tokenizer, tmp_path):
    path = tmp_path / "levels.jsonl"
    levels = [3, 1, 2, 1, 3, 0.5]
    rows = [{"prompt": str(index), "answer": "1", "about": {"level": level}} for index, level in enumerate(levels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"type": "jsonl", "path": str(path)}
    curriculum = {"sampling": {"order": "curriculum", "difficulty_field": "about.level"}}
    taken = build_prompt_source(config(train, data=curriculum), tokenizer).take(12)
    assert [prompt.reference["about"]["level"] for prompt in taken] == [0.5, 1, 1, 2, 3, 3] * 2
    rows[2]["about"] = {"difficulty": 3}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"row train/2 has no field 'level' in about \(it has: difficulty\); add it or set data.sampl"
    ):
        build_prompt_source(config(train, data=curriculum), tokenizer)
    rows[2]["about"] = {"level": "hard"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"row train/2: field 'about.level' is 'hard'; data.sampling.difficulty_field needs a finite"
    ):
        build_prompt_source(config(train, data=curriculum), tokenizer)


def test_evaluation_prompts_of_a_mixture_carry_their_tasks(config, tokenizer):
    data = mixture(("a", {"source": gym(2)}), ("b", {"source": gym(1, seed=4)}))
    prompts = build_evaluation_prompts(config(gym(3), evaluation={"data": data}), tokenizer)
    assert [(prompt.prompt_id, prompt.task) for prompt in prompts] == [("a/0", "a"), ("a/1", "a"), ("b/0", "b")]
