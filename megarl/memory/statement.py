"""The peak memory of every kind of rank of a run, by part: what it holds all the time, and what the worst moment of a step adds.

The moments are: prompts and sampling in the embedded engine on rank 0; scoring by each role; forward and backward of each role that
learns; its optimizer step; sending weights to an engine. Counted are tensors; not counted are Python, libraries, the CUDA context,
what communication libraries and the allocator keep for themselves, server engines, and checkpoints while they are written.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from megarl.config.models import ModelOfRun, models_of
from megarl.config.schema import Config, RoleConfig
from megarl.families.base.architecture import Architecture, padded_vocabulary_size
from megarl.families.registry import read_architecture
from megarl.memory import activations, held
from megarl.memory.activations import FLOAT, HeadShape, LayerShape
from megarl.parallel.axis_sizes import AxisSizes, axis_sizes
from megarl.weights.mapping import WeightMap, build_weight_map
from megarl.weights.value_head import with_value_head

Device = Literal["cpu", "cuda"]
ELEMENT = {"float32": 4, "bfloat16": 2}  # bytes


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Some of a rank's memory.

    Attributes:
        owner: a role, ``engine``, or ``run`` for what belongs to none.
        name: what it is.
        num_bytes: on this rank.
        tensors: by name, where the part is made of several kinds.
    """

    owner: str
    name: str
    num_bytes: float
    tensors: activations.Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """The peak of one kind of rank.

    Attributes:
        ranks: that are alike, the first one and how many.
        stages: role to its pipeline stage there.
        moment: when the peak is, such as ``policy update``.
        held: parts that are there all the time.
        added: parts that the moment adds.
        moments: bytes at each moment's peak, all that is held included.
    """

    first_rank: int
    num_ranks: int
    stages: dict[str, int]
    moment: str
    held: tuple[MemoryPart, ...]
    added: tuple[MemoryPart, ...]
    moments: dict[str, float]

    @property
    def peak(self) -> float:
        """Peak of all the parts, in bytes."""
        return self.moments[self.moment]


@dataclass(frozen=True, slots=True)
class _Role:
    """A model of the run in its layout, with the micro-batches that it works on."""

    name: str
    config: RoleConfig
    ranks: range  # of the world
    architecture: Architecture
    weight_map: WeightMap
    sizes: AxisSizes
    elements: tuple[held.Elements, ...]  # of each pipeline stage
    element: int
    learns: bool
    gives_values: bool
    tokens: int  # of a micro-batch, on one rank
    rows: int  # trained tokens of it
    micro_batches: int  # of one update

    @property
    def layer(self) -> LayerShape:
        return LayerShape(architecture=self.architecture, parallel=self.config.parallel, tokens=self.tokens, element=self.element)

    @property
    def head(self) -> HeadShape:
        padded = padded_vocabulary_size(self.architecture, self.weight_map.pad_multiple, self.config.parallel.tp)
        return HeadShape(
            rows=self.rows,
            hidden_size=self.architecture.hidden_size,
            vocabulary=0 if self.gives_values else padded // self.config.parallel.tp,
            chunk=self.config.logprob_chunk_tokens,
            element=self.element,
        )

    def layers(self, stage: int) -> list[bool]:
        """Return for each layer of a stage whether it has experts."""
        stages = self.sizes.pipeline_rank_of_layers(self.architecture.num_layers)
        return [self.architecture.is_moe_layer(layer) for layer, of in enumerate(stages) if of == stage]

    def stage_of(self, rank: int) -> int | None:
        """Return the pipeline stage of a rank of the world; None outside the role."""
        return (rank - self.ranks.start) // (len(self.ranks) // self.sizes.pp) if rank in self.ranks else None

    def offloaded(self, part: MemoryPart) -> bool:
        """Return whether a part that the role holds is in host memory while the role is idle."""
        return self.config.offload == "all" or (self.config.offload == "optimizer" and part.name == "optimizer state")

    def held_parts(self, stage: int) -> tuple[MemoryPart, ...]:
        parallel = self.config.parallel
        counts = self.elements[stage]
        parts = [MemoryPart(self.name, "weights", held.weights(counts, self.element), {})]
        if self.learns:
            parts.append(MemoryPart(self.name, "gradients", held.gradients(counts), {}))
            state = held.optimizer_state(counts, parallel, self.sizes, self.element)
            parts.append(MemoryPart(self.name, "optimizer state", state, {}))
        return tuple(parts)

    def gathered(self) -> float:
        """Return the one buffer in which linear layers under sequence parallelism gather a micro-batch (megatron-core)."""
        parallel = self.config.parallel
        is_used = parallel.sequence_parallel and parallel.tp > 1
        return float(self.element * self.tokens * self.architecture.hidden_size) if is_used else 0.0

    def scoring(self, stage: int) -> tuple[MemoryPart, ...]:
        layers = self.layers(stage)
        widest = max((activations.forward_only(self.layer, is_moe=is_moe) for is_moe in set(layers)), default=0.0)
        head = (
            activations.head_kept(self.head) + activations.head_forward(self.head) + 2 * self.layer.hidden
            if self._is_last(stage)
            else 0.0
        )
        return self._largest(activations_bytes=widest, head_bytes=head, before=())

    def update(self, stage: int, device: Device) -> tuple[MemoryPart, ...]:
        """Return the activations of the micro-batches in flight, and the working set of a layer's or of the head's backward pass.

        Of activations in host memory, which on a CPU is the rank's own, a GPU has one layer's.
        """
        layers, recompute = self.layers(stage), self.config.recompute
        kinds = [activations.saved(self.layer, is_moe=is_moe, recompute=recompute) for is_moe in layers]
        flight = self._in_flight(stage)
        tensors = activations.scaled(activations.added(*kinds), flight)
        if self.config.offload_activations and device == "cuda":
            tensors = max([{}, *kinds], key=activations.total)
        parallel = self.config.parallel
        if parallel.pp > 1:
            ends = (not self._is_last(stage)) + (stage > 0 and self.element != FLOAT)
            tensors["sent and received hidden states"] = ends * self.layer.hidden * flight * parallel.vpp
        head = 0.0
        if self._is_last(stage):
            norm = activations.norm(self.layer.norm_tokens, self.architecture.hidden_size, self.element)
            # gone when the layers' backward begins
            head = (
                norm["norm inputs"]
                + norm["normalised inputs"]
                + activations.head_kept(self.head)
                + activations.head_backward(self.head)
            )
        working = max((activations.working(self.layer, is_moe=is_moe, recompute=recompute) for is_moe in set(layers)), default=0.0)
        if self.architecture.tied_embeddings and parallel.pp == 1:
            working += self.element * self.head.weight_elements  # waits for the embedding's own gradient
        saved = MemoryPart(self.name, "activations", activations.total(tensors), tensors)
        return self._largest(activations_bytes=working, head_bytes=head, before=(saved,))

    def reduction(self, stage: int) -> tuple[MemoryPart, ...]:
        """Return the copy of the whole gradient buffer that gloo reduces and scatters."""
        return (MemoryPart(self.name, "gloo's copy of the gradients", held.gradients(self.elements[stage]), {}),)

    def step(self, stage: int) -> tuple[MemoryPart, ...]:
        size = held.optimizer_step(self.elements[stage], self.config.parallel, self.sizes)
        return (MemoryPart(self.name, "optimizer step", size, {}),)

    def whole_tensors(self) -> float:
        """Return the largest tensor, gathered on rank 0, and its parts."""
        largest = max(math.prod(shape) for shape in self.weight_map.hugging_face_shapes().values())
        return 2.0 * self.element * largest

    def _is_last(self, stage: int) -> bool:
        return stage == self.sizes.pp - 1

    def _in_flight(self, stage: int) -> float:
        """Return the micro-batches whose activations of the whole stage are kept at the same time (megatron-core's schedules)."""
        pp, vpp = self.sizes.pp, self.sizes.vpp
        if vpp == 1:
            return min(pp - stage, self.micro_batches)
        warmup = 2 * (pp - stage - 1) + (vpp - 1) * pp
        return min(warmup + 1, self.micro_batches * vpp) / vpp

    def _largest(self, *, activations_bytes: float, head_bytes: float, before: tuple[MemoryPart, ...]) -> tuple[MemoryPart, ...]:
        if head_bytes > activations_bytes:
            name = "values" if self.gives_values else "log-probability chunk"
            return (*before, MemoryPart(self.name, name, head_bytes, {}))
        return (*before, MemoryPart(self.name, "one layer's work", activations_bytes, {}))


def state_memory(config: Config, world_size: int, device: Device) -> list[RankMemory]:
    """State the peak of every kind of rank, the worst first.

    Args:
        config: that passed the cross-checks for this world.
        world_size: ranks of the run.
        device: that the ranks compute on; of GPUs only their own memory is counted.

    Raises:
        ConfigError: a layout does not divide the model or the world.
    """
    roles = [_role(config, model, world_size) for model in models_of(config).values()]
    kinds: dict[tuple[tuple[int | None, ...], bool], list[int]] = {}
    for rank in range(world_size):
        stages = tuple(role.stage_of(rank) for role in roles)
        has_engine = rank == 0 and config.samples_from_embedded
        kinds.setdefault((stages, has_engine), []).append(rank)
    result = [_rank(config, roles, stages, ranks, device, has_engine=has_engine) for (stages, has_engine), ranks in kinds.items()]
    return sorted(result, key=lambda kind: -kind.peak)


def _rank(
    config: Config, roles: list[_Role], stages: tuple[int | None, ...], ranks: list[int], device: Device, *, has_engine: bool
) -> RankMemory:
    policy = roles[0]
    present = [(role, stage) for role, stage in zip(roles, stages, strict=True) if stage is not None]
    # Copies of what is offloaded stay in host memory, which on a CPU is the ranks' own.
    is_own = device == "cpu"
    held_parts = [part for role, stage in present for part in role.held_parts(stage) if is_own or not role.offloaded(part)]
    names = {role.name for role in roles}
    size = held.batch(config.step_size.tokens, reference="reference" in names, critic="critic" in names)
    if device == "cpu":
        held_parts.append(MemoryPart("run", "batch", size, {}))
    if gathered := max((role.gathered() for role, _ in present), default=0.0):
        held_parts.append(MemoryPart("run", "buffer of gathered activations", gathered, {}))
    moments: dict[str, tuple[MemoryPart, ...]] = {}
    for role, stage in present:
        brought = tuple(part for part in role.held_parts(stage) if role.offloaded(part))
        weights = tuple(part for part in brought if part.name == "weights")
        if config.learns_from_samples or not role.learns:
            moments[f"{role.name} scoring"] = (*weights, *role.scoring(stage))
        if role.learns:
            moments[f"{role.name} update"] = (*brought, *role.update(stage, device))
            moments[f"{role.name} optimizer step"] = (*brought, *role.step(stage))
            if device == "cpu" and role.config.parallel.distributed_optimizer:
                moments[f"{role.name} gradient reduction"] = (*brought, *role.reduction(stage))
    if has_engine:
        engine = held.embedded_engine(config, policy.architecture, policy.weight_map, policy.element)
        held_parts.append(MemoryPart("engine", "weights", engine["weights"], {}))
        for moment, names_of_parts in (
            ("prompts", ("key-value cache of prompts", "one layer over all prompts")),
            ("sampling", ("key-value cache", "logits")),
        ):
            moments[moment] = tuple(MemoryPart("engine", name, engine[name], {}) for name in names_of_parts)
        moments["weight update"] = (MemoryPart("policy", "gathered tensor", policy.whole_tensors(), {}),)
    elif config.learns_from_samples and not config.samples_from_embedded:
        transfer = config.rollout.weight_transfer
        staging = 2.0 * (transfer.bucket_mib << 20) if transfer.method == "slices" else policy.whole_tensors()
        moments["weight update"] = (MemoryPart("policy", "staging of weights", staging, {}),)
    always = sum(part.num_bytes for part in held_parts)
    peaks = {moment: always + sum(part.num_bytes for part in parts) for moment, parts in moments.items()}
    worst = max(peaks, key=lambda moment: peaks[moment])
    return RankMemory(
        first_rank=ranks[0],
        num_ranks=len(ranks),
        stages={role.name: stage for role, stage in present},
        moment=worst,
        held=tuple(held_parts),
        added=moments[worst],
        moments=peaks,
    )


def state_relayout(before: Config, after: Config, world_size: int, device: Device) -> list[RankMemory]:
    """State the peak of every kind of rank while what learns goes from one stage's layout to the next, the worst first.

    One learner after the other is built again, takes weights and optimizer state over from what it was, and that is then freed
    (``loop/relayout.py``). Frozen models and engines are not there. Owners of what is still in the layout before are ``old policy``
    and ``old critic``.

    Args:
        before, after: configs of two stages, one after the other.
        world_size: ranks of the run.
        device: that the ranks compute on.

    Raises:
        ConfigError: a layout does not divide the model or the world.
    """
    old, new = models_of(before), models_of(after)
    roles = [(_role(before, old[name], world_size), _role(after, new[name], world_size)) for name in new if name in old]
    learners = [pair for pair in roles if pair[1].learns]
    kinds: dict[tuple[int | None, ...], list[int]] = {}
    for rank in range(world_size):
        kinds.setdefault(tuple(role.stage_of(rank) for pair in learners for role in pair), []).append(rank)
    staging = MemoryPart("run", "staging of the move", 2.0 * (after.rollout.weight_transfer.bucket_mib << 20), {})
    result = []
    for ranks in kinds.values():
        rank = ranks[0]
        moments = {
            f"{pair[1].name} changes layout": (*_while_one_moves(learners, moving, rank, device), staging)
            for moving, pair in enumerate(learners)
        }
        peaks = {moment: sum(part.num_bytes for part in parts) for moment, parts in moments.items()}
        worst = max(peaks, key=lambda moment: peaks[moment])
        stages = {name: role.stage_of(rank) for old, new in learners for name, role in ((f"old {old.name}", old), (new.name, new))}
        result.append(
            RankMemory(
                first_rank=rank,
                num_ranks=len(ranks),
                stages={name: stage for name, stage in stages.items() if stage is not None},
                moment=worst,
                held=(),
                added=moments[worst],
                moments=peaks,
            )
        )
    return sorted(result, key=lambda kind: -kind.peak)


def _while_one_moves(learners: list[tuple[_Role, _Role]], moving: int, rank: int, device: Device) -> Iterator[MemoryPart]:
    """Yield the learners before it in new layouts, those after it in old ones, and itself in both; without old gradients."""
    for number, (old, new) in enumerate(learners):
        present = [(old, f"old {old.name}")] if number >= moving else []
        present += [(new, new.name)] if number <= moving else []
        for role, owner in present:
            stage = role.stage_of(rank)
            for part in () if stage is None else role.held_parts(stage):
                if role is old and part.name == "gradients":
                    continue
                # of what is offloaded there is a copy in host memory, which on a CPU is the rank's own
                copies = 1 if not role.offloaded(part) else (number == moving) + (device == "cpu")
                yield replace(part, owner=owner, num_bytes=copies * part.num_bytes)


@lru_cache(maxsize=8)  # of hundreds of experts it takes a second, and advice asks for many layouts
def _weight_map(path: Path, pad_multiple: int, *, gives_values: bool) -> WeightMap:
    architecture = read_architecture(path)
    if gives_values:
        architecture = replace(architecture, tied_embeddings=False)
    weight_map = build_weight_map(architecture, pad_multiple, with_transformer_engine=False)
    return with_value_head(weight_map) if gives_values else weight_map


def _role(config: Config, model: ModelOfRun, world_size: int) -> _Role:
    role, step = model.role, config.step_size
    weight_map = _weight_map(model.path.resolve(), config.model.vocabulary_pad_multiple, gives_values=model.gives_values)
    architecture = weight_map.architecture
    ranks = role.ranks(world_size)
    sizes = axis_sizes(role.parallel, len(ranks))
    of_update = step.tokens // (config.updates_per_step if model.learns else 1)
    of_replica = max(step.unit_tokens, -(-of_update // sizes.dp))
    in_micro_batch = min(role.max_tokens_per_micro_batch, of_replica)
    tokens = -(-in_micro_batch // sizes.cp)
    return _Role(
        name=model.name,
        config=role,
        ranks=ranks,
        architecture=architecture,
        weight_map=weight_map,
        sizes=sizes,
        elements=held.elements(weight_map, sizes, aligned=model.learns and role.parallel.distributed_optimizer),
        element=ELEMENT[config.model.dtype],
        learns=model.learns,
        gives_values=model.gives_values,
        tokens=tokens,
        rows=max(1, round(tokens * step.trained_share)),
        micro_batches=-(-of_replica // in_micro_batch),
    )
