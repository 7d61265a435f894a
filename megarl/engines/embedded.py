"""The engine for laptops: transformers' generate in the trainer's own process."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megarl.config.schema import EmbeddedEngineConfig
from megarl.engines.checkpoint_views import checkpoint_views
from megarl.engines.protocol import Generation, SamplingParams
from megarl.engines.routed_experts import experts_of_rows, recorded_experts
from megarl.engines.token_sampler import GumbelSampler, RepetitionStop
from megarl.engines.weight_checklist import WeightChecklist
from megarl.errors import RolloutError
from megarl.types import FinishReason


@dataclass(eq=False)
class _Request:
    """One call of ``generate``: finished when every sample is there."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    answer: asyncio.Future[list[Generation]]
    samples: dict[int, Generation] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """One sequence to decode."""

    request: _Request
    sample_index: int

    @property
    def batch_key(self) -> SamplingParams:
        """Rows that differ in it cannot be decoded together; seeds and lengths are each row's own."""
        return replace(self.request.sampling, num_samples=1, max_new_tokens=0, seed=0)


class _Limits(StoppingCriteria):
    """Ends each row at its own limit, and all rows when an abort is asked for."""

    def __init__(self, limits: Tensor, width: int, abort: Event) -> None:
        """Take ``limits``, int64 [batch], the response tokens of each row, and ``width``, of the prompts."""
        self._limits, self._width, self._aborting = limits, width, abort

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return bool [batch], whether the row ends with its last token."""
        return (input_ids.shape[1] - self._width >= self._limits) | self._aborting.is_set()


class EmbeddedEngine:
    """RolloutEngine over a transformers model in this process, on CUDA where present, else on CPU.

    Concurrent ``generate`` calls of equal settings are decoded together, first come first served, ``batch_size`` sequences at a
    time, in a worker thread. A batch is formed one turn of the event loop after its requests came, so requests submitted in the
    same turn form the same batches in every run: with equal submissions the results are equal bit for bit.
    """

    def __init__(
        self,
        model_path: Path,
        dtype: torch.dtype,
        config: EmbeddedEngineConfig,
        weight_shapes: Mapping[str, tuple[int, ...]],
        *,
        reports_experts: bool = False,
    ) -> None:
        """Take the Hugging Face folder ``model_path``, of which only config.json is read, and ``weight_shapes``, what updates
        bring.

        With ``reports_experts`` every generation tells where the routers sent its tokens.
        """
        self._model_path = model_path
        self._weight_shapes = weight_shapes
        self._dtype = dtype
        self._config = config
        self._reports_experts = reports_experts
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._model: PreTrainedModel | None = None
        self._views: dict[str, Tensor] = {}
        self._version: int | None = None
        self._unusable = "it has no weights yet; call update_weights first"
        self._queue: deque[_Row] = deque()
        self._decoding: asyncio.Task[None] | None = None
        self._model_lock = asyncio.Lock()
        self._aborting = Event()  # read by the worker thread between tokens
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-engine")

    async def start(self) -> None:
        """Build the model; its weights come with the first ``update_weights``."""
        try:
            config = AutoConfig.from_pretrained(self._model_path)
        except (OSError, ValueError) as error:
            raise RolloutError(f"the embedded engine cannot read {self._model_path}/config.json: {error}") from error
        with torch.random.fork_rng():  # the throw-away initial weights must not shift the trainer's random numbers
            model = AutoModelForCausalLM.from_config(config, dtype=self._dtype)
        model = model.to(self._device).eval().requires_grad_(False)
        for buffer in model.buffers():  # in bfloat16 a router's correction bias would choose other experts than the trainer's
            buffer.data = buffer.data.float()
        self._views = checkpoint_views(model, self._weight_shapes)
        self._model = model
        # The folder's own sampling defaults (repetition penalty, ...) would change the distribution behind the trainer's back.
        self._model.generation_config = GenerationConfig()

    async def health(self) -> None:
        """Raise RolloutError when the engine cannot answer."""
        if self._model is None:
            raise RolloutError("the embedded engine was not started")
        if self._version is None:
            raise RolloutError(f"the embedded engine cannot answer: {self._unusable}")

    async def generate(self, prompt_token_ids: tuple[int, ...], sampling: SamplingParams) -> list[Generation]:
        """Sample ``sampling.num_samples`` responses to one prompt, in order."""
        await self.health()
        assert self._model is not None
        vocabulary = self._model.get_input_embeddings().num_embeddings
        if not prompt_token_ids or not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocabulary:
            raise RolloutError(
                f"the embedded engine got a prompt of {len(prompt_token_ids)} tokens that is empty or has ids outside "
                f"0..{vocabulary - 1}; does the tokenizer belong to {self._model_path}?"
            )
        request = _Request(prompt_token_ids, sampling, asyncio.get_running_loop().create_future())
        self._queue.extend(_Row(request, index) for index in range(sampling.num_samples))
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode_queue())
        return await request.answer

    async def abort(self) -> None:
        """End the requests in flight at the next token; returns when all have answered."""
        self._aborting.set()
        try:
            while self._decoding is not None and not self._decoding.done():
                await asyncio.wait({self._decoding})
        finally:
            self._aborting.clear()

    async def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Copy a whole new set of weights in place, after the batch being decoded.

        Raises:
            WeightsError: a parameter is missing, unknown or mis-shaped; the engine then refuses to generate.
        """
        if self._model is None:
            raise RolloutError("the embedded engine was not started")
        async with self._model_lock:
            self._version, self._unusable = None, f"its update to weight version {version} did not complete"
            checklist = WeightChecklist(self._weight_shapes)
            for name, tensor in weights:
                if checklist.accepts(name, tensor):
                    self._views[name].copy_(tensor)
            checklist.finish("the embedded engine")
            self._version = version

    async def close(self) -> None:
        """Drop the queue and the model; a batch being decoded ends at its next token."""
        self._aborting.set()
        if self._decoding is not None:
            self._decoding.cancel()
        for row in self._queue:
            row.request.answer.cancel()
        self._queue.clear()
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._model, self._views, self._version, self._unusable = None, {}, None, "it is closed"

    async def _decode_queue(self) -> None:
        """Decode batch after batch until the queue is empty."""
        while rows := self._next_batch():
            try:
                async with self._model_lock:
                    await self.health()
                    if self._aborting.is_set():
                        generations = [_generation([], [], (), row.request.sampling.max_new_tokens, None, 0) for row in rows]
                    else:
                        generations = await asyncio.get_running_loop().run_in_executor(self._worker, self._decode, rows)
            except Exception as error:
                self._fail(rows, error)
                continue
            for row, generation in zip(rows, generations, strict=True):
                samples = row.request.samples
                samples[row.sample_index] = generation
                if len(samples) == row.request.sampling.num_samples and not row.request.answer.done():
                    row.request.answer.set_result([samples[index] for index in range(len(samples))])

    def _next_batch(self) -> list[_Row]:
        """Take the oldest row of the queue and the oldest of those that can be decoded with it."""
        rows: list[_Row] = []
        left: deque[_Row] = deque()
        for row in self._queue:
            if row.request.answer.done():  # given up by its caller, or failed in an earlier batch
                continue
            is_alike = not rows or row.batch_key == rows[0].batch_key
            (rows if is_alike and len(rows) < self._config.batch_size else left).append(row)
        self._queue = left
        return rows

    def _fail(self, rows: list[_Row], error: Exception) -> None:
        """Hand the error to the callers of the batch."""
        for row in rows:
            if not row.request.answer.done():
                failure = RolloutError(f"the embedded engine failed while decoding: {type(error).__name__}: {error}")
                failure.__cause__ = error
                row.request.answer.set_exception(failure)

    def _decode(self, rows: Sequence[_Row]) -> list[Generation]:
        """Decode one batch; runs in the worker thread."""
        assert self._model is not None and self._version is not None
        sampling = rows[0].request.sampling
        prompts = [row.request.prompt_token_ids for row in rows]
        width = max(map(len, prompts))
        input_ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts], device=self._device)
        attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device)
        sampler = GumbelSampler([(row.request.sampling.seed, row.sample_index) for row in rows], sampling, attention_mask)
        limits = [row.request.sampling.max_new_tokens for row in rows]
        generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(limits),
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=0,
        )
        limit = _Limits(torch.tensor(limits, device=self._device), width, self._aborting)
        repetition = RepetitionStop(sampling.repetition_stop, len(rows), width) if sampling.repetition_stop is not None else None
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._config.threads or torch.multiprocessing.cpu_count())
        try:
            with torch.inference_mode(), recorded_experts(self._model) if self._reports_experts else nullcontext() as recorded:
                sequences = self._model.generate(
                    input_ids,
                    attention_mask=attention_mask,
                    generation_config=generation_config,
                    logits_processor=LogitsProcessorList([sampler]),
                    stopping_criteria=StoppingCriteriaList([limit, repetition] if repetition is not None else [limit]),
                )
        finally:
            torch.set_num_threads(threads_before)
        responses = sequences[:, width:].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        repeating = [None] * len(rows) if repetition is None else repetition.lengths
        generations = [
            _generation(response, row_logprobs, sampling.stop_token_ids, limit, length, self._version)
            for response, row_logprobs, limit, length in zip(responses, logprobs, limits, repeating, strict=True)
        ]
        if recorded is None:
            return generations
        experts = experts_of_rows(recorded, len(rows))
        return [
            # from the first prompt token on, up to the last token that was sampled, which no forward pass read
            replace(generation, routed_experts=row_experts[width - len(prompt) : width + len(generation.token_ids) - 1])
            for row_experts, prompt, generation in zip(experts, prompts, generations, strict=True)
        ]


def _generation(
    response: list[int], logprobs: list[float], stop_token_ids: tuple[int, ...], limit: int, repeating: int | None, version: int
) -> Generation:
    """Cut a row of a batch where it ended: what follows is padding.

    Args:
        limit: most tokens of this row.
        repeating: how many there were when it first repeated itself.
    """
    length, reason = limit, FinishReason.LENGTH
    if repeating is not None and repeating < limit:
        length, reason = repeating, FinishReason.REPETITION
    stop = next((index + 1 for index, token in enumerate(response[:length]) if token in stop_token_ids), None)
    if stop is not None:
        length, reason = stop, FinishReason.STOP
    elif len(response) < length:
        length, reason = len(response), FinishReason.ABORT
    return Generation(
        token_ids=tuple(response[:length]),
        logprobs=tuple(logprobs[:length]),
        weight_versions=(version,) * length,
        finish_reason=reason,
    )
