"""Whether two mathematical answers are equal.

Expressions are what latex2sympy reads of them, which is a parser: no text is ever evaluated as code. Constants, and functions and
equations at some points, are compared by their digits; what has none by math-verify's grader. The size of what would be worked out
is estimated first, as sympy would give 9^(9^9) digit by digit.
"""

import math
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from types import FrameType
from typing import Any

from megarl.builtin.mathematics.answers import Answer, Assignment, Expression, Listing, Matrix, Union, Words
from megarl.builtin.mathematics.quantities import Based, Clock, Number
from megarl.builtin.mathematics.text import depth_of, words_of

MAX_SECONDS = 1.0  # of processor time for reading and comparing one answer
_MAX_DIGITS = 20_000  # of a number that is worked out
_MAX_DEGREE = 5_000
_MAX_BARS = 12
_MAX_NESTED = 12
_MAX_EXPRESSION = 400  # characters
_MOST_ITEMS = 50  # of a list
_PLACES = 6  # a decimal of so many places stands for the number that it is rounded from
_DIGITS = 30  # that constants are worked out to; those of the comparison are fewer
_DIGITS_OF_DECIMALS = 12
_POINTS = (Fraction(7, 5), Fraction(-13, 11), Fraction(29, 9), Fraction(3, 17))  # at which functions are compared
_WORKED_OUT_BY_PARSER = re.compile(r"binom|choose|gcd|lcm|mod|det|matrix|_ ?\{?\d+\}? ?[CP]")
_MUCH_WORK = re.compile(r"\d{5}|\^|!")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")


class TooLongError(BaseException):  # not an Exception, which the libraries below would take for one of theirs
    """Reading or comparing took more than the time that it has."""


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Raise TooLongError in the block once it has used so much processor time; in another thread than the main one nothing can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def equal(gold: Answer, answer: Answer) -> bool:
    """Tell whether the answer is the gold one; units and names that only one of them has count for nothing."""
    if gold == answer:
        return True
    if isinstance(gold, Assignment) or isinstance(answer, Assignment):
        return _equal_assignments(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _equal_words(gold, answer)
    if isinstance(gold, Union) or isinstance(answer, Union):
        return _equal_unions(gold, answer)
    if isinstance(gold, Listing) or isinstance(answer, Listing):
        return _equal_lists(gold, answer)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return gold.is_determinant == answer.is_determinant and _equal_rows(gold.rows, answer.rows)
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return _minutes(gold, answer.half) == _minutes(answer, gold.half)
    if isinstance(gold, Based) or isinstance(answer, Based):
        # two with bases are equal above; one without is taken to be in the base that was asked for
        return type(gold) is not type(answer) and _digits(gold) == _digits(answer)
    if isinstance(gold, Number | Expression) and isinstance(answer, Number | Expression):
        return _equal_quantities(gold, answer)
    return False


def is_readable(answer: Answer) -> bool:
    """Tell whether every expression in the answer can be read by latex2sympy and worked out."""
    if isinstance(answer, Expression):
        return sympy_of(answer.latex) is not None
    if isinstance(answer, Assignment):
        return is_readable(answer.value)
    if isinstance(answer, Listing | Union):
        return all(map(is_readable, answer.items))
    if isinstance(answer, Matrix):
        return all(is_readable(entry) for row in answer.rows for entry in row)
    return True


def _equal_assignments(gold: Answer, answer: Answer) -> bool:
    if isinstance(gold, Assignment) and isinstance(answer, Assignment):
        if gold.name.casefold() == answer.name.casefold():
            return equal(gold.value, answer.value)
        return isinstance(gold.value, Expression) and _equal_relations(sympy_of(gold.latex), sympy_of(answer.latex))
    for one, other in ((gold, answer), (answer, gold)):
        if isinstance(one, Assignment) and isinstance(other, Expression) and "=" in other.latex:
            return _equal_relations(sympy_of(one.latex), sympy_of(other.latex))
    return equal(*(one.value if isinstance(one, Assignment) else one for one in (gold, answer)))


def _equal_words(gold: Answer, answer: Answer) -> bool:
    texts = [
        one.text if isinstance(one, Words) else words_of(one.latex) if isinstance(one, Expression) else "" for one in (gold, answer)
    ]
    if re.fullmatch("[a-j]", texts[0]) and (choice := re.match(r"\(?([a-j])\)?[).:] ?\S", texts[1])):
        return choice[1] == texts[0]  # the letter with what it stands for
    return bool(texts[0]) and texts[0] == texts[1]


def _equal_unions(gold: Answer, answer: Answer) -> bool:
    parts = [
        one.items if isinstance(one, Union) or (isinstance(one, Listing) and not one.begin) else (one,) for one in (gold, answer)
    ]
    return _equal_in_any_order(*parts)


def _equal_lists(gold: Answer, answer: Answer) -> bool:
    if not isinstance(gold, Listing) or not isinstance(answer, Listing):
        several, one = (gold, answer) if isinstance(gold, Listing) else (answer, gold)
        assert isinstance(several, Listing)
        is_single = len(several.items) == 1 and several.begin in ("", "{")
        return is_single and (equal(several.items[0], one) if several is gold else equal(one, several.items[0]))
    if "(" in (gold.begin, answer.begin) or "[" in (gold.begin, answer.begin):
        if gold.begin and answer.begin:
            return (gold.begin, gold.end) == (answer.begin, answer.end) and _equal_in_order(gold.items, answer.items)
        brackets = gold if gold.begin else answer
        if (brackets.begin, brackets.end) != ("(", ")"):
            return False
        is_ordered = gold.begin or len({item.name for item in gold.items if isinstance(item, Assignment)}) > 1
        return _equal_in_order(gold.items, answer.items) if is_ordered else _equal_in_any_order(gold.items, answer.items)
    return _equal_in_any_order(gold.items, answer.items)


def _equal_in_order(gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
    return len(gold) == len(answer) <= _MOST_ITEMS and all(map(equal, gold, answer))


def _equal_in_any_order(gold: Sequence[Answer], answer: Sequence[Answer]) -> bool:
    if len(gold) != len(answer) or len(gold) > _MOST_ITEMS:
        return False
    left = list(answer)
    for item in gold:
        match = next((index for index, other in enumerate(left) if equal(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _equal_rows(gold: Sequence[Sequence[Answer]], answer: Sequence[Sequence[Answer]]) -> bool:
    return len(gold) == len(answer) and all(map(_equal_in_order, gold, answer))


def _minutes(clock: Clock, other_half: str) -> tuple[int, int]:
    """Return hour of 24 and minute; a clock that does not say which half of the day is in the other's."""
    half = clock.half or (other_half if clock.hour <= 12 else "")
    return (clock.hour % 12 + 12 * (half == "p") if half else clock.hour), clock.minute


def _digits(answer: Answer) -> str | None:
    if isinstance(answer, Based):
        return answer.digits
    return answer.latex if isinstance(answer, Expression) else str(answer.value) if isinstance(answer, Number) else None


def _equal_quantities(gold: Number | Expression, answer: Number | Expression) -> bool:
    units = {gold.unit, answer.unit} - {""}
    if len(units) == 2 and not all(unit.startswith("degree") for unit in units):
        return False
    if _equal_values(gold, answer):
        return True
    if units != {"percent"} or gold.unit == answer.unit:
        return False
    number, percent = (gold, answer) if answer.unit else (answer, gold)
    return isinstance(number, Number) and isinstance(percent, Number) and number.value == percent.value / 100


def _equal_values(gold: Number | Expression, answer: Number | Expression) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        return gold.value == answer.value or _rounds_to(gold.value, answer) or _rounds_to(answer.value, gold)
    first, second = _as_sympy(gold), _as_sympy(answer)
    if first is None or second is None:
        return False
    if getattr(first, "is_Relational", False) or getattr(second, "is_Relational", False):
        return _equal_relations(first, second)
    for exact, number in ((first, answer), (second, gold)):
        if isinstance(number, Number) and (number.places or 0) >= _PLACES and not exact.free_symbols:
            value = exact.evalf(_DIGITS)
            return bool(value.is_real) and _rounds_to(Fraction(str(value)), number)
    return _equal_expressions(first, second)


def _rounds_to(value: Fraction, decimal: Number) -> bool:
    """Tell whether a decimal of enough places is the value, rounded."""
    if decimal.places is None or decimal.places < _PLACES:
        return False
    return abs(value - decimal.value) * 2 * 10**decimal.places <= 1


def _as_sympy(quantity: Number | Expression) -> Any:
    if isinstance(quantity, Expression):
        return sympy_of(quantity.latex)
    from sympy import Rational

    return Rational(quantity.value.numerator, quantity.value.denominator)


def _equal_expressions(first: Any, second: Any) -> bool:
    """Say whether their digits are equal at every point that both are defined at, or math-verify says so where they have none."""
    from sympy import Float

    if first == second:
        return True
    if getattr(first, "is_Matrix", False) or getattr(second, "is_Matrix", False):
        return _verify(first, second)
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    has_decimals = first.has(Float) or second.has(Float)
    num_compared = 0
    for turn in range(len(_POINTS) if symbols else 1):
        point = _point(symbols, turn)
        values = [_value_at(expression, point) for expression in (first, second)]
        if None in values:
            continue
        num_compared += 1
        if not _same_digits(values[0], values[1], _DIGITS_OF_DECIMALS if has_decimals else _DIGITS - 10):
            return False
    return num_compared > 0 or _verify(first, second)


def _point(symbols: Sequence[object], turn: int) -> dict[Any, Fraction]:
    return {symbol: _POINTS[(turn + index) % len(_POINTS)] + index for index, symbol in enumerate(symbols)}


def _value_at(expression: Any, point: dict[Any, Fraction]) -> Any:
    """Return its value as a complex number of _DIGITS digits, None where it has none."""
    from sympy import Rational

    try:
        at = expression.subs({symbol: Rational(value.numerator, value.denominator) for symbol, value in point.items()})
        value = at.doit().evalf(_DIGITS)
        return value if value.is_number and value.is_finite else None
    except Exception:  # undefined there, or nothing that has digits
        return None


def _same_digits(first: Any, second: Any, tolerance: int) -> bool:
    from sympy import Float

    scale = max(abs(first), abs(second))
    return bool(scale == 0 or abs(first - second) <= scale * Float(10) ** -tolerance)


def _equal_relations(first: Any, second: Any) -> bool:
    """Tell whether two equations or inequalities are one, up to a factor and the order of their sides."""
    if not (getattr(first, "is_Relational", False) and getattr(second, "is_Relational", False)):
        return False
    if first.rel_op != second.rel_op:
        second = second.reversed
    if first.rel_op != second.rel_op:
        return False
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    ratios = []
    for turn in range(len(_POINTS)):
        point = _point(symbols, turn)
        top, bottom = (_value_at(relation.lhs - relation.rhs, point) for relation in (first, second))
        if top is not None and bottom:
            ratios.append(top / bottom)
    is_constant = len(ratios) > 1 and all(_same_digits(ratio, ratios[0], _DIGITS_OF_DECIMALS) for ratio in ratios)
    return bool(is_constant and ratios[0] != 0 and (first.rel_op == "==" or ratios[0] > 0))


def _verify(gold: object, answer: object) -> bool:
    from math_verify import verify  # here, because it takes a second and other scorers do without

    return bool(verify(gold, answer, timeout_seconds=None))


@lru_cache(maxsize=8192)
def sympy_of(latex: str) -> Any:
    """Return the expression as sympy's, not worked out; None for one that latex2sympy cannot read or that is too large."""
    from latex2sympy2_extended import latex2sympy

    too_much = _WORKED_OUT_BY_PARSER.search(latex) and _MUCH_WORK.search(latex)
    if too_much or len(latex) > _MAX_EXPRESSION or latex.count("|") > _MAX_BARS or depth_of(latex) > _MAX_NESTED:
        return None
    try:
        parsed = latex2sympy(latex, is_real=not _IMAGINARY.search(latex), normalization_config=None)
        return parsed if _num_digits(parsed) <= _MAX_DIGITS else None
    except Exception:  # the parser's errors have no class of their own; what it cannot read is no mathematics
        return None


def _num_digits(expression: object) -> float:
    """Bound the digits of all numbers that come up when it is worked out; infinite where that is not known to end.

    Sums, products, integrals, derivatives and limits count as infinite too: they repeat the question and answer nothing.
    """
    import sympy

    if not isinstance(expression, sympy.Basic):
        return 0.0
    if isinstance(expression, sympy.Sum | sympy.Product | sympy.Integral | sympy.Derivative | sympy.Limit):
        return math.inf
    digits = max((_num_digits(part) for part in expression.args), default=0.0)
    if digits > _MAX_DIGITS:
        return math.inf
    if isinstance(expression, sympy.Rational):
        return float(max(len(str(abs(expression.p))), len(str(expression.q))))
    if isinstance(expression, sympy.Pow):
        size = _size(expression.exp)
        if size > (_MAX_DIGITS if expression.base.is_number else _MAX_DEGREE):
            return math.inf
        return digits * max(1.0, size)
    if isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.gamma):
        size = _size(expression.args[0])
        return size * max(1.0, digits)
    if isinstance(expression, sympy.Add | sympy.Mul):
        return sum(max(1.0, _num_digits(part)) for part in expression.args)
    return digits


def _size(expression: Any) -> float:
    """Return an upper bound of a number's absolute value, 1 for what holds symbols."""
    if not expression.is_number:
        return 1.0
    return float(abs(expression).evalf(5)) if _num_digits(expression) < 300 else math.inf
