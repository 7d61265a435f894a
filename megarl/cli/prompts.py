"""The first prompts of a run, without the run."""

from megarl.config.models_of import trains_on_pairs
from megarl.config.schema import Config
from megarl.config.stages import stages_of
from megarl.data.curriculum import StagedPrompts
from megarl.data.sampler import build_pair_source, build_prompt_source, build_sft_source
from megarl.data.tokenizer import run_tokenizer


def first_prompts(config: Config, count: int) -> list[tuple[int, ...]]:
    """Return the token ids of the first ``count`` training prompts, with a curriculum of its last stage."""
    tokenizer = run_tokenizer(config)
    if config.kind == "sft":
        return [example.token_ids[: example.num_prompt_tokens] for example in build_sft_source(config, tokenizer).take(count)]
    if trains_on_pairs(config):
        chosen = [pair.chosen for pair in build_pair_source(config, tokenizer).take(count)]
        return [response.token_ids[: response.num_prompt_tokens] for response in chosen]
    if config.curriculum is not None:
        stages = stages_of(config)
        return [prompt.token_ids for prompt in StagedPrompts(config, stages, tokenizer).source(stages[-1]).take(count)]
    return [prompt.token_ids for prompt in build_prompt_source(config, tokenizer).take(count)]
