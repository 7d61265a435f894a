"""Models that wait in host memory compute what they compute without, and their memory on the device is really given back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.objectives import ObjectiveFunction
from megarl.cli.parity import synthetic_batch
from megarl.config.schema import Config
from megarl.parallel.launch import run_local_ranks
from megarl.train.engine import TrainingEngine
from megarl.train.learner import Learner, share_results
from megarl.train.roles import Critic, Policy, Reference, compute_outputs, is_main_rank
from megarl.types import PackedBatch, TrainBatch, UpdateResult
from megarl.weights.checkpoint import CheckpointWriter, load_policy, whole_checkpoints
from megarl.weights.manifest import RunState
from tiny import PROMPTS, tiny_config, write_tiny_model

STEPS = 3


def device_bytes(tensors: list[Tensor]) -> list[int]:
    return [tensor.untyped_storage().size() for tensor in tensors]


def weights(engine: TrainingEngine) -> list[Tensor]:
    return [parameter.data for chunk in engine.chunks for parameter in chunk.parameters()]


def training_state(model: Learner) -> list[Tensor]:
    """Gradients, both moments, and in bfloat16 the main parameters."""
    found = [parameter.main_grad for chunk in model.engine.chunks for parameter in chunk.parameters()]
    for optimizer in model.optimizer.megatron.chained_optimizers:
        for main, state in optimizer.optimizer.state.items():
            found += [state["exp_avg"], state["exp_avg_sq"]]
            if model.engine.chunks[0].config.bf16 and isinstance(main, Tensor):
                found.append(main.data)
    return found


def assert_idle(config: Config, policy: Policy, reference: Reference, critic: Critic) -> None:
    """Nothing that has to leave is on the device."""
    if config.policy.offload == "none":
        return
    for model, role in ((policy, config.policy), (critic, config.critic)):
        if role is not None and model.engine.layout.is_member:
            assert set(device_bytes(training_state(model))) == {0}
            assert (set(device_bytes(weights(model.engine))) == {0}) == (role.offload == "all")
    assert set(device_bytes(weights(reference.engine))) <= {0}


def update_on_device(model: Learner, batches: Sequence[TrainBatch], objective: ObjectiveFunction) -> list[UpdateResult | None]:
    """As the loop does it: what the model needs stays on the device from the first update to the last."""
    with model.on_device():
        return [model.update(batch, objective) for batch in batches]


def train(config: Config, packed: PackedBatch, folder: Path, output: Path) -> None:
    """STEPS steps, in float32 with a checkpoint after the first; only the steps behind the checkpoint where there is one."""
    policy, reference, critic = Policy(config, total_updates=STEPS), Reference(config), Critic(config, total_updates=STEPS)
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    first = 0
    if whole_checkpoints(folder):
        first = 1
        with policy.on_device(), critic.on_device():
            template = policy.sharded_state(is_loading=True) | {"critic": critic.sharded_state(is_loading=True)}
            state = load_policy(folder / "step_00000001", template)
            policy.load_state(state)
            critic.load_state(state["critic"])
    history = []
    for step in range(first, STEPS):
        assert_idle(config, policy, reference, critic)
        scores = compute_outputs(policy, reference, critic, packed)
        prepared = algorithm.prepare(packed, scores, step)
        results = share_results(policy, update_on_device(policy, prepared.batches, algorithm.objective))
        critic_results = share_results(critic, update_on_device(critic, prepared.batches, algorithm.value_objective))
        history.append((step, scores.old, scores.reference, scores.values, results, critic_results))
        if step == first == 0 and config.policy.offload == "all" and config.model.dtype == "float32":
            writer = CheckpointWriter(folder, policy.weight_map, keep=2, asynchronous=False)
            with policy.on_device(), critic.on_device():
                state = policy.sharded_state() | {"critic": critic.sharded_state()}
                writer.save(state, RunState(step=1, weight_version=1, data={}, has_critic=True))
    tensors = {f"{name}.{key}": value for name, model in (("policy", policy), ("critic", critic)) for key, value in exported(model)}
    assert_idle(config, policy, reference, critic)
    if is_main_rank():
        torch.save((history, tensors), output)


def exported(model: Learner) -> list[tuple[str, Tensor]]:
    return [(name, tensor.clone()) for name, tensor in model.hugging_face_tensors()]


def roles(offload: bool) -> dict[str, Any]:
    """Policy and critic share one of three ranks; the policy's weights leave too, the critic's stay."""
    names = ("all", "optimizer", "all") if offload else ("none", "none", "none")
    policy = {"num_ranks": 2, "offload": names[0]}
    critic = {"first_rank": 1, "parallel": {"tp": 2}, "offload": names[1]}
    reference = {"num_ranks": 2, "parallel": {"pp": 2}, "offload": names[2]}
    return {
        name: {"max_tokens_per_micro_batch": 64} | role
        for name, role in (("policy", policy), ("critic", critic), ("reference", reference))
    }


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("family", "dtype"), [("qwen2", "float32"), ("llama", "bfloat16")])
def test_a_run_with_offload_equals_one_without(tmp_path: Path, family: str, dtype: str) -> None:
    write_tiny_model(tmp_path / "model", family)

    def run(offload: bool) -> tuple[list[tuple[Any, ...]], dict[str, Tensor]]:
        config = tiny_config(
            tmp_path / "model",
            algorithm={"preset": "ppo", "updates_per_step": 2},
            model={"path": str(tmp_path / "model"), "dtype": dtype},
            optimizer={"learning_rate": 1e-2},
            **roles(offload),
        )
        args = (config, synthetic_batch(PROMPTS, config), tmp_path / "checkpoints", tmp_path / "out.pt")
        run_local_ranks(train, args, 3, 60)
        return torch.load(tmp_path / "out.pt", weights_only=False)

    expected, expected_tensors = run(False)
    assert not torch.equal(expected[0][1], expected[-1][1]), "the policy learns"
    for _ in range(2 if dtype == "float32" else 1):  # the second time from the checkpoint of the first
        history, tensors = run(True)
        for line, expected_line in zip(history, expected[-len(history) :], strict=True):
            for value, expected_value in zip(line, expected_line, strict=True):
                assert torch.equal(value, expected_value) if isinstance(value, Tensor) else value == expected_value
        assert tensors.keys() == expected_tensors.keys()
        assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())
    assert len(history) == (STEPS - 1 if dtype == "float32" else STEPS)
