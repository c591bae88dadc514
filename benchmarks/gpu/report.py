"""Rows of results as lines of JSON, and the tables made of them."""

import json
from pathlib import Path
from typing import Any


Row = dict[str, Any]


def append_row(file: Path, row: Row) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[Row]:
    """All whole rows; none if there is no file. A process that was stopped may have left half a line."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A section for each part."""
    sections = []
    for part, each in found.items():
        lines = [f"## {part.capitalize()}", "", f"Exit status: {each['status']}. {each['seconds']} s.", ""]
        rows = each["rows"]
        if part == "correctness":
            lines += _outcomes(rows)
        lines += _table([row for row in rows if row.get("outcome") != "passed"])
        sections.append("\n".join(lines))
    return "# Results on one device\n\n" + "\n\n".join(sections) + "\n"


def _outcomes(rows: list[Row]) -> list[str]:
    outcomes = [row["outcome"] for row in rows]
    return [", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped")) + ".", ""]


def _table(rows: list[Row]) -> list[str]:
    """With every column that any row has, in the order in which they come up."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return ["Nothing to show."]
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return head + [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = str(value)
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(text.replace("|", "\\|").split())
