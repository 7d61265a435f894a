"""The weight map of one model: every Megatron parameter and the Hugging Face tensors it is made of."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megarl.errors import WeightsError, listed
from megarl.families.base.architecture import Architecture, padded_vocabulary_size
from megarl.families.base.weight_rules import Kind, Layers, LeftOut, Rule, Start
from megarl.families.registry import family_of
from megarl.weights.shards import Parameter, Shard, shard_of


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Two-way map of one model.

    Attributes:
        architecture: the model.
        parameters: every Megatron parameter (and buffer that is a weight) by its global name, in Hugging Face order; with tied
            embeddings the output layer maps to the embedding too, as the last pipeline stage holds a copy.
        pad_multiple: of the vocabulary.
        left_out: tensors that checkpoints may hold and the model does not.
    """

    architecture: Architecture
    parameters: dict[str, Parameter]
    pad_multiple: int
    left_out: tuple[LeftOut, ...] = ()

    def shard(self, name: str, tp_rank: int, tp: int) -> Shard:
        """Return what rank ``tp_rank`` of ``tp`` holds of the Megatron parameter ``name``; for experts the sizes are etp's."""
        padded = padded_vocabulary_size(self.architecture, self.pad_multiple, tp)
        return shard_of(self.parameters[name], self.architecture, padded, tp_rank, tp)

    def shard_shape(self, name: str, tp_rank: int, tp: int) -> tuple[int, ...]:
        """Shape of that part."""
        shard = self.shard(name, tp_rank, tp)
        shape = list(self.parameters[name].shapes[0])
        shape[shard.dim] = sum(piece.stop - piece.start for piece in shard.slices) + shard.padding
        return tuple(shape)

    def is_tensor_parallel(self, name: str) -> bool:
        """False when every tensor parallel rank holds the same values."""
        return self.parameters[name].kind is not Kind.REPLICATED

    def hugging_face_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every Hugging Face tensor, each once."""
        return {name: shape for p in self.parameters.values() for name, shape in zip(p.hugging_face, p.shapes, strict=True)}

    def hugging_face_starts(self) -> dict[str, Start]:
        """Name to value in a model with random weights of every Hugging Face tensor."""
        return {name: start for p in self.parameters.values() for name, start in zip(p.hugging_face, p.start, strict=True)}

    def unknown(self, names: Iterable[str]) -> set[str]:
        """Return those of ``names`` that are not left out by the family."""
        return {name for name in names if not any(tensors.pattern.fullmatch(name) for tensors in self.left_out)}

    def notices(self, names: Iterable[str]) -> list[str]:
        """Return one line for each kind of tensor among ``names`` that a user should know to be left out."""
        lines = []
        for tensors in self.left_out:
            found = sorted(name for name in names if tensors.pattern.fullmatch(name))
            if found and tensors.notice is not None:
                lines.append(f"{len(found)} tensors are left out, {tensors.notice}: {listed(found, 1)}")
        return lines


def build_weight_map(architecture: Architecture, pad_multiple: int, with_transformer_engine: bool) -> WeightMap:
    """Apply the family's table to every layer and expert.

    Raises:
        WeightsError: the table takes one Hugging Face tensor, or names one Megatron parameter, twice.
    """
    family = family_of(architecture.family)
    parameters = list(_apply(family.weight_rules(architecture), architecture, with_transformer_engine))
    _check_single_use(architecture.family, parameters)
    by_name = {parameter.megatron: parameter for parameter in parameters}
    return WeightMap(architecture, by_name, pad_multiple, family.left_out(architecture))


def _apply(rules: tuple[Rule, ...], architecture: Architecture, with_transformer_engine: bool) -> Iterator[Parameter]:
    def parameters_of(where: Iterable[Layers], layer: int | None) -> Iterator[Parameter]:
        for rule in rules:
            if rule.layers in where:
                for expert in range(architecture.num_experts) if rule.per_expert else (None,):
                    yield _parameter(rule, layer, expert, with_transformer_engine)

    yield from parameters_of((Layers.BEFORE,), None)
    for layer in range(architecture.num_layers):
        yield from parameters_of((Layers.ALL, Layers.MOE if architecture.is_moe_layer(layer) else Layers.DENSE), layer)
    yield from parameters_of((Layers.AFTER,), None)


def _parameter(rule: Rule, layer: int | None, expert: int | None, with_transformer_engine: bool) -> Parameter:
    name = (rule.transformer_engine if with_transformer_engine else None) or rule.megatron
    parts = rule.hugging_face
    return Parameter(
        megatron=name.format(layer=layer, expert=expert),
        template=name,
        hugging_face=tuple(part.name.format(layer=layer, expert=expert) for part in parts),
        shapes=tuple(part.shape for part in parts),
        kind=rule.kind,
        layers=rule.layers,
        layer=layer,
        expert=expert,
        start=tuple(part.start for part in parts),
        is_copy=rule.is_copy,
        is_buffer=rule.is_buffer,
        fused=rule.fused,
    )


def _check_single_use(family: str, parameters: list[Parameter]) -> None:
    owners = Counter(name for parameter in parameters if not parameter.is_copy for name in parameter.hugging_face)
    names = Counter(parameter.megatron for parameter in parameters)
    twice = sorted(name for count in (owners, names) for name, uses in count.items() if uses > 1)
    unknown = sorted({name for parameter in parameters if parameter.is_copy for name in parameter.hugging_face} - owners.keys())
    if twice or unknown:
        problems = [
            f"{what}: {listed(found)}" for what, found in (("mapped twice", twice), ("copies of nothing", unknown)) if found
        ]
        raise WeightsError(f"the weight table of family {family} is wrong; {'; '.join(problems)}")
