"""Numbers as people write them: with thousands separators, units, money, percent, powers of ten, in another base, on a clock."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megarl.builtin.mathematics.text import without_text_marks

_MAX_EXPONENT = 400  # a larger power of ten is left as an expression
_NUMBER = re.compile(
    r"([+-]?) ?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,4}))?"
)
_POWER_OF_TEN = re.compile(r"([+-]?[\d.,]+) ?(?:\\times|\\cdot|x) ?10 ?\^ ?(?:\{ ?([+-]?\d{1,4}) ?\}|([+-]?\d))")
_FRACTION = re.compile(r"([+-]?) ?(?:(\d+) ?)?\\frac ?\{ ?([+-]?\d+) ?\} ?\{ ?([+-]?\d+) ?\}")
_SLASHED = re.compile(r"([+-]?) ?(?:(\d+) )?(\d+) ?/ ?(\d+)")
_REPEATING = re.compile(r"([+-]?) ?(\d*)\.(\d*)\\overline ?\{(\d{1,40})\}")
_BASED = re.compile(r"([0-9A-F][0-9A-F,]*) ?_ ?(?:\{ ?(?:\\text ?\{)?([^{}]+)\}?\}|(\w))")
_MONEY = re.compile(r"([+-]?) ?(?:(?:US|USD)? ?\\?\$|[£€¥₹]|\\pounds|USD) ?(?=[\d.-])")
_PERCENT = re.compile(r" ?(?:\\?%|\\text ?\{ ?(?:percent|\\?%) ?\}|percent)$")
_DEGREES = re.compile(r" ?(?:\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree) ?(?:\\text ?\{ ?)?([CF]?) ?\}?$")
_UNIT = re.compile(r"(.*[\d})\]]) ?(?:\\text ?\{ ?([^{}\d]+?) ?\}|(?<= )([A-Za-z][A-Za-z ./]*?)) ?(?:\^ ?\{? ?([23]) ?\}?)?$")
_CLOCK = re.compile(r"(\d{1,2}) ?: ?(\d{2}) ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
_NO_UNIT = re.compile(r"(?:and|or|mod|to|by|if|for|where|when|sin|cos|tan|log|ln|pi|[a-z])\b")
_UNIT_NAMES = {
    "cm": ("centimeter", "centimetre"),
    "mm": ("millimeter", "millimetre"),
    "km": ("kilometer", "kilometre"),
    "m": ("meter", "metre"),
    "ft": ("foot", "feet"),
    "in": ("inch", "inche"),
    "mi": ("mile",),
    "yd": ("yard",),
    "h": ("hour", "hr"),
    "min": ("minute",),
    "sec": ("second", "s"),
    "kg": ("kilogram", "kilo"),
    "g": ("gram",),
    "lb": ("pound",),
    "l": ("liter", "litre"),
    "mph": ("miles per hour", "mile per hour", "miles/hour", "mi/h"),
    "money": ("dollar", "buck", "us dollar", "usd"),
    "percent": ("percentage",),
    "degree": ("deg",),
}
_UNIT_OF_NAME = {name: unit for unit, names in _UNIT_NAMES.items() for name in (unit, *names)}


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number as it is written.

    Attributes:
        value: exactly.
        places: digits after the point of a decimal; None for fractions and integers.
        unit: what it counts, in one spelling; empty where it is not said.
    """

    value: Fraction
    places: int | None = None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in the base that is written beside them."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day, or a ratio; ``half`` is a, p, or empty."""

    hour: int
    minute: int
    half: str


def read_number(text: str) -> Number | None:
    """Read a number without a unit, in digits, as a fraction, a mixed number or a power of ten; None for anything else."""
    if found := _NUMBER.fullmatch(text):
        sign, digits, exponent = found.groups()
        digits = re.sub("[, ]", "", digits)
        places = len(digits.partition(".")[2]) or None
        return _scaled(Number(Fraction(sign + digits.rstrip(".") if digits != "." else "0"), places), exponent)
    if found := _POWER_OF_TEN.fullmatch(text):
        mantissa = read_number(found[1])
        return None if mantissa is None else _scaled(mantissa, found[2] or found[3])
    if found := _REPEATING.fullmatch(text):
        sign, whole, begin, period = found.groups()
        value = Fraction(f"{whole or 0}.{begin or 0}") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(begin))
        return Number(-value if sign == "-" else value)
    if found := _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text):
        sign, whole, top, bottom = found.groups()
        if int(bottom) == 0:
            return None
        value = int(whole or 0) + Fraction(int(top), int(bottom))
        return Number(-value if sign == "-" else value)
    return None


def read_based(text: str) -> Based | None:
    """Read digits with a base as their index; None for anything else."""
    found = _BASED.fullmatch(text)
    return None if found is None else Based(found[1].replace(",", ""), (found[2] or found[3]).strip().casefold())


def read_clock(text: str) -> Clock | None:
    """Read a time of day; None for anything else."""
    found = _CLOCK.fullmatch(without_text_marks(text))
    if found is None:
        return None
    hour, minute, half = int(found[1]), int(found[2]), (found[3] or "").lower()
    return Clock(hour, minute, half)


def without_unit(text: str) -> tuple[str, str]:
    """Return the text without money's sign, percent, degrees or a unit behind it, and that unit in one spelling; empty for none."""
    if (money := _MONEY.match(text)) and money.end() < len(text):
        return money[1] + text[money.end() :], "money"
    if percent := _PERCENT.search(text):
        return text[: percent.start()].strip(), "percent"
    if (degrees := _DEGREES.search(text)) and degrees.start():
        return text[: degrees.start()].strip(), f"degree{degrees[1]}"
    if found := _UNIT.fullmatch(text):
        value, marked, plain, power = found.groups()
        if marked or not _NO_UNIT.match(plain):
            return value.strip(), unit_named(marked or plain, power or "")
    return text, ""


def unit_named(name: str, power: str) -> str:
    """Return one spelling of a unit: short, singular, squares and cubes as powers."""
    name = " ".join(name.casefold().replace(".", "").split())
    for word, of_word in (("square ", "2"), ("sq ", "2"), ("cubic ", "3"), ("cu ", "3")):
        if name.startswith(word):
            name, power = name.removeprefix(word), of_word
    if name not in _UNIT_OF_NAME and name.endswith("s"):
        name = name[:-1]
    return "" if name == "unit" else _UNIT_OF_NAME.get(name, name) + power


def _scaled(number: Number, exponent: str | None) -> Number | None:
    if exponent is None:
        return number
    power = int(exponent)
    if abs(power) > _MAX_EXPONENT:
        return None
    places = None if number.places is None else max(0, number.places - power) or None
    return Number(number.value * Fraction(10) ** power, places)
