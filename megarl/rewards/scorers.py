"""What each scorer computes. Worker processes import this, so it stays light: no torch, hence no megarl.types.

A scorer is called with the decoded response and the prompt's reference and returns a number; a scorer of steps is called with the
list of them and returns a list of numbers. Whatever it raises is a failure.
"""

import importlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.errors import ConfigError, one_line
from megarl.rewards.document_qa import document_qa_scorer, verdict_scorer
from megarl.rewards.math_scorer import math_score
from megarl.rewards.reading_tasks import READING_TASKS
from megarl.rewards.text_scorers import ngram_repetition, script_share, tagged_sections
from megarl.workers.isolation import isolated

Scorer = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """One scorer as a worker process is told of it; the fields are those of ScorerConfig.

    ``name`` is unique in the run: the scorer's, after its task's where the task has scorers of its own (``sums/exact``).
    Type ``verdict`` exists here only: it reads the replies of a judge, ``pattern`` and ``positive`` are the judge's.
    """

    name: str
    type: str
    pattern: str | None = None
    tags: tuple[str, ...] = ()
    ngram: int | None = None
    script: str | None = None
    extract: str | None = None
    match: tuple[str, ...] = ()
    positive: str | None = None
    function: str | None = None


def build_scorer(spec: ScorerSpec, *, is_sandboxed: bool = False) -> Scorer:
    """The scorer; its libraries are imported here, so that no response's time-out pays for that.

    Args:
        spec: what it is told.
        is_sandboxed: whether this process may execute a response, as some tasks of reasoning_gym do.

    Raises:
        ConfigError: the pattern or the function is missing or wrong.
    """
    pattern = compile_pattern(spec)
    if spec.type == "python":
        return import_function(spec)
    if spec.type == "regex":
        assert pattern is not None
        return lambda response, reference: 1.0 if pattern.search(response) else 0.0
    if spec.type == "format":
        whole = pattern or tagged_sections(spec.tags)
        return lambda response, reference: 1.0 if whole.fullmatch(response) else 0.0
    if spec.type == "repetition":
        ngram = spec.ngram
        assert ngram is not None
        return lambda response, reference: -ngram_repetition(response, ngram)
    if spec.type == "language":
        script = spec.script
        assert script is not None
        return lambda response, reference: script_share(response, script)
    if spec.type == "document_qa":
        return document_qa_scorer(pattern, spec.extract, spec.match)
    if spec.type == "verdict":
        assert pattern is not None and spec.positive is not None
        return verdict_scorer(pattern, spec.positive)
    loaders: dict[str, Callable[[], Scorer]] = {"exact": lambda: exact, "math": load_math}
    loaders["reasoning_gym"] = lambda: load_reasoning_gym(is_sandboxed=is_sandboxed)
    score_answer = loaders[spec.type]()
    if pattern is None:
        return score_answer

    def score_extracted(response: str, reference: Mapping[str, Any]) -> Any:
        match = pattern.search(response)
        # A response without an answer is a wrong response, not a failed scorer.
        return 0.0 if match is None or match[1] is None else score_answer(match[1], reference)

    return score_extracted


def compile_pattern(spec: ScorerSpec) -> re.Pattern[str] | None:
    """The compiled pattern, None when there is none.

    Raises:
        ConfigError: it is missing, not wanted, not a regular expression, or lacks the group that holds the answer.
    """
    if spec.pattern is None:
        if spec.type == "regex":
            raise ConfigError(f"scorer '{spec.name}' of type regex has no pattern; set pattern to the regular expression to find")
        return None
    if spec.type == "python":
        raise ConfigError(f"scorer '{spec.name}' of type python takes no pattern; search the response in {spec.function}")
    try:
        # a format is of the whole response, so its dots stand for line ends too
        pattern = re.compile(spec.pattern, re.DOTALL if spec.type == "format" else 0)
    except re.error as error:
        raise ConfigError(f"scorer '{spec.name}': pattern {spec.pattern!r} is not a regular expression: {error}") from error
    if spec.type not in ("regex", "format") and pattern.groups == 0:
        raise ConfigError(f"scorer '{spec.name}': pattern {spec.pattern!r} has no group; put the answer's part in ( )")
    return pattern


def import_function(spec: ScorerSpec) -> Callable[..., Any]:
    """The function that ``module:function`` of a python scorer names.

    Raises:
        ConfigError: it is not given, cannot be imported, or cannot be called.
    """
    if spec.function is None:
        raise ConfigError(f"scorer '{spec.name}' of type python has no function; set function to module:function")
    module_name, colon, function_name = spec.function.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(f"scorer '{spec.name}': function {spec.function!r} is not module:function, e.g. my_rewards:brevity")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(
            f"scorer '{spec.name}': cannot import {spec.function}: {one_line(error)}; its folder must be on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"scorer '{spec.name}': {spec.function} is a {type(function).__name__}, not a function")
    return function


def exact(answer: str, reference: Mapping[str, Any]) -> float:
    """1 if the answer equals the reference's, apart from case and white space."""
    return 1.0 if _normalise(answer) == _normalise(reference["answer"]) else 0.0


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def load_math() -> Scorer:
    """1 if the response's final answer is mathematically equal to the reference's."""
    import latex2sympy2_extended  # noqa: F401  (here, because it takes a second and other scorers do without)
    import math_verify  # noqa: F401

    # It warns in every worker that its time-outs are off, as they are meant to be: they would be a silent "wrong" after 5 seconds.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_score


def load_reasoning_gym(*, is_sandboxed: bool) -> Scorer:
    """The score that the task's own generator gives to the answer, 0 to 1.

    Some generators execute the answer (READING_TASKS has the others): in a sandbox, in a process of its own, or not at all.
    """
    import reasoning_gym  # here, because it takes seconds and other scorers do without

    generators: dict[str, Any] = {}

    def score(answer: str, reference: Mapping[str, Any]) -> float:
        if "entry" not in reference:
            raise ValueError("the prompt is not of a reasoning_gym source, so its answer cannot be scored by one")
        # Some generators score by their options, so these are part of the key.
        key = repr((reference["task"], reference["options"]))
        if key not in generators:
            generators[key] = reasoning_gym.create_dataset(reference["task"], **reference["options"])
        arguments = (generators[key], answer.strip(), reference["entry"])
        if reference["task"] in READING_TASKS:
            return _task_score(*arguments)
        if not is_sandboxed:
            raise ValueError(f"scoring {reference['task']} executes the answer, which needs bubblewrap; see docs/sandbox.md")
        return isolated(_task_score, *arguments)

    return score


def _task_score(generator: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return float(generator.score_answer(answer, entry))
