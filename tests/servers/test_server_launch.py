"""Command lines and environments of engine servers, and what stands in for GPU kernels on CPU."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from engine_plugin import load_plugin
from megarl.config.schema import Config
from megarl.engines.build import build_engine
from megarl.engines.server_engine import ServerEngine
from megarl.engines.server_launch import cores_of_ranks
from megarl.engines.sglang import CPU_FOLDER
from megarl.engines.vllm import VllmEngine
from megarl.errors import RolloutError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the settings of CPU servers")


def started_with(folder: Path, engine: str, **section: Any) -> tuple[dict[str, str | None], dict[str, str]]:
    """Flags with their values, and environment, of a server of ``engine``."""
    python = folder / "python"
    python.touch()
    values = {
        "kind": "rl",
        "seed": 7,
        "steps": 1,
        "model": {"path": folder},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {"engine": engine, "max_prompt_tokens": 20, "max_new_tokens": 30, engine: {"python": python, **section}},
    }
    built = build_engine(Config.model_validate(values), folder, weight_shapes={})
    assert isinstance(built, ServerEngine)
    (first, _, _, *words), environment = built.command(81)
    assert first == str(python)
    flags: dict[str, str | None] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            flags[word] = None if following.startswith("--") else following
    return flags, environment


@pytest.mark.parametrize(
    ("engine", "arguments", "expected"),
    [
        (
            "vllm",
            {"max_num_batched_tokens": 8192, "enable_prefix_caching": False, "enable_chunked_prefill": True},
            {"--max-num-batched-tokens": "8192", "--no-enable-prefix-caching": None, "--enable-chunked-prefill": None},
        ),
        ("sglang", {"chunked_prefill_size": 8192}, {"--chunked-prefill-size": "8192"}),
    ],
)
def test_limits_of_chunked_prefill_reach_the_engine(
    model_folder: Path, engine: str, arguments: dict[str, Any], expected: dict[str, str | None]
) -> None:
    flags, _ = started_with(model_folder, engine, arguments=arguments)
    assert expected.items() <= flags.items()
    without = started_with(model_folder, engine)[0]
    assert not expected.keys() & without.keys()  # none where none is given
    assert "--no-enable-chunked-prefill" not in flags and ("--no-enable-chunked-prefill" in without) == (engine == "vllm")


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_arguments_override_and_keep_their_kinds(model_folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SOME_PROXY", "kept")
    arguments = {"dtype": "bfloat16", "overrides": {"a": 1}, "skip_tokenizer_init": False, "new_switch": True, "seqs": 5}
    flags, environment = started_with(model_folder, engine, arguments=arguments, dtype="float32")
    assert flags["--dtype"] == "bfloat16"
    assert flags["--overrides"] == '{"a": 1}'
    assert flags["--seqs"] == "5"
    assert "--new-switch" in flags
    assert "--skip-tokenizer-init" not in flags
    assert ("--no-skip-tokenizer-init" in flags) == (engine == "vllm")  # SGLang's switches have no negative
    assert flags["--max-model-len" if engine == "vllm" else "--context-length"] == "50"
    assert environment["SOME_PROXY"] == "kept"
    assert not {"RANK", "OMP_NUM_THREADS"} & environment.keys()
    assert all(Path(folder).is_dir() for folder in environment["PYTHONPATH"].split(":"))


@pytest.mark.parametrize(("engine", "variable"), [("sglang", "SGLANG_CPU_OMP_THREADS_BIND"), ("vllm", "VLLM_CPU_OMP_THREADS_BIND")])
def test_every_worker_gets_cores_of_its_own(model_folder: Path, engine: str, variable: str) -> None:
    flags, environment = started_with(model_folder, engine, tensor_parallel_size=2)
    assert flags["--tensor-parallel-size"] == "2"
    assert environment[variable] == cores_of_ranks(2)
    assert variable not in started_with(model_folder, engine)[1]


@pytest.mark.parametrize(
    ("cores", "num_ranks", "bound"),
    [({0, 1}, 2, "0|1"), ({8, 2, 4, 6, 7}, 2, "2,4|6,7"), ({0, 1}, 4, "0|1|0|1"), ({3}, 2, "3|3"), ({0, 1, 2}, 1, "0,1,2")],
)
def test_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch, cores: set[int], num_ranks: int, bound: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    assert cores_of_ranks(num_ranks) == bound


def murmur3(data: bytes, state: int) -> int:
    """MurmurHash3_x86_32 of whole blocks of four bytes, as its author publishes it."""
    for start in range(0, len(data), 4):
        block = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 % 2**32
        block = (block << 15 | block >> 17) % 2**32 * 0x1B873593 % 2**32
        state ^= block
        state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


def test_the_hash_of_seeded_sampling() -> None:
    assert murmur3(b"aaaa", 0x9747B28C) == 0x5A97808A  # published test vectors
    assert murmur3(b"test", 0) == 0xBA6BD213
    seeds, positions, columns = [0, 5, 2**62 - 1, 2**63 + 11], [0, 1, 77, 2**20], [0, 1, 511, 151_935]
    hashed = load_plugin("megarl_murmur_hash", CPU_FOLDER).murmur_hash32(
        torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.tensor(columns)
    )
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for place, column in enumerate(columns):
            data = seed.to_bytes(8, "little") + position.to_bytes(4, "little") + column.to_bytes(4, "little")
            assert hashed[row, place] == murmur3(data, 0)


def test_the_rotary_embedding() -> None:
    heads, kv_heads, head_size, tokens = 4, 2, 16, 5
    embedding = Qwen2RotaryEmbedding(Qwen2Config(hidden_size=heads * head_size, num_attention_heads=heads))
    query, key = torch.randn(tokens, heads * head_size), torch.randn(tokens, kv_heads * head_size)
    positions = torch.tensor([0, 3, 4, 9, 2])
    cos, sin = embedding(query, torch.arange(10)[None])
    cache = torch.cat([cos[0, :, : head_size // 2], sin[0, :, : head_size // 2]], dim=-1)
    expected_query, expected_key = apply_rotary_pos_emb(
        query.view(1, tokens, heads, head_size).transpose(1, 2),
        key.view(1, tokens, kv_heads, head_size).transpose(1, 2),
        cos[:, positions],
        sin[:, positions],
    )
    load_plugin("_custom_ops", CPU_FOLDER / "vllm").rotary_embedding(positions, query, key, head_size, cache, True)
    torch.testing.assert_close(query, expected_query.transpose(1, 2).reshape(tokens, -1))
    torch.testing.assert_close(key, expected_key.transpose(1, 2).reshape(tokens, -1))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_what_is_local_goes_by_no_proxy(model_folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.delenv("NO_PROXY", raising=False)
    flags, environment = started_with(model_folder, engine)
    assert environment["http_proxy"] == "http://proxy:3128"
    assert environment["no_proxy"] == "intranet,127.0.0.1,localhost,::1"
    assert environment["NO_PROXY"] == "127.0.0.1,localhost,::1"
    assert flags["--host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("reported", "sampling", "needed"),
    [
        ("processed_logprobs", {"temperature": 0.9}, None),
        ("raw_logprobs", {"temperature": 0.9}, "processed_logprobs"),
        ("raw_logprobs", {}, None),  # at temperature 1 both are the same
        ("raw_logprobs", {"top_p": 0.9}, None),
        ("processed_logprobs", {"top_p": 0.9}, "raw_logprobs"),
        ("processed_logprobs", {"top_k": 20}, "raw_logprobs"),
        ("raw_logits", {}, "processed_logprobs"),
        ("processed_logits\x1b[2J" * 50, {}, "processed_logprobs"),
    ],
)
def test_a_vllm_that_reports_other_log_probabilities_is_refused(
    model_folder: Path, reported: str, sampling: dict[str, Any], needed: str | None
) -> None:
    values = {
        "kind": "rl",
        "steps": 1,
        "model": {"path": model_folder},
        "data": {"train": {"type": "jsonl", "path": "unused.jsonl"}},
        "rollout": {"engine": "vllm", "vllm": {"url": "http://127.0.0.1:9"}, **sampling},
    }
    engine = VllmEngine(Config.model_validate(values), model_folder, {})
    if needed is None:
        engine._require_logprobs_mode(reported)
        return
    with pytest.raises(RolloutError, match=f"start it with --logprobs-mode {needed}$") as refused:
        engine._require_logprobs_mode(reported)
    assert len(str(refused.value)) <= 300 and str(refused.value).isprintable()
