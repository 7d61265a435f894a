import itertools
import json

import datasets
import pytest

from megarl.config.schema import DatasetsSource, JsonlSource
from megarl.data.packing import pack_pairs, plan_group_micro_batches, plan_micro_batches
from megarl.data.sampler import build_evaluation_pairs, build_pair_source
from megarl.data.sources import read_rows
from megarl.errors import DataError

PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "11"}


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"type": "jsonl", "path": str(path)}


def test_rows_of_both_sources(tmp_path):
    rows = [PAIR | {"level": 3}, {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}]
    first, second = read_rows(JsonlSource.model_validate(jsonl(tmp_path / "rows.jsonl", *rows)), "train", in_pairs=True)
    assert (first.row_id, first.prompt, first.answer, first.rejected) == ("train/0", "1+1?", "2", "11")
    assert first.reference["level"] == 3 and second.prompt_text == "user: a"
    datasets.Dataset.from_list([{"q": "1+1?", "good": "2", "bad": "11"}]).save_to_disk(tmp_path / "saved")
    fields = {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad"}
    (row,) = read_rows(DatasetsSource(path=str(tmp_path / "saved"), **fields), "train", in_pairs=True)
    assert (row.prompt, row.answer, row.rejected) == ("1+1?", "2", "11")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chosen": None}, "field 'chosen' is a NoneType; it must be a string"),
        ({"rejected": 3}, "field 'rejected' is a int; it must be a string"),
        ({"rejected": [{"role": "assistant", "content": "a"}]}, "field 'rejected' is a list; it must be a string"),
        ({"chosen": " "}, "field 'chosen' is an empty string; write a response or leave the row out"),
        ({"rejected": ""}, "field 'rejected' is an empty string"),
        ({"rejected": "2"}, "fields 'chosen' and 'rejected' are equal, so neither is preferred; leave the row out"),
        ({"prompt": ""}, "field 'prompt' is an empty string"),
    ],
)
def test_malformed_pairs_name_file_line_and_field(tmp_path, change, expected):
    source = JsonlSource.model_validate(jsonl(tmp_path / "rows.jsonl", PAIR, PAIR | change))
    with pytest.raises(DataError) as error:
        read_rows(source, "train", in_pairs=True)
    assert str(error.value).startswith(f"{source.path}:2: {expected}")


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_missing_field_is_named_with_its_option(tmp_path, name):
    row = {key: value for key, value in PAIR.items() if key != name}
    source = JsonlSource.model_validate(jsonl(tmp_path / "rows.jsonl", row))
    with pytest.raises(DataError, match=rf":1: no field '{name}' \(it has: .*\); add it or set {name}_field"):
        read_rows(source, "train", in_pairs=True)


@pytest.fixture
def preference(config):
    def build(train, **sections):
        return config(train, **({"kind": "preference"} | sections))

    return build


def test_pairs_are_packed_chosen_first_with_suffix_and_end(preference, tokenizer, tmp_path):
    train = jsonl(tmp_path / "rows.jsonl", PAIR)
    (pair,) = build_pair_source(preference(train, data={"response_suffix": "!"}), tokenizer).take(1)
    packed = pack_pairs([pair, pair])
    starts = packed.cu_seqlens.tolist()
    texts = [tokenizer.decode(packed.token_ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert texts == [f"Q: 1+1? A: {answer}!{tokenizer.eos_token}" for answer in ("2", "11")] * 2
    assert packed.group_ids.tolist() == [0, 0, 1, 1]
    assert [int(packed.loss_mask[a:b].sum()) for a, b in itertools.pairwise(starts)] == [3, 4, 3, 4]


def test_lengths_of_responses_and_of_pairs(preference, tokenizer, tmp_path):
    train = jsonl(tmp_path / "rows.jsonl", PAIR, PAIR | {"chosen": "2" * 9})  # 11 tokens of prompt; 1 to 9 and the end

    def source(max_tokens, in_micro_batch, **parallel):
        policy = {"max_tokens_per_micro_batch": in_micro_batch, "parallel": parallel}
        return build_pair_source(preference(train, preference={"max_tokens": max_tokens}, policy=policy), tokenizer)

    assert len(source(21, 35).take(4)) == 4
    with pytest.raises(DataError, match=r"the chosen response of row train/1 has 21 tokens, 11 prompt \+ 10 response, above pref"):
        source(20, 100)
    with pytest.raises(DataError, match=r"the pair of row train/1 has 21 \+ 14 tokens, .*policy.max_tokens_per_micro_batch = 34;"):
        source(21, 34)
    assert len(source(21, 40, cp=2).take(4)) == 4
    with pytest.raises(DataError, match=r"has 21 \+ 14 tokens, each padded to a multiple of 4 for cp 2, .* = 39; raise it"):
        source(21, 39, cp=2)


def test_held_out_pairs_are_kept_out_of_training(preference, tokenizer, tmp_path):
    held_out = jsonl(tmp_path / "held_out.jsonl", PAIR)
    train = jsonl(tmp_path / "rows.jsonl", PAIR, PAIR | {"prompt": "other"})
    whole = preference(train, data={"exclude": [held_out]}, evaluation={"data": held_out})
    assert {pair.chosen.row_id for pair in build_pair_source(whole, tokenizer).take(4)} == {"train/1"}
    assert [pair.rejected.row_id for pair in build_evaluation_pairs(whole, tokenizer)] == ["evaluation/0"]
    assert build_evaluation_pairs(preference(train), tokenizer) == []


def test_a_group_is_never_torn():
    group_ids, lengths = [0, 0, 1, 1, 2, 2, 3, 3, 4], [5, 3, 1, 1, 4, 4, 2, 6, 8]
    for num_replicas, max_tokens, multiple in ((1, 8, 1), (2, 10, 1), (3, 16, 2), (6, 8, 4)):
        plan = plan_group_micro_batches(group_ids, lengths, lengths, num_replicas, max_tokens, multiple)
        assert len(plan) == num_replicas and len({len(replica) for replica in plan}) == 1 and len(plan[0]) % multiple == 0
        batches = [micro_batch for replica in plan for micro_batch in replica]
        assert sorted(number for micro_batch in batches for number in micro_batch) == list(range(9))
        for micro_batch in batches:
            assert micro_batch == sorted(micro_batch) and sum(lengths[number] for number in micro_batch) <= max_tokens
            for number in micro_batch:
                assert {other for other in range(9) if group_ids[other] == group_ids[number]} <= set(micro_batch)
    assert any(len(micro_batch) == 1 for micro_batch in plan_micro_batches(lengths, lengths, 1, 8)[0])  # which tears them
    with pytest.raises(DataError, match=r"group 1, sequences 1 to 2, has 9 tokens, above max_tokens_per_micro_batch = 8"):
        plan_group_micro_batches([0, 1, 1], [1, 4, 5], [1, 4, 5], 1, 8)
