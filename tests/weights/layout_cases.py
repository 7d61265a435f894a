"""Models of every family and the layouts that they are laid out in, for test_many_layouts."""

from dataclasses import dataclass, field
from typing import Any

from tiny import YARN

SEQUENCE = "sequence_parallel=true"
ULYSSES = "context_parallel_method=all_to_all"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
DENSE_ON_EIGHT = [
    "",
    "tp=2",
    f"tp=2,{SEQUENCE}",
    "tp=4",
    f"tp=4,pp=2,{SEQUENCE}",
    "pp=2",
    "pp=4",
    f"tp=2,pp=4,{SEQUENCE}",
    "pp=2,vpp=2",
    f"tp=2,pp=2,vpp=2,{SEQUENCE}",
    "tp=2,pp=2,vpp=2,cp=2",
    "cp=2",
    f"cp=4,{ULYSSES}",
    f"tp=2,cp=2,{ULYSSES},{SEQUENCE}",
    "tp=2,cp=4",
    "pp=2,cp=4",
    f"pp=2,{FIRST}=3",
    f"tp=4,pp=2,{LAST}=3",
    f"pp=2,cp=2,{FIRST}=1",
    f"tp=2,pp=2,cp=2,{SEQUENCE}",
]
DENSE_ON_SIX = [
    "tp=3",
    f"tp=3,pp=2,{SEQUENCE},{FIRST}=2",
    f"tp=3,cp=2,{SEQUENCE}",
    "pp=3,vpp=2",
    "pp=2,vpp=3",
    f"pp=2,vpp=2,{FIRST}=2,{LAST}=4",
    f"cp=3,{ULYSSES}",
    f"pp=3,{FIRST}=1,{LAST}=1",
    f"pp=3,cp=2,{LAST}=4",
]
EXPERTS_ON_EIGHT = [
    "",
    "ep=2",
    "ep=4",
    "etp=4",
    "etp=2,ep=2",
    f"tp=2,{SEQUENCE}",
    f"tp=2,etp=1,ep=4,{SEQUENCE}",
    f"tp=4,ep=2,{SEQUENCE}",
    f"tp=4,etp=2,ep=4,{SEQUENCE}",
    "pp=2,ep=4",
    "pp=4,ep=2",
    f"tp=2,pp=4,{SEQUENCE}",
    f"tp=2,pp=2,ep=2,{SEQUENCE}",
    "pp=2,vpp=2,ep=2",
    f"tp=2,pp=2,vpp=2,etp=1,ep=2,{SEQUENCE}",
    "cp=2,ep=2",
    f"cp=4,ep=4,{ULYSSES}",
    f"tp=2,cp=2,ep=2,{ULYSSES},{SEQUENCE}",
    f"pp=2,etp=2,ep=2,{FIRST}=3",
    f"tp=2,pp=2,cp=2,ep=4,etp=1,{SEQUENCE},{LAST}=3",
]
EXPERTS_ON_SIX = [
    "ep=3",
    "etp=3,ep=2",
    f"tp=3,{SEQUENCE}",
    f"tp=3,etp=1,ep=3,{SEQUENCE}",
    f"tp=3,pp=2,{SEQUENCE},{FIRST}=2",
    f"cp=3,ep=3,{ULYSSES}",
    "pp=3,vpp=2,ep=2",
    "pp=2,vpp=3,ep=3",
    f"pp=3,ep=2,{FIRST}=1,{LAST}=1",
]
ODD = {"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}


@dataclass(frozen=True, slots=True)
class World:
    """A model and the layouts that the ranks of one world take on, one after another."""

    family: str
    num_ranks: int
    layouts: list[str]
    sizes: dict[str, Any] = field(default_factory=dict)


WORLDS = {
    "llama": World("llama", 8, DENSE_ON_EIGHT),
    "llama, tied, 3 key-value heads": World("llama", 6, DENSE_ON_SIX, ODD | {"tie_word_embeddings": True}),
    "mistral": World("mistral", 8, DENSE_ON_EIGHT),
    "mistral, tied, 3 key-value heads": World("mistral", 6, DENSE_ON_SIX, ODD | {"tie_word_embeddings": True}),
    "qwen2, tied": World("qwen2", 8, DENSE_ON_EIGHT),
    "qwen2, 3 key-value heads": World("qwen2", 6, DENSE_ON_SIX, ODD | {"tie_word_embeddings": False}),
    "qwen3": World("qwen3", 8, DENSE_ON_EIGHT),
    "qwen3, tied, 3 key-value heads": World("qwen3", 6, DENSE_ON_SIX, ODD | {"tie_word_embeddings": True}),
    "phi3": World("phi3", 8, DENSE_ON_EIGHT),
    "phi3, tied, 3 key-value heads": World("phi3", 6, DENSE_ON_SIX, ODD | {"tie_word_embeddings": True}),
    "olmo2": World("olmo2", 8, DENSE_ON_EIGHT),
    "olmo2, tied, 3 key-value heads": World("olmo2", 6, DENSE_ON_SIX, ODD | {"tie_word_embeddings": True}),
    "qwen3_moe": World("qwen3_moe", 8, EXPERTS_ON_EIGHT, {"num_experts": 8}),
    "qwen3_moe, tied, scores not normalised": World(
        "qwen3_moe",
        6,
        EXPERTS_ON_SIX,
        ODD
        | {
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [],
            "moe_intermediate_size": 48,
        },
    ),
    "mixtral": World("mixtral", 8, EXPERTS_ON_EIGHT, {"num_local_experts": 8}),
    "mixtral, tied, 3 key-value heads": World(
        "mixtral", 6, EXPERTS_ON_SIX, ODD | {"tie_word_embeddings": True, "num_local_experts": 6}
    ),
    "deepseek_v3": World("deepseek_v3", 8, EXPERTS_ON_EIGHT),
    "deepseek_v3, tied, queries without latent, YaRN": World(
        "deepseek_v3",
        6,
        EXPERTS_ON_SIX,
        ODD
        | {
            "num_key_value_heads": 6,
            "tie_word_embeddings": True,
            "q_lora_rank": None,
            "rope_parameters": YARN,
            "moe_intermediate_size": 48,
            "n_routed_experts": 12,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 3,
        },
    ),
}
