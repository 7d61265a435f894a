"""The first prompts of a run, without the run."""

from collections.abc import Mapping
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from megarl.config.schema import Config, Rows
from megarl.config.stages import stages_of
from megarl.data.curriculum import StagedPrompts
from megarl.data.sampler import build_pair_source, build_prompt_source, build_sft_source
from megarl.data.tokenizer import run_tokenizer

TokenIds = tuple[int, ...]


class _Reader(Protocol):
    def __call__(self, config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenIds]:
        """Return the first prompts."""


def first_prompts(config: Config, count: int) -> list[TokenIds]:
    """Return the token ids of the first ``count`` training prompts, with a curriculum of its last stage."""
    return READERS[config.rows](config, run_tokenizer(config), count)


def _of_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenIds]:
    if config.curriculum is not None:
        stages = stages_of(config)
        return [prompt.token_ids for prompt in StagedPrompts(config, stages, tokenizer).source(stages[-1]).take(count)]
    return [prompt.token_ids for prompt in build_prompt_source(config, tokenizer).take(count)]


def _of_examples(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenIds]:
    return [example.token_ids[: example.num_prompt_tokens] for example in build_sft_source(config, tokenizer).take(count)]


def _of_pairs(config: Config, tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenIds]:
    chosen = [pair.chosen for pair in build_pair_source(config, tokenizer).take(count)]
    return [response.token_ids[: response.num_prompt_tokens] for response in chosen]


READERS: Mapping[Rows, _Reader] = {"prompts": _of_prompts, "examples": _of_examples, "pairs": _of_pairs}
