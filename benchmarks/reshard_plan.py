"""Time and peak memory of planning DeepSeek-V3 (671B) from 4,096 training ranks to engines of tp 16 and ep 64, on one core.

    python benchmarks/reshard_plan.py --engines 64 --expert-tp 1

Prints one line: wall and CPU seconds from the configuration to the finished plan, peak memory of the process, and what was planned.
"""

import argparse
import resource
import time
from pathlib import Path

from megarl.config.schema import ModelConfig, ParallelConfig
from megarl.families.base.engine_rules import EngineLayout
from megarl.reshard.plan.balance import Machines
from megarl.reshard.plan.plan import plan_transfer
from megarl.reshard.plan.report import LinkSpeeds, report

MODEL = ModelConfig(path=Path(__file__).parent / "deepseek_v3", dtype="bfloat16")
WORLD_SIZE = 4096


def main() -> None:
    """Plan, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--engines", type=int, default=64, help="engines of 64 ranks; 64 of them share all GPUs with training")
    parser.add_argument("--expert-tp", type=int, default=1, help="expert tensor parallel size of training")
    arguments = parser.parse_args()
    training = ParallelConfig(
        tp=8,
        pp=16,
        ep=32,
        etp=arguments.expert_tp,
        num_layers_in_first_pipeline_stage=3,
        num_layers_in_last_pipeline_stage=2,
    )
    engines = EngineLayout(engine=arguments.engine, tp=16, ep=64, replicas=arguments.engines)
    wall, cpu = time.perf_counter(), time.process_time()
    plan = plan_transfer(MODEL, training, WORLD_SIZE, engines, Machines(gpus_per_node=8), 512 << 20)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = report(plan, LinkSpeeds(within_node=450e9, between_nodes=50e9))
    print(
        f"{arguments.engines} {arguments.engine} engines, etp {arguments.expert_tp}: {wall:.1f} s wall, {cpu:.1f} s CPU, "
        f"{peak:.2f} GiB; {result.copies:,} copies in {result.messages:,} messages in {result.buckets} buckets, "
        f"{result.bytes_sent / 1e12:.1f} TB sent / needed {result.bytes_sent / result.bytes_needed:.2f}, "
        f"worst sender / mean {result.worst_over_mean:.3f} (least {result.least_worst_over_mean:.3f}), "
        f"predicted {result.seconds:.2f} s (least {result.least_seconds:.2f} s)"
    )


if __name__ == "__main__":
    main()
