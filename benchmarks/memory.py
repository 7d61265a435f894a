"""Peak memory of a training step on forked gloo ranks against what ``megarl plan memory`` states before it.

    python benchmarks/memory.py                 # many layouts of small models, by live tensors
    python benchmarks/memory.py --long          # an update with one sequence of 32k tokens under context parallelism 4
    python benchmarks/memory.py --log-probs     # the log-probability function at 8k, 16k and 32k tokens

Live tensors are the bytes of all storages that a torch dispatch mode has seen and that are still referenced, from before the
model is built; what gloo and kernels allocate inside is not among them. Two steps are run, and the second is measured. The worst
rank is shown.
"""

import argparse
import ctypes
import gc
import tempfile
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Olmo2Config, PretrainedConfig, Qwen2Config, Qwen3Config

from megarl.algorithms.algorithm import Algorithm
from megarl.config.schema import Config
from megarl.data.packing import no_routing
from megarl.memory.statement import RankMemory, state_memory
from megarl.parallel.launch import run_local_ranks
from megarl.parallel.logprobs import vocab_parallel_logprobs
from megarl.train.roles import Critic, Policy, Reference, compute_outputs, is_main_rank
from megarl.types import PackedBatch, TokenOutputs

MIB = 2**20
SIZES = {
    "vocab_size": 4001,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 16}),
    "olmo2": (Olmo2Config, {"pad_token_id": None, "eos_token_id": None}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 176}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 8,
            "q_lora_rank": 48,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 20,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        name: as the table shows it.
        ranks: of the world.
        family: of the model, random, with ``sizes`` over those above.
        role: keys of ``policy`` beside its layout.
        layout: keys of ``policy.parallel``.
        values: sections of the config over those of ``config_of``.
        length: tokens of a sequence, half of them trained; there are four.
    """

    name: str
    ranks: int = 1
    family: str = "llama"
    sizes: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    role: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    length: int = 512


SP = {"tp": 2, "sequence_parallel": True}
RING = {"context_parallel_method": "ring"}
CASES = [
    Case(name="one rank"),
    Case(name="bfloat16", model={"dtype": "bfloat16"}),
    Case(name="tied embeddings", family="qwen2"),
    Case(name="full recompute", role={"recompute": "full"}),
    Case(name="selective recompute", role={"recompute": "selective"}),
    Case(name="offloaded activations", role={"offload_activations": True}),
    Case(name="offloaded activations, full recompute", role={"offload_activations": True, "recompute": "full"}),
    Case(name="tp 2", ranks=2, layout={"tp": 2}),
    Case(name="tp 2, sequence parallel", ranks=2, family="qwen3", layout=SP),
    Case(name="tp 2, sequence parallel, bfloat16", ranks=2, layout=SP, model={"dtype": "bfloat16"}),
    Case(name="pp 2", ranks=2, layout={"pp": 2}),
    Case(name="pp 2, tied embeddings, bfloat16", ranks=2, family="qwen2", layout={"pp": 2}, model={"dtype": "bfloat16"}),
    Case(name="pp 2, vpp 2", ranks=2, layout={"pp": 2, "vpp": 2}),
    Case(name="pp 4", ranks=4, layout={"pp": 4}, role={"max_tokens_per_micro_batch": 512}),
    Case(name="dp 2", ranks=2),
    Case(name="dp 2, no distributed optimizer", ranks=2, layout={"distributed_optimizer": False}),
    Case(name="cp 2, all-gather", ranks=2, layout={"cp": 2}),
    Case(name="cp 2, all-to-all", ranks=2, layout={"cp": 2, "context_parallel_method": "all_to_all"}),
    Case(name="cp 2, ring", ranks=2, layout=RING | {"cp": 2}),
    Case(name="cp 4, ring, full recompute", ranks=4, layout=RING | {"cp": 4}, role={"recompute": "full"}),
    Case(name="cp 4, hybrid", ranks=4, layout={"cp": 4, "context_parallel_method": "hybrid", "ulysses_size": 2}),
    Case(name="cp 2, all-gather, selective", ranks=2, layout={"cp": 2}, role={"recompute": "selective"}),
    Case(name="norms of outputs and of all heads", family="olmo2"),
    Case(name="norms of outputs and of all heads, tp 2, bfloat16", ranks=2, family="olmo2", layout=SP, model={"dtype": "bfloat16"}),
    Case(name="ep 2", ranks=2, family="mixtral", layout={"ep": 2}),
    Case(name="latent attention, ep 2, etp 1, tp 2", ranks=2, family="deepseek_v3", layout=SP | {"ep": 2, "etp": 1}),
    Case(name="with reference", values={"algorithm": {"kl": {"place": "loss", "coefficient": 0.1}, "entropy_coefficient": 0.01}}),
    Case(name="with critic, tp 2", ranks=2, layout={"tp": 2}, values={"algorithm": {"preset": "ppo"}}),
]
LONG = Case(
    name="32k tokens, cp 4",
    ranks=4,
    sizes={"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 16000},
    layout=RING | {"cp": 4},
    role={"max_tokens_per_micro_batch": 32768, "logprob_chunk_tokens": 1024},
    length=32768,
)


def config_of(case: Case, folder: Path, num_sequences: int) -> Config:
    """The case as a config, its model's config.json in ``folder``."""
    config_class, special = FAMILIES[case.family]
    config_class(**(SIZES | special | case.sizes)).save_pretrained(folder)
    values: dict[str, Any] = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": str(folder), "init": "random"} | case.model,
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {
            "engine": "vllm",  # in a process of its own
            "weight_transfer": {"bucket_mib": 1},
            "prompts_per_step": 1,
            "samples_per_prompt": num_sequences,
            "max_prompt_tokens": case.length // 2,
            "max_new_tokens": case.length // 2,
        },
        "policy": {"parallel": case.layout, "max_tokens_per_micro_batch": 1024, "logprob_chunk_tokens": 64} | case.role,
    }
    return Config.model_validate(values | case.values)


def full_batch(config: Config) -> PackedBatch:
    """All sequences of the greatest length."""
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
    sequences, length = config.rollout.samples_per_prompt, prompt + response
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(length) >= prompt).repeat(sequences)
    return PackedBatch(
        token_ids=torch.randint(0, 4001, (sequences * length,), generator=generator),
        cu_seqlens=torch.arange(sequences + 1) * length,
        loss_mask=mask,
        sampler_logprobs=torch.zeros(len(mask)),
        weight_versions=torch.where(mask, 0, -1),
        step_rewards=torch.full((len(mask),), torch.nan),
        group_ids=torch.zeros(sequences, dtype=torch.int64),
        task_ids=torch.zeros(sequences, dtype=torch.int64),
        rewards=torch.rand(sequences, generator=generator),
        truncated=torch.zeros(sequences, dtype=torch.bool),
        greedy_rewards=torch.full((sequences,), torch.nan),
        routed_experts=no_routing(len(mask)),
        greedy_lengths=torch.zeros(sequences, dtype=torch.int64),
    )


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages made under the mode that are still referenced, their peak, and that of the resident memory."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.resident_peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once
        self._resident_start = _status("VmRSS")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages or size == 0:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def measure(self, work: Callable[[], Any]) -> int:
        """Peak of what ``work`` does."""
        self.peak = self.live
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        work()
        self.resident_peak = max(self.resident_peak, _status("VmHWM") - self._resident_start)
        return self.peak


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure_rank(config: Config, only_update: bool, output: Path) -> None:
    """Two steps on this rank, or an update of one; rank 0 saves what each rank held and its peaks, in bytes by name."""
    warnings.filterwarnings("ignore")
    meter = LiveTensors()
    found: dict[str, int] = {}
    with meter:
        packed = full_batch(config)
        policy = Policy(config, total_updates=10)
        reference = Reference(config) if config.algorithm.kl.place != "none" else None
        critic = Critic(config, total_updates=10) if config.algorithm.advantage == "gae" else None
        algorithm = Algorithm(config.algorithm, config.rollout.max_new_tokens)
        learners = [(policy, "policy", algorithm.objective)] + ([(critic, "critic", algorithm.value_objective)] if critic else [])
        if only_update:
            policy.optimizer.fill_state()
        for step in range(1 if only_update else 2):
            gc.collect()
            found["held before a step"] = meter.live
            zeros = torch.zeros(packed.token_ids.numel())
            kept = [TokenOutputs(old=zeros, entropies=zeros, reference=None, values=None)]
            if not only_update:
                found["scoring"] = meter.measure(lambda: kept.insert(0, compute_outputs(policy, reference, critic, packed)))  # noqa: B023
            prepared = algorithm.prepare(packed, kept[0], step)
            for learner, name, objective in learners:
                for batch in prepared.batches:
                    found[f"{name} update"] = meter.measure(lambda: learner.engine.forward_backward(batch, objective))  # noqa: B023
                    found[f"{name} optimizer step"] = meter.measure(learner.optimizer.step)
    found["peak"], found["resident"] = max(found.values()), meter.resident_peak
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if is_main_rank():
        torch.save(gathered, output)


@dataclass(frozen=True, slots=True)
class Row:
    """Stated and measured bytes of the rank that is stated to be the worst."""

    stated: RankMemory
    measured: dict[str, int]
    worst_measured: int

    @property
    def gap(self) -> float:
        """Of the stated peak from the measured one of the worst rank, relative."""
        return self.stated.peak / self.worst_measured - 1


def compare(case: Case, num_sequences: int = 4, *, only_update: bool = False) -> Row:
    """State a case's memory, then run it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_of(case, folder, num_sequences)
        stated = state_memory(config, case.ranks, "cpu")[0]
        run_local_ranks(measure_rank, (config, only_update, folder / "out.pt"), case.ranks, 1800)
        measured = torch.load(folder / "out.pt")
    return Row(stated, measured[stated.first_rank], max(rank["peak"] for rank in measured))


def stated(row: Row, moment: str) -> float:
    """Bytes stated for what was measured under that name."""
    held = sum(part.num_bytes for part in row.stated.held)
    if moment == "held before a step":
        return held
    if moment == "scoring":
        return max(value for name, value in row.stated.moments.items() if name.endswith("scoring"))
    if moment.endswith("update"):
        return max(row.stated.moments[moment], row.stated.moments.get(moment.replace("update", "gradient reduction"), 0.0))
    return row.stated.moments[moment]


def show(case: Case, row: Row) -> None:
    print(f"{case.name:<40} {row.stated.peak / MIB:>9.2f} {row.worst_measured / MIB:>9.2f} {100 * row.gap:>+6.1f}%", end="  ")
    for moment in ("held before a step", "scoring", "policy update", "policy optimizer step"):
        print(f"{stated(row, moment) / MIB:>9.2f} {row.measured[moment] / MIB:>9.2f}", end="  ")
    print(flush=True)


def show_long() -> None:
    """Forward, backward and optimizer step of one sequence."""
    with tempfile.TemporaryDirectory() as name:
        memory = state_memory(config_of(LONG, Path(name), 1), LONG.ranks, "cpu")[0]
    print(f"stated {memory.peak / MIB:.1f} MiB for each rank, at {memory.moment}")
    for part in (*memory.held, *memory.added):
        print(f"  {part.owner:<8} {part.name:<24} {part.num_bytes / MIB:>9.1f} MiB", flush=True)
    row = compare(LONG, num_sequences=1, only_update=True)
    resident = row.measured["resident"]
    print(f"measured by live tensors {row.worst_measured / MIB:.1f} MiB, stated {100 * row.gap:+.1f}%")
    print(f"measured by resident memory {resident / MIB:.1f} MiB, stated {100 * (row.stated.peak / resident - 1):+.1f}%")


def show_log_probs() -> None:
    """Peak above inputs and gradients of the log-probability function, chunks of 1,024 tokens."""
    print(f"{'tokens':>7} {'MiB beyond hidden states, weights and their gradients':>10}")
    for tokens in (8192, 16384, 32768):
        hidden = torch.randn(tokens, 64, requires_grad=True)
        weight = torch.randn(8000, 64, requires_grad=True)
        targets = torch.randint(0, 8000, (tokens,))
        meter = LiveTensors()
        with meter:

            def work() -> None:
                logprobs, entropy = vocab_parallel_logprobs(hidden, weight, targets, vocabulary_size=8000)  # noqa: B023
                (logprobs.sum() + 0.01 * entropy.sum()).backward()

            peak = meter.measure(work)
        print(f"{tokens:>7} {(peak - hidden.nbytes - weight.nbytes) / MIB:>10.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--log-probs", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    if options.long:
        show_long()
        return
    if options.log_probs:
        show_log_probs()
        return
    print(f"{'MiB, stated and measured':<40} {'peak':>19} {'gap':>7}", end="  ")
    print(f"{'held':>19}  {'scoring':>19}  {'policy update':>19}  {'optimizer step':>19}")
    for case in CASES:
        if options.only in case.name:
            show(case, compare(case))


if __name__ == "__main__":
    main()
