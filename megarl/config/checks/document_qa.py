"""Checks of scorers of type document_qa and their judges."""

import re
from collections.abc import Iterator

from megarl.config.schema import Config, JudgeConfig, ScorerConfig
from megarl.config.tasks import placed_scorers

PLACEHOLDERS = ("{question}", "{reference}", "{answer}")
OWN_FIELDS = ("model", "messages", "temperature", "max_tokens", "stream", "n")  # of a request; the judge needs them as they are


def check_document_qa(scorer: ScorerConfig) -> Iterator[str]:
    """The keys of a scorer of type document_qa agree; lines start with the key's name."""
    if scorer.extract is not None and scorer.pattern is not None:
        yield f"extract: {scorer.extract} is given beside pattern {scorer.pattern!r}, and both find the answer; remove one of them"
    if "substring" in scorer.match and scorer.extract is None and scorer.pattern is None:
        yield (
            "match: substring over the whole response gives 1 to one that repeats the document; set extract, for example to "
            "the_answer_is, or remove substring"
        )
    if scorer.judge is not None:
        for line in _check_judge(scorer.judge):
            yield f"judge.{line}"


def check_judges(config: Config) -> Iterator[str]:
    """A judge's requests fit into the time of a prompt, and its scores have log names of their own."""
    for path, scorers in placed_scorers(config):
        names = [scorer.name or scorer.type for scorer in scorers]
        for index, scorer in enumerate(scorers):
            if scorer.type != "document_qa":
                continue
            for part in (f"{names[index]}_rule", f"{names[index]}_judge"):
                if part in names:
                    yield f"{path}.{index}.name: the scorer logs its part {part}, another scorer's name; rename one of them"
            if scorer.judge is not None:
                yield from _check_time(f"{path}.{index}.judge", scorer.judge, config.rollout.time_limit(0))


def _check_time(path: str, judge: JudgeConfig, limit: float) -> Iterator[str]:
    seconds = judge.timeout * (judge.retries + 1) + judge.retry_delay * (2**judge.retries - 1)
    if seconds > limit:
        yield (
            f"{path}.timeout: {judge.retries + 1} requests of {judge.timeout:g} s and the waits between them take up to "
            f"{seconds:g} s, above the {limit:g} s of rollout.request_timeout; lower timeout or retries, or raise "
            "rollout.request_timeout"
        )


def _check_judge(judge: JudgeConfig) -> Iterator[str]:
    for placeholder in PLACEHOLDERS:
        if placeholder not in judge.prompt:
            yield f"prompt: {judge.prompt[:60]!r}... has no {placeholder}; add it, as the judge sees nothing else"
    try:
        if re.compile(judge.verdict).groups == 0:
            yield f"verdict: {judge.verdict!r} has no group to take the verdict from; put the verdict's part in ( )"
    except re.error as error:
        yield f"verdict: {judge.verdict!r} is not a regular expression ({error}); correct it"
    for name in OWN_FIELDS:
        if name in judge.arguments:
            yield f"arguments.{name}: is set by MegaRL; remove it"
