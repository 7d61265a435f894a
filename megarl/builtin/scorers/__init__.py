"""The scorers: a new one is a class with its section in a file here, and its name in ``ScorerConfig``.

Worker processes import this, so it stays light.
"""

from typing import Annotated

from pydantic import Field

from megarl.builtin.scorers.answers import AnswerScorer, ExactScorer, MathScorer
from megarl.builtin.scorers.base import BaseScorer, RunApart, Scorer, WorkerScorer
from megarl.builtin.scorers.document_qa import DocumentQAScorer
from megarl.builtin.scorers.outside import PythonScorer, RewardServerScorer
from megarl.builtin.scorers.reasoning_gym import ReasoningGymScorer
from megarl.builtin.scorers.text import FormatScorer, LanguageScorer, RegexScorer, RepetitionScorer
from megarl.section import ByType

ScorerConfig = Annotated[
    ExactScorer
    | RegexScorer
    | MathScorer
    | ReasoningGymScorer
    | DocumentQAScorer
    | FormatScorer
    | RepetitionScorer
    | LanguageScorer
    | PythonScorer
    | RewardServerScorer,
    Field(discriminator="type"),
    ByType(),
]

__all__ = [
    "AnswerScorer",
    "BaseScorer",
    "DocumentQAScorer",
    "ExactScorer",
    "FormatScorer",
    "LanguageScorer",
    "MathScorer",
    "PythonScorer",
    "ReasoningGymScorer",
    "RegexScorer",
    "RepetitionScorer",
    "RewardServerScorer",
    "RunApart",
    "Scorer",
    "ScorerConfig",
    "WorkerScorer",
]
