"""Ranks and layers where megatron-core puts them."""

from itertools import product

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megarl.config.schema import ParallelConfig
from megarl.errors import ConfigError
from megarl.parallel.axis_sizes import axis_sizes
from megarl.parallel.layout import RANK_ORDER


def groups(ranks: object, axis: int) -> list[list[int]]:
    """All groups along one axis of an array of ranks."""
    return sorted(map(list, ranks.swapaxes(axis, -1).reshape(-1, ranks.shape[axis]).tolist()))


@pytest.mark.parametrize("sizes", list(product((1, 2, 4), (1, 3), (1, 2), (1, 2), (1, 2), (1, 2))))
def test_ranks_are_those_of_megatron(sizes: tuple[int, ...]) -> None:
    tp, pp, cp, ep, etp, factor = sizes
    world_size = tp * pp * cp * ep * etp * factor
    sizes = axis_sizes(ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp), world_size)
    dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=sizes.dp, pp=pp, cp=cp, order=RANK_ORDER)
    expert = parallel_state.RankGenerator(tp=etp, ep=ep, dp=sizes.expert_dp, pp=pp, cp=1, order=RANK_ORDER)
    for axis, name in enumerate(("pp", "dp", "cp", "tp")):
        assert groups(sizes.dense_ranks(), axis) == sorted(dense.get_ranks(name))
    for axis, name in enumerate(("pp", "dp", "ep", "tp")):
        assert groups(sizes.expert_ranks(), axis) == sorted(expert.get_ranks(name))


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "first", "last"),
    [
        (8, 1, 1, None, None),
        (8, 4, 1, None, None),
        (24, 4, 3, None, None),
        (61, 16, 1, 3, 2),
        (61, 16, 1, None, 1),
        (61, 16, 1, 1, None),
        (5, 2, 1, 3, 2),
        (14, 4, 2, 2, 4),
        (12, 3, 2, 4, None),
    ],
)
def test_layers_are_those_of_megatron(num_layers: int, pp: int, vpp: int, first: int | None, last: int | None) -> None:
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_dtype="any",
    )
    expected = {}
    for rank in range(pp):
        for stage in range(vpp):
            vp_stage = stage if vpp > 1 else None
            start = get_transformer_layer_offset(config, vp_stage, rank)
            expected |= dict.fromkeys(range(start, start + get_num_layers_to_build(config, vp_stage, rank)), rank)
    parallel = ParallelConfig(pp=pp, vpp=vpp, num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last)
    assert axis_sizes(parallel, pp).pipeline_rank_of_layers(num_layers) == [expected[layer] for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("config", "world_size", "num_layers", "message"),
    [
        (ParallelConfig(tp=2, pp=2), 6, 4, "world size 6 is not divisible by tp 2 × pp 2 × cp 1 = 4"),
        (ParallelConfig(tp=1, ep=4, etp=2), 4, 4, "world size 4 is not divisible by etp 2 × ep 4 × pp 1 = 8"),
        (ParallelConfig(pp=4), 4, 5, "5 layers cannot be shared out over pp 4 stages"),
        (ParallelConfig(pp=2, vpp=2), 2, 6, "vpp 2 does not divide the layers of every pipeline stage [3, 3]"),
    ],
)
def test_what_does_not_divide_is_refused(config: ParallelConfig, world_size: int, num_layers: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        axis_sizes(config, world_size).pipeline_rank_of_layers(num_layers)
    assert message in str(error.value)
