"""The weight map of one model: every Megatron parameter and the Hugging Face tensors it is made of."""

from dataclasses import dataclass

from megarl.models.architecture import Architecture, padded_vocabulary_size
from megarl.weights.families import llama, qwen2, qwen3
from megarl.weights.rules import Kind, Parameter, Rule, Shard, hugging_face_shape, shard_of

FAMILIES: dict[str, tuple[Rule, ...]] = {"llama": llama.RULES, "qwen2": qwen2.RULES, "qwen3": qwen3.RULES}


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Two-way map of one model.

    Attributes:
        architecture: the model.
        parameters: every Megatron parameter by its global name, in Hugging Face order; with tied embeddings
            ``output_layer.weight`` maps to the embedding too, as the last pipeline stage holds a copy.
        pad_multiple: of the vocabulary.
    """

    architecture: Architecture
    parameters: dict[str, Parameter]
    pad_multiple: int

    def shard(self, name: str, tp_rank: int, tp: int) -> Shard:
        """What rank ``tp_rank`` of ``tp`` holds of the Megatron parameter ``name``."""
        padded = padded_vocabulary_size(self.architecture, self.pad_multiple, tp)
        return shard_of(self.parameters[name], self.architecture, padded, tp_rank, tp)

    def shard_shape(self, name: str, tp_rank: int, tp: int) -> tuple[int, ...]:
        """Shape of that part."""
        shard = self.shard(name, tp_rank, tp)
        shape = list(hugging_face_shape(shard.slices[0].name, self.architecture))
        shape[shard.dim] = sum(piece.stop - piece.start for piece in shard.slices) + shard.padding
        return tuple(shape)

    def is_tensor_parallel(self, name: str) -> bool:
        """False when every tensor parallel rank holds the same values."""
        return self.parameters[name].kind is not Kind.REPLICATED

    def hugging_face_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every Hugging Face tensor, each once."""
        names = [name for parameter in self.parameters.values() for name in parameter.hugging_face]
        return {name: hugging_face_shape(name, self.architecture) for name in names}


def build_weight_map(architecture: Architecture, pad_multiple: int, with_transformer_engine: bool) -> WeightMap:
    """Apply the family's table to every layer."""
    parameters: dict[str, Parameter] = {}
    for group in _by_layer(FAMILIES[architecture.family], architecture.num_layers):
        for rule, layer in group:
            name = (rule.transformer_engine if with_transformer_engine else None) or rule.megatron
            sources = tuple(source.format(layer=layer) for source in rule.hugging_face)
            if architecture.tied_embeddings and rule.megatron == "output_layer.weight":
                sources = ("model.embed_tokens.weight",)
            parameters[name.format(layer=layer)] = Parameter(name.format(layer=layer), sources, rule.kind)
    return WeightMap(architecture, parameters, pad_multiple)


def _by_layer(rules: tuple[Rule, ...], num_layers: int) -> list[list[tuple[Rule, int]]]:
    per_layer = [rule for rule in rules if rule.per_layer]
    first = rules.index(per_layer[0])
    before = [rule for rule in rules[:first] if not rule.per_layer]
    after = [rule for rule in rules[first:] if not rule.per_layer]
    layers = [[(rule, layer) for rule in per_layer] for layer in range(num_layers)]
    return [[(rule, 0) for rule in before], *layers, [(rule, 0) for rule in after]]
