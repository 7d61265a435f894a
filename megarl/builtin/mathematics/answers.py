r"""Mathematical answers, read into what they are made of: numbers, words, lists, intervals, matrices, and expressions for sympy.

math-verify and latex2sympy read one expression well. What stands around expressions is read here: they take ``(1, 2]`` for a set,
the last entry of a matrix for all of it, and ``7 and 8`` for 8.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megarl.builtin.mathematics.quantities import Based, Clock, Number, read_based, read_clock, read_number, without_unit
from megarl.builtin.mathematics.text import is_balanced, split_at, tidy, tokens_of, words_of

MAX_CHARACTERS = 1000  # of an answer that is read as mathematics; a longer one is compared as a text

_CHOICE = re.compile(r"(?:\\text ?\{ ?)?\(?(?:\\text ?\{ ?)?([A-J]) ?\}? ?\)? ?\}?[.:]?")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?)(?:small)?(matrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{\1(?:small)?\2\}")
_NAME = re.compile(
    r"(?:[A-Za-z]|\\(?!frac|sqrt|text)[A-Za-z]+)(?: ?_ ?(?:\w|\{[^{}]*\}))?'*(?: ?\( ?[A-Za-z](?: ?, ?[A-Za-z])* ?\))?"
    r"|\\text ?\{[^{}]*\}"
)
_COMMAND = re.compile(r"\\[A-Za-z]+|\\begin\{[^}]*\}|\\end\{[^}]*\}")
_WORD = re.compile(r"(?:(?<=[\s,.(\"'-])|^)[^\W\d_]{3,}(?=[\s,.)!?\"':-]|$)|[^\W\d_a-zA-Zα-ωΑ-Ω]{2,}")
_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc|log|exp|mod|max|min|gcd|lcm|det|arc[a-z]{3}|sqrt")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_OPERATOR = re.compile(r"\\(?!text)[A-Za-z]+|[\^+*_=]")
_CONJUNCTION = re.compile(r",? ?(?:\\text ?\{ ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])),? ?")
_OUTWARD = re.compile(r"([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])")
_SMALLER = {"<": True, "\\lt": True, "\\le": False}
_LARGER = {">": "<", "\\gt": "<", "\\ge": "\\le"}
_CLOSING = {"(": ")]", "[": ")]", "\\{": ("\\}",), "\\langle": ("\\rangle",)}


@dataclass(frozen=True, slots=True)
class Words:
    """A text, compared as one: a name, a date, a letter of multiple choice."""

    text: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Several answers between brackets: none where their order means nothing, ``{`` of a set, others of points and intervals."""

    begin: str
    end: str
    items: "tuple[Answer, ...]"


@dataclass(frozen=True, slots=True)
class Union:
    """Intervals or sets joined by a cup, in any order."""

    items: "tuple[Answer, ...]"


@dataclass(frozen=True, slots=True)
class Matrix:
    """The rows of a matrix, each of entries."""

    rows: "tuple[tuple[Answer, ...], ...]"
    is_determinant: bool


@dataclass(frozen=True, slots=True)
class Assignment:
    """``name = value``, or the interval that inequalities leave a name; ``latex`` is how it is written."""

    name: str
    value: "Answer"
    latex: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Expression:
    """Anything else, as LaTeX for sympy, with its unit."""

    latex: str
    unit: str = ""


Answer = Words | Number | Based | Clock | Listing | Union | Matrix | Assignment | Expression


def read_answer(text: str) -> Answer:
    """Read what a text means as an answer; Words where it is no mathematics, or too much of it."""
    text = tidy(text)
    if french := _OUTWARD.fullmatch(text):
        begin, inside, end = french.groups()
        text = ("(" if begin == "]" else "[") + inside + (")" if end == "[" else "]")
    return _read(text) if len(text) <= MAX_CHARACTERS and is_balanced(text) else Words(words_of(text))


def is_prose(answer: Answer) -> bool:
    """Tell whether it is a text of more words than an answer has."""
    return isinstance(answer, Words) and (answer.text.count(" ") > 4 or len(answer.text) > 80)


def _read(text: str) -> Answer:
    if not text:
        return Words("")
    if choice := _CHOICE.fullmatch(text):
        return Words(choice[1].casefold())
    if whole := _whole_text(text):
        inside = _read(whole)
        return inside if isinstance(inside, Number | Clock | Words) else Words(words_of(whole))
    for read in (
        _read_quantity,
        read_clock,
        read_based,
        _read_lists,
        _read_relation,
        _read_brackets,
        _read_plus_minus,
        _read_matrix,
    ):
        if (answer := read(text)) is not None:
            return answer
    plain = _COMMAND.sub(" ", text.replace("\\text", " "))
    words = [word for word in _WORD.findall(plain) if not _FUNCTION.fullmatch(word)]
    if len(words) > 1 or (words and not _OPERATOR.search(text)):
        return Words(words_of(text))
    value, unit = without_unit(text)
    return Expression(value, unit)


def _whole_text(text: str) -> str | None:
    r"""Return what ``\text{...}`` around all of a text holds, without the marks of text within."""
    if not text.startswith("\\text") or not text.endswith("}"):
        return None
    found = re.fullmatch(r"\\text ?\{([^{}]*)\}", text)
    return found[1].strip() if found else None


def _read_quantity(text: str) -> Answer | None:
    if (number := read_number(text)) is not None:
        return number
    value, unit = without_unit(text)
    price, _ = without_unit(value) if unit == "money" else (value, "")  # $2 per pound
    number = read_number(price) if value != text else None
    return None if number is None else replace(number, unit=unit)


def _read_lists(text: str) -> Answer | None:
    """Read answers side by side: with commas, semicolons, "and" or "or" between them, or joined by cups."""
    joined = split_at(text, "\\cup")
    if len(joined) > 1:
        return Union(tuple(map(_read, joined)))
    parts = [part for part in split_at(_conjoined(text), ",", ";") if part]
    if len(parts) < 2:
        return None
    if all(isinstance(part, Words) and not re.fullmatch(r"\w{1,20}", part.text) for part in map(_read, parts)):
        return None  # a sentence
    return Listing("", "", _items(parts))


def _items(parts: Iterable[str]) -> tuple[Answer, ...]:
    """Return what the parts mean, with both of a plus-minus."""
    items = [_read(part) for part in parts if part]
    return tuple(one for item in items for one in (item.items if isinstance(item, Listing) and not item.begin else (item,)))


def _conjoined(text: str) -> str:
    """Return the text with commas for the words and, or, where these stand between mathematics."""
    return _CONJUNCTION.sub(", ", text)


def _read_relation(text: str) -> Answer | None:
    parts, relations = _relations(text)
    if not relations or not all(parts):
        return None
    if set(relations) <= {"="}:
        if _NAME.fullmatch(parts[0]) and len(set(parts[1:])) >= 1:
            return Assignment(_name(parts[0]), _read(parts[-1]), text)
        if not re.search(r"(?<!\\)[A-Za-z]", _COMMAND.sub("", parts[0])):
            return _read(parts[-1])  # 3 + 4 = 7
        return None
    if relations == ["\\in"] and _NAME.fullmatch(parts[0]):
        return Assignment(_name(parts[0]), _read(parts[1]), text)
    if all(one in _LARGER for one in relations):
        parts.reverse()
        relations = [_LARGER[one] for one in reversed(relations)]
    if not all(one in _SMALLER for one in relations):
        return None
    if len(relations) == 1:
        if _NAME.fullmatch(parts[0]):
            parts, relations = ["-\\infty", *parts], ["<", *relations]
        elif _NAME.fullmatch(parts[1]):
            parts, relations = [*parts, "\\infty"], [*relations, "<"]
    if len(relations) != 2 or not _NAME.fullmatch(parts[1]):
        return None
    begin, end = ("(" if _SMALLER[relations[0]] else "["), (")" if _SMALLER[relations[1]] else "]")
    return Assignment(_name(parts[1]), Listing(begin, end, (_read(parts[0]), _read(parts[2]))), text)


def _relations(text: str) -> tuple[list[str], list[str]]:
    """Return the sides of equations and inequalities, and what stands between them."""
    parts, relations, begin = [], [], 0
    for start, token, depth in tokens_of(text):
        if depth == 0 and (token in ("=", "\\in") or token in _SMALLER or token in _LARGER):
            parts.append(text[begin:start].strip())
            relations.append(token)
            begin = start + len(token)
    return [*parts, text[begin:].strip()], relations


def _name(text: str) -> str:
    return re.sub(r"[\s{}]|\\text", "", text)


def _read_plus_minus(text: str) -> Answer | None:
    if not _PLUS_MINUS.search(text):
        return None
    upper = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == "pm" else "-", text)
    lower = _PLUS_MINUS.sub(lambda sign: "-" if sign[1] == "pm" else "+", text)
    return Listing("", "", tuple(_read(re.sub(r"^\+ ?", "", one)) for one in (upper, lower)))


def _read_brackets(text: str) -> Answer | None:
    tokens = list(tokens_of(text))
    begin, end = tokens[0][1], tokens[-1][1]
    if len(tokens) < 2 or end not in _CLOSING.get(begin, ()) or any(depth == 0 for _, _, depth in tokens[1:-1]):
        return None
    inside = text[len(begin) : tokens[-1][0]].strip()
    parts = split_at(inside, ",", ";")
    if begin == "(" and end == ")" and len(parts) == 1:
        return _read(inside)
    if len(parts) == 1 and begin == "[":
        return None
    if begin == "\\{":
        return Listing("{", "}", _items(parts))
    begin, end = ("(", ")") if begin == "\\langle" else (begin, end)
    return Listing(begin, end, tuple(map(_read, parts)))


def _read_matrix(text: str) -> Answer | None:
    found = _MATRIX.fullmatch(text)
    if found is None or "\\begin" in found[3]:
        return None
    lines = [line for line in split_at(found[3].replace("\\hline", ""), "\\\\") if line]
    rows = tuple(tuple(_read(entry) for entry in split_at(line, "&")) for line in lines)
    return Matrix(rows, is_determinant=found[1] in ("v", "V"))
