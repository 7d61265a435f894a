"""Groups that outlive a step: the store of those begun and not yet trained on, and whole ones that are left over."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megarl.config.schema import Config
from megarl.config.tasks import TRAIN, tasks_of
from megarl.engines.protocol import Generation
from megarl.rollout.saved_groups import PromptOf, Saved, load_group, load_prompt, load_sample, save_group, save_prompt, save_sample
from megarl.types import FinishReason, Prompt, RolloutGroup, Tickets

NOTHING_YET = Generation(token_ids=(), logprobs=(), weight_versions=(), finish_reason=FinishReason.ABORT)


@dataclass(slots=True, kw_only=True)
class PendingGroup:
    """One group from its prompt to its training.

    Attributes:
        ticket: running number of the run's groups; unlike the prompt's id it never comes back in a later epoch.
        prompt: the prompt.
        begun_version: version of the policy's weights when it was begun; no token of it is older.
        samples: what there is of each response, the greedy one last; one with FinishReason.ABORT is not whole yet. Empty once the
            group is scored.
        scored: the group as it is trained on; None until all responses are whole and scored.
    """

    ticket: int
    prompt: Prompt
    begun_version: int
    samples: list[Generation]
    scored: RolloutGroup | None = None

    @property
    def unfinished(self) -> list[int]:
        """Indices of the samples that are not whole."""
        return [index for index, sample in enumerate(self.samples) if sample.finish_reason is FinishReason.ABORT]

    @property
    def name(self) -> tuple[int, str]:
        """Ticket and prompt id."""
        return self.ticket, self.prompt.prompt_id


class PendingGroups:
    """The store. Every group that was begun is in it, was taken for training, or was dropped.

    Attributes:
        groups: in the order in which they were begun.
        num_begun: groups ever begun; the next ticket.
    """

    def __init__(self) -> None:
        self.groups: list[PendingGroup] = []
        self.num_begun = 0
        self._dropped: list[tuple[int, str]] = []

    def begin(self, prompt: Prompt, version: int, num_samples: int) -> PendingGroup:
        """Begin a group of ``num_samples`` responses."""
        group = PendingGroup(
            ticket=self.num_begun, prompt=prompt, begun_version=version, samples=[NOTHING_YET for _ in range(num_samples)]
        )
        self.num_begun += 1
        self.groups.append(group)
        return group

    def take(self, groups: Iterable[PendingGroup]) -> tuple[tuple[RolloutGroup, ...], Tickets]:
        """Take whole groups out, to train on them; the tickets have those dropped since the last call beside them."""
        taken, trained = [], []
        for group in groups:
            assert group.scored is not None
            self.groups.remove(group)
            taken.append(group.scored)
            trained.append(group.name)
        tickets = Tickets(trained=tuple(trained), dropped=tuple(self._dropped))
        self._dropped.clear()
        return tuple(taken), tickets

    def drop(self, group: PendingGroup) -> None:
        """Give up a group that cannot be trained on."""
        self.groups.remove(group)
        self._dropped.append(group.name)

    def state(self) -> Saved:
        """Return all of it as JSON values, for a checkpoint. Groups dropped since the last ``take`` are named by the next."""
        return {"num_begun": self.num_begun, "dropped": list(self._dropped), "groups": [_save(group) for group in self.groups]}

    def restore(self, state: Saved, prompt_of: PromptOf) -> None:
        """Go on from ``state()``; ``prompt_of`` gives the prompt of an id."""
        self.groups = [_load(group, prompt_of) for group in state["groups"]]
        self._dropped = [(ticket, prompt_id) for ticket, prompt_id in state["dropped"]]
        self.num_begun = state["num_begun"]


def _save(group: PendingGroup) -> Saved:
    return {
        **save_prompt(group.prompt),
        "ticket": group.ticket,
        "begun_version": group.begun_version,
        "samples": [save_sample(sample) for sample in group.samples],
        "scored": None if group.scored is None else save_group(group.scored),
    }


def _load(saved: Saved, prompt_of: PromptOf) -> PendingGroup:
    return PendingGroup(
        ticket=saved["ticket"],
        prompt=load_prompt(saved, prompt_of),
        begun_version=saved["begun_version"],
        samples=[load_sample(sample) for sample in saved["samples"]],
        scored=None if saved["scored"] is None else load_group(saved["scored"], prompt_of),
    )


def joined(first: Generation, more: Generation, max_new_tokens: int) -> Generation:
    """Join a response and what it went on with; it is whole when it ended, or has ``max_new_tokens``."""
    token_ids = first.token_ids + more.token_ids
    is_cut = more.finish_reason is FinishReason.LENGTH and len(token_ids) < max_new_tokens
    return replace(
        more,
        token_ids=token_ids,
        logprobs=first.logprobs + more.logprobs,
        weight_versions=first.weight_versions + more.weight_versions,
        finish_reason=FinishReason.ABORT if is_cut else more.finish_reason,
    )


def next_batch(groups: Sequence[PendingGroup], version: int, max_staleness: int, size: int) -> list[PendingGroup] | None:
    """Choose the groups to train on next; None while those that must not wait longer are not whole.

    The oldest whole groups are taken, but only when every group can still be trained on within ``max_staleness`` updates of its
    begin, ``size`` groups at each. There always is such a batch once all are whole, while no more than (v + max_staleness + 1)
    ``size`` groups are begun before update v + 1 (AReaL's bound, arXiv 2505.24298, section 5.1).

    Args:
        groups: all that are pending, in the order in which they were begun.
        version: of the weights that are trained.
        max_staleness: updates.
        size: groups of a step.
    """
    chosen = [group for group in groups if group.scored is not None][:size]
    if len(chosen) < size:
        return None
    for ahead in range(max_staleness + 1):
        latest_begin = version + ahead - max_staleness
        num_due = sum(group.begun_version <= latest_begin for group in groups)
        num_chosen = sum(group.begun_version <= latest_begin for group in chosen)
        if num_chosen < min(num_due - ahead * size, size):
            return None
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverGroup:
    """A group that can be trained on, and the step that sampled it."""

    step: int
    group: RolloutGroup


def groups_per_task(config: Config) -> int | None:
    """Return how many groups of each task a step has when tasks are balanced; None when they are not."""
    if config.data.sampling.mixture != "balanced":
        return None
    return config.rollout.prompts_per_step // len(tasks_of(config.data.train, TRAIN))


def fill_step(waiting: Sequence[LeftoverGroup], num_groups: int, per_task: int | None) -> list[LeftoverGroup]:
    """Choose the groups that a step trains on, the oldest first; fewer than ``num_groups`` while some are missing.

    Args:
        waiting: oldest first.
        num_groups: groups of a step.
        per_task: groups of each task in a step, which then come in turn (a, b, a, b ...), so that mini-batches are balanced too;
            None takes them as they come.
    """
    if per_task is None:
        return list(waiting[:num_groups])
    taken: list[tuple[int, LeftoverGroup]] = []
    counts: Counter[str] = Counter()
    for one in waiting:
        task = one.group.prompt.task
        if counts[task] < per_task:
            taken.append((counts[task], one))
            counts[task] += 1
    return [one for _, one in sorted(taken, key=lambda item: (item[0], item[1].group.prompt.task))]
