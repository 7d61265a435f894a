"""The weights of a model that gives one number for each token instead of a distribution: a critic.

Its Hugging Face form is that of transformers' ``*ForSequenceClassification`` with one label: the backbone and ``score.weight``.
"""

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megarl.families.base.weight_blocks import LM_HEAD
from megarl.families.base.weight_rules import Kind, Layers, LeftOut, Start
from megarl.weights.files.safetensors_files import SafetensorsFolder
from megarl.weights.files.sources import RandomSource, SafetensorsSource, WeightSource
from megarl.weights.mapping import WeightMap
from megarl.weights.shards import Parameter, Slice

HEAD = "score.weight"
OUTPUT_LAYER = "output_layer.weight"


def with_value_head(weight_map: WeightMap) -> WeightMap:
    """Return the map of the same model with a value head in the place of its output layer, as models.build.ValueModel."""
    backbone = _backbone(weight_map)
    head = Parameter(
        megatron=OUTPUT_LAYER,
        template=OUTPUT_LAYER,
        hugging_face=(HEAD,),
        shapes=((1, weight_map.architecture.hidden_size),),
        kind=Kind.REPLICATED,
        layers=Layers.AFTER,
        layer=None,
        expert=None,
        start=(Start.SMALL,),
    )
    return replace(backbone, parameters=backbone.parameters | {OUTPUT_LAYER: head})


def value_head_source(folder: Path, weight_map: WeightMap, seed: int) -> WeightSource:
    """Return a folder with a value head as it is, one without (a language model) with a random one of small values.

    Args:
        folder: Hugging Face safetensors.
        weight_map: with the value head.
        seed: of the random head.

    Raises:
        WeightsError: the folder is damaged or does not fit its config.json.
    """
    if HEAD in SafetensorsFolder(folder).shapes:
        return SafetensorsSource(folder, weight_map)
    return _RandomHead(SafetensorsSource(folder, _backbone(weight_map)), RandomSource(weight_map, seed))


class _RandomHead:
    def __init__(self, backbone: WeightSource, random: WeightSource) -> None:
        self._backbone = backbone
        self._random = random

    def read(self, piece: Slice) -> Tensor:
        """Read the slice from the folder, or draw it."""
        return (self._random if piece.name == HEAD else self._backbone).read(piece)


def _backbone(weight_map: WeightMap) -> WeightMap:
    """Without output layer; a folder may still hold one."""
    parameters = {name: parameter for name, parameter in weight_map.parameters.items() if name != OUTPUT_LAYER}
    return replace(weight_map, parameters=parameters, left_out=(*weight_map.left_out, LeftOut(re.compile(re.escape(LM_HEAD)))))
