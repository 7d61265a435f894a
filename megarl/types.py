"""The stages of data. A new fact about a sample is a new stage, never an optional key.

    Prompt -> Rollout -> ScoredRollout -> RolloutGroup -> PackedBatch (+ TokenOutputs) -> TrainBatch -> UpdateResult

Token-level tensors of a PackedBatch are aligned with the *predicted* token: entry ``t`` of ``loss_mask``, ``sampler_logprobs``,
``advantages`` ... belongs to ``token_ids[t]``, whose log-prob comes from the model's output at position ``t - 1`` of
the same sequence. The first token of a sequence is never predicted, so its ``loss_mask`` is False.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

GREEDY_INDEX = -1  # sample_index of a prompt's greedy response
NO_VERSION = -1  # weight version of a token that no weights of the run sampled
NO_EXPERT = -1  # expert of a token whose routing the engine did not report


class FinishReason(StrEnum):
    """Why an engine stopped sampling."""

    STOP = "stop"  # a stop token was sampled (it is the last of token_ids)
    LENGTH = "length"  # max_new_tokens were sampled
    REPETITION = "repetition"  # the response only repeated itself (rollout.repetition_stop)
    ABORT = "abort"  # the engine gave the request up


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task to answer.

    Attributes:
        prompt_id: unique within the run, e.g. ``"train/17"``; error messages name it.
        token_ids: the chat-templated prompt, as the model reads it.
        text: the same, as a person reads it.
        reference: what scorers compare with (answer string, reasoning-gym entry ...).
        task: name of the data source that it is from.
        prefill: end of the text that is the beginning of the response, e.g. ``"<think>\\n"``, and is shown in front of it.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    text: str
    reference: Mapping[str, Any]
    task: str
    prefill: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the policy or the environment said, as people read it."""

    speaker: Literal["policy", "environment"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A response in several turns, with an environment's answers between them.

    Attributes:
        turns: who said what, in order; a last message of the environment that no tokens were made of is there too.
        reward: the environment's rewards, summed over the turns.
        failure: why the environment failed, with the turn; None where it did not. The episode ended with it.
        is_out_of_turns: whether it ended because the policy had no more turns.
        seconds: waited for the environment.
    """

    turns: tuple[Turn, ...]
    reward: float
    failure: str | None
    is_out_of_turns: bool
    seconds: float = field(compare=False)

    @property
    def num_turns(self) -> int:
        """Turns of the policy."""
        return sum(turn.speaker == "policy" for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response.

    Attributes:
        prompt: the prompt it answers.
        sample_index: 0 .. samples_per_prompt - 1 within its group; GREEDY_INDEX for the greedy response.
        token_ids: all tokens after the prompt, exactly as the engine sampled or read them: stop tokens included, and what an
            environment answered in between.
        from_policy: whether the policy sampled the token; False for an environment's.
        logprobs: the sampler's log-prob of each token (nats), under softmax(logits / temperature) over the whole
            vocabulary; of the greedy response under softmax(logits); 0 for an environment's token.
        weight_versions: version of the policy weights that sampled each token; for an environment's that of the token
            before, NO_VERSION before the first.
        finish_reason: why sampling ended; LENGTH also where an environment's message left no room.
        text: the prompt's prefill and the decoded response, without the tokens that end it; of an episode the policy's last turn.
        episode: its turns, where there is an environment.
        routed_experts: int16 [tokens read, num_moe_layers, top_k], the experts that the engine sent each token of prompt and
            response to when it read it; the last ones it never read. None when it was not asked.
    """

    prompt: Prompt
    sample_index: int
    token_ids: tuple[int, ...]
    from_policy: tuple[bool, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    text: str
    episode: Episode | None = None
    routed_experts: Tensor | None = field(default=None, compare=False)

    @property
    def num_policy_tokens(self) -> int:
        """Tokens that the policy sampled: what every length of a response counts."""
        return sum(self.from_policy)

    @property
    def name(self) -> str:
        """What messages call it: ``"train/17 sample 3"``, ``"train/17 greedy response"``."""
        which = "greedy response" if self.sample_index == GREEDY_INDEX else f"sample {self.sample_index}"
        return f"{self.prompt.prompt_id} {which}"

    @property
    def environment_failure(self) -> str | None:
        """One line with prompt, sample, turn and reason; None where the environment did not fail, or there is none."""
        if self.episode is None or self.episode.failure is None:
            return None
        return f"environment failed on {self.name}, {self.episode.failure}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its reward.

    Attributes:
        rollout: the response.
        reward: weighted sum of the scorers' scores.
        parts: scorer name to its raw score, for the log; of document_qa also ``NAME_rule`` and ``NAME_judge``, the latter only
            where the judge was asked.
        step_rewards: index in ``rollout.token_ids`` of the last token of each reasoning step, ascending, and the step's reward;
            empty without a scorer of steps.
        failures: one line for each scorer that raised or timed out (already handled by the failure policy).
    """

    rollout: Rollout
    reward: float
    parts: Mapping[str, float]
    step_rewards: tuple[tuple[int, float], ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All scored responses to one prompt.

    Attributes:
        prompt: the prompt they answer.
        rollouts: the sampled responses, in ``sample_index`` order.
        greedy: the response at temperature 0, of which only the reward is used; None where the method has no such baseline.
    """

    prompt: Prompt
    rollouts: tuple[ScoredRollout, ...]
    greedy: ScoredRollout | None

    @property
    def has_equal_rewards(self) -> bool:
        """Whether all responses, the greedy one among them, have one reward: such a group teaches nothing."""
        rewards = {scored.reward for scored in self.rollouts}
        return len(rewards if self.greedy is None else rewards | {self.greedy.reward}) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tickets:
    """The groups that a step used up where groups outlive a step, each by its ticket (running number in the run) and prompt id.

    Attributes:
        trained: on which the step trains.
        dropped: given up since the step before, because they could not be trained on.
    """

    trained: tuple[tuple[int, str], ...]
    dropped: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The sequences of one step, ragged and concatenated, the same on every rank.

    Worked example, two sequences "p p r r" and "p r": ``token_ids`` has 6 entries, ``cu_seqlens = [0, 4, 6]``,
    ``loss_mask = [F, F, T, T, F, T]``.

    Attributes:
        token_ids: int64 [num_tokens], prompt and response of each sequence.
        cu_seqlens: int64 [num_sequences + 1], start of each sequence in ``token_ids``.
        loss_mask: bool [num_tokens], True where the token is trained on (the policy produced it).
        sampler_logprobs: float32 [num_tokens], nats; 0 where ``loss_mask`` is False.
        weight_versions: int64 [num_tokens], version of the weights that sampled the token; -1 where ``loss_mask`` is False.
        step_rewards: float32 [num_tokens], reward of the reasoning step that ends with the token; NaN where none ends.
        routed_experts: int16 [num_tokens, num_moe_layers, top_k], the experts that the engine sent the token to when it *read* it,
            NO_EXPERT where that is not known; [num_tokens, 0, 0] without routing replay. Unlike the rest it belongs to the token as
            an input: entry ``t`` routes the position whose output predicts ``token_ids[t + 1]``.
        group_ids: int64 [num_sequences], sequences with equal id answer the same prompt.
        task_ids: int64 [num_sequences], sequences with equal id have prompts of the same data source.
        rewards: float32 [num_sequences].
        truncated: bool [num_sequences], True where sampling was ended by the length limit.
        greedy_rewards: float32 [num_sequences], reward of the greedy response to the sequence's prompt; NaN where none was
            generated.
        greedy_lengths: int64 [num_sequences], tokens of that response that the policy sampled; 0 where none was generated.
        correct: bool [num_sequences], whether the answer is right; None where nobody said so and rewards must tell.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    loss_mask: Tensor
    sampler_logprobs: Tensor
    weight_versions: Tensor
    step_rewards: Tensor
    routed_experts: Tensor
    group_ids: Tensor
    task_ids: Tensor
    rewards: Tensor
    truncated: Tensor
    greedy_rewards: Tensor
    greedy_lengths: Tensor
    correct: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """Number of sequences in the batch."""
        return self.cu_seqlens.numel() - 1

    @property
    def sequence_lengths(self) -> Tensor:
        """int64 [num_sequences], tokens of prompt and response."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutputs:
    """What the models say of the tokens of a PackedBatch before the step's updates (nats); 0 where its loss_mask is False.

    Attributes:
        old: float32 [num_tokens], log-probs under the policy, by the trainer.
        entropies: float32 [num_tokens], of the same policy at each token.
        reference: float32 [num_tokens], log-probs under the reference model; None without one.
        values: float32 [num_tokens], reward that the critic expects from the token on; None when the algorithm has no critic.
    """

    old: Tensor
    entropies: Tensor
    reference: Tensor | None
    values: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticTokens:
    """What a critic learns from, each float32 [num_tokens].

    Attributes:
        old_values: the critic's before the step's updates.
        returns: what its values are to become.
    """

    old_values: Tensor
    returns: Tensor

    def at(self, index: Tensor | slice, device: torch.device | None = None) -> "CriticTokens":
        """Select tokens, and move them to a device if one is given."""
        return CriticTokens(old_values=self.old_values[index].to(device), returns=self.returns[index].to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What is learned from tokens that a policy sampled, each float32 [num_tokens].

    Attributes:
        old_logprobs: under the policy before the step's updates, by the trainer.
        advantages: of the method.
        sampler_weights: importance weights of the policy loss for sampling by another policy than the trainer's; None without such
            a correction.
        critic: None without a critic.
    """

    old_logprobs: Tensor
    advantages: Tensor
    sampler_weights: Tensor | None
    critic: CriticTokens | None

    def at(self, index: Tensor | slice, device: torch.device | None = None) -> "SampledTokens":
        """Select tokens, and move them to a device if one is given."""
        return SampledTokens(
            old_logprobs=self.old_logprobs[index].to(device),
            advantages=self.advantages[index].to(device),
            sampler_weights=None if self.sampler_weights is None else self.sampler_weights[index].to(device),
            critic=None if self.critic is None else self.critic.at(index, device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What one optimizer step of the policy learns from.

    Attributes:
        packed: the sequences.
        token_weights: float32 [num_tokens], weight of each token's loss term with the global normaliser already in it: the
            loss is a plain sum over tokens, micro-batches and ranks of ``token_weights * term``.
        reference_logprobs: float32 [num_tokens], under the reference model; None without one.
        sampled: of the same tokens; None for training on given responses.
        keeps_groups: the objective needs adjacent sequences of the same group in the same micro-batch.
    """

    packed: PackedBatch
    token_weights: Tensor
    reference_logprobs: Tensor | None
    sampled: SampledTokens | None
    keeps_groups: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer step did; equal on every rank.

    Attributes:
        metrics: name to value, already reduced over the whole batch.
        gradient_norm: global L2 norm before clipping.
        learning_rate: of this step.
        skipped: True when the gradient was NaN or Inf and the weights were left alone.
        empty: True when nothing in the batch had a gradient and weights and optimizer state were left alone.
        num_tokens: trained tokens of the batch.
        num_sequences: sequences of the batch.
    """

    metrics: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool
    empty: bool
    num_tokens: int
    num_sequences: int
