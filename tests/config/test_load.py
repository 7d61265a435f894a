"""Files, overrides and their mistakes: one clear line for each."""

import re
from pathlib import Path

import pytest

from megarl.config.load import dump_config, load_config, save_config
from megarl.errors import ConfigError

VALID = """
kind: rl
steps: 3
model: {path: models/tiny, init: random}
data:
  train: {type: reasoning_gym, task: chain_sum, options: {min_digits: 1}}
rewards:
  scorers:
    - {type: exact}
    - {type: python, function: "rewards:score", weight: 0.5}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def errors_of(file: Path, text: str, overrides: list[str] | None = None) -> list[str]:
    """Lines of the error that loading ``text`` gives, with the file's path shortened."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides or [])
    return [line.replace(str(file), "run.yaml") for line in str(caught.value).split("\n")]


def test_values_and_defaults(file: Path) -> None:
    config = load_config(file)
    assert (config.kind, config.steps, config.model.path, config.model.init) == ("rl", 3, Path("models/tiny"), "random")
    assert config.data.train.options == {"min_digits": 1}  # type: ignore[union-attr]
    assert [scorer.weight for scorer in config.rewards.scorers] == [1.0, 0.5]
    assert config.optimizer.learning_rate == 1e-6


def test_overrides_in_order_with_indices_and_new_sections(file: Path) -> None:
    config = load_config(
        file,
        [
            "optimizer.learning_rate=3e-4",
            "policy.parallel.tp=2",
            "policy.parallel.tp=4",
            "rewards.scorers.1.weight=2",
            "rollout.stop_token_ids=[1, 2]",
            "rollout.vllm.arguments.max_num_seqs=64",
            "rollout.vllm.arguments.swap=1e-3",
            'data.template="Q: {prompt} = "',
            "data.response_suffix=a=b",
            "evaluation.data={type: jsonl, path: held_out.jsonl}",
            "model.tokenizer=",
        ],
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.policy.parallel.tp == 4
    assert [scorer.weight for scorer in config.rewards.scorers] == [1.0, 2.0]
    assert config.rollout.stop_token_ids == [1, 2]
    assert config.rollout.vllm.arguments == {"max_num_seqs": 64, "swap": 0.001}
    assert config.data.template == "Q: {prompt} = "
    assert config.data.response_suffix == "a=b"
    assert config.evaluation.data is not None and config.evaluation.data.type == "jsonl"
    assert config.model.tokenizer is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate", "is not section.key=value"),
        ("=3", "is not section.key=value"),
        ("optimizer..learning_rate=3", "is not section.key=value"),
        ("data.template={prompt", "the value is not valid YAML"),
        ("rewards.scorers.2.weight=3", "rewards.scorers is a list with 2 items and 2 is not"),
        ("rewards.scorers.first.weight=3", "rewards.scorers is a list with 2 items and first is not"),
        ("steps.more=3", "steps is 3, which has no keys"),
        ("policy.paralel.tp=3", "--set: policy.paralel: unknown key; the nearest valid key is policy.parallel"),
        (
            "policy.parallel.tp=0",
            "--set: policy.parallel.tp: is 0, input should be greater than or equal to 1; give whole number ≥ 1",
        ),
    ],
)
def test_bad_override_is_one_line(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(file, [override])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--set")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer: {learning_rat: 1}", "optimizer.learning_rate"),
        ("optimizer: {lr: 1}", "optimizer.learning_rate"),
        ("lr: 1", "optimizer.learning_rate"),
        ("policy: {tp: 2}", "policy.parallel.tp"),
        ("temprature: 1", "rollout.temperature"),
        ("rollout: {vllm: {ports: 1}}", "rollout.vllm.port"),
        ("evaluation: {data: {type: jsonl, path: a, prompt_feild: b}}", "evaluation.data.prompt_field"),
    ],
)
def test_unknown_key_names_the_nearest(file: Path, key: str, nearest: str) -> None:
    (line,) = errors_of(file, VALID + key)
    assert line.endswith(f"unknown key; the nearest valid key is {nearest}")


def test_unknown_key_in_a_list_item(file: Path) -> None:
    assert errors_of(file, VALID.replace("weight: 0.5", "wieght: 0.5")) == [
        "run.yaml: rewards.scorers.1.wieght: unknown key; the nearest valid key is rewards.scorers.1.weight"
    ]


def test_mistakes_in_a_mixture_name_the_task(file: Path) -> None:
    tasks = (
        "{name: a, weight: 0, source: {type: jsonl, path: a}}, {name: b, weight: -1, source: {type: jsonl, path: b}}, "
        "{name: '', source: {type: mixture, tasks: []}}, "
        "{name: d, source: {type: jsonl, paths: d}, scorers: [{type: exact, wieght: 2}]}"
    )
    lines = errors_of(file, f"kind: rl\nsteps: 1\nmodel: {{path: m}}\ndata: {{train: {{type: mixture, tasks: [{tasks}]}}}}\n")
    starts = [
        "data.train.tasks.0.weight: is 0, input should be greater than 0; give number > 0",
        "data.train.tasks.1.weight: is -1, input should be greater than 0",
        "data.train.tasks.2.name: is '', string should have at least 1 character",
        "data.train.tasks.2.source.type: is 'mixture'; give jsonl or datasets or reasoning_gym",
        "data.train.tasks.3.source.path: is required",
        "data.train.tasks.3.source.paths: unknown key; the nearest valid key is data.train.tasks.3.source.path",
        "data.train.tasks.3.scorers.0.wieght: unknown key; the nearest valid key is data.train.tasks.3.scorers.0.weight",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"run.yaml: {start}")


def test_every_mistake_has_its_line(file: Path) -> None:
    lines = errors_of(
        file,
        """
        kind: ppo
        model: {}
        data: {train: {type: json}}
        policy: 3
        optimizer: {beta1: 1.5, learning_rate: .nan}
        rollout: {stop_token_ids: [end]}
        """,
    )
    assert len(lines) == 8
    starts = [
        "run.yaml: kind: is 'ppo'; give `rl` or `sft`",
        "run.yaml: steps: is required; give whole number ≥ 0 (steps)",
        "run.yaml: model.path: is required; give path (folder)",
        "run.yaml: policy: is 3; give a section with keys among parallel",
        "run.yaml: optimizer.learning_rate: is nan, input should be a finite number; give number > 0",
        "run.yaml: optimizer.beta1: is 1.5, input should be less than 1; give number ≥ 0 and < 1",
        "run.yaml: rollout.stop_token_ids.0: is 'end', input should be a valid integer",
        "run.yaml: data.train.type: is 'json'; give jsonl or datasets or reasoning_gym or mixture",
    ]
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("kind: rl\nsteps: 1\nkind: sft\n", 3, "key 'kind' is already given in line 1"),
        ("policy:\n  parallel:\n    tp: 1\n    tp: 2\n", 4, "key 'tp' is already given in line 3"),
        ("- rl\n- 3\n", 1, "not 'key: value' lines"),
        ("", 1, "holds null"),
        ("kind: rl\nmodel: {path: a\nsteps: 3\n", 3, "not valid YAML"),
        ("kind: rl\n3: x\n", 2, "key '3' is not a text"),
    ],
)
def test_bad_yaml_names_its_line(file: Path, text: str, line: int, reason: str) -> None:
    (message,) = errors_of(file, text)
    assert message.startswith(f"run.yaml:{line}: ")
    assert reason in message


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("kind: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(latin)


def test_dump_and_load_give_the_same_config(file: Path, tmp_path: Path) -> None:
    texts = [
        "a\nb",
        "  spaces  ",
        "1e-6",
        "yes",
        "null",
        "2024-01-01",
        "# no comment",
        "é 漢 \t",
        "'\"",
        "x" * 500,
        "{prompt}: [",
        "",
        "~",
    ]
    config = load_config(file, ["optimizer.learning_rate=1.2345678901234567e-7"])
    options = {"texts": texts, "numbers": [1e-6, 1e300, 3, -0.5], "flags": [True, False, None], "nested": {"a": {"b": []}}}
    train = config.data.train.model_copy(update={"options": options})
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": train, "template": "Q\n{prompt}\nA "})})
    save_config(config, tmp_path / "saved.yaml")
    loaded = load_config(tmp_path / "saved.yaml")
    assert loaded == config
    assert dump_config(loaded) == dump_config(config)


def test_save_into_a_missing_folder(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        save_config(load_config(file), tmp_path / "absent" / "config.yaml")


SAVED_BEFORE = """
rewards:
  scorers:
  - {type: regex, name: null, weight: 1.0, pattern: a, tags: [], ngram: null, script: null, extract: null, match: [], judge: null,
     function: null, step_separator: null, url: null, engine: null, api_key_env: null}
rollout:
  environment: {type: calculator, function: null, options: {}, max_turns: 3}
"""


def test_a_config_that_lists_the_keys_of_every_type_is_read(file: Path) -> None:
    """So earlier versions saved the config of a run."""
    file.write_text(VALID.partition("rewards:")[0] + SAVED_BEFORE)
    config = load_config(file)
    (scorer,) = config.rewards.scorers
    assert scorer.model_dump(exclude_unset=True) == {"type": "regex", "name": None, "weight": 1.0, "pattern": "a"}
    assert config.rollout.environment is not None and config.rollout.environment.max_turns == 3


@pytest.mark.parametrize(
    ("scorer", "line"),
    [
        (
            "{type: python, function: 'a:b', pattern: x}",
            "rewards.scorers.0.pattern: 'x' has no use for type python; remove it or use type exact or regex or math or "
            "reasoning_gym or document_qa or format",
        ),
        ("{type: exact, ngram: 0}", "rewards.scorers.0.ngram: 0 has no use for type exact; remove it or use type repetition"),
        ("{type: repetition}", "rewards.scorers.0.ngram: is required for type repetition; give for example 4"),
        ("{type: math, patern: a}", "rewards.scorers.0.patern: unknown key; the nearest valid key is rewards.scorers.0.pattern"),
        (
            "{type: math, judge: {url: 'http://j', model: m}}",
            "rewards.scorers.0.judge: has no use for type math; remove it or use type document_qa",
        ),
    ],
)
def test_keys_of_other_types(file: Path, scorer: str, line: str) -> None:
    text = VALID.partition("rewards:")[0] + f"rewards: {{scorers: [{scorer}]}}\n"
    assert errors_of(file, text) == [f"run.yaml: {line}"]
