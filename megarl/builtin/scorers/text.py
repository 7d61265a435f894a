"""Rewards for how a response is written: a pattern, its format, repetition, language."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

from megarl.builtin.scorers.base import BaseScorer, RunApart, Scorer, pattern_mistakes
from megarl.section import key

Script = Literal["latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai", "chinese", "japanese", "korean"]

# A character's script is told by the first word of its Unicode name, and of these a script of the config has one or several.
_NAMES_OF_SCRIPT = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
    "chinese": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "korean": ("HANGUL",),
}
_LETTER_BY_LETTER = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI")


class RegexScorer(BaseScorer):
    """1 if a regular expression is found in the response."""

    type: Literal["regex"] = key("regex", "-", "Looks for a pattern.")
    pattern: str = key(..., "regular expression", "What is looked for.", give="a regular expression")

    def mistakes(self) -> Iterator[str]:
        """Yield a line for each mistake that its own keys show."""
        yield from pattern_mistakes("pattern", self.pattern)

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        pattern = re.compile(self.pattern)
        return lambda response, reference: 1.0 if pattern.search(response) else 0.0


class FormatScorer(BaseScorer):
    """1 if the whole response has a form."""

    type: Literal["format"] = key("format", "-", "Looks at the whole response.")
    pattern: str | None = key(None, "regular expression", "The form; its dots stand for line ends too.")
    tags: list[str] = key(list, "-", "In place of a pattern: one <tag>...</tag> of each, in this order, and nothing else.")

    def mistakes(self) -> Iterator[str]:
        """Yield a line for each mistake that its own keys show."""
        if bool(self.tags) == (self.pattern is not None):
            yield "tags: type format needs either tags or a pattern; give for example tags: [think, answer]"
        if any(re.search(r"[<>/\s]", tag) or not tag for tag in self.tags):
            yield f"tags: {self.tags!r} must be names without <, >, / and spaces; give for example [think, answer]"
        yield from pattern_mistakes("pattern", self.pattern)

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        whole = tagged_sections(self.tags) if self.pattern is None else re.compile(self.pattern, re.DOTALL)
        return lambda response, reference: 1.0 if whole.fullmatch(response) else 0.0


class RepetitionScorer(BaseScorer):
    """Minus the share of the response's word sequences that stood in it before."""

    type: Literal["repetition"] = key("repetition", "-", "Looks for repetitions.")
    ngram: int = key(..., "words", "Length of the sequences.", give="for example 4", ge=1)

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        return lambda response, reference: -ngram_repetition(response, self.ngram)


class LanguageScorer(BaseScorer):
    """The share of the response's words that are written in a script."""

    type: Literal["language"] = key("language", "-", "Looks at the script.")
    script: Script = key(..., "-", "The script.", give="for example latin")

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer from its own keys."""
        return lambda response, reference: script_share(response, self.script)


def tagged_sections(tags: Sequence[str]) -> re.Pattern[str]:
    """Make a pattern whose full match is one ``<tag>...</tag>`` of each tag, in order, with nothing but white space around them.

    DeepSeek-R1's format reward (arXiv 2501.12948, section 2.2.2) with tags think and answer. No tag may stand inside a section,
    so a second <answer> is no match.
    """
    inside = "(?:(?!" + "|".join(rf"</?{re.escape(tag)}>" for tag in tags) + ").)*"
    sections = [rf"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in tags]
    return re.compile(r"\s*" + r"\s*".join(sections) + r"\s*", re.DOTALL)


def ngram_repetition(text: str, size: int) -> float:
    """Return the share of the n-grams of words that are repetitions, 1 - distinct / all, 0 to 1; 0 for texts of fewer words.

    The n-gram repetition penalty of arXiv 2502.03373, appendix C.2, as Open-R1 counts it over a whole response. Words are
    lower-cased and divided at white space.
    """
    words = text.lower().split()
    ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def script_share(text: str, script: str) -> float:
    """Return the share of the text's words that are written in a script, 0 to 1; 1 for a text without words.

    DeepSeek-R1's language consistency (arXiv 2501.12948, section 2.3.2): the proportion of words in the target language, which is
    told here by the script alone: English and French are both latin. A word is a run of letters of one script; where words are
    written without spaces (Chinese, Japanese, Thai) every letter counts as one. Digits, punctuation, symbols and accents count for
    nothing; full-width and mathematical letters count as the letters that they stand for.
    """
    wanted = _NAMES_OF_SCRIPT[script]
    words = list(_words(unicodedata.normalize("NFKC", text)))
    return sum(word in wanted for word in words) / len(words) if words else 1.0


def _words(text: str) -> Iterator[str]:
    """Yield the first word of the Unicode names of each word's letters."""
    before = ""
    for character in text:
        script = _script_of(character)
        if script == "accent":  # belongs to the letter before it
            continue
        if script and (script != before or script in _LETTER_BY_LETTER):
            yield script
        before = script


@lru_cache(maxsize=65536)
def _script_of(character: str) -> str:
    """Return the first word of a letter's Unicode name, "accent" for a mark, empty for anything else."""
    category = unicodedata.category(character)
    if category.startswith("M"):
        return "accent"
    return unicodedata.name(character, "UNKNOWN").split()[0] if category.startswith("L") else ""
