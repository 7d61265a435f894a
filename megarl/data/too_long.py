"""Rows that are longer than the model may read: refused by name, left out with a count, or cut in the middle of their prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from megarl.config.schema import Config, Rows
from megarl.data.row_sizes import naming_row
from megarl.data.sources import Row
from megarl.errors import DataError
from megarl.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rows_in_limits(
    config: Config, name: str, rows: Sequence[Row], sizes: numpy.ndarray, form: Rows, encode: Callable[[Row], object]
) -> numpy.ndarray:
    """Return which of the rows are trained on, bool [n].

    Args:
        config: the run; ``data.too_long`` decides.
        name: of the rows, for the line that counts those left out or cut.
        rows: all of them.
        sizes: of ``RowSizes.measure``.
        form: that was measured.
        encode: refuses a row that is too long, with a message that names it.

    Raises:
        DataError: one is too long and such rows are refused, or all are left out.
    """
    too_long = _is_too_long(config, sizes, form)
    policy, count = config.data.too_long, int(too_long.sum())
    if not count:
        return ~too_long
    first = rows[int(too_long.argmax())]
    if policy == "refuse":
        naming_row(first, encode, first)
    verb = "left out" if policy == "leave_out" else "cut in the middle of their prompts"
    print(
        f"{name}: {count:,} of {len(rows):,} rows are too long and {verb} (data.too_long), the first {first.location}", flush=True
    )
    if policy == "leave_out" and count == len(rows):
        raise DataError(f"{name}: all {count:,} rows are too long and left out (data.too_long); raise the limit on their tokens")
    return ~too_long if policy == "leave_out" else numpy.ones(len(rows), dtype=bool)


def _is_too_long(config: Config, sizes: numpy.ndarray, form: Rows) -> numpy.ndarray:
    if form == "prompts":
        return sizes[:, 0] > config.rollout.max_prompt_tokens
    lengths = sizes[:, :1] + sizes[:, 1:]  # of each response with its prompt
    if form == "examples":
        return lengths[:, 0] > config.sft.max_tokens
    is_above = pair_tokens(config, lengths) > config.policy.max_tokens_per_micro_batch
    return (lengths.max(axis=1) > config.preference.max_tokens) | is_above


def pair_tokens(config: Config, lengths: numpy.ndarray) -> numpy.ndarray:
    """Count the tokens [n] of each pair of responses, int [n, 2] with their prompts, when computed, padding included."""
    parallel = config.policy.parallel
    multiple = 2 * parallel.cp if parallel.cp > 1 else 1  # as Layout.sequence_multiple
    return (-(-(lengths + config.tokens_behind) // multiple) * multiple).sum(axis=1)


def cut_in_the_middle(prompt: Prompt, max_tokens: int, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    """Return the prompt with at most so many tokens: without its middle where it has more."""
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    token_ids = without_middle(prompt.token_ids, max_tokens)
    decoded: object = tokenizer.decode(token_ids)
    return replace(prompt, token_ids=token_ids, text=str(decoded))


def without_middle(token_ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """Keep the first and the last tokens of a sequence longer than ``max_tokens``, as many of both: what is asked about a
    document stands before or behind it (LongBench, arXiv 2308.14508)."""
    tail = max_tokens // 2
    return (*token_ids[: max_tokens - tail], *token_ids[len(token_ids) - tail :])
