"""Loss and gradients under context parallelism against one rank: every method with every other axis, on awkward lengths.

    python benchmarks/context_parallel_grid.py [--kind ppo|sft|dpo|all]

The model has sixteen query heads to two key-value heads. The batch has sequences of one token, of odd lengths and of fewer
tokens than there are context parallel ranks, packed into micro-batches of unequal fill. With ppo, policy and critic learn, both in
the layout, as is dpo's reference. Exits 1 when any parameter's gradient, a loss, a norm or a score is above the bound.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megarl.cli.parity import ParityRun, parse_layout
from megarl.config.schema import Config

BOUND = 1e-5
KINDS = ("ppo", "sft", "dpo")
VOCABULARY = 131
HEADS, KEY_HEADS = 16, 2
LENGTHS = (1, 2, 3, 5, 17, 31)  # of prompts; one response is empty (but with dpo), the others have 1 to 12 tokens
METHODS = {
    "all-gather": "context_parallel_method=all_gather",
    "all-to-all": "context_parallel_method=all_to_all",
    "ring": "context_parallel_method=ring",
    "hybrid": "context_parallel_method=hybrid,ulysses_size=2",
}
SEQUENCE = "sequence_parallel=true"
AXES = ("cp=2", "cp=3", "cp=4", "cp=6", "cp=8", "cp=4,dp=2", f"tp=2,cp=4,{SEQUENCE}", "pp=2,cp=4", "pp=2,vpp=2,cp=4")
AXES_OF_TWO = (f"tp=2,cp=2,{SEQUENCE}", "tp=2,cp=2,dp=2", "pp=2,cp=2", "pp=2,vpp=2,cp=2", f"tp=2,pp=2,cp=2,{SEQUENCE}")


def is_possible(axes: str, method: str) -> bool:
    """Heads are exchanged by as many ranks as divide the heads of a tensor parallel rank; a hybrid has rings of two or more."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in axes.split(",")) if size.isdecimal()}
    if method == "all-to-all":
        return HEADS // sizes.get("tp", 1) % sizes["cp"] == 0
    return method != "hybrid" or (sizes["cp"] % 2 == 0 and sizes["cp"] > 2)


def config_of(folder: Path, kind: str) -> Config:
    """The run whose gradients are compared."""
    values = {
        "kind": {"ppo": "rl", "sft": "sft", "dpo": "preference"}[kind],
        "steps": 1,
        "model": {"path": folder},
        "policy": {"max_tokens_per_micro_batch": 96, "logprob_chunk_tokens": 7},
        "algorithm": {"preset": "ppo"},
        "rollout": {"samples_per_prompt": 3, "max_prompt_tokens": max(LENGTHS), "max_new_tokens": 12},
        "data": {"train": {"type": "reasoning_gym", "task": "chain_sum"}},
    }
    return Config.model_validate(values)


def write_model(folder: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    config = Qwen2Config(**sizes, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=64)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def run_grid(folder: Path, kind: str) -> int:
    """Print a row for each combination; the number of those above the bound."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    run = ParityRun(config_of(folder, kind), prompts, folder)
    print(f"\n{kind}\n\n| layout | method | ranks | worst gradient gap | loss gap | norm gap | score gap |")
    print("|---|---|---|---|---|---|---|")
    num_rows, num_above = 0, 0
    for axes in (*AXES, *AXES_OF_TWO):
        for method, settings in METHODS.items():
            if not is_possible(axes, method):
                continue
            row = run.compare_layout(axes, parse_layout(f"{axes},{settings}"))
            gaps = (row.worst_gap, row.loss_gap, row.norm_gap, row.output_gap)
            num_rows, num_above = num_rows + 1, num_above + (max(gaps) > BOUND)
            cells = " | ".join(f"{gap:.1e}" for gap in gaps)
            print(f"| {axes.replace(',', ', ')} | {method} | {row.num_ranks} | {cells} |", flush=True)
    print(f"\n{num_rows} combinations, {num_above} above {BOUND:g}")
    return num_above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=(*KINDS, "all"), default="all")
    kind = parser.parse_args().kind
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        kinds = KINDS if kind == "all" else (kind,)
        sys.exit(int(sum(run_grid(Path(name), one) for one in kinds) > 0))


if __name__ == "__main__":
    main()
