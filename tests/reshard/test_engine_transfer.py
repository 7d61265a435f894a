"""Every transport to an engine's workers, with the plugin's own receivers: each number at its place, and no failure unnoticed.

Where ranks and workers are is made up: on CPU the buffers of cuda_ipc are host memory, and a gloo group stands for NCCL's.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine_crew import Crew, Parameters, before_pack, receiver_module
from engine_plugin import load_plugin
from megarl.errors import ConfigError, TransferError
from megarl.parallel import launch
from megarl.parallel.launch import run_local_ranks
from megarl.reshard import engine_transports
from megarl.reshard.transport_choice import Location, own_location
from slow_layouts import EngineSizes, MegatronSizes
from transfers import Transfer, transfer

LAUNCH_SECONDS = 60
RANKS = 4

pytestmark = pytest.mark.timeout(2 * LAUNCH_SECONDS)


def case_of(folder: Path, family: str, target: EngineSizes) -> Transfer:
    source = MegatronSizes(tp=2, pp=2) if family == "llama" else MegatronSizes(pp=2, ep=2, dp=2)
    workers = range(target.ranks * target.replicas)
    case = transfer(folder, family, (source, range(RANKS)), (target, workers))
    assert case.plan.num_buckets > 2
    return case


def dense(folder: Path) -> Transfer:
    return case_of(folder, "llama", EngineSizes(engine="vllm", tp=2))


def hosts(names: str) -> list[Location]:
    """Four ranks, then the workers, one letter each."""
    return [Location(name, None) for name in names]


def gpus(names: str) -> list[Location]:
    return [Location("host", f"GPU-{name}") for name in names]


def update_three_times(cases: list[tuple[Transfer, str, list[Location], str]]) -> None:
    for case, asked, locations, expected in cases:
        crew = Crew(case, asked, locations)
        crew.join()
        assert crew.transfer.transport == expected
        for _ in range(3):
            crew.update()
        dist.barrier()
        assert "megarl-weights" not in Path("/proc/self/maps").read_text()
        assert not [link for link in Path("/proc/self/fd").iterdir() if "megarl-weights" in os.path.realpath(link)]


def test_shared_memory_and_gloo(tmp_path: Path) -> None:
    experts = case_of(tmp_path, "qwen3_moe", EngineSizes(engine="sglang", tp=2, ep=2, replicas=2))
    llama = dense(tmp_path)
    cases = [
        (llama, "auto", hosts("aaaaaa"), "shared_memory"),
        (llama, "shared_memory", hosts("aabbab"), "shared_memory"),  # half of the bytes pass through another rank
        (experts, "auto", hosts("baaaaaaa"), "shared_memory"),  # rank 0 shares with no worker
        (experts, "auto", hosts("aaaaaaab"), "gloo"),
        (llama, "gloo", hosts("aaaaaa"), "gloo"),
    ]
    run_local_ranks(update_three_times, (cases,), RANKS, LAUNCH_SECONDS)


def test_colocated_gpus(tmp_path: Path) -> None:
    experts = case_of(tmp_path, "mixtral", EngineSizes(engine="vllm", tp=2, ep=2))
    cases = [
        (dense(tmp_path), "auto", gpus("012301"), "cuda_ipc"),
        (experts, "cuda_ipc", gpus("012332"), "cuda_ipc"),
        (experts, "auto", gpus("012334"), "shared_memory"),  # one worker has a GPU of its own
    ]
    run_local_ranks(update_three_times, (cases,), RANKS, LAUNCH_SECONDS)


class Coalescing:
    """A gloo group that takes messages as NCCL does: between start and end, all at once."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        self.group: Any = dist.ProcessGroupGloo(dist.PrefixStore("nccl", store), rank, size, timeout)
        self.works: Any = None

    def _start_coalescing(self) -> None:
        self.works = []

    def send(self, tensors: Any, peer: int, tag: int) -> None:
        self.works.append(self.group.send(tensors, peer, tag))

    def recv(self, tensors: Any, peer: int, tag: int) -> None:
        self.works.append(self.group.recv(tensors, peer, tag))

    def _end_coalescing(self) -> "Coalescing":
        return self

    def wait(self, timeout: Any) -> None:
        for work in self.works:
            work.wait(timeout)
        self.works = None


def test_messages_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_transports.Crew, "uses_nccl", property(lambda crew: True))
    monkeypatch.setattr(
        engine_transports, "_nccl_group", lambda crew, store, size: Coalescing(store, crew.rank, size, crew.timeout)
    )
    monkeypatch.setattr(
        "megarl_slice_sources._nccl_group", lambda store, rank, size, device, timeout: Coalescing(store, rank, size, timeout)
    )
    case = dense(tmp_path)
    cases = [(case, "auto", gpus("012345"), "nccl"), (case, "auto", gpus("012312"), "cuda_ipc")]
    run_local_ranks(update_three_times, (cases,), RANKS, LAUNCH_SECONDS)


def keep_error(folder: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:
        (folder / f"error{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}")
        raise


def errors(folder: Path) -> dict[int, str]:
    return {int(path.name.removeprefix("error")): path.read_text() for path in folder.glob("error*")}


def join_in_vain(folder: Path, case: Transfer) -> None:
    crew = Crew(case, "nccl", gpus("012314"))
    keep_error(folder, crew.join)


def test_an_impossible_transport_is_refused_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run_local_ranks(join_in_vain, (tmp_path, dense(tmp_path)), RANKS, LAUNCH_SECONDS)
    assert set(errors(tmp_path).values()) == {
        "ConfigError: rollout.weight_transfer.transport nccl is impossible: trainer rank 1 and the engine's worker 0 share "
        "GPU GPU-1, of which NCCL takes only one into a group; use auto"
    }


def join_without_worker(folder: Path, case: Transfer) -> None:
    crew = Crew(case, "auto", hosts("aaaaaa"), timeout=2.0)
    keep_error(folder, crew.transfer.join if crew.rank == 1 else crew.join)


def test_a_worker_that_does_not_join_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransferError):
        run_local_ranks(join_without_worker, (tmp_path, dense(tmp_path)), RANKS, LAUNCH_SECONDS)
    assert "TransferError: worker 1 of the engine did not join within 2 s" in errors(tmp_path).values()


class SlowParameters(Parameters):
    """Keeps its reader in the first bucket until ``go`` is set."""

    def __init__(self, needed: Any, go: threading.Event) -> None:
        super().__init__(needed)
        self.go = go

    def open(self, name: str) -> Any:
        assert self.go.wait(20)
        return super().open(name)


def read_slowly(case: Transfer) -> None:
    crew = Crew(case, "shared_memory", hosts("aaaaaa"))
    crew.join()
    go, packed = threading.Event(), threading.Event()
    buckets: set[int] = set()

    def see_bucket(bucket: int) -> None:
        buckets.add(bucket)
        if len(buckets) > 1:
            packed.set()

    before_pack(crew.transfer, see_bucket)
    parameters = SlowParameters(case.needed[crew.rank], go) if crew.has_worker else None
    updating = threading.Thread(target=crew.update, args=(parameters,))
    updating.start()
    is_overtaken = packed.wait(0.5)
    dist.monitored_barrier()  # all have looked
    go.set()
    updating.join(20)
    assert packed.is_set() and not is_overtaken and not updating.is_alive()


def test_a_buffer_is_not_filled_again_before_it_is_read(tmp_path: Path) -> None:
    run_local_ranks(read_slowly, (dense(tmp_path),), RANKS, LAUNCH_SECONDS)


def update_while_one_dies(folder: Path, case: Transfer, locations: list[Location]) -> None:
    crew = Crew(case, "shared_memory", locations, timeout=5.0)
    crew.join()
    if crew.rank == 3:
        before_pack(crew.transfer, lambda bucket: os.kill(os.getpid(), signal.SIGKILL) if bucket == 1 else None)
    keep_error(folder, crew.update)


@pytest.mark.parametrize("locations", ["aaaaaa", "aabbab"])
def test_the_neighbours_of_a_killed_rank_name_tensor_and_bucket(
    tmp_path: Path, locations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 30.0)  # all have the time to say what they saw
    with pytest.raises(Exception, match=r"rank|exitcode|signal"):
        run_local_ranks(update_while_one_dies, (tmp_path, dense(tmp_path), hosts(locations)), RANKS, LAUNCH_SECONDS)
    found = errors(tmp_path)
    assert found  # a rank that has nothing more to do when the other dies has no error of its own
    assert all("bucket " in text and "model." in text for text in found.values())
    if locations == "aabbab":  # what rank 3 has for worker 0 goes through rank 1
        assert "from rank 3" in found[1] or "worker 0" in found[1]


def update_with_flipped_bit(folder: Path, case: Transfer) -> None:
    crew = Crew(case, "shared_memory", hosts("aabbab"), timeout=3.0)
    crew.join()
    pack, send = crew.transfer._pack, crew.transfer.send

    def pack_and_flip(held: Any, packed: Any, data: Any) -> None:
        pack(held, packed, data)
        if crew.rank == 2 and packed.bucket == 1:
            data[3] ^= 1

    crew.transfer._pack = pack_and_flip
    receiving = crew.receive(Parameters(case.needed[crew.rank])) if crew.has_worker else None
    try:
        keep_error(folder, send)
    finally:
        if receiving is not None:
            (folder / f"worker{crew.rank}").write_text(str(receiving.exception(20)))


def test_a_changed_bit_is_found_and_the_bucket_not_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 30.0)
    with pytest.raises(TransferError):
        run_local_ranks(update_with_flipped_bit, (tmp_path, dense(tmp_path)), RANKS, LAUNCH_SECONDS)
    told = [path.read_text() for path in tmp_path.glob("worker*")]
    print(told, errors(tmp_path))
    assert any("bucket 1 (model." in text and "from trainer rank 2 arrived changed" in text for text in told)
    assert any("has read bucket 1 (model." in text for text in errors(tmp_path).values())


def test_both_ends_say_where_they_are_in_the_same_words() -> None:
    here = load_plugin("megarl_slice_sources").own_location(receiver_module.torch.device("cpu"))
    location = own_location(receiver_module.torch.device("cpu"))
    assert here == {"host": location.host, "gpu": location.gpu} and location.gpu is None and location.host
