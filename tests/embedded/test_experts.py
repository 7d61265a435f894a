"""The embedded engine with experts, against what transformers loads from the same checkpoint."""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from megarl.config.schema import EmbeddedEngineConfig
from megarl.engines.embedded import EmbeddedEngine
from megarl.engines.protocol import Generation
from megarl.errors import RolloutError, WeightsError
from megarl.families.registry import read_architecture
from megarl.weights.mapping import build_weight_map
from tiny import write_tiny_model
from tiny_rollout import sampling

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3"]
PROMPT = tuple(range(3, 70, 3))
BIAS = "e_score_correction_bias"


def checkpoint(folder: Path, family: str) -> dict[str, Tensor]:
    """A tiny model's tensors as transformers names them on disk; bfloat16 would lose what its correction biases say."""
    write_tiny_model(folder, family)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor + 100 if name.endswith(BIAS) else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def trained_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """What the trainer's updates bring."""
    return build_weight_map(read_architecture(folder), 128, False).hugging_face_shapes()


def greedy_by_transformers(folder: Path, dtype: torch.dtype) -> tuple[list[int], Tensor]:
    """Token ids and log-probabilities after PROMPT."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config = GenerationConfig()
    ids = torch.tensor([PROMPT])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = generated.sequences[0, len(PROMPT) :]
    return tokens.tolist(), torch.cat(generated.logits).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_loads_what_from_pretrained_loads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    weights = checkpoint(tmp_path, family)

    async def run() -> list[Generation]:
        engine = EmbeddedEngine(tmp_path, dtype, EmbeddedEngineConfig(threads=1), trained_shapes(tmp_path))
        await engine.start()
        await engine.update_weights(((name, torch.randn_like(tensor)) for name, tensor in weights.items()), 0)
        # As the trainer sends them: in its model's type, but for buffers.
        sent = ((name, tensor if name.endswith(BIAS) else tensor.to(dtype)) for name, tensor in reversed(weights.items()))
        await engine.update_weights(sent, 1)
        generations = await engine.generate(PROMPT, sampling(num_samples=1, temperature=0.0))
        await engine.close()
        return generations

    (generation,) = asyncio.run(run())
    tokens, logprobs = greedy_by_transformers(tmp_path, dtype)
    assert generation.token_ids == tuple(tokens)
    assert (logprobs - torch.tensor(generation.logprobs)).abs().max() <= 1e-5


def test_an_update_without_one_expert_is_refused(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, "qwen3_moe")
    del weights["model.layers.2.mlp.experts.4.up_proj.weight"]
    weights["model.layers.2.mlp.experts.6.up_proj.weight"] = torch.zeros(32, 64)

    async def run() -> None:
        engine = EmbeddedEngine(tmp_path, torch.float32, EmbeddedEngineConfig(threads=1), trained_shapes(tmp_path))
        await engine.start()
        with pytest.raises(WeightsError) as refused:
            await engine.update_weights(iter(weights.items()), 0)
        assert "(missing: model.layers.2.mlp.experts.4.up_proj.weight;" in str(refused.value)
        assert "not in the model: model.layers.2.mlp.experts.6.up_proj.weight)" in str(refused.value)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, r"has 245952 numbers and the weights of the trainer 245888; use"),
        (
            {"model.layers.0.mlp.experts.0.up_proj.weight": (31, 64)},
            r"no model\.layers\.0\..*up_proj\.weight of shape \(31, 64\)",
        ),
        ({"model.layers.0.mlp.experts.6.up_proj.weight": (32, 64)}, r"no model\.layers\.0\.mlp\.experts\.6.*\(1 such of"),
    ],
)
def test_a_model_that_updates_would_not_fill_is_refused_at_the_start(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], words: str
) -> None:
    write_tiny_model(tmp_path, "qwen3_moe")
    shapes = {name: shape for name, shape in (trained_shapes(tmp_path) | change).items() if shape is not None}
    engine = EmbeddedEngine(tmp_path, torch.float32, EmbeddedEngineConfig(threads=1), shapes)
    with pytest.raises(RolloutError, match=rf"^transformers' Qwen3MoeForCausalLM .*{words}"):
        asyncio.run(engine.start())
