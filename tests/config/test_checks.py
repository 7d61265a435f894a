"""Every refusal across keys, model and world size: one line that names the key, the numbers and the fix."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megarl.config.checks import check
from megarl.config.load import describe
from megarl.config.schema import Config
from megarl.errors import ConfigError
from megarl.families.registry import read_architecture
from small_model import MODEL

RL: dict[str, Any] = {
    "kind": "rl",
    "steps": 10,
    "model": {"init": "random"},
    "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}},
    "rewards": {"scorers": [{"type": "exact"}]},
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
PHI3 = {"model_type": "phi3"}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 36,
}


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    facts = {name: value for name, value in (MODEL | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def build(model: Path, *settings: str, **top: Any) -> Config:
    """RL with the given ``section.key=json`` settings."""
    data = copy.deepcopy(RL | top)
    data["model"]["path"] = str(model)
    for setting in settings:
        path, _, value = setting.partition("=")
        *sections, name = path.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = json.loads(value)
    return Config.model_validate(data)


def failures(config: Config, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config, world_size)
    return str(caught.value).split("\n")


def mistakes(model: Path, *settings: str, **top: Any) -> list[str]:
    """What is wrong with a config, found when it is read or, where nothing is, when it is checked."""
    try:
        config = build(model, *settings, **top)
    except ValidationError as error:
        return [describe(detail, "run.yaml").removeprefix("run.yaml: ") for detail in error.errors()]
    return failures(config)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ([], 1),
        (["policy.parallel.tp=2", "policy.parallel.pp=2", "policy.parallel.cp=2", "policy.parallel.sequence_parallel=true"], 16),
        (["policy.parallel.pp=3", "policy.parallel.vpp=4"], 3),
        (["policy.parallel.tp=2", "policy.parallel.cp=2", 'policy.parallel.context_parallel_method="all_to_all"'], 4),
        (["policy.parallel.cp=8", 'policy.parallel.context_parallel_method="all_to_all"'], 8),
        (["policy.parallel.cp=6", 'policy.parallel.context_parallel_method="hybrid"', "policy.parallel.ulysses_size=2"], 6),
        (["policy.parallel.ep=1", "policy.parallel.etp=1"], 1),
        (["policy.max_tokens_per_micro_batch=1024"], 1),
        (["rollout.max_prompt_tokens=2000", "rollout.max_new_tokens=48"], 1),
        (["rollout.prompts_per_step=6", "algorithm.updates_per_step=3", "optimizer.warmup_steps=30"], 1),
        (["steps=0", "optimizer.warmup_steps=30"], 1),
        (["rollout.asynchronous.max_staleness=2", "algorithm.sampler_correction.max_staleness=1"], 1),
        (["rollout.partial.step_token_budget=100", "algorithm.sampler_correction.max_staleness=4"], 1),
        (['rollout.engine="vllm"', "rollout.temperature=0.7"], 1),
        (['rollout.engine="vllm"', "rollout.top_p=0.7"], 1),
        (['rollout.engine="sglang"', "rollout.temperature=0.7", "rollout.top_p=0.7"], 1),
        (["rollout.stop_token_ids=[0, 99]"], 1),
        (['model.dtype="bfloat16"', 'model.attention_impl="transformer_engine"'], 1),
        (['algorithm.preset="ppo"'], 1),
        (['algorithm.preset="ppo"', 'critic={"parallel": {"tp": 2}, "warmup_steps": 9}'], 2),
        (['algorithm.preset="ppo"', "policy.num_ranks=4", "policy.parallel.tp=4", 'critic={"first_rank": 4}'], 6),
        (["policy.first_rank=1", 'algorithm.preset="grpo"', 'reference={"num_ranks": 1}'], 2),
        (['rewards.scorers=[{"type": "regex", "pattern": "a+"}, {"type": "python", "function": "a.b:c"}]'], 1),
        (['kind="sft"', "rewards.scorers=[]", "sft.max_tokens=2048", "rollout.max_new_tokens=5000"], 1),
    ],
)
def test_good_configs_pass(model: Path, settings: list[str], world_size: int) -> None:
    check(build(model, *settings), world_size)


LAYOUT = [
    (
        ["policy.parallel.tp=3", "policy.parallel.pp=2", "policy.parallel.vpp=2"],
        8,
        "policy.parallel: world size 8 = tp 3 × pp 2 × cp 1 × dp ?: 8 is not divisible by 6; use 6 or 12 ranks",
        "tp 3 does not divide the model's num_attention_heads 8",
        "tp 3 does not divide the model's num_key_value_heads 4",
    ),
    (["policy.first_rank=2"], 2, "policy.first_rank: there is no rank 2 in a world of 2; give at most 1"),
    (["policy.first_rank=1", "policy.num_ranks=4"], 4, "policy.num_ranks: 4 ranks from rank 1 on reach beyond a world of 4"),
    (
        ["policy.first_rank=1", "policy.num_ranks=3", "policy.parallel.tp=2"],
        4,
        "policy.parallel: number of ranks 3 = tp 2 × pp 1 × cp 1 × dp ?: 3 is not divisible by 2; use 2 or 4 ranks",
        "policy.num_ranks: rank 0 of a world of 4 would have no part of any model",
    ),
    (
        # no KL, so no reference
        ["policy.num_ranks=2", 'reference={"first_rank": 2}'],
        4,
        "policy.num_ranks: ranks 2, 3 of a world of 4 would have no part of any model; start fewer ranks",
    ),
    (["policy.parallel.cp=4"], 2, "world size 2 = tp 1 × pp 1 × cp 4 × dp ?: 2 is not divisible by 4; use 4 ranks"),
    (
        ["policy.parallel.tp=5"],
        5,
        "tp 5 does not divide the model's num_attention_heads 8",
        "num_key_value_heads 4;",
        "tp 5 does not divide the model's intermediate_size 96",
    ),
    (
        ["policy.parallel.pp=8"],
        8,
        "12 layers do not divide into pp 8 × vpp 1 = 8 equal chunks; choose pp × vpp among 1, 2, 3, 4, 6, 12",
    ),
    (["policy.parallel.pp=2", "policy.parallel.vpp=4"], 2, "12 layers do not divide into pp 2 × vpp 4 = 8 equal chunks"),
    (["policy.parallel.vpp=2"], 1, "vpp 2 needs pp 2 or more and pp is 1"),
    (["policy.parallel.sequence_parallel=true"], 2, "sequence_parallel: is true with tp 1"),
    (
        ["policy.parallel.cp=3", 'policy.parallel.context_parallel_method="all_to_all"'],
        3,
        "policy.parallel.cp: all_to_all exchanges whole heads among 3 ranks, and with tp 1 a rank has 8 query and 4 key heads",
    ),
    (
        ["policy.parallel.cp=2", 'policy.parallel.context_parallel_method="hybrid"'],
        2,
        "policy.parallel.ulysses_size: None with context_parallel_method hybrid; hybrid needs the number of neighbouring ranks",
    ),
    (
        ["policy.parallel.cp=4", "policy.parallel.ulysses_size=2"],
        4,
        "policy.parallel.ulysses_size: 2 with context_parallel_method all_gather",
    ),
    (
        ["policy.parallel.cp=4", 'policy.parallel.context_parallel_method="hybrid"', "policy.parallel.ulysses_size=4"],
        4,
        "policy.parallel.ulysses_size: 4 does not leave a ring of cp 4",
    ),
    (
        ["policy.parallel.ep=2", "policy.parallel.etp=2"],
        4,
        "policy.parallel.ep: is 2, but the model has no",
        "policy.parallel.etp: is 2",
    ),
]


@pytest.mark.parametrize("case", LAYOUT, ids=lambda case: case[0][0])
def test_layouts(model: Path, case: tuple[Any, ...]) -> None:
    settings, world_size, *expected = case
    assert_lines(failures(build(model, *settings), world_size), expected)


def assert_lines(lines: list[str], expected: list[str]) -> None:
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert part in line


EXACT, MATH = '[{"type": "exact"}]', '[{"type": "math"}]'
REGEX = '[{"type": "regex", "pattern": "(a"}]'
STEPS = json.dumps([{"type": "python", "function": "a.b:c", "step_separator": "."}])


def tasks(*names: str, weights: tuple[float, ...] = (), scorers: str = "[]", size: int = 1000) -> str:
    """``type: mixture`` with tasks of these names, as JSON."""
    weights = weights or (1.0,) * len(names)
    return json.dumps(
        {
            "type": "mixture",
            "tasks": [
                {
                    "name": name,
                    "weight": weight,
                    "source": {"type": "reasoning_gym", "task": "chain_sum", "size": size},
                    "scorers": json.loads(scorers),
                }
                for name, weight in zip(names, weights, strict=True)
            ],
        }
    )


BALANCED = 'data.sampling.mixture="balanced"'
RUN = [
    ([f"data.train={tasks('a', 'b', 'a')}"], "data.train.tasks.2.name: 'a' is also the name of task 0"),
    (
        [f"data.train={tasks('a', 'b', 'c')}", BALANCED],
        "rollout.prompts_per_step: 32 prompts are not divisible by the 3 tasks of data.train",
    ),
    ([BALANCED], "data.sampling.mixture: balanced needs several tasks, and data.train has one"),
    (
        [f"data.train={tasks('a', 'b', size=15)}", BALANCED],
        "data.train.tasks.0.source.size: 15 prompts are fewer than rollout.prompts_per_step 32, of which 16 are of this task",
        "data.train.tasks.1.source.size: 15 prompts",
    ),
    (
        [f"data.train={tasks('a', 'b', weights=(1.0, 3.0), size=20)}"],
        "data.train.tasks.1.source.size: 20 prompts are fewer than rollout.prompts_per_step 32, of which 24 are of this task",
    ),
    (
        [f"data.train={tasks('a', scorers=EXACT)}", f"evaluation.data={tasks('a', scorers=MATH)}"],
        "evaluation.data.tasks.0.scorers: differ from those of data.train's task 'a'",
    ),
    (
        [f"data.train={tasks('a', scorers=EXACT)}", f"evaluation.data={tasks('b')}", "rewards.scorers=[]"],
        "rewards.scorers: is empty and evaluation.data needs at least one",
    ),
    (
        [f"data.train={tasks('a', 'b', scorers=REGEX)}"],
        "data.train.tasks.0.scorers.0.pattern: '(a' is not a regular",
        "data.train.tasks.1.scorers.0.pattern: '(a' is not a regular",
    ),
    (['data.sampling.order="curriculum"'], "data.sampling.order: curriculum needs to know how hard each row is"),
    (
        ['data.sampling.difficulty_field="level"'],
        "data.sampling.difficulty_field: is 'level' and order shuffle does not look at it",
    ),
    (['kind="sft"', 'data.sampling.order="prioritised"'], "data.sampling.order: prioritised draws rows by how often the policy"),
    (
        ['data.sampling.order="prioritised"', 'reward_model={"path": "absent"}'],
        "data.sampling.order: prioritised with a reward_model",
        "reward_model.path: absent",
    ),
    (["algorithm.over_sampling=1.5"], "algorithm.over_sampling: is 1.5 and only dynamic sampling drops groups"),
    (
        ['rollout.repetition_stop={"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2}'],
        "rollout.repetition_stop.min_pattern_size: 5 is above max_pattern_size 4",
    ),
    (
        ['rollout.repetition_stop={"max_pattern_size": 64, "min_pattern_size": 64, "min_count": 8}'],
        "rollout.repetition_stop.min_count: 8 patterns of 64 tokens or more never fit into fewer than rollout.max_new_tokens 512",
    ),
    (
        ['rollout.engine="sglang"', 'rollout.repetition_stop={"max_pattern_size": 4, "min_count": 2}'],
        "rollout.repetition_stop: SGLang cannot end responses that repeat themselves",
    ),
    (
        ['algorithm.advantage="process_rewards"'],
        "process_rewards needs a reward for each step of a response, and task train has no",
    ),
    (
        [
            'algorithm={"advantage": "process_rewards", "dynamic_sampling": true, "reward_shaping": {"overlong_buffer": 0.1}}',
            f"rewards.scorers={STEPS}",
            'reward_model={"path": "absent"}',
        ],
        "algorithm.reward_shaping.overlong_buffer: is 0.1 and changes rewards of whole responses",
        "reward_model: scores whole responses, and advantage process_rewards uses",
        "algorithm.dynamic_sampling: is true and drops groups by the rewards of whole responses",
        "algorithm.dynamic_sampling: is true with a reward_model",
        "reward_model.path: absent",
    ),
    (["rollout.max_new_tokens=20000"], "= 20512 tokens)", "= 20512 tokens exceed max_position_embeddings 2048"),
    (["policy.max_tokens_per_micro_batch=1023"], "1023 tokens cannot hold the longest sequence (rollout.max_prompt_tokens 512 +"),
    (['kind="sft"', "sft.max_tokens=2049"], "sft.max_tokens 2049 exceed max_position_embeddings 2048"),
    (
        [
            'kind="sft"',
            "sft.max_tokens=8",
            "rollout.max_new_tokens=2000",
            'evaluation.data={"type": "reasoning_gym", "task": "a"}',
        ],
        "512 + rollout.max_new_tokens 2000 = 2512 tokens exceed",
    ),
    (["rollout.prompts_per_step=10", "algorithm.updates_per_step=4"], "prompts_per_step 10 does not divide into 4 mini-batches"),
    (["rollout.samples_per_prompt=1"], "1 response per prompt makes every advantage 0"),
    (["data.train.size=31"], "31 prompts are fewer than rollout.prompts_per_step 32"),
    (["rewards.scorers=[]"], "rewards.scorers: is empty and kind: rl needs at least one"),
    (['algorithm.kl.place="loss"'], "algorithm.kl.coefficient: is 0 with kl.place loss"),
    (["algorithm.kl.coefficient=0.1"], "algorithm.kl.coefficient: is 0.1 but kl.place is none"),
    (
        ['rollout.engine="vllm"', "rollout.temperature=0.7", "rollout.top_p=0.9", "rollout.top_k=5"],
        "0.7 with top_p 0.9 and top_k 5",
    ),
    (
        [
            'rollout.engine="vllm"',
            "rollout.min_p=0.1",
            'evaluation={"data": {"type": "reasoning_gym", "task": "a"}, "temperature": 0.6}',
        ],
        "evaluation.temperature: 0.6 with min_p 0.1 on engine vllm",
    ),
    (
        ['rollout.engine="sglang"', "rollout.min_p=0.1", "rollout.repetition_penalty=1.1"],
        "rollout.repetition_penalty: is 1.1, and SGLang's log-probabilities are of the logits after it",
        "rollout.min_p: is 0.1, which SGLang cannot do with seeds",
    ),
    (
        ["rollout.presence_penalty=0.5", 'rollout.partial={"step_token_budget": 64}'],
        "rollout.presence_penalty: is 0.5 and counts the tokens of one request, but responses go on in another",
    ),
    (
        ['rollout.engine="vllm"', 'rollout.vllm={"url": "http://a", "python": "/p", "port": 80, "arguments": {"x": 1}}'],
        "rollout.vllm.python: is /p but rollout.vllm.url http://a",
        "rollout.vllm.port: is 80",
        "rollout.vllm.arguments: is {'x': 1}",
    ),
    (['rollout.engine="vllm"', 'rollout.vllm.python="/absent"'], "rollout.vllm.python: /absent does not exist"),
    (['rollout.engine="sglang"', 'rollout.sglang.python="/absent"'], "rollout.sglang.python: /absent does not exist"),
    (
        ['rollout.engine="sglang"', 'rollout.sglang={"url": "http://a", "port": 80}'],
        "rollout.sglang.port: is 80 but rollout.sglang.url",
    ),
    (
        ['rollout.weight_transfer.transport="nccl"'],
        "rollout.weight_transfer.transport: nccl has no use with rollout.engine embedded",
    ),
    (
        ['rollout.engine="vllm"', 'rollout.weight_transfer={"transport": "gloo", "method": "broadcast"}'],
        "rollout.weight_transfer.transport: gloo has no use with method broadcast",
    ),
    (["optimizer.min_learning_rate=0.1"], "optimizer.min_learning_rate: 0.1 is above learning_rate 1e-06"),
    (["optimizer.warmup_steps=11"], "optimizer.warmup_steps: 11 optimizer steps exceed the run's steps 10"),
    (["algorithm.updates_per_step=2", "optimizer.warmup_steps=21"], "exceed the run's steps 10 × updates_per_step 2 = 20"),
    (["rollout.stop_token_ids=[5, 100, -1]"], "token id 100 is outside the model's vocabulary of 100", "token id -1"),
    (['data.template="Question:"'], "data.template: 'Question:' has no {prompt}"),
    (['data.exclude=[{"type": "jsonl", "path": "absent.jsonl"}]'], "data.exclude.0.path: absent.jsonl does not exist"),
    (['model.tokenizer="absent"'], "model.tokenizer: absent is not a folder"),
    (['model.init="pretrained"'], "has no *.safetensors file"),
    (['kind="sft"', "critic={}"], "critic: is given and kind sft has no critic; remove it"),
    (["critic={}"], "critic: is given and algorithm.advantage group_mean_std has no critic"),
    (['algorithm.preset="ppo"', "critic.warmup_steps=10"], "critic.warmup_steps: 10 leaves none of the run's 10 steps"),
    (['algorithm.preset="ppo"', 'critic.path="absent"'], "critic.path: absent"),
    (
        ['algorithm.preset="ppo"', 'critic={"parallel": {"tp": 3, "cp": 2}, "max_tokens_per_micro_batch": 1000}'],
        "critic.parallel: world size 1 = tp 3",
        "critic.parallel.tp: tp 3 does not divide the model's num_attention_heads 8",
        "critic.parallel.tp: tp 3 does not divide the model's num_key_value_heads 4",
        "critic.max_tokens_per_micro_batch: 1000 tokens cannot hold",
    ),
    (
        ["algorithm.dynamic_sampling=true", 'reward_model={"path": "absent"}'],
        "algorithm.dynamic_sampling: is true with a reward_model",
        "reward_model.path: absent",
    ),
    (
        ['algorithm.preset="remax"', 'reward_model={"path": "absent"}'],
        "algorithm.advantage: greedy_baseline with a reward_model",
        "reward_model.path: absent",
    ),
    (
        ['algorithm.preset="grpo"', 'reference={"offload": "optimizer", "offload_activations": true}'],
        "reference.offload: is optimizer, and a frozen model has none; choose all, or none",
        "reference.offload_activations: is true, and a frozen model keeps none; remove it",
    ),
    (["rollout.routing_replay=true"], "rollout.routing_replay: is true and "),
    (
        ["rollout.routing_replay=true", "algorithm.over_sampling=1.5", "algorithm.dynamic_sampling=true"],
        "rollout.routing_replay: is true and does not go together with algorithm.over_sampling",
        "rollout.routing_replay: is true and ",
    ),
    (
        ['kind="sft"', "rollout.asynchronous={}", "rollout.partial.step_token_budget=4"],
        "rollout.asynchronous: is given and kind sft",
        "rollout.partial: is given and kind sft",
    ),
    (["rollout.asynchronous={}", "rollout.partial.step_token_budget=4"], "rollout.partial: is given beside rollout.asynchronous"),
    (["rollout.partial.step_token_budget=512"], "rollout.partial.step_token_budget: 512 tokens are all that a response may have"),
    (["algorithm.sampler_correction.max_staleness=1"], "max_staleness: is 1 and every token is sampled by the weights it trains"),
    (
        ["rollout.asynchronous.max_staleness=2", "algorithm.sampler_correction.max_staleness=2"],
        "algorithm.sampler_correction.max_staleness: 2 leaves nothing out, as rollout.asynchronous.max_staleness 2 bounds",
    ),
    (["evaluation.every=5"], "evaluation.every: is 5 but there is no evaluation.data"),
    (
        ['evaluation={"data": {"type": "reasoning_gym", "task": "a"}, "samples_per_prompt": 4}'],
        "evaluation.samples_per_prompt: 4 greedy responses",
    ),
]


@pytest.mark.parametrize("case", RUN, ids=lambda case: case[0][-1][:60])
def test_run(model: Path, case: tuple[Any, ...]) -> None:
    settings, *expected = case
    assert_lines(failures(build(model, *settings)), expected)


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        ({"type": "regex"}, "pattern: is required for type regex"),
        ({"type": "regex", "pattern": "(a"}, "pattern: '(a' is not a regular expression"),
        ({"type": "math", "pattern": "a+"}, "pattern: 'a+' has no group"),
        ({"type": "python"}, "function: is required for type python"),
        ({"type": "python", "function": "a.b.c"}, "function: 'a.b.c' is not module:function"),
        ({"type": "python", "function": "a:b", "pattern": "x"}, "pattern: 'x' has no use for type python"),
        ({"type": "exact", "function": "a:b"}, "function: 'a:b' has no use for type exact"),
        ({"type": "exact", "name": "b", "step_separator": "."}, "step_separator: '.' has no use for type exact"),
        ({"type": "math", "tags": ["think"]}, "tags: ['think'] has no use for type math; remove it or use type format"),
        ({"type": "format"}, "tags: type format needs either tags or a pattern"),
        ({"type": "format", "tags": ["think"], "pattern": "a"}, "tags: type format needs either tags or a pattern"),
        ({"type": "format", "tags": ["<think>"]}, "tags: ['<think>'] must be names without <"),
        ({"type": "repetition"}, "ngram: is required for type repetition; give for example 4"),
        ({"type": "language", "script": "latin", "ngram": 3}, "ngram: 3 has no use for type language"),
        ({"type": "language"}, "script: is required for type language; give for example latin"),
        ({"type": "math", "url": "http://a"}, "url: 'http://a' has no use for type math; remove it or use type reward_server"),
        ({"type": "reward_server", "engine": "vllm"}, "url: is required for type reward_server"),
        ({"type": "reward_server", "url": "http://a"}, "engine: is required for type reward_server; give vllm or sglang"),
        (
            {"type": "reward_server", "url": "http://a", "engine": "vllm", "pattern": "x"},
            "pattern: 'x' has no use for type reward_server",
        ),
    ],
)
def test_scorer_fields(model: Path, scorer: dict[str, Any], expected: str) -> None:
    lines = mistakes(model, "rewards.scorers=" + json.dumps([{"type": "exact", "name": "first"}, scorer]))
    assert_lines(lines, [f"rewards.scorers.1.{expected}"])


ENVIRONMENT = {"type": "calculator"}
ENVIRONMENTS: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({}, {"rewards": {"scorers": []}}, None),
    ({"observation_template": "[{observation}]"}, {"data": RL["data"] | {"template": "{prompt}"}}, None),
    (
        {},
        {"data": RL["data"] | {"template": "{prompt}"}},
        "rollout.environment.observation_template: is not given and data.template '{prompt}' is no chat; give a text with "
        "{observation} in it",
    ),
    (
        {"observation_template": "{observation}{observation}"},
        {},
        "rollout.environment.observation_template: '{observation}{observation}' must have {observation} in it, once",
    ),
    (
        {"type": "python"},
        {},
        "rollout.environment.function: is required for type python; give for example my_package.environments:Shop",
    ),
    (
        {"type": "python", "function": "shop"},
        {},
        "rollout.environment.function: 'shop' is not module:Class for type python; give for example my_package.environments:Shop",
    ),
    (
        {"function": "shop:Shop"},
        {},
        "rollout.environment.function: 'shop:Shop' has no use for type calculator; remove it or use type python",
    ),
    (
        {},
        {"rewards": {"scorers": [{"type": "exact", "name": "environment"}]}},
        "rewards.scorers.0.name: 'environment' is the name of the environment's rewards; give another name",
    ),
    (
        {"type": "tower_of_hanoi"},
        {},
        "rollout.environment.type: tower_of_hanoi plays reasoning_gym's task tower_of_hanoi and data.train is chain_sum; use "
        "another source or environment",
    ),
]


@pytest.mark.parametrize(("environment", "top", "expected"), ENVIRONMENTS)
def test_environments(model: Path, environment: dict[str, Any], top: dict[str, Any], expected: str | None) -> None:
    setting = "rollout.environment=" + json.dumps(ENVIRONMENT | environment)
    if expected is None:
        check(build(model, setting, **top), 1)
    else:
        assert mistakes(model, setting, **top) == [expected]


def test_scorers_together(model: Path, tmp_path: Path) -> None:
    config = build(model, 'rewards.scorers=[{"type": "exact"}, {"type": "math", "name": "exact"}]')
    assert_lines(failures(config), ["rewards.scorers.1.name: 'exact' is also the name of scorer 0"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    data = json.dumps({"type": "jsonl", "path": str(rows)})
    config = build(model, f"data.train={data}", 'rewards.scorers=[{"type": "reasoning_gym"}]')
    assert_lines(failures(config), ["scores only its own tasks, and data.train has type jsonl"])


ARCHITECTURE = [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type 'longrope' is not supported"),
    (PHI3 | {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "rope_type 'longrope' is not"),
    (PHI3 | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}, "partial_rotary_factor is 0.75, and only"),
    (PHI3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, and only heads that rotate whole are supported"),
    ({"model_type": "olmo2", "attention_bias": True}, "attention_bias is true and not supported for olmo2"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"model_type": "llama", "attention_bias": True, "mlp_bias": False}, "attention_bias is true and not supported for llama"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is true and not supported for llama"),
    ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantized (awq)"),
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3, qwen3_moe, mixtral"),
    ({"model_type": "mixtral"}, "num_local_experts is null, not a whole number"),
    (MIXTRAL | {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with normalised scores is not supported"),
    (MIXTRAL | {"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds the 6 experts"),
    (DEEPSEEK | {"norm_topk_prob": False}, "norm_topk_prob false is not supported with sigmoid scores"),
    (DEEPSEEK | {"topk_group": 1}, "num_experts_per_tok 4 with topk_group 1 is not supported"),
    (DEEPSEEK | {"n_group": 3}, "n_group 3 does not divide the 8 experts"),
    (DEEPSEEK | {"rope_interleave": False}, "rope_interleave is false and not supported with latent attention"),
    (DEEPSEEK | {"attention_bias": True}, "attention_bias is true and not supported for deepseek_v3"),
    ({"vocab_size": None}, "vocab_size is null, not a whole number"),
    ({"num_key_value_heads": None}, "num_key_value_heads is null, not a whole number"),
    ({"num_hidden_layers": "12"}, 'num_hidden_layers is "12", not a whole number'),
]


@pytest.mark.parametrize(("changes", "expected"), ARCHITECTURE, ids=lambda value: value if isinstance(value, str) else "")
def test_architecture(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    (line,) = failures(build(write_model(tmp_path / "model", **changes)))
    assert line.startswith("model.path: ")
    assert str(tmp_path / "model" / "config.json") in line
    assert expected in line


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None, "sliding_window": 4096, "use_sliding_window": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "attention_bias": False},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "mistral", "head_dim": None},
        {"model_type": "mistral", "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 1024},
        PHI3 | {"partial_rotary_factor": 1.0, "resid_pdrop": 0.0, "rope_scaling": None, "attention_bias": False},
        PHI3 | {"num_key_value_heads": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {"model_type": "olmo2", "num_key_value_heads": None},
        MIXTRAL,
        QWEN3_MOE,
        QWEN3_MOE | {"num_experts": None, "num_local_experts": 6, "norm_topk_prob": True},
        QWEN3_MOE | {"num_experts_per_tok": 1},
        DEEPSEEK,
        DEEPSEEK | {"n_group": 1, "topk_group": 1},
        DEEPSEEK | {"num_key_value_heads": None, "q_lora_rank": None},
    ],
)
def test_supported_architectures(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(build(write_model(tmp_path / "model", **changes)), 1)


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [3]}, {"decoder_sparse_step": 2}, {"decoder_sparse_step": 99}])
def test_sglang_refuses_dense_layers_among_those_with_experts(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", **(QWEN3_MOE | changes))
    (line,) = failures(build(model, 'rollout.engine="sglang"'))
    assert line.startswith("rollout.engine: sglang gives every layer of qwen3_moe experts, and only ")
    check(build(model, 'rollout.engine="sglang"', 'kind="sft"'), 1)
    check(build(write_model(tmp_path / "all", **QWEN3_MOE), 'rollout.engine="sglang"'), 1)


def test_phi3_without_its_longrope(tmp_path: Path) -> None:
    """The model of 131,072 positions as the one of 1,024 that it was made from; other scalings are refused."""
    longrope = {"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
    positions = {"max_position_embeddings": 131072, "original_max_position_embeddings": 1024}
    model = write_model(tmp_path / "model", **PHI3, **positions, rope_scaling=longrope)
    check(build(model, 'model.rope_scaling={"rope_type": "default"}'), 1)
    (line,) = failures(build(model, 'model.rope_scaling={"rope_type": "linear", "factor": 4.0}'))
    assert "rope_type 'linear' is not supported for phi3, which transformers scales by longrope alone; use rope_type" in line


def test_sglang_refuses_olmo2s_heads_of_a_width_of_their_own(tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide", model_type="olmo2", head_dim=64)
    (line,) = failures(build(wide, 'rollout.engine="sglang"'))
    assert line.startswith("rollout.engine: sglang takes hidden_size / num_attention_heads for the width of olmo2's heads, and ")
    check(build(wide, 'rollout.engine="vllm"'), 1)
    check(build(write_model(tmp_path / "model", model_type="olmo2", head_dim=None), 'rollout.engine="sglang"'), 1)


SERVED_DEEPSEEK = DEEPSEEK | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}


@pytest.mark.parametrize(
    ("engine", "changes", "expected"),
    [
        ("vllm", SERVED_DEEPSEEK | {"tie_word_embeddings": True}, "vllm gives deepseek_v3 an output layer of its own, and "),
        ("sglang", QWEN3_MOE | {"tie_word_embeddings": True}, "sglang gives qwen3_moe an output layer of its own, and "),
        ("sglang", MIXTRAL | {"tie_word_embeddings": True}, "sglang gives mixtral an output layer of its own, and "),
        ("sglang", MIXTRAL | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "sglang does not scale mixtral's RoPE, and "),
        ("vllm", SERVED_DEEPSEEK | {"rms_norm_eps": 1e-5}, "vllm gives the norms of deepseek_v3's latents rms_norm_eps 1e-05 of "),
        (
            "sglang",
            SERVED_DEEPSEEK | {"rms_norm_eps": 1e-5},
            "sglang gives the norms of deepseek_v3's latents rms_norm_eps 1e-05 of ",
        ),
        (
            "vllm",
            SERVED_DEEPSEEK | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "vllm takes any scaling of deepseek_v3's RoPE",
        ),
        ("sglang", SERVED_DEEPSEEK | {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "sglang takes any scaling of"),
        ("vllm", SERVED_DEEPSEEK | {"topk_method": None}, "vllm reads topk_method in "),
        ("sglang", SERVED_DEEPSEEK | {"topk_method": "greedy"}, "sglang reads topk_method in "),
        ("vllm", SERVED_DEEPSEEK | {"scoring_func": None}, "vllm reads scoring_func in "),
        ("sglang", SERVED_DEEPSEEK | {"scoring_func": "softmax"}, "sglang reads scoring_func in "),
        ("vllm", SERVED_DEEPSEEK | {"moe_layer_freq": 2}, "vllm reads moe_layer_freq in "),
        ("sglang", SERVED_DEEPSEEK | {"moe_layer_freq": None}, "sglang reads moe_layer_freq in "),
    ],
)
def test_models_that_an_engine_computes_otherwise(tmp_path: Path, engine: str, changes: dict[str, Any], expected: str) -> None:
    model = write_model(tmp_path / "model", **changes)
    (line,) = failures(build(model, f'rollout.engine="{engine}"'))
    assert line.startswith(f"rollout.engine: {expected}")
    assert str(model) in line
    assert "use" in line
    check(build(model, f'rollout.engine="{engine}"', 'kind="sft"'), 1)
    check(build(model, 'rollout.engine="embedded"'), 1)


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("vllm", SERVED_DEEPSEEK | {"rms_norm_eps": 1e-6, "rope_scaling": {"type": "yarn", "factor": 40}}),
        ("vllm", SERVED_DEEPSEEK | {"moe_layer_freq": None}),
        ("vllm", MIXTRAL | {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("vllm", QWEN3_MOE | {"tie_word_embeddings": True}),
        ("sglang", SERVED_DEEPSEEK | {"tie_word_embeddings": True}),
        ("sglang", MIXTRAL | {"rms_norm_eps": 1e-5}),
        ("sglang", {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_models_that_an_engine_computes_as_transformers(tmp_path: Path, engine: str, changes: dict[str, Any]) -> None:
    check(build(write_model(tmp_path / "model", **changes), f'rollout.engine="{engine}"'), 1)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 1023}, 1023),
        (MIXTRAL | {"sliding_window": 512}, 512),
        (PHI3 | {"sliding_window": 1023}, 1023),
        ({"use_sliding_window": True, "sliding_window": 512}, 512),
        ({"layer_types": ["full_attention", "sliding_attention"] * 6, "sliding_window": 512}, 512),
    ],
)
def test_sequences_fit_into_the_sliding_window(tmp_path: Path, changes: dict[str, Any], window: int) -> None:
    (line,) = failures(build(write_model(tmp_path / "model", **changes)))
    assert f"= 1024 tokens exceed the sliding window of {window} tokens of model.path" in line


@pytest.mark.parametrize(
    ("changes", "parallel", "world_size", "expected"),
    [
        (MIXTRAL, {"ep": 4}, 4, "policy.parallel.ep: ep 4 does not divide the model's 6 experts; choose among 1, 2, 3, 6"),
        (QWEN3_MOE, {"etp": 8}, 8, "policy.parallel.etp: etp 8 (tp when not given) does not divide the experts' width 36"),
        (MIXTRAL, {"ep": 3}, 4, "world size 4 = etp 1 × ep 3 × pp 1 × expert dp ?: 4 is not divisible by 3"),
        (MIXTRAL, {"tp": 2}, 2, "sequence_parallel: is false, and tp 2 with experts (mixtral) needs it; set it to true"),
        (DEEPSEEK, {"tp": 2}, 2, "sequence_parallel: is false, and tp 2 with latent attention (deepseek_v3) needs it"),
        (
            DEEPSEEK | {"num_attention_heads": 6},
            {"tp": 4, "etp": 1, "sequence_parallel": True},
            4,
            "policy.parallel.tp: tp 4 does not divide the model's num_attention_heads 6",
        ),
        (
            DEEPSEEK | {"moe_intermediate_size": 5},
            {"tp": 2, "etp": 1, "sequence_parallel": True},
            2,
            "tp 2 does not divide the model's n_shared_experts × moe_intermediate_size 5",
        ),
        ({}, {"ep": 2}, 2, "policy.parallel.ep: is 2, but the model has no experts (qwen2); set it to 1"),
        (QWEN3_MOE | {"decoder_sparse_step": 99}, {"ep": 2}, 2, "ep: is 2, but the model has no experts (qwen3_moe)"),
    ],
)
def test_experts_and_latent_attention(
    tmp_path: Path, changes: dict[str, Any], parallel: dict[str, Any], world_size: int, expected: str
) -> None:
    model = write_model(tmp_path / "model", **changes)
    assert_lines(failures(build(model, f"policy.parallel={json.dumps(parallel)}"), world_size), [expected])


def test_attention_of_transformer_engine(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", **DEEPSEEK)
    settings = ['model.attention_impl="transformer_engine"', 'model.transformer_impl="local"']
    expected = [
        "model.attention_impl: transformer_engine takes bfloat16 and Transformer Engine's layers, not dtype float32 with "
        "transformer_impl local; change them, or use megarl",
        "model.attention_impl: transformer_engine is not supported for latent attention (deepseek_v3)",
    ]
    assert_lines(failures(build(model, *settings)), expected)


def test_experts_divide_into_other_sizes_than_dense_layers(tmp_path: Path) -> None:
    parallel = {"tp": 4, "ep": 2, "etp": 2, "pp": 3, "sequence_parallel": True}
    # no layer is dense, so tp need not divide intermediate_size
    model = write_model(tmp_path / "model", **(MIXTRAL | {"intermediate_size": 98}))
    check(build(model, f"policy.parallel={json.dumps(parallel)}"), 12)


FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"pp": 2, FIRST: 5}, None),
        ({"pp": 2, FIRST: 5, LAST: 7}, None),
        ({"pp": 4, FIRST: 2, LAST: 4}, None),
        ({"pp": 3, "vpp": 2, LAST: 4}, None),
        ({FIRST: 5}, f"policy.parallel.{FIRST}: is 5 and pp is 1, so there is one stage"),
        ({"pp": 2, "vpp": 2, LAST: 5}, f"policy.parallel.{LAST}: 5 layers do not divide into vpp 2 chunks"),
        ({"pp": 4, FIRST: 1}, f"the model's 12 layers less {FIRST} 1 leave 11 for the other 3 stages of vpp 1 chunks"),
        ({"pp": 2, FIRST: 12}, "leave 0 for the other 1 stages"),
        ({"pp": 2, FIRST: 5, LAST: 5}, f"{FIRST} 5 and {LAST} 5 leave 2 for the other 0 stages"),
        (
            {"pp": 5},
            "do not divide into pp 5 × vpp 1 = 5 equal chunks; choose pp × vpp among 1, 2, 3, 4, 6, 12, or set num_layers_in",
        ),
    ],
)
def test_uneven_pipeline_stages(model: Path, parallel: dict[str, Any], expected: str | None) -> None:
    config = build(model, f"policy.parallel={json.dumps(parallel)}")
    world_size = parallel.get("pp", 1)
    if expected is None:
        check(config, world_size)
    else:
        assert expected in failures(config, world_size)[0]


def test_old_llama_has_as_many_key_value_heads_as_heads(tmp_path: Path) -> None:
    assert read_architecture(write_model(tmp_path / "model", model_type="llama", num_key_value_heads=None)).num_kv_heads == 8


def test_model_folder(tmp_path: Path) -> None:
    assert_lines(failures(build(tmp_path / "absent")), [f"model.path: {tmp_path / 'absent'} is not a folder"])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_lines(failures(build(empty)), ["has no config.json"])
    (empty / "config.json").write_text('{"model_type": ')
    assert_lines(failures(build(empty)), ["config.json is not valid JSON"])
    (empty / "config.json").write_text("[]")
    assert_lines(failures(build(empty)), ["config.json is not valid JSON (it holds list, not an object)"])


def test_reference(model: Path, tmp_path: Path) -> None:
    kl = ['algorithm.kl={"place": "loss", "coefficient": 0.1}']
    check(build(model, *kl), 1)
    check(build(model, 'reference={"path": "absent"}'), 1)  # not built without a KL term
    assert_lines(failures(build(model, *kl, 'reference={"path": "absent"}')), ["reference.path: absent is not a folder"])
    other = write_model(tmp_path / "other", vocab_size=101, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    lines = failures(build(model, *kl, f'reference={{"path": "{other}", "parallel": {{"tp": 4}}}}'), 4)
    assert_lines(
        lines,
        [
            "reference.parallel.tp: tp 4 does not divide the model's num_attention_heads 6",
            "reference.parallel.tp: tp 4 does not divide the model's num_key_value_heads 2",
            "vocab_size 101",
            "has no *.safetensors file",
        ],
    )
    assert_lines(
        failures(build(model, *kl, 'reference={"max_tokens_per_micro_batch": 8}')),
        ["reference.max_tokens_per_micro_batch: 8 tokens"],
    )


def test_all_mistakes_are_reported_together(model: Path) -> None:
    config = build(model, "optimizer.min_learning_rate=1", "rollout.samples_per_prompt=1", "policy.parallel.tp=3")
    assert len(failures(config, 2)) == 5
