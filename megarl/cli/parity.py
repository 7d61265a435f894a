"""``megarl parity``: one batch, many layouts, the same gradients.

The batch is made once from the config's own prompts (so lengths are the user's) with responses of unequal lengths, random
rewards, and old, reference and sampler's log-probs near the model's own, so that ratios, clipping and KL all matter. Every
layout then computes loss and gradients of that batch, and what each of the run's models says of it, in a world of its own; each
gradient, put together under its Hugging Face name, and each model's outputs are compared with one rank's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from megarl.algorithms.algorithm import Algorithm
from megarl.algorithms.batches import build_preference_batch, build_supervised_batch
from megarl.algorithms.objectives import ObjectiveFunction, supervised_objective
from megarl.algorithms.preferences import build_pair_objective
from megarl.config.layout_text import MOST_RANKS, dp_of, layout_items, parallel_of, quoted_layout
from megarl.config.models import models_of
from megarl.config.schema import Config, CriticConfig, ParallelConfig, ReferenceConfig, RewardModelConfig, RoleConfig, Rows
from megarl.data.packing import no_routing, with_scored_ends
from megarl.errors import ConfigError, cut, quoted
from megarl.families.registry import read_architecture
from megarl.parallel.launch import run_local_ranks
from megarl.train.engine import TrainingEngine
from megarl.train.learner import Learner
from megarl.train.roles import Critic, Policy, Reference, RewardModel, build_learner, compute_outputs, is_main_rank
from megarl.types import NO_VERSION, PackedBatch, TokenOutputs, TrainBatch
from megarl.weights.transfer import hugging_face_gradients

CRITIC = "critic."
FOLLOWERS: dict[str, type[RoleConfig]] = {"reference": ReferenceConfig, "critic": CriticConfig, "reward_model": RewardModelConfig}


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """What one layout computed.

    Attributes:
        loss_scale: sum of weight times |advantage| (or of the weights, supervised): the loss's size before terms cancel.
        loss: of the policy, and of the critic where there is one, added up.
        gradients: by Hugging Face name; the critic's with ``critic.`` in front.
        parameters: Megatron parameter to the Hugging Face tensors in it.
        outputs: what each model says of the batch, by model; empty where only gradients were asked for.
    """

    layout: str
    num_ranks: int
    loss: float
    loss_scale: float
    gradient_norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, tuple[str, ...]]
    outputs: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One layout against one rank.

    Attributes:
        loss_gap: |loss - reference| / max(|reference|, loss_scale): whitened advantages leave little of the loss but its rounding.
        norm_gap: |norm - reference| / reference of the global gradient norm.
        worst_gap: largest over Megatron parameters of ‖gradient - reference‖ / ‖reference‖. Query, key and value are one
            parameter there: the key bias's own gradient nearly cancels (softmax ignores a shift), which leaves rounding.
        worst_parameter: where.
        output_gap: largest over models of ‖outputs - reference‖ / ‖reference‖.
    """

    layout: str
    num_ranks: int
    loss: float
    loss_gap: float
    norm_gap: float
    worst_gap: float
    worst_parameter: str
    output_gap: float


def synthetic_batch(prompts: Sequence[Sequence[int]], config: Config) -> PackedBatch:
    """Return groups of random responses, lengths 1 to max_new_tokens (one empty), rewards in [0, 1]; a function of the seed.

    Each group has the reward and the length of a greedy response, two tasks take turns, and steps end at about every fourth token,
    whether the method uses them or not. Where training is on pairs two responses, chosen and rejected, none empty.

    Args:
        prompts: token ids; each is answered samples_per_prompt times.
    """
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary_size = read_architecture(config.model.path).vocabulary_size
    limit = config.rollout.max_new_tokens
    in_pairs = config.trains_on_pairs
    tokens, masks, lengths, groups, truncated = [], [], [], [], []
    for group, prompt in enumerate(prompts):
        for sample in range(2 if in_pairs else config.rollout.samples_per_prompt):
            is_empty = group == 0 and sample == 0 and not in_pairs
            length = 0 if is_empty else int(torch.randint(1, limit + 1, (), generator=generator))
            response = torch.randint(0, vocabulary_size, (length,), generator=generator)
            tokens.append(torch.cat([torch.tensor(prompt), response]))
            masks.append(torch.arange(len(tokens[-1])) >= len(prompt))
            lengths.append(len(tokens[-1]))
            groups.append(group)
            truncated.append(length == limit)
    loss_mask, group_ids = torch.cat(masks), torch.tensor(groups)
    rewards = torch.rand(len(lengths), generator=generator)
    greedy_rewards = torch.rand(len(prompts), generator=generator)
    greedy_lengths = torch.randint(0, limit + 1, (len(prompts),), generator=generator)
    step_rewards = torch.rand(len(loss_mask), generator=generator)
    ends_step = loss_mask & (torch.rand(len(loss_mask), generator=generator) < 0.25)
    packed = PackedBatch(
        token_ids=torch.cat(tokens),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        loss_mask=loss_mask,
        sampler_logprobs=torch.zeros(len(loss_mask)),
        weight_versions=torch.where(loss_mask, 0, NO_VERSION),
        step_rewards=torch.where(ends_step, step_rewards, torch.nan),
        routed_experts=no_routing(len(loss_mask)),
        group_ids=group_ids,
        task_ids=group_ids % 2,
        rewards=rewards,
        truncated=torch.tensor(truncated),
        greedy_rewards=greedy_rewards[group_ids],
        greedy_lengths=greedy_lengths[group_ids],
    )
    return with_scored_ends(packed) if config.trains_reward_model else packed


def gather_sharded_gradients(engine: TrainingEngine) -> None:
    """Complete the gradient buffers that the distributed optimizer reduces by shards."""
    if not engine.role.parallel.distributed_optimizer:
        return
    groups = engine.layout.groups
    for chunk in engine.ddp_chunks:
        for buffers, group in ((chunk.buffers, groups.dp_cp), (chunk.expert_parallel_buffers, groups.expt_dp)):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _add_model_scores(config: Config, batch_file: Path) -> None:
    """Give the batch, on one rank, log-probs near the model's own as those of old policy, reference and sampler."""
    packed: PackedBatch = torch.load(batch_file, weights_only=False)
    if config.trains_reward_model:
        torch.save((packed, None), batch_file)
        return
    logprobs, entropies = Policy(config, total_updates=1).engine.forward_only(packed)
    critic = build_critic(config)
    generator = torch.Generator().manual_seed(config.seed + 1)

    def near(outputs: Tensor) -> Tensor:
        return outputs + 0.3 * torch.randn(outputs.shape, generator=generator) * packed.loss_mask

    old, reference, sampler = near(logprobs), near(logprobs), near(logprobs)
    values = None if critic is None else near(critic.engine.forward_only(packed)[0])
    packed = replace(packed, sampler_logprobs=sampler)
    torch.save((packed, TokenOutputs(old=old, entropies=entropies, reference=reference, values=values)), batch_file)


def build_critic(config: Config) -> Critic | None:
    """Build the critic of a method that has one; every rank must build it."""
    return Critic(config, total_updates=1) if config.has_critic else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """A batch and what is minimised over it, by the policy and by a critic."""

    batch: TrainBatch
    objective: ObjectiveFunction
    value_objective: ObjectiveFunction | None = None


def _of_samples(config: Config, packed: PackedBatch, outputs: TokenOutputs | None) -> _Trained:
    assert outputs is not None
    algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
    (batch,) = algorithm.prepare(packed, outputs, step=0).batches
    return _Trained(batch=batch, objective=algorithm.objective, value_objective=algorithm.value_objective)


def _of_examples(config: Config, packed: PackedBatch, outputs: TokenOutputs | None) -> _Trained:
    return _Trained(batch=build_supervised_batch(packed), objective=supervised_objective)


def _of_pairs(config: Config, packed: PackedBatch, outputs: TokenOutputs | None) -> _Trained:
    reference = outputs.reference if outputs is not None and config.has_reference else None
    return _Trained(batch=build_preference_batch(packed, reference), objective=build_pair_objective(config))


PREPARE: Mapping[Rows, Callable[[Config, PackedBatch, TokenOutputs | None], _Trained]] = {
    "prompts": _of_samples,
    "examples": _of_examples,
    "pairs": _of_pairs,
}


def compute_gradients(
    policy: Learner, critic: Critic | None, config: Config, packed: PackedBatch, outputs: TokenOutputs | None
) -> tuple[float, float, dict[str, Tensor]]:
    """Return the loss, loss_scale and, on rank 0, gradients (see LayoutResult) of one update; collective."""
    trained = PREPARE[config.rows](config, packed, outputs)
    batch = trained.batch
    loss, gradients = _loss_and_gradients(policy, batch, trained.objective)
    sizes = batch.token_weights if batch.sampled is None else batch.token_weights * batch.sampled.advantages.abs()
    scale = float(sizes.sum())
    if critic is not None:
        assert trained.value_objective is not None
        critic_loss, critic_gradients = _loss_and_gradients(critic, batch, trained.value_objective)
        loss, scale = loss + critic_loss, scale + critic_loss
        gradients |= {CRITIC + name: gradient for name, gradient in critic_gradients.items()}
    return loss, scale, gradients


def _loss_and_gradients(model: Learner, batch: TrainBatch, objective: ObjectiveFunction) -> tuple[float, dict[str, Tensor]]:
    layout = model.engine.layout
    metrics = layout.share(model.engine.forward_backward(batch, objective) if layout.is_member else None)
    gather_sharded_gradients(model.engine)
    return metrics["loss"], dict(hugging_face_gradients(model.engine.chunks, model.weight_map, layout))


def megatron_parameters(policy: Learner, critic: Critic | None) -> dict[str, tuple[str, ...]]:
    """Yield each trained Megatron parameter and the Hugging Face tensors in it."""
    return {
        prefix + name: tuple(prefix + tensor for tensor in parameter.hugging_face)
        for prefix, model in (("", policy), (CRITIC, critic))
        if model is not None
        for name, parameter in model.weight_map.parameters.items()
        if not (parameter.is_copy or parameter.is_buffer)
    }


def _gradient_norm(model: Learner) -> float:
    layout = model.engine.layout
    return layout.share(model.optimizer.step()[0] if layout.is_member else None)


def _compute(config: Config, name: str, batch_file: Path, result_file: Path) -> None:
    """Compute one rank of one layout."""
    packed, outputs = torch.load(batch_file, weights_only=False)
    policy, critic = build_learner(config, total_updates=1), build_critic(config)
    reference = Reference(config) if config.has_reference else None
    reward_model = RewardModel(config, config.reward_model) if config.reward_model is not None else None
    said: dict[str, Tensor | None]
    if policy.has_value_head:
        said = {"policy": policy.engine.forward_only(packed)[0]}
    else:
        own = compute_outputs(policy, reference, critic, packed)
        said = {"policy": own.old, "reference": own.reference, "critic": own.values}
        said["reward_model"] = None if reward_model is None else reward_model.rewards(packed)
    loss, loss_scale, gradients = compute_gradients(policy, critic, config, packed, outputs)
    norm = math.hypot(*(_gradient_norm(model) for model in (policy, critic) if model is not None))
    if is_main_rank():
        result = LayoutResult(
            layout=name,
            num_ranks=dist.get_world_size(),
            loss=loss,
            loss_scale=loss_scale,
            gradient_norm=norm,
            gradients=gradients,
            parameters=megatron_parameters(policy, critic),
            outputs={model: values for model, values in said.items() if values is not None},
        )
        torch.save(result, result_file)


def parse_layout(text: str) -> dict[str, object]:
    """Read ``"tp=2,pp=2"`` or ``"tp=2,pp=2,critic.tp=4,critic.first_rank=4"``; an empty text is one rank.

    Raises:
        ConfigError: an item is not key=value, or the key is no layout key or given twice.
    """
    known = (*ParallelConfig.model_fields, "dp", "first_rank", "max_tokens_per_micro_batch")
    where = quoted_layout(text)
    items = layout_items(text, where) if text else {}
    for name in items:
        model, _, key = name.rpartition(".")
        if key not in known or model not in ("", *FOLLOWERS):
            raise ConfigError(
                f"{where}: unknown key {cut(name, 40)!r}; give tp, pp, cp, ep or another key of policy.parallel, dp, first_rank or "
                f"max_tokens_per_micro_batch, for another model with {', '.join(f'{follower}.' for follower in FOLLOWERS)} in front"
            )
    return {**items}


def with_layout(config: Config, layout: dict[str, object]) -> tuple[Config, int]:
    """Return the config with its models in another layout, and the ranks it needs.

    A model without keys of its own has the policy's layout and ranks; one with such keys has tp · pp · cp · dp ranks from
    ``first_rank`` on, whatever the config says.

    Args:
        layout: keys of policy.parallel, plus ``dp`` (1 when not given), ``first_rank`` (0) and ``max_tokens_per_micro_batch``;
            those of another model with its name and a dot in front.

    Raises:
        ConfigError: a value is of the wrong type, or the run has no such model.
    """
    where = quoted_layout(",".join(f"{name}={value}" for name, value in layout.items()))
    keys: dict[str, dict[str, object]] = {}
    for name, value in layout.items():
        model, _, key = name.rpartition(".")
        keys.setdefault(model or "policy", {})[key] = value
    unused = sorted(keys.keys() - models_of(config).keys())
    if unused:
        raise ConfigError(f"{where}: the run has no {unused[0]}; leave out the keys that start with {unused[0]}.")
    policy = _in_layout(config.policy, keys.get("policy", {}), where)
    place = policy.model_dump(include={"first_rank", "num_ranks", "parallel", "max_tokens_per_micro_batch", "offload"})
    changed: dict[str, RoleConfig] = {"policy": policy}
    for name, kind in FOLLOWERS.items():
        role = getattr(config, name)
        if name in keys:
            role = role or kind.model_validate(policy.model_dump())
            changed[name] = _in_layout(role, keys[name], where)
        elif role is not None:
            changed[name] = kind.model_validate(role.model_dump() | place)
    world = range(max(role.ranks(0).stop for role in changed.values()))
    for name, role in changed.items():
        if role.ranks(0) == world:
            changed[name] = role.model_copy(update={"num_ranks": None})  # all of them, as a config says it
    return config.model_copy(update=changed), len(world)


def _in_layout(role: RoleConfig, keys: dict[str, object], where: str) -> RoleConfig:
    """Return the role with only these layout keys set; ``where`` begins its errors."""
    sizes = dict(keys)
    dp = dp_of(sizes.pop("dp", 1), where)
    own = {key: sizes.pop(key) for key in ("max_tokens_per_micro_batch", "first_rank") if key in sizes}
    parallel = parallel_of(sizes, where)
    num_ranks = parallel.tp * parallel.pp * parallel.cp * dp
    if num_ranks > MOST_RANKS:
        raise ConfigError(f"{where}: is tp · pp · cp · dp = {num_ranks:.15g} ranks; give sizes of at most {MOST_RANKS} ranks")
    place = {"first_rank": 0, "num_ranks": num_ranks, "parallel": parallel.model_dump(), "offload": "none"}
    try:
        return type(role).model_validate(role.model_dump() | place | own)
    except ValidationError as error:
        problem = error.errors()[0]
        shown = quoted(problem["input"])
        raise ConfigError(f"{where}: {problem['loc'][-1]}: is {shown}, {problem['msg']}; give a whole number") from error


def compare_results(reference: LayoutResult, result: LayoutResult) -> ParityRow:
    """Return the relative gaps of one layout to the reference."""
    gaps = {}
    for parameter, names in reference.parameters.items():
        expected, actual = (
            torch.cat([gradients[name].double().flatten() for name in names])
            for gradients in (reference.gradients, result.gradients)
        )
        gaps[parameter] = float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
    worst = max(gaps, key=lambda name: gaps[name])
    return ParityRow(
        layout=result.layout,
        num_ranks=result.num_ranks,
        loss=result.loss,
        loss_gap=abs(result.loss - reference.loss) / max(abs(reference.loss), reference.loss_scale),
        norm_gap=abs(result.gradient_norm - reference.gradient_norm) / reference.gradient_norm,
        worst_gap=gaps[worst],
        worst_parameter=worst,
        output_gap=max((_output_gap(result.outputs[model], outputs) for model, outputs in reference.outputs.items()), default=0.0),
    )


def _output_gap(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


class ParityRun:
    """Holds the batch and one rank's result; ``compare_layout`` runs one layout after another.

    Args:
        config: the run; its own policy layout is not used.
        prompts: token ids of the batch's prompts.
        folder: for the batch and the results.
    """

    def __init__(self, config: Config, prompts: Sequence[Sequence[int]], folder: Path) -> None:
        # gradients of one optimizer step over the whole batch
        self.config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"updates_per_step": 1})})
        self._folder = folder
        self._batch_file = folder / "batch.pt"
        torch.save(synthetic_batch(prompts, config), self._batch_file)
        single, _ = with_layout(self.config, {})
        self._run(_add_model_scores, (single, self._batch_file), 1)
        self.reference = self._result(single, "one rank", 1)

    def _run(self, function: Callable[..., None], args: tuple[object, ...], num_ranks: int) -> None:
        run_local_ranks(function, args, num_ranks, self.config.distributed_timeout)

    def _result(self, config: Config, name: str, num_ranks: int) -> LayoutResult:
        result_file = self._folder / "result.pt"
        self._run(_compute, (config, name, self._batch_file, result_file), num_ranks)
        result: LayoutResult = torch.load(result_file, weights_only=False)
        result_file.unlink()
        return result

    def set_policy(self, **settings: object) -> None:
        """Change settings of the policy role for the layouts that follow, e.g. recompute."""
        self.config = self.config.model_copy(update={"policy": self.config.policy.model_copy(update=settings)})

    def compare_layout(self, name: str, layout: dict[str, object]) -> ParityRow:
        """Compute the batch in ``layout`` (see with_layout) and compare it with one rank."""
        config, num_ranks = with_layout(self.config, layout)
        return compare_results(self.reference, self._result(config, name, num_ranks))
