"""QwenLong-L1's hybrid reward (arXiv 2505.17667): a rule's score or a judge's, whichever is higher."""

from dataclasses import dataclass

from megarl.builtin.scorers.document_qa import RuleScore, VerdictReader, gold_answers
from megarl.config.schema import JudgeConfig
from megarl.errors import RewardError
from megarl.rewards.judge import Judge, JudgeFailure
from megarl.rewards.process_pool import ScorerFailure, WorkerPool
from megarl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridScore:
    """What is known of one response.

    Attributes:
        rule: 0 to 1.
        judge: 0 or 1; None where the judge was not asked or failed.
        failure: why the judge has no score; None where it was not needed.
    """

    rule: float
    judge: float | None
    failure: ScorerFailure | None

    def parts(self, name: str) -> dict[str, float]:
        """Return the score and its two parts, as they are logged."""
        parts = {name: max(self.rule, self.judge or 0.0), f"{name}_rule": self.rule}
        return parts if self.judge is None else parts | {f"{name}_judge": self.judge}


class HybridScorer:
    """One scorer of type document_qa: its rule and the reading of verdicts run in the workers, its judge is asked from here.

    The judge is asked only where it can change the score, and sees the question and the short answers, never the documents.
    """

    def __init__(self, name: str, judge: JudgeConfig | None, timeout: float, pool: WorkerPool) -> None:
        """Prepare a scorer whose rule the pool knows under ``name``; ``timeout`` is that of a worker, in seconds."""
        self._name = name
        self._timeout = timeout
        self._pool = pool
        self._judge = Judge(judge) if judge is not None else None

    async def check(self) -> None:
        """Make sure that the judge answers, and with a verdict.

        Raises:
            RewardError: it does not.
        """
        if self._judge is None:
            return
        reply = await self._judge.check()
        try:
            await self._verdict(reply, self._judge)
        except ScorerFailure as failure:
            raise RewardError(f"{failure}; correct prompt, verdict or max_tokens of the judge in rewards.scorers") from failure

    async def close(self) -> None:
        """Close the judge's connections."""
        if self._judge is not None:
            await self._judge.close()

    async def score(self, rollout: Rollout) -> HybridScore:
        """Return the score of a response.

        Raises:
            ScorerFailure: the rule failed.
            RewardError: no worker can be started.
        """
        reference = rollout.prompt.reference
        # Not the whole reference: the documents would be copied to a worker for every response.
        gold = {key: reference[key] for key in ("answer", "answers") if key in reference}
        rule = await self._pool.score(self._name, rollout.text, gold, self._timeout)
        if not isinstance(rule, RuleScore):
            raise ScorerFailure("the worker answered with something else than a rule's score")
        if self._judge is None or rule.answer is None or rule.score >= 1:
            return HybridScore(rule=rule.score, judge=None, failure=None)
        if len(rule.answer) > self._judge.config.max_answer_characters:  # no short answer: it could hold the documents
            return HybridScore(rule=rule.score, judge=0.0, failure=None)
        question = reference.get("question")
        if not isinstance(question, str) or not question.strip():
            failure = ScorerFailure(f"the prompt's field 'question' is {question!r}; the judge needs it, apart from the documents")
            return HybridScore(rule=rule.score, judge=None, failure=failure)
        try:
            reply = await self._judge.ask(question, rule.answer, gold_answers(gold))
            return HybridScore(rule=rule.score, judge=await self._verdict(reply, self._judge), failure=None)
        except (JudgeFailure, ScorerFailure) as error:
            return HybridScore(rule=rule.score, judge=None, failure=ScorerFailure(str(error)))

    async def _verdict(self, reply: str, judge: Judge) -> float:
        try:
            verdict = await self._pool.score(verdict_name(self._name), reply, {}, self._timeout)
            if not isinstance(verdict, float):
                raise ScorerFailure("the worker answered with something else than a verdict")
            return verdict
        except ScorerFailure as failure:
            raise ScorerFailure(f"judge {judge.config.url}: {failure}") from failure


def verdict_name(name: str) -> str:
    """Return what the pool calls the reader of verdicts of the scorer ``name``."""
    return f"{name}_judge"  # that of its part in the log, so that no other scorer of the list has it


def verdict_reader(judge: JudgeConfig) -> VerdictReader:
    """Return what the workers are told of a judge."""
    return VerdictReader(pattern=judge.verdict, positive=judge.positive)
