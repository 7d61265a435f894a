"""Random small models and pairs of layouts, and what their ranks hold."""

import random
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from megarl.config.schema import ParallelConfig
from megarl.families.base.architecture import Architecture
from megarl.families.base.engine_rules import EngineLayout
from megarl.families.registry import read_architecture
from megarl.parallel.axis_sizes import axis_sizes
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.engine_layouts import engine_shard_layout
from megarl.reshard.plan.plan import build_plan
from megarl.reshard.plan.shard_layout import ShardLayout, TensorTable, megatron_shard_layout, optimizer_table, tensor_table
from megarl.weights.mapping import WeightMap, build_weight_map
from slow_layouts import EngineSizes, MegatronSizes, engine_rank, hugging_face_tensors, megatron_rank
from tiny import CLASSES

FAMILIES = sorted(CLASSES)
PAD_MULTIPLE = 3
BUCKET = 1 << 13


def random_architecture(rng: random.Random, family: str, folder: Path) -> Architecture:
    """Few layers, small sizes that many layouts divide."""
    kv_heads = rng.choice((1, 2, 4))
    sizes: dict[str, Any] = {
        "vocab_size": rng.choice((61, 70, 131)),
        "hidden_size": rng.choice((8, 16)),
        "intermediate_size": rng.choice((16, 48)),
        "num_hidden_layers": 4,
        "num_attention_heads": kv_heads * rng.choice((4, 8)) if kv_heads < 4 else 8,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice((2, 4)),
        "moe_intermediate_size": rng.choice((8, 16)),
        "tie_word_embeddings": rng.random() < 0.5,
    }
    if family in ("qwen2", "phi3", "olmo2"):
        del sizes["head_dim"]
        sizes["hidden_size"] = sizes["num_attention_heads"] * 2
    if family == "qwen3_moe":
        sizes |= {"num_experts": 8, "mlp_only_layers": rng.choice(([], [1]))}
    if family == "mixtral":
        sizes |= {"num_local_experts": 4}
    if family == "deepseek_v3":
        latent = {"q_lora_rank": rng.choice((None, 5)), "kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2}
        sizes |= latent | {"n_routed_experts": 8, "v_head_dim": 4, "num_key_value_heads": sizes["num_attention_heads"]}
        del sizes["head_dim"]
    config_class, _, special = CLASSES[family]
    config: PretrainedConfig = config_class(**(special | sizes))
    config.save_pretrained(folder)
    return read_architecture(folder)


def random_megatron(rng: random.Random, a: Architecture) -> MegatronSizes:
    tp = rng.choice([size for size in (1, 2, 4) if a.num_kv_heads % size == 0])
    pp, vpp = rng.choice(((1, 1), (2, 1), (2, 2), (4, 1)))
    first, last = rng.choice(((None, None), (1, None), (None, 1), (3, 1))) if (pp, vpp) == (2, 1) else (None, None)
    ep = rng.choice((1, 2, 4)) if a.moe else 1
    etp = rng.choice((None, 1, 2)) if a.moe else None
    cp = rng.choice((1, 2))
    dp = rng.choice((1, 2, 3, 4))
    while tp * cp * dp % ((etp or tp) * ep):
        dp += 1
    return MegatronSizes(tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, ep=ep, etp=etp, first=first, last=last)


def random_engine(rng: random.Random, a: Architecture) -> EngineSizes:
    engine = rng.choice(("vllm", "sglang"))
    tp = rng.choice([size for size in (1, 2, 4) if a.num_heads % size == 0])
    eps = [ep for ep in (1, 2, 4) if ep == 1 or (a.moe and (ep % tp == 0 or (engine == "sglang" and tp % ep == 0)))]
    return EngineSizes(engine=engine, tp=tp, ep=rng.choice(eps), replicas=rng.choice((1, 2, 3)))


def parallel_config(s: MegatronSizes) -> ParallelConfig:
    return ParallelConfig(
        tp=s.tp,
        pp=s.pp,
        vpp=s.vpp,
        cp=s.cp,
        ep=s.ep,
        etp=s.etp,
        num_layers_in_first_pipeline_stage=s.first,
        num_layers_in_last_pipeline_stage=s.last,
    )


class Case:
    """A random model and two layouts, planned."""

    def __init__(self, seed: int, family: str, folder: Path, *, to_engine: bool, optimizer: bool = False) -> None:
        rng = random.Random(f"{seed} {family}")
        self.architecture = a = random_architecture(rng, family, folder)
        self.weight_map = build_weight_map(a, PAD_MULTIPLE, with_transformer_engine=False)
        self.tensors = optimizer_table(self.weight_map) if optimizer else tensor_table(self.weight_map, 2)
        self.source_sizes = random_megatron(rng, a)
        self.source = megatron(self.weight_map, self.source_sizes, self.tensors)
        self.target: MegatronSizes | EngineSizes
        self.target = random_engine(rng, a) if to_engine else random_megatron(rng, a)
        if isinstance(self.target, EngineSizes):
            s = self.target
            layout = EngineLayout(engine=s.engine, tp=s.tp, ep=s.ep, replicas=s.replicas)
            self.destination = engine_shard_layout(a, layout, self.tensors)
        else:
            self.destination = megatron(self.weight_map, self.target, self.tensors)
        first_gpu = rng.choice((0, 64)) if to_engine else 0
        self.machines = Machines(gpus_per_node=rng.choice((1, 4, 8)), first_destination_gpu=first_gpu)
        self.plan = build_plan(self.source, self.destination, self.tensors, self.machines, BUCKET)

    def __repr__(self) -> str:
        return f"{self.architecture.family} {self.source_sizes} → {self.target}"


def megatron(weight_map: WeightMap, s: MegatronSizes, tensors: TensorTable) -> ShardLayout:
    return megatron_shard_layout(weight_map, axis_sizes(parallel_config(s), s.world_size), tensors)


def contents(case: Case, s: MegatronSizes | EngineSizes) -> list[dict[str, Tensor]]:
    """For each rank its parameters, filled with the integers that say which element each is."""
    tensors = hugging_face_tensors(case.architecture)
    if isinstance(s, EngineSizes):
        return [engine_rank(tensors, case.architecture, s, rank) for rank in range(s.ranks * s.replicas)]
    return [megatron_rank(tensors, case.architecture, s, rank, PAD_MULTIPLE) for rank in range(s.world_size)]
