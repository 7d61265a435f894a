"""The one place where a configuration key exists: its type, default, unit and meaning. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megarl.config.names import Name
from megarl.config.presets import PRESETS, with_preset

ADVANTAGES = (
    "group_mean_std",
    "group_mean",
    "leave_one_out",
    "group_mean_batch_std",
    "batch_mean_std",
    "reward_to_go",
    "reward_to_go_batch_mean",
    "gae",
    "greedy_baseline",
    "process_rewards",
    "group_mean_task_std",
)
SURROGATES = ("ppo_clip", "gmpo", "cispo", "policy_gradient", "mirror_descent")


def key(default: Any, unit: str, sentence: str, **constraints: Any) -> Any:
    """A schema field with its documentation; ``...`` as default makes the key required."""
    extra = {"json_schema_extra": {"unit": unit}, "description": sentence, **constraints}
    if callable(default):
        return Field(default_factory=default, **extra)
    return Field(default=default, **extra)


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys and numbers that are NaN or infinite refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The Hugging Face model that is trained."""

    path: Path = key(
        ..., "folder", "Model folder: config.json, tokenizer files, and safetensors or a Megatron checkpoint unless init is random."
    )
    init: Literal["pretrained", "random"] = key(
        "pretrained", "-", "Read the folder's weights, or draw random ones from its config and the seed."
    )
    tokenizer: Path | None = key(None, "folder", "Tokenizer folder; the model folder when not given.")
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "-", "Type of parameters and activations; gradients and optimizer state stay float32."
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = key(
        "auto", "-", "Megatron layer implementation; auto takes Transformer Engine where it is installed and CUDA is present."
    )
    vocabulary_pad_multiple: int = key(1, "rows", "The vocabulary is padded to a multiple of this times tp.", ge=1)


class ParallelConfig(Section):
    """The layout of one role over its ranks; data parallel size is what remains of the world."""

    tp: int = key(1, "ranks", "Tensor parallel size.", ge=1)
    pp: int = key(1, "ranks", "Pipeline parallel size.", ge=1)
    vpp: int = key(1, "model chunks per rank", "Virtual pipeline size (interleaved schedule); 1 means 1F1B.", ge=1)
    cp: int = key(1, "ranks", "Context parallel size.", ge=1)
    ep: int = key(1, "ranks", "Expert parallel size.", ge=1)
    etp: int | None = key(None, "ranks", "Tensor parallel size of experts; tp when not given.", ge=1)
    sequence_parallel: bool = key(False, "-", "Shard activations of norms and residuals along the sequence over the tp ranks.")
    num_layers_in_first_pipeline_stage: int | None = key(
        None, "layers", "Layers of the first pipeline stage; an equal share when not given.", ge=1
    )
    num_layers_in_last_pipeline_stage: int | None = key(
        None, "layers", "Layers of the last pipeline stage; an equal share when not given.", ge=1
    )
    context_parallel_method: Literal["all_gather", "all_to_all", "ring", "hybrid"] = key(
        "all_gather",
        "-",
        "How attention sees other ranks' tokens: gather keys and values, exchange heads (Ulysses), pass keys and values around a "
        "ring, or exchange heads among ulysses_size neighbours and pass keys and values around rings of such neighbours.",
    )
    ulysses_size: int | None = key(
        None, "ranks", "For hybrid: neighbouring context parallel ranks, such as those of a node, that exchange heads.", ge=2
    )
    distributed_optimizer: bool = key(True, "-", "Shard optimizer state over data and context parallel ranks.")
    overlap_gradient_reduce: bool = key(False, "-", "Overlap gradient reduction with the backward pass.")


class RoleConfig(Section):
    """One model in the world: its layout and how much it computes at once."""

    parallel: ParallelConfig = key(ParallelConfig, "-", "Layout of this role.")
    max_tokens_per_micro_batch: int = key(
        16384, "tokens", "Most tokens that one packed micro-batch of one data parallel replica holds, over all its cp ranks.", ge=1
    )
    logprob_chunk_tokens: int = key(
        1024, "tokens", "Response tokens whose vocabulary logits exist at the same time, in forward and in backward.", ge=1
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none", "-", "Activation recomputation: none, attention only, or whole transformer layers."
    )


class ReferenceConfig(RoleConfig):
    """The frozen reference model of the KL term; built only when algorithm.kl needs it."""

    path: Path | None = key(
        None, "folder", "Hugging Face folder of the reference weights; the policy's starting weights when not given."
    )


class OptimizerConfig(Section):
    """Adam (decoupled weight decay) and its learning-rate schedule."""

    learning_rate: float = key(1e-6, "-", "Peak learning rate.", gt=0)
    min_learning_rate: float = key(0.0, "-", "Learning rate at the end of the decay.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "-", "Shape of the decay from peak to minimum.")
    warmup_steps: int = key(0, "optimizer steps", "Linear warm-up from 0.", ge=0)
    weight_decay: float = key(0.01, "-", "Decoupled weight decay; not applied to biases and norms.", ge=0)
    beta1: float = key(0.9, "-", "Adam's first moment decay.", ge=0, lt=1)
    beta2: float = key(0.999, "-", "Adam's second moment decay.", ge=0, lt=1)
    epsilon: float = key(1e-8, "-", "Adam's denominator constant.", gt=0)
    clip_gradient: float = key(1.0, "L2 norm", "The global gradient norm is clipped to this; 0 means no clipping.", ge=0)
    max_skipped_steps: int = key(
        10,
        "optimizer steps",
        "Training ends with an error after this many consecutive steps skipped for NaN or Inf gradients.",
        ge=1,
    )


class CriticConfig(RoleConfig):
    """The critic; built only when algorithm.advantage is gae."""

    path: Path | None = key(
        None,
        "folder",
        "Hugging Face folder that the critic starts from: a language model, whose output layer it replaces, or a "
        "...ForSequenceClassification with one label, such as a reward model; the policy's starting weights when not given.",
    )
    optimizer: OptimizerConfig | None = key(None, "-", "The critic's optimizer; settings as the policy's when not given.")
    warmup_steps: int = key(0, "steps", "In the first steps of the run the critic alone learns.", ge=0)


class RewardModelConfig(RoleConfig):
    """A frozen reward model that scores every training response beside the scorers; there is none when the section is not given."""

    path: Path = key(
        ..., "folder", "Hugging Face folder of a ...ForSequenceClassification with one label that reads the policy's tokens."
    )
    weight: float = key(1.0, "-", "Factor of its score in the reward.")


class ClipConfig(Section):
    """The clip range of the importance ratio; policy_gradient and mirror_descent do not clip."""

    low: float = key(0.2, "-", "The ratio is clipped below at 1 - low (gmpo: at e^-low).", ge=0, le=1)
    high: float = key(0.2, "-", "The ratio is clipped above at 1 + high (gmpo: at e^high).", ge=0)
    dual: float | None = key(
        None, "-", "For ppo_clip: the loss of a token with a negative advantage stays below dual times its size.", gt=1
    )


class KLConfig(Section):
    """The KL penalty against the reference model."""

    place: Literal["none", "reward", "loss"] = key(
        "none", "-", "No penalty and no reference model, a part of each token's reward, or a term of the loss."
    )
    estimator: Literal["k1", "k2", "k3"] = key("k3", "-", "Schulman's estimator of KL(policy || reference) per token.")
    coefficient: float = key(0.0, "-", "Weight of the penalty (beta); with a target, its value at the first step.", ge=0)
    target: float | None = key(
        None, "nats per response", "The coefficient is adapted after each step to hold this KL; fixed when not given.", gt=0
    )
    adaptation_rate: float = key(0.1, "-", "With a target: K of the adaptation, beta times (1 + K error) after each step.", gt=0)


class SamplerCorrectionConfig(Section):
    """Importance weights for the gap between the sampler's log-probabilities and the trainer's."""

    method: Literal["none", "tis", "mis"] = key(
        "none", "-", "No correction; tis: ratios above the cap count as the cap; mis: tokens above the cap are left out."
    )
    level: Literal["token", "sequence"] = key("token", "-", "One ratio for each token, or the product over the response.")
    cap: float = key(2.0, "-", "Largest trainer / sampler probability ratio.", gt=0)


class EntropyControlConfig(Section):
    """AEPO (arXiv 2512.12967): responses with negative advantages are left out while the entropy is too high."""

    low: float = key(..., "nats", "They are taken back in once the mean token entropy is below this.", ge=0)
    high: float = key(..., "nats", "They are left out once the mean token entropy is above this.", gt=0)


class RewardShapingConfig(Section):
    """What is added to each response's reward before advantages are made."""

    overlong_buffer: float = key(
        0.0,
        "share of rollout.max_new_tokens",
        "Soft overlong punishment: over this last share of the longest response the reward falls by up to 1; 0 means none.",
        ge=0,
        le=1,
    )
    length_weight: float = key(
        0.0,
        "-",
        "Weight of Kimi k1.5's length reward, which prefers the shorter of a group's correct responses; 0 means none.",
        ge=0,
    )
    length_start: int = key(0, "steps", "The length reward counts after this many steps.", ge=0)
    correct_reward: float = key(1.0, "reward", "For the length reward: a response with at least this reward is correct.")


class GAEConfig(Section):
    """Generalised advantage estimation (arXiv 1506.02438), for advantage gae."""

    discount: float = key(1.0, "-", "Gamma: what a reward one token later is worth.", gt=0, le=1)
    trace_decay: float = key(
        0.95, "-", "Lambda: 1 takes whole returns, 0 the error of one token; unused with length_adaptive_alpha.", ge=0, le=1
    )
    value_trace_decay: float | None = key(
        None, "-", "Lambda of the critic's targets (VAPO, arXiv 2504.05118, uses 1); the advantages' when not given.", ge=0, le=1
    )
    length_adaptive_alpha: float | None = key(
        None, "-", "Lambda of a response of l tokens is 1 - 1 / (alpha l) (VAPO uses 0.05); trace_decay when not given.", gt=0
    )


class AlgorithmConfig(Section):
    """A policy-gradient method as one choice per axis; the defaults are GRPO (arXiv 2402.03300)."""

    preset: Annotated[str, Name(PRESETS)] | None = key(
        None, "-", "A method's choices (megarl/config/presets); keys given beside it go before the preset's."
    )
    advantage: Annotated[str, Name(ADVANTAGES, or_function=True)] = key("group_mean_std", "-", "Baseline and scale of the reward.")
    whiten: bool = key(False, "-", "Shift and scale advantages to mean 0 and variance 1 over all response tokens of the step.")
    ratio: Literal["token", "sequence", "sequence_token"] = key(
        "token", "-", "Importance ratio of each token, of the whole response (geometric mean), or the latter with token gradients."
    )
    surrogate: Annotated[str, Name(SURROGATES, or_function=True)] = key("ppo_clip", "-", "Policy loss of each token.")
    clip: ClipConfig = key(ClipConfig, "-", "Clipping of the ratio.")
    mirror_descent_tau: float = key(0.1, "-", "For mirror_descent: weight of the squared log-ratio of a response.", gt=0)
    gae: GAEConfig = key(GAEConfig, "-", "Settings of advantage gae.")
    value_clip: float = key(
        0.2, "-", "For advantage gae: values that move further from those before the step have no gradient towards it.", gt=0
    )
    aggregation: Literal["sequence_mean", "token_mean", "token_sum_over_constant", "sequence_sum"] = key(
        "sequence_mean",
        "-",
        "Over the global batch: mean of each response's token mean, mean over all tokens, token sum / (responses times "
        "rollout.max_new_tokens), or mean of each response's token sum.",
    )
    kl: KLConfig = key(KLConfig, "-", "KL penalty.")
    entropy_coefficient: float = key(0.0, "-", "Weight of the entropy bonus.", ge=0)
    entropy_control: EntropyControlConfig | None = key(None, "-", "Negative samples by entropy; all are used when not given.")
    sampler_correction: SamplerCorrectionConfig = key(SamplerCorrectionConfig, "-", "Weights for sampler and trainer that differ.")
    reward_shaping: RewardShapingConfig = key(RewardShapingConfig, "-", "Rewards for length.")
    mask_truncated: bool = key(False, "-", "Leave responses cut at rollout.max_new_tokens out of the loss (overlong filtering).")
    dynamic_sampling: bool = key(
        False,
        "-",
        "Drop groups whose rewards, the greedy response's included, are all equal and sample others in their place (DAPO, arXiv "
        "2503.14476).",
    )
    max_sampling_waves: int = key(
        10, "waves", "Dynamic sampling gives up with an error after this many waves of prompts for one step.", ge=1
    )
    updates_per_step: int = key(1, "optimizer steps", "Mini-batches that the rollouts of one step are split into, in order.", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, section: Any) -> Any:
        return with_preset(section)


class EmbeddedEngineConfig(Section):
    """transformers' generate inside the rank 0 process, for laptops."""

    batch_size: int = key(64, "sequences", "Most sequences decoded together.", ge=1)
    threads: int = key(0, "threads", "CPU threads while generating; 0 means all cores.", ge=0)


class EngineServerConfig(Section):
    """The real vLLM or SGLang as a server process in a Python environment of its own, or one given by URL."""

    python: Path | None = key(
        None,
        "file",
        "Python of the environment that has the engine; when not given, the trainer's own if it has it, else the one built by "
        "make engine-vllm or engine-sglang.",
    )
    url: str | None = key(None, "URL", "Use this running server instead of starting one.")
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
    bucket_mib: int = key(64, "MiB", "Most that a rank sends, or a worker receives, at a time.", ge=1)
    max_restarts: int = key(
        1, "restarts", "How often an engine is started again when a weight update fails, before the run ends with the error.", ge=0
    )


class RolloutConfig(Section):
    """Sampling of responses."""

    engine: Literal["embedded", "sglang", "vllm"] = key("embedded", "-", "Which engine samples.")
    prompts_per_step: int = key(32, "prompts", "Groups that one step trains on.", ge=1)
    samples_per_prompt: int = key(8, "responses", "Responses per group.", ge=1)
    max_prompt_tokens: int = key(512, "tokens", "Longest prompt; a longer one is an error that names it.", ge=1)
    max_new_tokens: int = key(512, "tokens", "Longest response.", ge=1)
    temperature: float = key(1.0, "-", "Softmax temperature of sampling; the trainer's log-probabilities use it too.", gt=0)
    top_p: float = key(1.0, "-", "Nucleus sampling mass; 1 means off.", gt=0, le=1)
    top_k: int = key(0, "tokens", "Sample among the k most probable tokens; 0 means off.", ge=0)
    stop_token_ids: list[int] = key(list, "token ids", "More stop tokens than the tokenizer's end-of-sequence token.")
    request_timeout: float = key(
        600.0, "seconds", "Time one prompt has to be answered and scored; the error names the prompt.", gt=0
    )
    max_retries: int = key(2, "retries", "How often a failed or timed-out request is sent again.", ge=0)
    concurrency: int = key(256, "prompts", "Most prompts in flight at the same time.", ge=1)
    weight_transfer: WeightTransferConfig = key(WeightTransferConfig, "-", "Updates of a server's weights.")
    embedded: EmbeddedEngineConfig = key(EmbeddedEngineConfig, "-", "Settings of engine: embedded.")
    sglang: EngineServerConfig = key(EngineServerConfig, "-", "Settings of engine: sglang.")
    vllm: EngineServerConfig = key(EngineServerConfig, "-", "Settings of engine: vllm.")


class JsonlSource(Section):
    """Rows of a JSON-lines file."""

    type: Literal["jsonl"] = key("jsonl", "-", "The rows come from a JSON-lines file.")
    path: Path = key(..., "file", "JSON-lines file, one object a line.")
    prompt_field: str = key("prompt", "-", "Field with the question, a string or a list of chat messages.")
    answer_field: str = key("answer", "-", "Field with the expected answer; SFT trains on it as the response.")


class DatasetsSource(Section):
    """A Hugging Face dataset."""

    type: Literal["datasets"] = key("datasets", "-", "The rows come from a Hugging Face dataset.")
    path: str = key(..., "name or folder", "Folder written by save_to_disk, or a name for datasets.load_dataset.")
    split: str = key("train", "-", "Split of the dataset.")
    prompt_field: str = key("prompt", "-", "Field with the question, a string or a list of chat messages.")
    answer_field: str = key("answer", "-", "Field with the expected answer; SFT trains on it as the response.")


class ReasoningGymSource(Section):
    """Procedurally generated, verifiable tasks of the reasoning-gym package."""

    type: Literal["reasoning_gym"] = key("reasoning_gym", "-", "The rows come from a reasoning-gym generator.")
    task: str = key(..., "-", "Name of the generator, e.g. chain_sum.")
    size: int = key(1000, "prompts", "How many tasks are generated.", ge=1)
    seed: int = key(0, "-", "Seed of the generator; different seeds give different tasks.")
    options: dict[str, Any] = key(dict, "-", "The generator's own options, e.g. min_digits: 1.")


DataSource = Annotated[JsonlSource | DatasetsSource | ReasoningGymSource, Field(discriminator="type")]


class DataConfig(Section):
    """Where prompts come from and how they are written for the model."""

    train: DataSource = key(..., "-", "Training rows.")
    exclude: list[DataSource] = key(list, "-", "Rows whose prompt text appears here are left out of training.")
    shuffle: bool = key(True, "-", "Shuffle each pass over the rows with the run's seed.")
    template: str = key("chat", "-", "'chat' for the tokenizer's chat template, or a text with {prompt} in it.")
    response_suffix: str = key("", "-", "Text put after each SFT response, before the end-of-sequence token.")


class SFTConfig(Section):
    """Supervised fine-tuning on the answers of data.train."""

    examples_per_step: int = key(64, "examples", "Examples in one optimizer step.", ge=1)
    max_tokens: int = key(2048, "tokens", "Longest example, prompt and response; a longer one is an error that names it.", ge=2)


class JudgeConfig(Section):
    """A language model that judges answers, behind vLLM, SGLang or another server with the OpenAI interface; temperature 0."""

    url: str = key(..., "URL", "The server's address up to its version, e.g. http://judge:8000/v1.")
    model: str = key(..., "-", "The model's name at the server.")
    prompt: str = key(
        "Question: {question}\n\nCorrect answer: {reference}\n\nGiven answer: {answer}\n\nDo the two answers mean the same? Do not "
        "answer the question yourself. Say briefly why, and end with [[YES]] or [[NO]].",
        "-",
        "What it is asked, with {question}, {reference} (the gold answers) and {answer} (the response's) in it, never documents.",
    )
    verdict: str = key(r"\[\[(\w+)\]\]", "regular expression", "The first group of its last match in the reply is the verdict.")
    positive: str = key("YES", "-", "The verdict, in any case, that scores 1; any other scores 0.", min_length=1)
    max_tokens: int = key(512, "tokens", "Longest reply; one that is cut is a failure.", ge=1)
    max_answer_characters: int = key(2000, "characters", "A longer answer is not shown to the judge and scores 0 with it.", ge=1)
    timeout: float = key(60.0, "seconds", "Time that one request may take.", gt=0)
    retries: int = key(4, "retries", "How often a judge that is away, late or overloaded is asked again.", ge=0)
    retry_delay: float = key(1.0, "seconds", "Wait before the first retry; it doubles with each one.", ge=0)
    arguments: dict[str, Any] = key(
        dict, "-", "More fields of the request under the server's names, e.g. chat_template_kwargs: {enable_thinking: false}."
    )


class ScorerConfig(Section):
    """One reward; the reward of a response is the weighted sum of all."""

    type: Literal["exact", "regex", "math", "reasoning_gym", "document_qa", "python"] = key(..., "-", "Which scorer.")
    name: str | None = key(None, "-", "Name in the log; the type when not given.")
    weight: float = key(1.0, "-", "Factor of this score in the reward.")
    pattern: str | None = key(
        None,
        "regular expression",
        "For regex: 1 if it is found in the response; for exact, math, reasoning_gym, document_qa: its first group is the answer.",
    )
    extract: Literal["the_answer_is", "boxed", "answer_tag"] | None = key(
        None,
        "-",
        "For document_qa, in place of a pattern: the answer follows the last 'the answer is', or stands in the last \\boxed{} or "
        "<answer></answer>; the whole response when neither is given.",
    )
    match: list[Literal["exact", "f1", "substring"]] = key(
        list,
        "-",
        "For document_qa: the best of these counts, after SQuAD's normalisation: equal texts, F1 of tokens, gold answer within the "
        "answer; exact alone when empty.",
    )
    judge: JudgeConfig | None = key(
        None,
        "-",
        "For document_qa: judges answers that do not score 1 by the rule; the higher score counts. No judge when not given.",
    )
    function: str | None = key(
        None, "module:function", "For python: called with (response: str, reference: mapping), sync or async, returns a number."
    )


class RewardsConfig(Section):
    """Scoring of responses."""

    scorers: list[ScorerConfig] = key(list, "-", "The scorers; RL needs at least one.")
    timeout: float = key(10.0, "seconds", "Time one scorer has for one response.", gt=0)
    on_failure: Literal["drop", "zero", "stop"] = key(
        "stop", "-", "When a scorer raises or times out: drop the whole group, count its score as 0, or end the run."
    )
    concurrency: int = key(32, "responses", "Most responses scored at the same time.", ge=1)


class EvaluationConfig(Section):
    """Accuracy on held-out prompts during training."""

    data: DataSource | None = key(None, "-", "Held-out prompts; no evaluation when not given.")
    every: int = key(
        0, "steps", "Evaluate after every so many steps, at the start and at the end; 0 means only start and end.", ge=0
    )
    samples_per_prompt: int = key(1, "responses", "Responses per prompt: k of pass@k.", ge=1)
    temperature: float = key(0.0, "-", "Sampling temperature; 0 means greedy.", ge=0)
    pass_threshold: float = key(1.0, "reward", "A response with at least this reward counts as correct.")


class CheckpointConfig(Section):
    """Checkpoints of the run."""

    every: int = key(0, "steps", "Save after every so many steps; 0 means only at the end.", ge=0)
    keep: int = key(2, "checkpoints", "Keep the newest so many; older ones are deleted after a newer one is whole.", ge=1)
    asynchronous: bool = key(False, "-", "Write in the background while training goes on.")
    export: bool = key(True, "-", "Write the policy as a Hugging Face folder at the end.")


class ObserveConfig(Section):
    """What is logged and watched."""

    rollouts_per_step: int = key(8, "responses", "Sampled responses written to rollouts/ at each step.", ge=0)
    tensorboard: bool = key(True, "-", "Write TensorBoard files.")
    progress: bool = key(True, "-", "Show the progress display.")
    max_logprob_gap: float = key(
        0.1, "nats", "The run ends at its first step when the mean |trainer - sampler| log-probability gap is above this.", gt=0
    )
    min_entropy: float = key(0.0, "nats", "Warn when the mean token entropy falls below this.", ge=0)
    stall_warning: float = key(120.0, "seconds", "Warn, naming the prompts, when no response has come for so long.", gt=0)


class Config(Section):
    """One run."""

    kind: Literal["rl", "sft"] = key(..., "-", "Reinforcement learning or supervised fine-tuning.")
    steps: int = key(..., "steps", "Length of the run: rollout-and-update steps for rl, optimizer steps for sft.", ge=0)
    seed: int = key(0, "-", "Seed of everything random in the run.", ge=0)
    run_dir: Path = key(Path("runs/default"), "folder", "Where the run writes; --run-dir overrides it.")
    distributed_timeout: float = key(1800.0, "seconds", "Time a collective may take before the run ends with an error.", gt=0)
    model: ModelConfig = key(..., "-", "The model.")
    policy: RoleConfig = key(RoleConfig, "-", "The trained model's layout.")
    reference: ReferenceConfig | None = key(None, "-", "The reference model's layout; the policy's when not given.")
    critic: CriticConfig | None = key(None, "-", "The critic's layout and optimizer; the policy's when not given.")
    reward_model: RewardModelConfig | None = key(None, "-", "A reward model beside the scorers; none when not given.")
    optimizer: OptimizerConfig = key(OptimizerConfig, "-", "The policy's optimizer.")
    algorithm: AlgorithmConfig = key(AlgorithmConfig, "-", "The RL method.")
    sft: SFTConfig = key(SFTConfig, "-", "Settings of kind: sft.")
    rollout: RolloutConfig = key(RolloutConfig, "-", "Sampling.")
    data: DataConfig = key(..., "-", "Training data.")
    rewards: RewardsConfig = key(RewardsConfig, "-", "Rewards.")
    evaluation: EvaluationConfig = key(EvaluationConfig, "-", "Evaluation.")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "-", "Checkpoints.")
    observe: ObserveConfig = key(ObserveConfig, "-", "Logging.")
