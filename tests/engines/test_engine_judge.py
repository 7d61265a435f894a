"""A judge that the real vLLM and SGLang serve. They need ``make engine-vllm engine-sglang``; without, these tests fail."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megarl.config.schema import RewardsConfig
from megarl.rewards.combine import RewardScorer
from megarl.types import FinishReason, Prompt, Rollout, ScoredRollout
from served_models import START_TIMEOUT, served_model, until_ready

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from quickstart.make_model import make_tokenizer

PROMPT = "Is it {reference}, {question} Given answer: {answer}"


def write_judge(folder: Path) -> None:
    """A model whose next token depends on the last one only: [[YES]] after a 4, [[NO]] after any other, then the end.

    Embeddings are unit vectors, which layers without output leave as they are; the output layer is the table of what follows what.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[[YES]]", "[[NO]]"])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    yes, no, four = tokenizer.convert_tokens_to_ids(["[[YES]]", "[[NO]]", "4"])
    sizes = {
        "hidden_size": 384,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = Qwen2Config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=False, **sizes
    )
    model = Qwen2ForCausalLM(config).float()
    follows = torch.zeros(len(tokenizer), config.hidden_size)
    follows[no, : len(tokenizer)] = 1
    follows[no, four], follows[yes, four] = 0, 1
    follows[no, [yes, no]], follows[tokenizer.eos_token_id, [yes, no]] = 0, 1
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(config.hidden_size)[: len(tokenizer)])
        model.lm_head.weight.copy_(follows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def response(answer: str) -> Rollout:
    reference = {"question": "what is 2 + 2?", "answers": ["4"], "documents": ["a secret"]}
    return Rollout(
        prompt=Prompt(prompt_id="train/0", token_ids=(1,), text="", reference=reference, task="train"),
        sample_index=0,
        token_ids=(1,),
        from_policy=(True,),
        logprobs=(0.0,),
        weight_versions=(0,),
        finish_reason=FinishReason.STOP,
        text=f"The answer is \\boxed{{{answer}}}.",
    )


async def judged(name: str, folder: Path, answers: list[str]) -> tuple[list[ScoredRollout | None], ScoredRollout | None]:
    """All answers at the same time, and the last one again when the judge is away."""
    async with served_model(name, folder) as (url, process):
        judge = {"url": f"{url}/v1", "model": str(folder / "model"), "prompt": PROMPT, "max_tokens": 4, "retries": 0}
        scorer = {"type": "document_qa", "extract": "boxed", "judge": judge}
        settings = RewardsConfig.model_validate({"scorers": [scorer], "timeout": 30, "on_failure": "zero"})
        reward_scorer = RewardScorer(settings, {}, str)
        try:
            await until_ready(reward_scorer, process)
            scored = await asyncio.gather(*(reward_scorer.score(response(answer)) for answer in answers))
            await process.close()
            return list(scored), await reward_scorer.score(response(answers[-1]))
        finally:
            await reward_scorer.close()


@pytest.mark.timeout(2 * START_TIMEOUT)
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_better_of_rule_and_judge_counts(tmp_path: Path, name: str) -> None:
    write_judge(tmp_path / "model")
    scored, alone = asyncio.run(judged(name, tmp_path, ["4", "it is 4", "it is 5", "maybe 14"]))
    parts = [dict(one.parts) for one in scored if one is not None]
    rule, judge, both = "document_qa_rule", "document_qa_judge", "document_qa"
    assert parts == [
        {rule: 1.0, both: 1.0},  # the judge is not asked
        {rule: 0.0, judge: 1.0, both: 1.0},
        {rule: 0.0, judge: 0.0, both: 0.0},
        {rule: 0.0, judge: 1.0, both: 1.0},  # a judge can be pleased
    ]
    assert alone is not None and alone.parts == {rule: 0.0, both: 0.0}
    (failure,) = alone.failures
    assert "train/0 sample 0" in failure and "failed in 1 requests" in failure
