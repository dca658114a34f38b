"""The reference lists every field of a recipe and of a ledger, with its type and its default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from engram.ledger import EpochLine, Ledger, MemoryLine, Score, SideLine
from engram.training.recipe import ModelTable, Recipe, TargetTable, WindowsTable
from engram.training.settings import FitSettings, Framing
from engram.windows import (
    EventColumn,
    EventWindows,
    FixedWindows,
    RecordingColumn,
    Side,
    Span,
    Split,
    TimeTo,
)

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"

TABLES = {
    "A recipe": Recipe,
    "`[windows]`": WindowsTable,
    "`[windows.fixed]`": FixedWindows,
    "`[windows.events]`": EventWindows,
    "`[[windows.fixed.beside]]`": Span,
    "`[target]`": TargetTable,
    "`[target.recording]`": RecordingColumn,
    "`[target.event]`": EventColumn,
    "`[target.time_to]`": TimeTo,
    "`[split]`": Split,
    "`[split.test]`": Side,
    "`[model]`": ModelTable,
    "`[model.framing]`": Framing,
    "`[training]`": FitSettings,
}
"""Heading on the page -> what the table below it describes."""

LINES = {
    "ledger.json": Ledger,
    "`epochs`": EpochLine,
    "`memory`": MemoryLine,
    "`sides`": SideLine,
    "`scores`": Score,
}

_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "table",
}


@pytest.mark.parametrize("heading", TABLES)
def test_the_recipe_page_tells_every_field(heading: str) -> None:
    """Name, type and default of each field, in the order of the code; a default is spelled as in TOML."""
    assert list(rows("recipe.md", heading)) == list(fields(TABLES[heading]))


@pytest.mark.parametrize("heading", LINES)
def test_the_ledger_page_tells_every_field(heading: str) -> None:
    """Name and type of each field, in the order of the code."""
    told = [(name, kind) for name, kind, _ in fields(LINES[heading])]
    extra = [("version", "whole number")] if heading == "ledger.json" else []
    assert [row[:2] for row in rows("ledger.md", heading)] == extra + told


def rows(page: str, heading: str) -> Iterator[tuple[str, ...]]:
    """Yield all cells but the last, the meaning, of each row of the table below a heading."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    section = re.split(r"\n#+ ", text.partition(f"# {heading}\n")[2])[0]
    for line in re.findall(r"^\| `.*", section, re.MULTILINE):
        name, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        yield (name.strip("`"), *cells[:-1])


def fields(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and default of each field, as the page spells them."""
    schema = TypeAdapter(kind).json_schema()
    for name, told in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else spelled(told.get("default"))
        yield name, words(told), default


def words(told: Mapping[str, Any]) -> str:
    """Name the type of a field in a JSON schema."""
    if "anyOf" in told:
        return " or ".join(words(choice) for choice in told["anyOf"] if choice.get("type") != "null")
    if "enum" in told or "const" in told:
        return ", ".join(f'`"{value}"`' for value in told.get("enum") or [told["const"]])
    if told.get("type") == "array":
        items = words(told["items"])
        return f"list of {items}" if items != "table" else "list of tables"
    return _KINDS[told.get("type", "object")]


def spelled(default: Any) -> str:
    """Spell a default; fields without one may be left out, and tables have defaults of their own."""
    return "-" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"
