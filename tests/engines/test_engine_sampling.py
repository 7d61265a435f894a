"""What min_p and penalties do in the real engines. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megarl.engines.protocol import SamplingParams
from real_engines import ARGUMENTS, make_engine
from tiny_rollout import exported_weights, generate_all, make_tiny_model, sampling, worst_gap

PROMPTS = [(1, 2, 3), tuple(range(5, 40))]


# vLLM reports log-probabilities of the logits before either; SGLang takes min_p without seeds alone
@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("vllm", {"min_p": 0.3, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.5}, {}),
        ("sglang", {"min_p": 0.3}, {"enable_deterministic_inference": False}),
    ],
)
def test_options_choose_the_tokens_and_leave_the_log_probabilities(
    tmp_path: Path, name: str, options: dict[str, float], arguments: dict[str, Any]
) -> None:
    make_tiny_model(0, tmp_path / "model")
    model = make_tiny_model(1)

    async def use(*asked: SamplingParams) -> list[Any]:
        engine = make_engine(name, tmp_path, rollout=options, arguments=ARGUMENTS[name] | arguments)
        await engine.start()
        try:
            await engine.update_weights(exported_weights(model), 0)
            return [await generate_all(engine, PROMPTS, one) for one in asked]
        finally:
            await engine.close()

    greedy, only_the_best, all_options, free, *penalised = asyncio.run(
        use(
            sampling(temperature=0.0, num_samples=1),
            sampling(min_p=1.0, num_samples=3),
            sampling(**options),
            sampling(),
            *(
                [sampling(frequency_penalty=2.0, min_p=0.9), sampling(frequency_penalty=-2.0, min_p=0.9)]
                if len(options) > 1
                else []
            ),
        )
    )
    for group, (best,) in zip(only_the_best, greedy, strict=True):
        assert {one.token_ids for one in group} == {best.token_ids}
    assert any(one.token_ids != best.token_ids for group, (best,) in zip(free, greedy, strict=True) for one in group)
    for groups in (only_the_best, all_options, free, *penalised):
        gap = worst_gap(model, PROMPTS, groups, 1.0)
        print(f"{name}: worst log-probability gap {gap:.1e}")
        assert gap <= 1e-4
    if penalised:
        varied, repeated = ([len(set(one.token_ids)) for group in groups for one in group] for groups in penalised)
        print(f"{name}: different tokens of 12 with frequency_penalty 2: {varied}, with -2: {repeated}")
        assert min(varied) > max(repeated)
