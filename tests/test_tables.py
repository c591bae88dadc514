"""Tables: Markdown in files, aligned columns that fit on a terminal."""

import pytest

from blockgen_hf.tables import Table, aligned, error_bar, number, terminal_width


TABLE = Table(
    ["decoding", "L'", "gen. PPL (a judge)", "tokens/s (min to max)"],
    [["`ar`", "–", "60.1 ± 9.1", "241"], ["`arpc:corrector=ar_kl:corrector_start=1`", "16", "8.2 ± 0", "9 (8 to 10)"]],
)


def test_markdown_aligns_numbers_on_the_right() -> None:
    assert TABLE.markdown().splitlines() == [
        "| decoding | L' | gen. PPL (a judge) | tokens/s (min to max) |",
        "|---|---:|---:|---:|",
        "| `ar` | – | 60.1 ± 9.1 | 241 |",
        "| `arpc:corrector=ar_kl:corrector_start=1` | 16 | 8.2 ± 0 | 9 (8 to 10) |",
    ]


def test_markdown_keeps_a_cell_in_its_column() -> None:
    assert Table(["a", "b"], [["x|y", "two\nlines"]]).markdown().splitlines()[-1] == r"| x\|y | two lines |"


def test_text_aligns_columns_and_wraps_headings() -> None:
    assert TABLE.text(60).splitlines() == [
        "                                                    tokens/s",
        "                                       gen. PPL      (min to",
        "decoding                         L'   (a judge)         max)",
        "ar                                –  60.1 ± 9.1          241",
        "arpc:corrector=ar_kl:corrector_  16     8.2 ± 0  9 (8 to 10)",
        "start=1",
    ]


@pytest.mark.parametrize("width", [40, 41, 47, 60, 79, 100, 200])
def test_text_fits_and_loses_nothing(width: int) -> None:
    names = [f"`arpc:{i}:block_size={16 * i}:temperature=0.5`" for i in (1, 5)]
    rows = [[name, *(f"{i * j:.2f}" for j in range(14))] for i, name in zip((10, 10**5), names, strict=True)]
    table = Table(["decoding", *(f"a figure number {i}" for i in range(14))], rows)
    text = table.text(width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        assert all(cell in text for cell in row[1:])
        if width >= 60:
            assert row[0][1:12] in text


def test_columns_that_do_not_fit_follow_with_the_labels_repeated() -> None:
    table = Table(["name", *"abcdef"], [["one", *("1" * 12 for _ in range(6))]])
    parts = table.text(48).split("\n\n")
    assert [part.split()[: part.split().index("one")] for part in parts] == [
        ["name", "a", "b", "c"],
        ["name", "d", "e", "f"],
    ]


def test_labels_are_not_cut_where_columns_go_to_another_part_anyway() -> None:
    table = Table(["decoding", *"abcdef"], [["block_diffusion:16", *("1" * 15 for _ in range(6))]])
    assert table.text(100).count("block_diffusion:16  ") == 2


def test_a_cell_too_long_goes_on_in_the_next_line() -> None:
    assert aligned(["one two", "5"], [4, 3]) == ["one     5", "two"]
    assert aligned(["one two", "5"], [4, 3], bottom=True) == ["one", "two     5"]
    assert aligned(["", ""], [2, 2]) == [""]


def test_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("72", 72), ("5", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_width() == width


def test_rounding_errors_are_zero() -> None:
    assert error_bar(2e-14, 4.0) == "± 0" and error_bar(0.0, 0.0) == "± 0"
    assert error_bar(None, 4.0) == "" and error_bar(0.123, 4.0) == "± 0.12" and error_bar(1.0, 4.0, ".2f") == "± 1.00"
    assert number(-1e-16, ".2f") == "0.00" and number(-0.5, ".1f") == "-0.5" and number(None, "d") == "–"
    assert number(100, "d") == "100" and number(0, "d") == "0"
