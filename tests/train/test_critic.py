"""Critic and reward model against transformers' models with a score head: values, gradients, starts, layouts of their own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from megarl.algorithms.algorithm import Algorithm
from megarl.cli.parity import CRITIC, ParityRun, parse_layout, synthetic_batch, with_layout
from megarl.config.schema import Config
from megarl.errors import WeightsError
from megarl.loop.models import build_models
from megarl.loop.rl import train
from megarl.parallel.launch import run_local_ranks
from megarl.train.learner import share_results
from megarl.train.roles import Critic, Policy, RewardModel, compute_outputs, is_main_rank
from megarl.types import PackedBatch, TokenOutputs
from megarl.weights.export import write_hugging_face_folder
from own_batches import OWN_LOGPROBS, parts_of
from tiny import PROMPTS, tiny_config, write_tiny_model

PPO = {"preset": "ppo", "gae": {"discount": 0.95, "trace_decay": 0.9, "value_trace_decay": 0.7}}
LAYOUTS = ["tp=2", "tp=2,sequence_parallel=true", "pp=2,vpp=2", "cp=2", "dp=2,pp=2,max_tokens_per_micro_batch=30"]


def write_classifier(folder: Path, family: str) -> PreTrainedModel:
    """A language model, and in ``score`` beside it the same backbone with a score head; returns the latter."""
    write_tiny_model(folder, family)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(std=0.2)
    model.save_pretrained(folder / "score")
    return model


def expected_values(model: PreTrainedModel, packed: PackedBatch) -> list[list[torch.Tensor]]:
    """The score before each response token, by sequence."""
    values = []
    for start, stop in zip(packed.cu_seqlens.tolist(), packed.cu_seqlens.tolist()[1:], strict=False):
        tokens, trained = packed.token_ids[start:stop], packed.loss_mask[start:stop]
        hidden = model.model(input_ids=tokens[None]).last_hidden_state[0]
        values.append([(model.score.weight[0] * hidden[t - 1]).sum() for t in range(len(tokens)) if trained[t]])
    return values


def compute_values(config: Config, packed: PackedBatch, output: Path) -> None:
    (values,) = Critic(config, total_updates=1).engine.forward_only(packed)
    if is_main_rank():
        torch.save(values, output)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_values_equal_transformers(tmp_path: Path, family: str) -> None:
    model = write_classifier(tmp_path, family)
    config = tiny_config(tmp_path, algorithm=PPO, critic={"path": str(tmp_path / "score"), "max_tokens_per_micro_batch": 64})
    packed = synthetic_batch(PROMPTS, config)
    with torch.no_grad():
        expected = torch.zeros(packed.token_ids.numel(), dtype=torch.float64)
        expected[packed.loss_mask] = torch.stack([value for row in expected_values(model, packed) for value in row]).double()
    assert expected.std() > 0.1
    experts = "ep=2,etp=1,tp=2,sequence_parallel=true" if family == "mixtral" else "tp=2,pp=2"
    for layout in ("", experts):
        changed, num_ranks = with_layout(config, parse_layout(layout))
        run_local_ranks(compute_values, (changed, packed, tmp_path / "out.pt"), num_ranks, 60)
        assert (torch.load(tmp_path / "out.pt").double() - expected).abs().max() <= 1e-5, layout


def test_gradient_equals_a_loop_over_transformers_in_every_layout(tmp_path: Path) -> None:
    """Clipped value loss on targets from GAE with the critic's own λ; the KL in the reward counts too."""
    model = write_classifier(tmp_path, "qwen2").double()
    config = tiny_config(tmp_path, algorithm=PPO, critic={"path": str(tmp_path / "score"), "max_tokens_per_micro_batch": 64})
    run = ParityRun(config, PROMPTS, tmp_path)
    packed, scores = torch.load(tmp_path / "batch.pt", weights_only=False)
    loss = torch.zeros((), dtype=torch.float64)
    trained = [range(start, stop) for start, stop in zip(packed.cu_seqlens.tolist(), packed.cu_seqlens.tolist()[1:], strict=False)]
    for number, values in enumerate(expected_values(model, packed)):
        positions = [p for p in trained[number] if packed.loss_mask[p]]
        if not positions:
            continue
        rewards = [-0.05 * float(scores.old[p] - scores.reference[p]) for p in positions]
        rewards[-1] += float(packed.rewards[number])
        old = [float(scores.values[p]) for p in positions]
        targets, advantage = [0.0] * len(old), 0.0
        for t in reversed(range(len(old))):
            following = old[t + 1] if t + 1 < len(old) else 0.0
            advantage = rewards[t] + 0.95 * following - old[t] + 0.95 * 0.7 * advantage
            targets[t] = advantage + old[t]
        for value, before, target in zip(values, old, targets, strict=True):
            bounded = value.clamp(before - 0.2, before + 0.2)
            loss = loss + torch.maximum((value - target) ** 2, (bounded - target) ** 2) / 2
    (loss / packed.loss_mask.sum()).backward()
    for name, parameter in model.named_parameters():
        gap = (run.reference.gradients[CRITIC + name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert gap <= 1e-5, (name, gap)
    for layout in LAYOUTS:
        row = run.compare_layout(layout, parse_layout(layout))
        assert max(row.worst_gap, row.loss_gap, row.norm_gap) <= 1e-5, row


def export_critic(config: Config, output: Path) -> None:
    assert config.critic is not None and config.critic.path is not None
    tensors = Critic(config, total_updates=1).hugging_face_tensors()
    if is_main_rank():
        write_hugging_face_folder(tensors, config.critic.path, config.model.path, output, with_value_head=True)
    else:
        assert list(tensors) == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "deepseek_v3"])
def test_an_exported_critic_is_what_transformers_and_the_next_run_load(tmp_path: Path, family: str) -> None:
    """Rank 0, which writes, has no part of the critic."""
    model = write_classifier(tmp_path, family)
    # a language model's config beside the weights of a classifier: the export has to say what it is
    shutil.copyfile(tmp_path / "config.json", tmp_path / "score" / "config.json")
    critic = {"path": str(tmp_path / "score"), "first_rank": 1, "parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}}
    config = tiny_config(tmp_path, algorithm=PPO, critic=critic | {"max_tokens_per_micro_batch": 64})
    run_local_ranks(export_critic, (config, tmp_path / "exported"), 5, 60)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    assert loaded.config.architectures == [type(model).__name__] and loaded.config.num_labels == 1
    original = model.state_dict()
    assert loaded.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
    packed = synthetic_batch(PROMPTS, config)
    values = []
    for folder in ("score", "exported"):
        changed = tiny_config(tmp_path, algorithm=PPO, critic={"path": str(tmp_path / folder), "max_tokens_per_micro_batch": 64})
        run_local_ranks(compute_values, (changed, packed, tmp_path / "out.pt"), 1, 60)
        values.append(torch.load(tmp_path / "out.pt"))
    assert torch.equal(*values) and values[0].std() > 0.1


def score_responses(config: Config, packed: PackedBatch, output: Path) -> None:
    assert config.reward_model is not None
    scores = RewardModel(config, config.reward_model).rewards(packed)
    if is_main_rank():
        torch.save(scores, output)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_reward_model_scores_as_transformers(tmp_path: Path, family: str) -> None:
    model = write_classifier(tmp_path, family)
    packed = synthetic_batch(PROMPTS, tiny_config(tmp_path))
    model.config.pad_token_id = None  # transformers then takes the last token of a sequence alone in its batch
    sequences = packed.token_ids.split(packed.sequence_lengths.tolist())
    with torch.no_grad():
        expected = torch.cat([model(input_ids=tokens[None]).logits[0] for tokens in sequences])
    assert expected.std() > 0.1
    for layout in LAYOUTS:
        changed, num_ranks = with_layout(tiny_config(tmp_path), parse_layout(layout))
        role = changed.policy.model_dump() | {"path": str(tmp_path / "score")}
        config = tiny_config(tmp_path, reward_model=role)
        run_local_ranks(score_responses, (config, packed, tmp_path / "out.pt"), num_ranks, 60)
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=0, atol=1e-5)


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    config = tiny_config(tmp_path, reward_model={"path": str(tmp_path)})
    with pytest.raises(WeightsError, match=r"missing: score.weight"):
        run_local_ranks(score_responses, (config, synthetic_batch(PROMPTS, config), tmp_path / "out.pt"), 1, 60)


def score_and_update(config: Config, packed: PackedBatch, output: Path) -> None:
    policy, critic = Policy(config, total_updates=4), Critic(config, total_updates=4)
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    history = []
    for step in range(4):
        scores: TokenOutputs = compute_outputs(policy, None, critic, packed)
        prepared = algorithm.prepare(packed, scores, step)
        policy.update(prepared.batches[0], algorithm.objective)
        (result,) = share_results(critic, [critic.update(prepared.batches[0], algorithm.value_objective)])
        history.append((scores.old, scores.values, result.metrics["loss"], result.gradient_norm))
    if is_main_rank():
        torch.save(history, output)


@pytest.mark.parametrize(
    ("policy", "critic", "first_rank"),
    [
        ({"tp": 2, "pp": 2}, {"tp": 4, "sequence_parallel": True}, 0),
        ({"cp": 2}, {"pp": 2, "vpp": 2}, 0),
        ({"tp": 2}, {"pp": 2}, 2),
    ],
)
def test_policy_and_critic_in_layouts_of_their_own_learn_as_on_one_rank(
    tmp_path: Path, policy: dict[str, Any], critic: dict[str, Any], first_rank: int
) -> None:
    """The policy has ranks 0 to 3, or those below the critic's first."""
    write_tiny_model(tmp_path, "llama")
    # Adam's first steps have the size of the learning rate whatever the gradient's: a large epsilon keeps rounding small
    settings: dict[str, Any] = {"algorithm": PPO | {"kl": {"place": "none", "coefficient": 0.0}}, "optimizer": {"epsilon": 1e-2}}
    settings["optimizer"] |= {"learning_rate": 1e-3}
    histories = []
    for layouts, num_ranks in ((({}, {}), 1), ((policy, critic), 4)):
        roles: list[dict[str, Any]] = [{"parallel": layout, "max_tokens_per_micro_batch": 64} for layout in layouts]
        if num_ranks > 1:
            roles[0]["num_ranks"], roles[1]["first_rank"] = first_rank or num_ranks, first_rank
        config = tiny_config(tmp_path, policy=roles[0], critic=roles[1], **settings)
        run_local_ranks(score_and_update, (config, synthetic_batch(PROMPTS, config), tmp_path / "out.pt"), num_ranks, 60)
        histories.append(torch.load(tmp_path / "out.pt"))
    for (old, values, loss, norm), (other_old, other_values, other_loss, other_norm) in zip(*histories, strict=True):
        torch.testing.assert_close(other_old, old, rtol=0, atol=1e-4)
        torch.testing.assert_close(other_values, values, rtol=0, atol=1e-4)
        assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-3)
    assert histories[0][-1][2] < histories[0][0][2], "the critic learns"


def test_a_head_that_the_folder_lacks_starts_small_and_equal_in_every_layout(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen2")  # with tied embeddings: the critic has no output layer to tie
    packed = synthetic_batch(PROMPTS, tiny_config(tmp_path))
    found = []
    for layout, num_ranks in ({}, 1), ({"tp": 2}, 2), ({"pp": 2, "cp": 2}, 4):
        config = tiny_config(tmp_path, algorithm=PPO, policy={"parallel": layout, "max_tokens_per_micro_batch": 64})
        run_local_ranks(compute_values, (config, packed, tmp_path / "out.pt"), num_ranks, 60)
        found.append(torch.load(tmp_path / "out.pt"))
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=0, atol=1e-5)
    assert 0 < found[0].abs().max() < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score.weight": torch.zeros(2, 64)}, r"score.weight is \[2, 64\], config.json says \[1, 64\]"),
        ({"model.norm.weight": None}, r"missing: model.norm.weight"),
    ],
)
def test_a_folder_that_is_no_critic_is_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], words: str) -> None:
    write_classifier(tmp_path, "llama")
    file = tmp_path / "score" / "model.safetensors"
    save_file({name: tensor for name, tensor in (load_file(file) | change).items() if tensor is not None}, file)
    config = tiny_config(tmp_path, algorithm=PPO, critic={"path": str(tmp_path / "score")})
    with pytest.raises(WeightsError, match=words):
        run_local_ranks(compute_values, (config, synthetic_batch(PROMPTS, config), tmp_path / "out.pt"), 1, 60)


def adapt_beta(config: Config, output: Path) -> None:
    """Four steps, in the first two of which the critic alone learns."""
    models = build_models(config)
    parts = parts_of(config, synthetic_batch(PROMPTS, config))
    train(parts, models, config.observe)
    coefficients: list[float] = []
    for step, metrics in parts.reporter.steps:
        assert ("loss" in metrics) == (step > 2) and "critic_loss" in metrics
        coefficients.append(metrics["kl_coefficient"])
    torch.save([*coefficients[1:], models.algorithm.kl_coefficient], output)


def test_beta_waits_while_the_critic_alone_learns(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    config = tiny_config(
        tmp_path,
        steps=4,
        algorithm={"preset": "ppo", "kl": {"coefficient": 0.2, "target": 6.0}},
        critic={"warmup_steps": 2},
        observe=OWN_LOGPROBS,
    )
    run_local_ranks(adapt_beta, (config, tmp_path / "out.pt"), 1, 60)
    coefficients = torch.load(tmp_path / "out.pt")
    assert coefficients[:2] == [0.2, 0.2]
    # the policy has hardly moved from the reference, so beta falls by K · 0.2 after each of its steps
    assert coefficients[2:] == pytest.approx([0.2 * 0.98, 0.2 * 0.98**2])
