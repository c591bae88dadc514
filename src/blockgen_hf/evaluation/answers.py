"""
The number that a text gives as its answer, and whether two answers are the same (GSM8K).

Numbers are read as fractions, exactly: `18.0` is `18`, `0.5` is `1/2`, and 0.1 + 0.2 is 0.3.
"""

import re
import unicodedata
from fractions import Fraction


MARKER = "####"
# Longer numbers are no answers to anyone's question, and cost quadratic time.
MAX_DIGITS = 400
# What is looked at, from the marker on or at the end of a text.
_MAX_CHARACTERS = 2000

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+"  # 1,234,567 and 12,34,567
_NUMBER = re.compile(
    rf"(?P<whole>{_DIGITS})[ ]+(?P<part>{_DIGITS})[ ]?/[ ]?(?P<parts>{_DIGITS})"
    rf"|(?P<numerator>{_DIGITS})[ ]?/[ ]?(?P<denominator>{_DIGITS})"
    rf"|(?P<decimal>(?:{_DIGITS})(?:\.[0-9]+)?|(?<![.0-9])\.[0-9]+)"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})\b", re.IGNORECASE)
# What may stand behind a number: words, with exponents as in m2 or m^3. No other digit, and nothing to calculate.
_EXPONENT = re.compile(r"(?<=[a-zA-Z])\^?[23](?![0-9a-zA-Z])")
_NO_UNIT = re.compile(r"[0-9+*=<>×÷^]")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_BESIDE_VULGAR = re.compile("(?<=[0-9¼-¾⅐-⅞])(?=[¼-¾⅐-⅞])|(?<=[¼-¾⅐-⅞])(?=[0-9])")  # a space is missing: 1½
_SIGNS = str.maketrans({"−": "-", "–": "-", "—": "-", "⁄": "/", "∕": "/", "\u00a0": " ", "\u202f": " ", "\u2009": " "})


def find_answer(text: str, *, last_number: bool = False) -> Fraction | None:
    """
    The answer of a text: the number that stands behind the last `####`, in the same line.

    Args:
        text (`str`): what a model wrote, or a solution of a data set; of any length.
        last_number (`bool`): where there is no `####`, take the last number of the text.

    Returns:
        The number, or None: there is no `####`, or what follows is no number (see [`parse_number`]).
    """
    if MARKER in text:
        start = text.rindex(MARKER) + len(MARKER)
        lines = text[start : start + _MAX_CHARACTERS].lstrip(" \t:").splitlines()
        return parse_number(lines[0]) if lines else None
    return _last_number(text) if last_number else None


def parse_number(text: str) -> Fraction | None:
    """
    The number that a text consists of.

    It may be an integer, with or without commas between thousands, a decimal, a fraction (`3/4`) or a mixed number
    (`1 1/2`, `1½`), with a sign, a currency sign before or behind it, a percent sign, a word of scale (`5 million`), a
    unit and a full stop. Percent and units are dropped: `50%` is 50, as in GSM8K's solutions. Bold and code signs of
    Markdown are dropped too.

    Returns:
        None where there is no number, more than one, something to calculate, a division by zero, or more than 400
        digits.
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    text = _plain(text).strip().strip("*_`").strip()
    negative, text = _split_sign(text)
    found = _NUMBER.match(text)
    if found is None:
        return None
    rest = text[found.end() :]
    if rest[:1] == "." and rest[1:2].isdigit():
        return None
    scale = _SCALE.match(rest)
    if scale is not None:
        rest = rest[scale.end() :]
    number = _value(found)
    if number is None or _is_no_unit(rest):
        return None
    number *= 1 if scale is None else _SCALES[scale[1].lower()]
    return -number if negative else number


def number_text(number: Fraction) -> str:
    """The shortest exact text: `18`, `-2.5`, `1/3`."""
    decimal = _decimal_text(number)
    return decimal if decimal is not None else str(number)


def _decimal_text(number: Fraction) -> str | None:
    """A terminating decimal, None where there is none or a long one."""
    places = next((places for places in range(13) if 10**places % number.denominator == 0), None)
    if places is None:
        return None
    digits = str(abs(number.numerator) * (10**places // number.denominator)).zfill(places + 1)
    sign = "-" if number < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}" if places else f"{sign}{digits}"


def _plain(text: str) -> str:
    """Typographic signs, thin spaces and `½` as ASCII has them."""
    text = text.translate(_SIGNS)
    text = _BESIDE_VULGAR.sub(" ", text)
    return _VULGAR.sub(lambda found: unicodedata.normalize("NFKC", found[0]).replace("⁄", "/"), text)


def _split_sign(text: str) -> tuple[bool, str]:
    """Whether a number is negative, and its text from the first digit on: one sign, and one currency, in any order."""
    sign = currency = ""
    while text:
        first = text[0]
        if first in "+-" and not sign:
            sign = first
        elif unicodedata.category(first) == "Sc" and not currency:
            currency = first
        elif not first.isspace():
            break
        text = text[1:]
    return sign == "-", text


def _is_no_unit(text: str) -> bool:
    return _NO_UNIT.search(_EXPONENT.sub("", text)) is not None or text[:2].lower() in ("e2", "e3")


def _value(found: re.Match[str]) -> Fraction | None:
    if sum(character.isdigit() for character in found[0]) > MAX_DIGITS:
        return None
    parts = {name: part.replace(",", "") for name, part in found.groupdict().items() if part is not None}
    if "decimal" in parts:
        return Fraction(parts["decimal"])
    over, under = (parts["part"], parts["parts"]) if "part" in parts else (parts["numerator"], parts["denominator"])
    if int(under) == 0:
        return None
    return int(parts.get("whole", 0)) + Fraction(int(over), int(under))


def _last_number(text: str) -> Fraction | None:
    tail = _plain(text[-_MAX_CHARACTERS:])
    is_cut = len(text) > _MAX_CHARACTERS
    last: tuple[re.Match[str], bool] | None = None
    for found in _NUMBER.finditer(tail):
        before = tail[: found.start()]
        if (is_cut and not before) or before[-1:].isalpha():
            continue  # the end of a longer number, or a name such as B12
        last = (found, _is_negative(before))
    if last is None:
        return None
    found, negative = last
    number = _value(found)
    if number is None:
        return None
    scale = _SCALE.match(tail, found.end())
    number *= 1 if scale is None else _SCALES[scale[1].lower()]
    return -number if negative else number


def _is_negative(before: str) -> bool:
    """Whether a minus stands before a number, and not between two."""
    amount = before.rstrip()
    if amount and unicodedata.category(amount[-1]) == "Sc":
        before = amount[:-1]
    if not before.endswith("-"):
        return False
    before = before[:-1]
    last = before.rstrip()[-1:]
    return not (before[-1:].isalpha() or last.isdigit() or last in [")", "%"])


__all__ = ["MARKER", "find_answer", "number_text", "parse_number"]
