"""Bytes, balance, links, staging memory, order and time of plans, each counted message by message."""

import random
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cases import BUCKET, FAMILIES, Case, contents
from megarl.errors import ConfigError
from megarl.reshard.plan.balance import Machines, choose_senders, least_worst_load
from megarl.reshard.plan.plan import Message, Plan, build_plan
from megarl.reshard.plan.report import LinkSpeeds, report
from megarl.reshard.plan.shard_layout import RankSets

SPEEDS = LinkSpeeds(within_node=4e9, between_nodes=1e9)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("models")
    return [
        Case(seed, family, folder, to_engine=to_engine)
        for family in FAMILIES
        for to_engine in (True, False)
        for seed in range(100, 103)
    ]


def test_bytes_sent_are_the_bytes_needed(cases: list[Case]) -> None:
    for case in cases:
        needed = sum(
            int((tensor != 0).sum()) * (4 if name.endswith(("expert_bias", "e_score_correction_bias")) else 2)
            for rank in contents(case, case.target)
            for name, tensor in rank.items()
        )
        result = report(case.plan, SPEEDS)
        in_copies = sum(copy.num_bytes for message in case.plan.messages() for copy in message.copies)
        assert in_copies == result.bytes_sent == result.bytes_needed == needed, case


def test_no_sender_has_more_than_its_share(cases: list[Case]) -> None:
    for case in cases:
        sent = Counter(dict.fromkeys(range(case.source.num_ranks), 0))
        for message in case.plan.messages():
            sent[message.sender] += message.num_bytes
        mean = sent.total() / len(sent)
        assert max(sent.values()) <= 1.1 * max(mean, case.plan.least_worst_load), case
        assert report(case.plan, SPEEDS).worst_over_mean == pytest.approx(max(sent.values()) / mean)


def test_share_against_every_choice() -> None:
    """Nested rank sets with few copies: the bound is below the best of all choices, and the choice near it."""
    rng = random.Random(0)
    for _ in range(100):
        sets = [[0], [1], [2], [3], [0, 1], [2, 3], [0, 1, 2, 3]]
        holders = RankSets.of([np.array(ranks) for ranks in sets])
        of_copy = [rng.randrange(len(sets)) for _ in range(7)]
        sizes = [rng.randrange(1, 9) for _ in of_copy]
        best = min(
            max(sum(size for size, rank in zip(sizes, choice, strict=True) if rank == worst) for worst in range(4))
            for choice in product(*(sets[number] for number in of_copy))
        )
        bytes_of_set = np.bincount(of_copy, sizes, minlength=len(sets))
        bound = least_worst_load(holders, bytes_of_set, 4)
        assert bound <= best
        gpus = np.array([rng.randrange(4) for _ in of_copy])
        senders = choose_senders(holders, np.array(of_copy, dtype=np.int32), np.array(sizes), gpus, Machines(gpus_per_node=2), 4)
        assert all(sender in sets[number] for sender, number in zip(senders.tolist(), of_copy, strict=True))
        assert np.bincount(senders, sizes).max() <= bound + 3 * max(sizes)


def test_a_rank_that_alone_holds_much_sends_little_else() -> None:
    holders = RankSets.of([np.array([0]), np.array([0, 1]), np.array([0, 1, 2])])
    of_copy = np.array([0] + [1] * 100 + [2] * 90, dtype=np.int32)
    sizes = np.array([100] + [1] * 190)
    senders = choose_senders(holders, of_copy, sizes, np.zeros(191, dtype=np.int64), Machines(gpus_per_node=1), 3)
    assert np.bincount(senders, sizes).tolist() == pytest.approx([100, 100, 90], abs=3)


def test_neighbours_come_first(tmp_path: Path) -> None:
    """Where every node has a replica of everything, and in a layout that does not change, little leaves the node or the GPU."""
    for seed, family in enumerate(FAMILIES):
        case = Case(seed, family, tmp_path, to_engine=False)
        ranks = case.source.num_ranks
        same = build_plan(case.source, case.source, case.tensors, Machines(gpus_per_node=1), BUCKET)
        moved = sum(message.num_bytes for message in same.messages() if message.sender != message.receiver)
        assert moved <= 0.1 * report(same, SPEEDS).bytes_sent, case
        one_node = build_plan(case.source, case.destination, case.tensors, Machines(gpus_per_node=ranks + 64), BUCKET)
        result = report(one_node, SPEEDS)
        assert result.sent[:, 2].sum() == 0 and result.received.sum() == result.bytes_sent


def test_buckets_bound_the_staging_memory(cases: list[Case]) -> None:
    for case in cases:
        sent, received, last = Counter[tuple[int, int]](), Counter[tuple[int, int]](), 0
        for message in case.plan.messages():
            assert message.num_bytes == sum(copy.num_bytes for copy in message.copies)
            assert message.bucket in (last, last + 1)
            last = message.bucket
            sent[message.bucket, message.sender] += message.num_bytes
            received[message.bucket, message.receiver] += message.num_bytes
        assert max(sent.values()) <= BUCKET and max(received.values()) <= BUCKET, case
        result = report(case.plan, SPEEDS)
        assert (result.send_buffer, result.receive_buffer) == (max(sent.values()), max(received.values()))


def run_blocking(queues: dict[object, list[int]], ends: dict[int, tuple[object, object]]) -> None:
    """Every process handles its messages in order and waits for the other end of each; fails when all wait."""
    while any(queues.values()):
        ready = [
            number for queue in queues.values() for number in queue[:1] if all(queues[end][0] == number for end in ends[number])
        ]
        assert ready, "all processes wait"
        for number in set(ready):
            for end in set(ends[number]):
                queues[end].pop(0)


def test_blocking_calls_in_order_never_wait_for_each_other(cases: list[Case]) -> None:
    """With Megatron on both sides a rank is sender and receiver in one process."""
    for case in cases[::3]:
        to_engine = case.destination.parameters[0].startswith("model.")
        queues: dict[object, list[int]] = {}
        ends: dict[int, tuple[object, object]] = {}
        for number, message in enumerate(case.plan.messages()):
            ends[number] = (message.sender, ("engine", message.receiver) if to_engine else message.receiver)
            for end in set(ends[number]):
                queues.setdefault(end, []).append(number)
        run_blocking(queues, ends)


def test_views_of_ranks_are_the_messages(cases: list[Case]) -> None:
    for case in cases[::9]:
        messages = list(case.plan.messages())
        for rank in range(case.source.num_ranks):
            assert list(case.plan.for_sender(rank)) == [message for message in messages if message.sender == rank]
        for rank in range(case.destination.num_ranks):
            assert list(case.plan.for_receiver(rank)) == [message for message in messages if message.receiver == rank]
        first = [copy for message in messages for copy in message.copies][:5]
        assert [copy for _, copy in case.plan.first_copies(5)] == first


def test_same_arguments_give_the_same_plan(cases: list[Case]) -> None:
    for case in cases[::4]:
        again = build_plan(case.source, case.destination, case.tensors, case.machines, BUCKET)
        for column in ("overlaps", "first_overlap", "chunk", "sender", "receiver", "bucket", "message_bytes"):
            assert np.array_equal(getattr(again, column), getattr(case.plan, column)), (case, column)


def seconds(message: Message, machines: Machines) -> float:
    sender, receiver = message.sender, message.receiver + machines.first_destination_gpu
    if sender == receiver:
        return 0.0
    same_node = sender // machines.gpus_per_node == receiver // machines.gpus_per_node
    return message.num_bytes / (4e9 if same_node else 1e9)


def slow_seconds(plan: Plan) -> tuple[float, float]:
    """Each bucket as slow as its slowest rank, and the busiest rank alone."""
    by_bucket, by_rank = Counter[tuple[int, str, int]](), Counter[tuple[str, int]]()
    for message in plan.messages():
        for end in (("sender", message.sender), ("receiver", message.receiver)):
            by_bucket[message.bucket, *end] += seconds(message, plan.machines)
            by_rank[end] += seconds(message, plan.machines)
    slowest: dict[int, float] = {}
    for (bucket, *_), time in by_bucket.items():
        slowest[bucket] = max(slowest.get(bucket, 0.0), time)
    return sum(slowest.values()), max(by_rank.values())


def test_predicted_seconds(cases: list[Case]) -> None:
    for case in cases[::3]:
        result = report(case.plan, SPEEDS)
        assert (result.seconds, result.least_seconds) == pytest.approx(slow_seconds(case.plan)), case


def test_a_bucket_too_small_for_a_row_is_refused(cases: list[Case]) -> None:
    with pytest.raises(ConfigError, match=r"buckets of 8 bytes cannot hold a row of \d+ bytes"):
        build_plan(cases[0].source, cases[0].destination, cases[0].tensors, cases[0].machines, 8)
