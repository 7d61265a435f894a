r"""LaTeX and Unicode spellings of an answer as one: what is written differently and means the same becomes the same text."""

import re
import unicodedata
from collections.abc import Iterator

# before NFKC, which would make x2 of x², and 31/2 of 3½
_SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": "\\times ",
    "·": "\\cdot ",
    "÷": "/",
    "√": "\\sqrt ",
    "π": "\\pi ",
    "∞": "\\infty ",
    "≤": "\\le ",
    "≥": "\\ge ",
    "≠": "\\ne ",
    "±": "\\pm ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "°": "^\\circ ",
    "½": "\\frac{1}{2}",
    "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}",
    "⅓": "\\frac{1}{3}",
    "⅔": "\\frac{2}{3}",
    "²": "^2",
    "³": "^3",
    "\u200b": "",
    "\ufeff": "",
    "，": ", ",
    "。": "",
}
_TRANSLATION = str.maketrans(_SYMBOLS)
_ROOT = re.compile(r"√ ?(\d+)")
_SPACING = re.compile(r"(?<!\\)\\[!,;:>]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])\.?")
_SPACES = re.compile(r"\\(?:qquad|quad|hspace\{[^{}]*\})(?![A-Za-z])|(?<!\\)\\ |~|\s+")
_SAME = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:mathrm|mathbf|mathit|mathsf|rm|bf|textbf|textit|textrm|textnormal|mbox|operatorname)(?=\s*\{)"), r"\\text"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s+([A-Za-z])(?![A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<=[\d\s)])\*(?=[\d\s(A-Za-z])"), r"\\cdot "),
)
_ORDINAL = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)\b")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"))
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_TOKEN = re.compile(r"\\begin\{[A-Za-z]+\*?\}|\\end\{[A-Za-z]+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)


def tidy(text: str) -> str:
    r"""Unify the spelling: no marks of mathematics around, no LaTeX of appearance, ``\text`` for upright letters, single spaces."""
    text = text.strip()
    for begin, end in _WRAPPERS:
        inside = text[len(begin) : -len(end)] if len(text) > len(begin) + len(end) else ""
        if text.startswith(begin) and text.endswith(end) and begin not in inside and not text.endswith("\\" + end):
            text = inside.strip()
    text = unicodedata.normalize("NFKC", _ROOT.sub(r"\\sqrt{\1}", text).translate(_TRANSLATION))
    text = _SPACES.sub(" ", _SPACING.sub("", text))
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    text = _SPACES.sub(" ", text).strip()
    return text.rstrip(" .,;:") if not text.endswith("...") else text


def without_text_marks(text: str) -> str:
    r"""Return the words of ``\text{words}``, with spaces around them."""
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def words_of(text: str) -> str:
    """Return the text as words are compared: without LaTeX's marks of text, case, spaces that mean nothing, and a full stop."""
    plain = without_text_marks(text).casefold().strip(" .,;:!?'\"")
    return _ORDINAL.sub(r"\1", re.sub(r"\s*([^\w\s])\s*", r"\1", plain))


def tokens_of(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield each token's begin, text and depth: how many brackets, groups and environments are open before it.

    A closing bracket has the depth of its opening one. ``(`` may be closed by ``]``, as intervals are.
    """
    depth = 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        depth -= _closes(token)
        yield found.start(), token, depth
        depth += _opens(token)


def split_at(text: str, *separators: str) -> list[str]:
    """Return the parts of a text between separators (tokens) that stand in no brackets."""
    parts, begin = [], 0
    for start, token, depth in tokens_of(text):
        if depth == 0 and token in separators:
            parts.append(text[begin:start].strip())
            begin = start + len(token)
    return [*parts, text[begin:].strip()]


def is_balanced(text: str) -> bool:
    """Tell whether every bracket, group and environment is closed."""
    depth = groups = 0
    for _, token, _ in tokens_of(text):
        depth += _opens(token) - _closes(token)
        groups += (token == "{") - (token == "}")
        if depth < 0 or groups < 0:
            return False
    return depth == groups == 0


def depth_of(text: str) -> int:
    """Return how deeply brackets are nested."""
    return max((depth for _, _, depth in tokens_of(text)), default=0)


def _opens(token: str) -> bool:
    return token in ("(", "[", "{", "\\{", "\\langle") or token.startswith("\\begin{")


def _closes(token: str) -> bool:
    return token in (")", "]", "}", "\\}", "\\rangle") or token.startswith("\\end{")
