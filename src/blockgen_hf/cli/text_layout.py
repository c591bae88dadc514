"""Text on a terminal: what may be printed, how wide it is, and where its lines break."""

import unicodedata


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(
        sign if sign == "\n" or unicodedata.category(sign) != "Cc" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def wrap(text: str, width: int) -> list[tuple[int, int]]:
    """
    Rows of at most `width` terminal columns as (start, end) in the text, broken at its line ends and at spaces, inside
    of a word only where it is longer than a row.
    """
    rows = []
    start, column, space = 0, 0, -1  # of the row: its first index, its columns so far, its last space
    for i, sign in enumerate(text):
        if sign == "\n":
            rows.append((start, i))
            start, column, space = i + 1, 0, -1
            continue
        if column + _columns(sign) > width and sign == " ":
            rows.append((start, i))
            start, column, space = i + 1, 0, -1
            continue
        if column + _columns(sign) > width:
            end = space if space > start else i
            rows.append((start, end))
            start = end + 1 if end == space else end
            column, space = sum(map(_columns, text[start:i])), -1
        if sign == " ":
            space = i
        column += _columns(sign)
    return [*rows, (start, len(text))]


def _columns(sign: str) -> int:
    if unicodedata.combining(sign):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1
