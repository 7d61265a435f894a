"""``megarl plan``: what a run will move, computed before it starts."""

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from megarl.cli.command_line import ConfigPath, Overrides, finite
from megarl.config.layout_text import MOST_RANKS, layout_items, parallel_of
from megarl.config.load import load_config
from megarl.config.schema import ParallelConfig
from megarl.config.stages import configs_of
from megarl.errors import ConfigError, quoted

if TYPE_CHECKING:
    from megarl.reshard.plan.plan import Plan
    from megarl.reshard.plan.report import PlanReport

plan_app = typer.Typer(no_args_is_help=True, help="What a run will move and hold, computed before it starts.")


@plan_app.command()
def sync(
    config_path: ConfigPath,
    overrides: Overrides = [],  # noqa: B006
    engine: Annotated[Literal["vllm", "sglang"] | None, typer.Option(help="Engine that gets the weights.")] = None,
    tp: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Ranks that the engine's attention is cut over.")] = 1,
    ep: Annotated[
        int, typer.Option(min=1, max=MOST_RANKS, help="Ranks that its experts are distributed over; 1 cuts them over tp.")
    ] = 1,
    replicas: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="Engines, all alike.")] = 1,
    to: Annotated[str | None, typer.Option(help='A Megatron layout instead of an engine, such as "tp=4,pp=2".')] = None,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="With --to: one float32 tensor of optimizer state.")] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_RANKS, help="Ranks of the policy; as configured, or the fewest, by default.")
    ] = None,
    disjoint: Annotated[bool, typer.Option("--disjoint", help="The engines have nodes of their own.")] = False,
    gpus_per_node: Annotated[int, typer.Option(min=1, max=MOST_RANKS, help="GPUs of a node; training rank r is on GPU r.")] = 8,
    intra_gbps: Annotated[
        float, typer.Option(min=0.001, max=1e9, callback=finite, help="Gigabits per second of a GPU within its node, each way.")
    ] = 3600,
    inter_gbps: Annotated[
        float, typer.Option(min=0.001, max=1e9, callback=finite, help="Gigabits per second of a GPU to other nodes, each way.")
    ] = 400,
    bucket_mib: Annotated[int, typer.Option(min=1, max=1 << 20, help="MiB that a rank sends, or receives, at a time.")] = 512,
    num_copies: Annotated[int, typer.Option("--copies", min=0, max=10**9, help="Show so many of the first copies.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the bytes of every rank.")] = False,
) -> None:
    """Print how the weights of CONFIG's policy (with a curriculum in its last stage) get to engines or to another Megatron layout,
    or why they cannot."""
    from megarl.families.base.engine_rules import EngineLayout
    from megarl.reshard.plan.balance import Machines
    from megarl.reshard.plan.plan import plan_transfer
    from megarl.reshard.plan.report import LinkSpeeds, report

    config = configs_of(load_config(config_path, overrides))[-1]
    if (engine is None) == (to is None):
        raise ConfigError("plan sync: give either --engine vllm or sglang, or --to with a Megatron layout")
    if engine is not None and optimizer:
        raise ConfigError("plan sync: engines take no optimizer state; give --optimizer with --to")
    ranks = world_size or config.policy.num_ranks or fewest_ranks(config.policy.parallel)
    if engine is not None:
        target: EngineLayout | ParallelConfig = EngineLayout(engine=engine, tp=tp, ep=ep, replicas=replicas)
        words = f"{replicas} × {engine} tp={tp},ep={ep}"
        first_gpu = _first_engine_gpu(ranks, replicas * max(tp, ep), gpus_per_node, disjoint)
    else:
        target, words, first_gpu = _parallel(str(to)), f"Megatron {to}", 0
    plan = plan_transfer(
        config.model,
        config.policy.parallel,
        ranks,
        target,
        Machines(gpus_per_node=gpus_per_node, first_destination_gpu=first_gpu),
        bucket_mib << 20,
        optimizer_state=optimizer,
    )
    result = report(plan, LinkSpeeds(within_node=intra_gbps * 1e9 / 8, between_nodes=inter_gbps * 1e9 / 8))
    if as_json:
        print(json.dumps(_as_json(plan, result, num_copies)))
        return
    print(f"Megatron {_sizes(config.policy.parallel)} on {ranks} ranks → {words} on {plan.destination.num_ranks} ranks")
    _show(result, f"{intra_gbps:g} Gb/s within a node, {inter_gbps:g} Gb/s between nodes, each way")
    _show_copies(plan, num_copies)


def fewest_ranks(parallel: ParallelConfig) -> int:
    """Return the ranks of one replica of a layout."""
    experts = (parallel.etp or parallel.tp) * parallel.ep * parallel.pp
    return math.lcm(parallel.tp * parallel.pp * parallel.cp, experts)


def _sizes(parallel: ParallelConfig) -> str:
    sizes = parallel.model_dump(include={"tp", "pp", "vpp", "cp", "ep", "etp"})
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size not in (None, 1)) or "tp=1"


def _first_engine_gpu(world_size: int, num_engine_ranks: int, gpus_per_node: int, disjoint: bool) -> int:
    if disjoint:
        return -(-world_size // gpus_per_node) * gpus_per_node
    if num_engine_ranks > world_size:
        raise ConfigError(
            f"plan sync: the engines have {num_engine_ranks} ranks and training has {world_size} GPUs; use fewer --replicas, "
            "or give the engines GPUs of their own with --disjoint"
        )
    return 0


def _parallel(text: str) -> ParallelConfig:
    where = f"plan sync --to {quoted(text)}"
    return parallel_of(layout_items(text, where), where)


def _as_json(plan: "Plan", result: "PlanReport", num_copies: int) -> dict[str, Any]:
    from megarl.reshard.plan.report import Link

    values = asdict(result)
    for name in ("sent", "received"):
        by_rank = values.pop(name)
        values[f"{name}_bytes_of_ranks"] = {link.name.lower(): by_rank[:, link].tolist() for link in Link}
    values["sent_over_needed"] = result.bytes_sent / result.bytes_needed
    values["worst_over_mean"] = result.worst_over_mean
    values["least_worst_over_mean"] = result.least_worst_over_mean
    values["first_copies"] = [
        {
            "bucket": message.bucket,
            "sender": message.sender,
            "receiver": message.receiver,
            "tensor": copy.tensor,
            "source_parameter": copy.source_parameter,
            "source": [[part.start, part.stop] for part in copy.source],
            "destination_parameter": copy.destination_parameter,
            "destination": [[part.start, part.stop] for part in copy.destination],
            "bytes": copy.num_bytes,
        }
        for message, copy in plan.first_copies(num_copies)
    ]
    return values


def _show(result: "PlanReport", speeds: str) -> None:
    from megarl.reshard.plan.report import Link

    table = Table("GB of a rank", "mean", "worst", "same GPU", "within the node", "between nodes")
    for name, by_link in (("sent", result.sent), ("received", result.received)):
        total, means = by_link.sum(axis=1), by_link.mean(axis=0) / 1e9
        worst = f"{total.max() / 1e9:.3f} (rank {total.argmax()})"
        table.add_row(name, f"{total.mean() / 1e9:.3f}", worst, *(f"{means[link]:.3f}" for link in Link))
    Console(width=132).print(table)
    ratio = result.bytes_sent / result.bytes_needed
    print(f"bytes sent {result.bytes_sent:,} / needed {result.bytes_needed:,} = {ratio:.2f}")
    print(f"worst sender / mean {result.worst_over_mean:.3f}; no choice of senders is below {result.least_worst_over_mean:.3f}")
    print(
        f"{result.copies:,} copies in {result.messages:,} messages in {result.buckets:,} buckets of {result.bucket_bytes >> 20} MiB"
    )
    send, receive = result.send_buffer / 2**20, result.receive_buffer / 2**20
    print(f"staging memory of a rank: {send:.0f} MiB to send, {receive:.0f} MiB to receive")
    print(f"predicted {result.seconds:.3f} s at {speeds}; the busiest rank alone needs {result.least_seconds:.3f} s")


def _show_copies(plan: "Plan", num_copies: int) -> None:
    for message, copy in plan.first_copies(num_copies):
        places = [
            f"{name}[{part[0].start}:{part[0].stop}, {part[1].start}:{part[1].stop}]"
            for name, part in ((copy.source_parameter, copy.source), (copy.destination_parameter, copy.destination))
        ]
        print(
            f"bucket {message.bucket}: rank {message.sender} → rank {message.receiver}: {places[0]} → {places[1]}, "
            f"{copy.num_bytes} bytes of {copy.tensor}"
        )
