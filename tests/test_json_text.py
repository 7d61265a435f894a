"""JSON of others: what is data comes as it is, and what is not is refused with one reason."""

import json

import pytest

from megarl.json_text import parse_json


@pytest.mark.parametrize(
    "text",
    ["1e99", "-1E-320", "1e+308", "0.1e0003", "9" * 40, '"e999 1e999"', '"' + "9" * 5000 + '"', '{"a": [-0.25, 7, null, "é"]}'],
)
def test_a_number_within_bounds_is_what_python_reads(text: str) -> None:
    assert parse_json(text) == json.loads(text) == parse_json(text.encode())


@pytest.mark.parametrize("number", ["1e309", "-1E+400", "1e000999", "9" * 400 + ".5"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match="is not finite"):
        parse_json(f'{{"logprob": [{number}]}}')


@pytest.mark.parametrize("number", ["9" * 41, "-" + "9" * 40, "1" * 5000])
def test_a_whole_number_of_too_many_digits_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match=f"a number has {len(number)} digits"):
        parse_json(f"[{number}]")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_only_what_is_nested_too_deeply_is_refused(opening: str, closing: str) -> None:
    for depth in (1, 63, 64):
        text = opening * depth + "1" + closing * depth
        assert parse_json(text) == json.loads(text)
    for depth in (65, 900, 100_000):
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(opening * depth + "1" + closing * depth)
