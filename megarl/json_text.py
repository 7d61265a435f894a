"""JSON of others, a model folder's or a server's: read within limits, so that all that comes is data or one plain reason."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 64  # of lists and objects within each other
MAX_DIGITS = 40  # of a whole number
MAX_FILE_BYTES = 64 << 20  # of a file that is read whole
_OUTLINE = bytes.maketrans(b"123456789E", b"000000000e")  # every digit alike, every exponent's letter too


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: with a short reason: it is no JSON or no UTF-8, is nested too deeply, or has a number that is not finite or too
            long.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        if _may_have_huge_numbers(decoded):
            value = json.loads(decoded, parse_int=_whole_number, parse_float=_finite, parse_constant=_refuse_constant)
        else:
            value = json.loads(decoded, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    _check_depth(value)
    return value


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as ``parse_json``, or it holds something else than an object.
    """
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    value = parse_json(file.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    return value


def _may_have_huge_numbers(text: str) -> bool:
    """Return False only where every number surely is finite and has at most MAX_DIGITS digits.

    Numbers of such a text need no look at each, which an engine's answer has two of for every token: no run of digits has
    MAX_DIGITS, and no exponent has three.
    """
    outline = text.encode(errors="replace").translate(_OUTLINE)
    return b"0" * MAX_DIGITS in outline or b"e000" in outline or b"e+000" in outline


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is not finite")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _check_depth(value: object) -> None:
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            for item in (one.values() if type(one) is dict else one)
            if type(item) is list or type(item) is dict
        ]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
