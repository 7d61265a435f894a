"""Sampling of responses."""

from pathlib import Path
from typing import Any, Literal

from megarl.builtin.environments import EnvironmentConfig
from megarl.section import Section, key


class EmbeddedEngineConfig(Section):
    """transformers' generate inside the rank 0 process, for laptops."""

    batch_size: int = key(64, "sequences", "Most sequences decoded together.", ge=1)
    threads: int = key(0, "threads", "CPU threads while generating; 0 means all cores.", ge=0, le=4096)


class EngineServerConfig(Section):
    """The real vLLM or SGLang as a server process in a Python environment of its own, or one given by URL."""

    python: Path | None = key(
        None,
        "file",
        "Python of the environment that has the engine; when not given, the trainer's own if it has it, else the one built by "
        "make engine-vllm or engine-sglang.",
    )
    url: str | None = key(None, "URL", "Use this running server instead of starting one (docs/engines.md says how it is started).")
    api_key_env: str | None = key(
        None,
        "environment variable",
        "Holds the key of the server at url; one that the run starts gets a random key of its own.",
    )
    port: int = key(0, "port", "Port of the started server; 0 takes a free one.", ge=0, le=65535)
    tensor_parallel_size: int = key(1, "ranks", "Tensor parallel size of the server.", ge=1)
    dtype: Literal["float32", "bfloat16"] | None = key(None, "-", "Type of the server's weights; the policy's when not given.")
    start_timeout: float = key(600.0, "seconds", "Time the server has to become healthy.", gt=0)
    start_attempts: int = key(
        2, "starts", "How often a server that is not healthy in time is started before the run ends with the error.", ge=1
    )
    update_timeout: float = key(300.0, "seconds", "Time each step of a weight update may take.", gt=0)
    arguments: dict[str, Any] = key(dict, "-", "More engine arguments under the engine's own names, e.g. vLLM's max_num_seqs: 64.")


class WeightTransferConfig(Section):
    """How new weights get into an engine server; the embedded engine takes them from rank 0's memory."""

    method: Literal["slices", "broadcast"] = key(
        "slices",
        "-",
        "slices: all ranks send each worker of the engine what it holds, and no more; broadcast: rank 0 gathers whole tensors and "
        "sends all of them to every worker.",
    )
    transport: Literal["auto", "gloo", "shared_memory", "nccl", "cuda_ipc"] = key(
        "auto",
        "-",
        "What slices go by: cuda_ipc where every worker of the engine is on the GPU of a trainer rank, nccl where none is, "
        "shared_memory on one machine, gloo (through host memory) anywhere; auto takes the first of these that is possible.",
    )
    bucket_mib: int = key(64, "MiB", "Most that a rank sends, or a worker receives, at a time.", ge=1)
    max_restarts: int = key(
        1, "restarts", "How often an engine is started again when a weight update fails, before the run ends with the error.", ge=0
    )


class RepetitionStopConfig(Section):
    """When a response counts as one that only repeats itself: its end is one pattern of tokens several times in a row."""

    max_pattern_size: int = key(..., "tokens", "Longest pattern that is looked for.", ge=1)
    min_pattern_size: int = key(1, "tokens", "Shortest pattern that is looked for.", ge=1)
    min_count: int = key(..., "-", "The response ends when the pattern stands there this many times in a row.", ge=2)


class AsynchronousConfig(Section):
    """Generation runs beside training, ahead of it by a bounded number of weight versions (AReaL, arXiv 2505.24298)."""

    max_staleness: int = key(
        1,
        "weight versions",
        "A response is trained on at most this many updates after its group was begun, so no token is older; so many steps' groups "
        "more than one are under way.",
        ge=1,
    )
    on_update: Literal["continue", "finish"] = key(
        "continue",
        "-",
        "What happens to responses under way at a weight update. continue: they are cut at the next token and go on with the new "
        "weights; finish: the update waits for them.",
    )


class PartialConfig(Section):
    """Partial rollouts (Kimi k1.5, arXiv 2501.12599): a response grows by a bounded number of tokens in one step."""

    step_token_budget: int = key(
        ...,
        "tokens",
        "A response that has grown by so many in a step waits for the next one, and goes on with newer weights.",
        ge=1,
    )


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["embedded", "sglang", "vllm"] = key("embedded", "-", "Which engine samples.")
    prompts_per_step: int = key(32, "prompts", "Groups that one step trains on.", ge=1)
    samples_per_prompt: int = key(8, "responses", "Responses per group.", ge=1)
    max_prompt_tokens: int = key(512, "tokens", "Longest prompt; a longer one is an error that names it.", ge=1)
    max_new_tokens: int = key(512, "tokens", "Longest response; with an environment all turns and its messages together.", ge=1)
    temperature: float = key(1.0, "-", "Softmax temperature of sampling; the trainer's log-probabilities use it too.", gt=0)
    top_p: float = key(1.0, "-", "Nucleus sampling mass; 1 means off.", gt=0, le=1)
    top_k: int = key(0, "tokens", "Sample among the k most probable tokens; 0 means off.", ge=0)
    min_p: float = key(
        0.0,
        "-",
        "Sample among tokens at least this times as probable as the most probable one; 0 means off. As with top_p and top_k, "
        "log-probabilities are of the distribution before it, so sampler_correction does not correct for it.",
        ge=0,
        le=1,
    )
    presence_penalty: float = key(
        0.0,
        "-",
        "Subtracted from the logits of tokens that the turn has so far; 0 means off. Log-probabilities are of the logits before "
        "it, so sampler_correction does not correct for it.",
        ge=-2,
        le=2,
    )
    frequency_penalty: float = key(
        0.0, "-", "As presence_penalty, for every time that the turn has the token; 0 means off.", ge=-2, le=2
    )
    repetition_penalty: float = key(
        1.0,
        "-",
        "As presence_penalty, for tokens that the prompt or the turn has: their positive logits are divided by it, negative ones "
        "multiplied; 1 means off.",
        gt=0,
        le=2,
    )
    stop_token_ids: list[int] = key(
        list,
        "token ids",
        "More stop tokens than the tokenizer's end-of-sequence token and those of the model's generation_config.json.",
    )
    show_special_tokens: bool = key(
        True,
        "-",
        "Keep special tokens such as <think> in the text of a response, which scorers, environments and rollouts/ see; tokens that "
        "end it or only pad are never in it.",
    )
    show_prefill: bool = key(
        True, "-", "Begin that text with what the template ends the prompt with as the response's beginning, e.g. <think>."
    )
    repetition_stop: RepetitionStopConfig | None = key(
        None, "-", "End responses that repeat themselves (Kimi k1.5, arXiv 2501.12599); none are ended when not given."
    )
    routing_replay: bool = key(
        False,
        "-",
        "For mixtures of experts: the engine reports the experts of every token, and the policy's routers choose the same ones "
        "(arXiv 2510.11370).",
    )
    request_timeout: float = key(
        600.0, "seconds", "Time one prompt has to be answered and scored; the error names the prompt.", gt=0
    )
    request_timeout_per_kilotoken: float = key(
        0.0, "seconds", "Added to request_timeout for every 1,000 tokens of the prompt and its longest response.", ge=0
    )
    max_retries: int = key(2, "retries", "How often a failed or timed-out request is sent again.", ge=0)
    concurrency: int = key(256, "prompts", "Most prompts in flight at the same time.", ge=1)
    environment: EnvironmentConfig | None = key(None, "-", "What answers the policy's turns; one turn when not given.")
    asynchronous: AsynchronousConfig | None = key(None, "-", "Generate beside training; when not given, steps alternate with it.")
    partial: PartialConfig | None = key(None, "-", "Spread long responses over several steps; when not given, they end in theirs.")
    weight_transfer: WeightTransferConfig = key(WeightTransferConfig, "-", "Updates of a server's weights.")
    embedded: EmbeddedEngineConfig = key(EmbeddedEngineConfig, "-", "Settings of engine: embedded.")
    sglang: EngineServerConfig = key(EngineServerConfig, "-", "Settings of engine: sglang.")
    vllm: EngineServerConfig = key(EngineServerConfig, "-", "Settings of engine: vllm.")

    @property
    def server_engine(self) -> Literal["sglang", "vllm"] | None:
        """The engine behind a server; None for the embedded one."""
        return None if self.engine == "embedded" else self.engine

    @property
    def server(self) -> EngineServerConfig | None:
        """The settings of the chosen engine's server; None for the embedded one, which has none."""
        servers = {"sglang": self.sglang, "vllm": self.vllm}
        return servers.get(self.engine)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest response."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def longest_words(self) -> str:
        """The same, as a message says it."""
        return (
            f"rollout.max_prompt_tokens {self.max_prompt_tokens} + rollout.max_new_tokens {self.max_new_tokens} = "
            f"{self.longest} tokens"
        )

    @property
    def outlives_updates(self) -> bool:
        """Whether a response may go on after an update of the weights."""
        return self.asynchronous is not None or self.partial is not None

    def reshaping(self) -> dict[str, float]:
        """Return the options in use that make the sampler's distribution another than softmax(logits / temperature)."""
        off = {"top_p": 1, "top_k": 0, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
        return {name: getattr(self, name) for name, value in off.items() if getattr(self, name) != value}

    def time_limit(self, num_prompt_tokens: int) -> float:
        """Return the seconds that a prompt of so many tokens has to be answered and scored."""
        return self.request_timeout + self.request_timeout_per_kilotoken * (num_prompt_tokens + self.max_new_tokens) / 1000
