"""Which stage has which prompts, and how often earlier ones come back."""

import json
from collections import Counter

import numpy
import pytest

from groups import answered
from megarl.config.stages import stages_of
from megarl.data.curriculum import StagedPrompts, without_middle
from megarl.errors import CheckpointError, DataError

EVERY_LENGTH = range(1, 31)  # the template has 7 tokens more


def jsonl(path, lengths):
    path.write_text("".join(json.dumps({"prompt": "a" * length, "answer": "1"}) + "\n" for length in lengths))
    return {"type": "jsonl", "path": str(path)}


def staged(config, *longest, share=0.0, floor=0.1, too_long="leave_out", **sections):
    """Stages of one step each up to the given lengths."""
    named = [{"name": f"s{number}", "steps": 1, "max_prompt_tokens": size} for number, size in enumerate(longest)]
    curriculum = {"stages": named, "retrospective_share": share, "retrospective_floor": floor, "too_long": too_long}
    return config(sections.pop("train"), curriculum=curriculum, **sections)


def prompts_of(settings, tokenizer):
    stages = stages_of(settings)
    return StagedPrompts(settings, stages, tokenizer), stages


def lengths(prompts):
    return sorted(len(prompt.token_ids) for prompt in prompts)


def test_prompts_fall_into_stages_by_their_lengths(config, tokenizer, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", EVERY_LENGTH)
    held_out = {"data": jsonl(tmp_path / "held_out.jsonl", (1, 9, 20))}
    settings = staged(config, 10, 20, 20, 32, train=train, evaluation=held_out)
    prompts, stages = prompts_of(settings, tokenizer)
    assert lengths(prompts.source(stages[0]).take(3)) == [8, 9, 10]
    assert lengths(prompts.source(stages[1]).take(10)) == [*range(11, 21)]
    assert lengths(prompts.source(stages[2]).take(10)) == [*range(11, 21)], "equal lengths: the same prompts"
    assert lengths(prompts.source(stages[3]).take(12)) == [*range(21, 33)]
    assert [lengths(prompts.evaluation_prompts(stage)) for stage in stages] == [[8], [8, 16], [8, 16], [8, 16, 27]]
    report = prompts.report()
    assert [stage["num_prompts"] for stage in report["stages"]] == [3, 10, 10, 12]
    assert [stage["num_held_out"] for stage in report["stages"]] == [1, 1, 1, 1]
    assert report["leave_out"] == [{"prompt_id": f"train/{length - 1}", "num_tokens": length + 7} for length in range(26, 31)]
    assert "5 prompts are longer than the last stage's 32 tokens (the longest 37) and left out" in prompts.lines()[-1]
    # the order of two stages on the same prompts is not the same
    assert prompts.source(stages[1]).take(10) != prompts.source(stages[2]).take(10)


def test_what_is_too_long_loses_its_middle_when_asked(config, tokenizer, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "abcdefghij" + "x" * 30 + "klmnopqrst", "answer": "1"}) + "\n")
    settings = staged(config, 21, too_long="cut_middle", train={"type": "jsonl", "path": str(train)})
    prompts, stages = prompts_of(settings, tokenizer)
    (prompt,) = prompts.source(stages[0]).take(1)
    assert (len(prompt.token_ids), prompt.text) == (21, "Q: abcdefghopqrst A: ")
    assert prompts.report()["cut_middle"] == [{"prompt_id": "train/0", "num_tokens": 57}]
    assert without_middle(tuple(range(9)), 4) == (0, 1, 7, 8)
    assert without_middle(tuple(range(9)), 5) == (0, 1, 2, 7, 8)


def test_an_empty_stage_is_refused(config, tokenizer, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", (1, 2, 3))
    with pytest.raises(DataError, match=r"^curriculum.stages.1.max_prompt_tokens: no prompt .* 21 to 40 tokens, .* have 8 to 10\)"):
        prompts_of(staged(config, 20, 40, train=train), tokenizer)


def test_earlier_prompts_come_back_in_proportion_to_one_over_their_mean_reward(config, tokenizer, tmp_path):
    """Three earlier prompts with mean rewards 1, 1/2 and 0, the last as the floor of 1/4: first drawn 1/7, 2/7, 4/7 of the time."""
    train = jsonl(tmp_path / "train.jsonl", [1, 2, 3, 4, *range(10, 20)])
    settings = staged(config, 12, 30, share=0.25, floor=0.25, train=train)
    prompts, stages = prompts_of(settings, tokenizer)
    first = prompts.source(stages[0])
    easy, middle, hard, _ = sorted(first.take(4), key=lambda prompt: prompt.prompt_id)  # the fourth is never answered
    first.record([answered(easy, [1.0, 1.0]), answered(middle, [0.0, 1.0]), answered(hard, [0.0, 0.0])], pass_threshold=1.0)
    source = prompts.source(stages[1])
    source.restore(json.loads(json.dumps(first.state())))
    draws = 4000
    counts = Counter()
    for _ in range(draws):
        taken = source.take(4)
        (back,) = [prompt for prompt in taken if len(prompt.token_ids) <= 12]
        assert taken.index(back) == 3, "every fourth place is an earlier prompt's"
        counts[back.prompt_id] += 1
        source.record([answered(prompt, [1.0]) for prompt in taken if prompt is not back], pass_threshold=1.0)
    shares = [counts[prompt.prompt_id] / draws for prompt in (easy, middle, hard)]
    assert shares == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=3 * numpy.sqrt(0.25 / draws))


def test_no_earlier_prompt_comes_twice_before_it_is_answered(config, tokenizer, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [1, 2, *range(10, 20)])
    prompts, stages = prompts_of(staged(config, 12, 30, share=0.5, train=train), tokenizer)
    first, source = prompts.source(stages[0]), prompts.source(stages[1])
    assert min(lengths(source.take(4))) > 12, "none was answered yet"
    first.record([answered(prompt, [0.0]) for prompt in first.take(2)], pass_threshold=1.0)
    source.restore(first.state())
    taken = source.take(2) + source.take(4)
    first_two, *others = lengths(taken)[:2], *lengths(taken)[2:]
    assert first_two == [8, 9] and min(others) > 12, "both wait for their answers, and own prompts take their places"
    source.record([answered(prompt, [0.0]) for prompt in taken], pass_threshold=1.0)
    assert lengths(source.take(2))[0] in (8, 9)
    assert source.metrics()["curriculum/earlier_share"] == pytest.approx(2 / 6)


def test_a_stage_resumes_exactly(config, tokenizer, tmp_path):
    train = jsonl(tmp_path / "train.jsonl", EVERY_LENGTH)
    prompts, stages = prompts_of(staged(config, 20, 37, share=0.4, train=train), tokenizer)
    first, source = prompts.source(stages[0]), prompts.source(stages[1])
    first.record([answered(prompt, [index % 3]) for index, prompt in enumerate(first.take(13))], pass_threshold=1.0)
    source.restore(first.state())
    source.record([answered(prompt, [0.5]) for prompt in source.take(7)], pass_threshold=1.0)
    source.take(3)
    resumed = prompts.source(stages[1])
    resumed.restore(json.loads(json.dumps(source.state())))
    for count in (1, 5, 9):
        assert [prompt.prompt_id for prompt in resumed.take(count)] == [prompt.prompt_id for prompt in source.take(count)]
    assert resumed.state() == source.state()
    with pytest.raises(CheckpointError, match="is of a run without curriculum"):
        resumed.restore({"taken": 0, "tasks": {}})


def test_a_task_without_prompts_of_a_stages_lengths_sits_it_out(config, tokenizer, tmp_path):
    tasks = [
        {"name": "short", "source": jsonl(tmp_path / "short.jsonl", (1, 2))},
        {"name": "all", "source": jsonl(tmp_path / "all.jsonl", EVERY_LENGTH)},
    ]
    sampling = {"sampling": {"mixture": "balanced"}}
    settings = staged(config, 10, 37, share=0.5, train={"type": "mixture", "tasks": tasks}, data=sampling)
    prompts, stages = prompts_of(settings, tokenizer)
    first, source = prompts.source(stages[0]), prompts.source(stages[1])
    taken = first.take(4)
    assert Counter(prompt.task for prompt in taken) == {"short": 2, "all": 2}
    first.record([answered(prompt, [0.0]) for prompt in taken], pass_threshold=1.0)
    source.restore(first.state())
    later = source.take(8)
    assert sum(len(prompt.token_ids) <= 10 for prompt in later) == 4
    assert {prompt.task for prompt in later if len(prompt.token_ids) > 10} == {"all"}
