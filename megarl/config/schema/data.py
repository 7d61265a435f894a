"""Rows, their rewards, and evaluation on them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megarl.builtin.sandbox import SandboxConfig
from megarl.builtin.scorers import ScorerConfig
from megarl.section import Section, key


class JsonlSource(Section):
    """Rows of a file."""

    type: Literal["jsonl"] = key("jsonl", "-", "The rows come from a file.")
    path: Path = key(..., "file", "JSON lines, a JSON array (.json), CSV, TSV or Parquet; text is UTF-8 and may be gzipped.")
    prompt_field: str = key(
        "prompt", "-", "Field with the question, a string or a list of chat messages; dotted for nested ones (extra.asked.0)."
    )
    answer_field: str = key(
        "answer",
        "-",
        "Field with the expected answer, dotted likewise; SFT trains on it as the response. The name in prompt_field takes the "
        "last message of its chats.",
    )
    chosen_field: str = key(
        "chosen",
        "-",
        "For kinds preference and reward_model, in place of answer_field: the preferred response, or a chat that ends with "
        "it; the name in prompt_field takes the prompt from there.",
    )
    rejected_field: str = key("rejected", "-", "For these kinds: field with the response to the same prompt that is not preferred.")


class DatasetsSource(Section):
    """A Hugging Face dataset."""

    type: Literal["datasets"] = key("datasets", "-", "The rows come from a Hugging Face dataset.")
    path: str = key(
        ...,
        "name, folder or file",
        "Folder written by save_to_disk, a folder or file with rows, or a name for datasets.load_dataset.",
    )
    split: str = key("train", "-", "Split of the dataset.")
    prompt_field: str = key(
        "prompt", "-", "Field with the question, a string or a list of chat messages; dotted for nested ones (extra.asked.0)."
    )
    answer_field: str = key(
        "answer",
        "-",
        "Field with the expected answer, dotted likewise; SFT trains on it as the response. The name in prompt_field takes the "
        "last message of its chats.",
    )
    chosen_field: str = key(
        "chosen",
        "-",
        "For kinds preference and reward_model, in place of answer_field: the preferred response, or a chat that ends with "
        "it; the name in prompt_field takes the prompt from there.",
    )
    rejected_field: str = key("rejected", "-", "For these kinds: field with the response to the same prompt that is not preferred.")


class ReasoningGymSource(Section):
    """Procedurally generated, verifiable tasks of the reasoning-gym package."""

    type: Literal["reasoning_gym"] = key("reasoning_gym", "-", "The rows come from a reasoning-gym generator.")
    task: str = key(..., "-", "Name of the generator, e.g. chain_sum.")
    size: int = key(1000, "prompts", "How many tasks are generated.", ge=1)
    seed: int = key(0, "-", "Seed of the generator; different seeds give different tasks.")
    options: dict[str, Any] = key(dict, "-", "The generator's own options, e.g. min_digits: 1.")


RowSource = Annotated[JsonlSource | DatasetsSource | ReasoningGymSource, Field(discriminator="type")]


class TaskConfig(Section):
    """One task of a mixture."""

    name: str = key(..., "-", "Name in the log and in prompt ids.", min_length=1)
    weight: float = key(1.0, "-", "The task's share of the prompts is its weight over the sum of all weights.", gt=0)
    source: RowSource = key(..., "-", "Rows of the task.")
    scorers: list[ScorerConfig] = key(list, "-", "Scorers of the task's responses, in place of rewards.scorers.")


class MixtureSource(Section):
    """Several tasks, each with rows and, where it wants, scorers of its own."""

    type: Literal["mixture"] = key("mixture", "-", "The rows come from several named sources.")
    tasks: list[TaskConfig] = key(..., "-", "The tasks.", min_length=1)


DataSource = Annotated[JsonlSource | DatasetsSource | ReasoningGymSource | MixtureSource, Field(discriminator="type")]


class SamplingConfig(Section):
    """Which training prompts come next; the seed, the position and what is known of the prompts decide."""

    order: Literal["shuffle", "sequential", "curriculum", "prioritised"] = key(
        "shuffle",
        "-",
        "Every pass over a task's rows is shuffled, in their order, or from easy to hard; prioritised: after a first pass rows are "
        "drawn in proportion to 1 - success rate (Kimi k1.5, arXiv 2501.12599).",
    )
    mixture: Literal["weights", "balanced"] = key(
        "weights",
        "-",
        "Of a mixture: each prompt's task is drawn by the weights, or every step has equally many prompts of each task "
        "(QwenLong-L1.5, arXiv 2512.12967).",
    )
    difficulty_field: str | None = key(
        None,
        "-",
        "Field of the rows with a number that is larger for harder ones, dotted for nested fields; curriculum needs it, and "
        "prioritised takes its first pass from easy to hard when it is given.",
    )
    priority_floor: float = key(0.05, "-", "For prioritised: the least priority, so that solved prompts come back.", gt=0, le=1)
    success_update: float = key(
        0.5,
        "-",
        "Weight of a prompt's newest group in its success rate, the share of responses with at least evaluation.pass_threshold.",
        gt=0,
        le=1,
    )


class DataConfig(Section):
    """Where prompts come from and how they are written for the model."""

    train: DataSource = key(..., "-", "Training rows.")
    exclude: list[RowSource] = key(list, "-", "Rows whose prompt text appears here are left out of training.")
    sampling: SamplingConfig = key(SamplingConfig, "-", "Order of the training rows.")
    template: str = key("chat", "-", "'chat' for the tokenizer's chat template, or a text with {prompt} in it.")
    add_bos: bool | None = key(
        None,
        "-",
        "Whether prompts begin with the tokenizer's BOS token, never with two. When not given, a text template's do where the "
        "tokenizer adds one to a text, and a chat template's where the template writes one.",
    )
    chat_template: Path | None = key(None, "file", "Jinja file in place of the tokenizer's chat template.")
    chat_template_options: dict[str, Any] = key(
        dict, "-", "Variables of the chat template, e.g. enable_thinking: false, tools: [...] or date_string: 26 Jul 2024."
    )
    chat_template_date: str = key(
        "2024-07-26",
        "date",
        "Day that a chat template reads from the clock, YYYY-MM-DD; the same on every day, so that prompts never change.",
    )
    response_suffix: str = key(
        "", "-", "Text put after each response that data.train gives (all kinds but rl), before the end-of-sequence token."
    )
    too_long: Literal["refuse", "leave_out", "cut_middle"] = key(
        "refuse",
        "-",
        "Rows above rollout.max_prompt_tokens, sft.max_tokens or preference.max_tokens: do not begin, naming one; leave them out, "
        "and say how many; or, for prompts of kind rl, cut tokens out of their middle. A curriculum has its own.",
    )


class SFTConfig(Section):
    """Supervised fine-tuning on the answers of data.train."""

    examples_per_step: int = key(64, "examples", "Examples in one optimizer step.", ge=1)
    max_tokens: int = key(2048, "tokens", "Longest example, prompt and response; a longer one is an error that names it.", ge=2)


class RewardsConfig(Section):
    """How responses are scored."""

    scorers: list[ScorerConfig] = key(
        list, "-", "The scorers of every task that has none of its own; RL needs at least one, or an environment."
    )
    timeout: float = key(10.0, "seconds", "Time one scorer has for one response.", gt=0)
    on_failure: Literal["drop", "zero", "stop"] = key(
        "stop", "-", "When a scorer or the environment fails: drop the whole group, count its score as 0, or end the run."
    )
    concurrency: int = key(32, "responses", "Most responses scored at the same time.", ge=1)
    sandbox: SandboxConfig = key(SandboxConfig, "-", "What the worker processes of scorers may do.")


class EvaluationConfig(Section):
    """Accuracy during training, on held-out prompts or, for kinds preference and reward_model, pairs."""

    data: DataSource | None = key(None, "-", "Held-out prompts or pairs; no evaluation when not given.")
    every: int = key(
        0, "steps", "Evaluate after every so many steps, at the start and at the end; 0 means only start and end.", ge=0
    )
    samples_per_prompt: int = key(
        1, "responses", "Responses per prompt; pass@k is logged for k = 1, 2, 4, ... and this number.", ge=1
    )
    temperature: float = key(0.0, "-", "Sampling temperature; 0 means greedy.", ge=0)
    pass_threshold: float = key(1.0, "reward", "A response with at least this reward counts as correct.")
