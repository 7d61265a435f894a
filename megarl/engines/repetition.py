"""Ending responses that repeat themselves inside transformers' generate()."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from megarl.config.schema import RepetitionStopConfig


class RepetitionStop(StoppingCriteria):
    """Ends a row when its last tokens are one pattern several times in a row; each row looks at its own response only.

    The rule is vLLM's (``check_sequence_repetition`` in its scheduler), so that the engines end the same responses.

    Attributes:
        lengths: for each row its response tokens when it first repeated itself; None while it has not. A row that another criterion
            ended goes on with padding, which repeats itself: the smaller length counts.
    """

    def __init__(self, config: RepetitionStopConfig, num_rows: int, prompt_width: int) -> None:
        """``prompt_width`` is the number of columns, padding included, before the responses."""
        self.lengths: list[int | None] = [None] * num_rows
        self._config = config
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """int64 [rows, width so far] to bool [rows], whether the row is done."""
        length = input_ids.shape[1] - self._prompt_width
        count = self._config.min_count
        repeats = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for size in range(self._config.min_pattern_size, min(self._config.max_pattern_size, length // count) + 1):
            end = input_ids[:, -size * count :]
            repeats |= (end[:, size:] == end[:, :-size]).all(dim=1)
        for row in repeats.nonzero()[:, 0].tolist():
            if self.lengths[row] is None:
                self.lengths[row] = length
        return repeats
