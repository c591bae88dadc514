"""Numbers of answers: what is read, exactly, and what is not; never slowly."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockgen_hf.evaluation.answers import find_answer, number_text, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        (" 18 ", 18),
        ("18.", 18),
        ("18.0", 18),
        ("18.50", Fraction(37, 2)),
        (".5", Fraction(1, 2)),
        ("+7", 7),
        ("-7", -7),
        ("- 7", -7),
        ("−7", -7),
        ("$18", 18),
        ("$ 1,234.50", Fraction(2469, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("5 €", 5),
        ("£3", 3),
        ("50%", 50),
        ("50 percent", 50),
        ("1,234,567", 1234567),
        ("12,34,567", 1234567),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1½", Fraction(3, 2)),
        ("½", Fraction(1, 2)),
        ("-½", Fraction(-1, 2)),
        ("18 dollars.", 18),
        ("18 (eighteen)", 18),
        ("60 miles/hour", 60),
        ("3 m^2", 3),
        ("3 m2", 3),
        ("5 million", 5_000_000),
        ("2.5 thousand people", 2500),
        ("**18**", 18),
        ("`18`", 18),
        ("007", 7),
    ],
)
def test_numbers(text: str, number: int | Fraction) -> None:
    assert parse_number(text) == number
    assert find_answer(f"5 + 13 = 18\n#### {text}") == number


@pytest.mark.parametrize(
    "text",
    [
        *("", "   ", "eighteen", "3/0", "1 1/0", "1,23", "1,2,3", "10:30", "3.5.2", "5 - 2", "5+2", "2 = 2", "1e3"),
        *("1e-3", "3 eggs and 4", "1 000", "--5", "$$5", "x5", "3^2", "2 × 3", "#5", "٣", "1" * 401, "1" * 3000),
        *("½2", "½½"),
    ],
)
def test_no_numbers(text: str) -> None:
    assert parse_number(text) is None
    assert find_answer(f"So it is:\n#### {text}") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("no marker, 5", None),
        ("#### 5\n#### 6", 6),
        ("#### 5\nQuestion: 7 apples?", 5),
        ("####5", 5),
        ("#### : 5", 5),
        ("#####5", 5),
        ("### 5", None),
        ("####", None),
        ("####\n5", None),
        ("#### 5 #### ", None),
    ],
)
def test_marker(text: str, number: int | None) -> None:
    assert find_answer(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7.", 7),
        ("10 - 3", 3),
        ("7 - $3", 3),
        ("2021-2023", 2023),
        ("it is -3.", -3),
        ("it is -$3 today", -3),
        ("it is -½", Fraction(-1, 2)),
        ("10 - ½", Fraction(1, 2)),
        ("so it is ...5", 5),
        ("it is .5", Fraction(1, 2)),
        ("version 3.5.2", 2),
        ("(3) -4", 4),
        ("She has 5kg of it", 5),
        ("It costs $1,234.50.", Fraction(2469, 2)),
        ("half: 1/2 cup", Fraction(1, 2)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("2 million people", 2_000_000),
        ("room B12", None),
        ("none", None),
        ("5 is not 1/0", None),
        ("9 but #### 5", 5),
        ("9 but #### none", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: int | Fraction | None) -> None:
    assert find_answer(text, last_number=True) == number


@pytest.mark.parametrize(("number", "text"), [("18", "18"), ("-5/2", "-2.5"), ("1/3", "1/3"), ("1/40", "0.025")])
def test_number_text(number: str, text: str) -> None:
    assert number_text(Fraction(number)) == text


fractions = st.fractions(max_denominator=10**6).filter(lambda number: abs(number) < 10**30)
decimals = st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12)


@given(fractions)
def test_the_text_of_a_number_is_read_as_the_number(number: Fraction) -> None:
    assert parse_number(number_text(number)) == parse_number(str(number)) == number


@given(
    st.integers(-(10**30), 10**30), st.sampled_from(["", "$", "€ ", "£"]), st.sampled_from(["", "%", " eggs", ".0"])
)
def test_decorations_change_nothing(number: int, before: str, after: str) -> None:
    sign = "-" if number < 0 else ""
    for written in (f"{abs(number)}", f"{abs(number):,}"):
        assert parse_number(f"{sign}{before}{written}{after}") == number
        assert parse_number(f" {before}{sign}{written}{after}. ") == number
        assert find_answer(f"so {sign}{before}{written}{after}", last_number=True) == number


@given(decimals)
def test_decimals_are_exact(number: object) -> None:
    assert parse_number(f"{number:f}") == parse_number(f"{number:,f}000") == Fraction(str(number))


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(1, 10**6))
def test_mixed_numbers(whole: int, part: int, parts: int) -> None:
    assert parse_number(f"-{whole:,} {part}/{parts} cups") == -(whole + Fraction(part, parts))


# Any sign, and often one that numbers are written with. Unlike `st.text()`, it makes no table of all of Unicode first.
likely = [*"0123456789 .,-−+/%$€£½#*^:\n", "#### ", "million", "é", "٣"]
signs = st.sampled_from(likely) | st.integers(0, 0x10FFFF).map(chr)


@given(st.lists(signs).map("".join))
def test_any_text_gives_a_number_or_none(text: str) -> None:
    for found in (
        parse_number(text),
        find_answer(text),
        find_answer(f"#### {text}"),
        find_answer(text, last_number=True),
    ):
        assert found is None or isinstance(found, Fraction)


@pytest.mark.parametrize(
    "unit", ["1", "1 ", "1,", "1/", "1.", "#", "#### ", "-", "$", "-$ ", "1a", "a", "½", "1,000 ", "9 9/9 ", "\n"]
)
def test_a_million_signs_take_no_time(unit: str) -> None:
    for before in ("", "#### ", "#### 1 "):
        text = before + unit * (10**6 // len(unit))
        started = time.process_time()
        parse_number(text)
        find_answer(text)
        find_answer(text, last_number=True)
        assert time.process_time() - started < 1


def test_a_million_digits_are_no_number() -> None:
    assert find_answer("1" * 10**6, last_number=True) is None
