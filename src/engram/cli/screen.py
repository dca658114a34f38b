"""How the command line shows things: tables, JSON, counts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["JsonOption", "count", "make_table", "show", "show_json"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
"""``--json``, of every command that shows something."""


def make_table(*headers: str) -> Table:
    """Begin a table; a header that starts with ``>`` is right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(
            header.lstrip(">"), justify="right" if header.startswith(">") else "left", overflow="fold"
        )
    return table


def count(number: int, noun: str) -> str:
    """Say how many there are of something.

    Examples
    --------
    >>> count(1, "recording"), count(2000, "recording")
    ('1 recording', '2,000 recordings')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show(what: str | Table) -> None:
    """Print a line or a table."""
    if isinstance(what, str):
        typer.echo(what)
        return
    from rich.console import Console

    # A pipe has no width: a table that is folded at 80 columns is of no use to grep.
    Console(width=None if sys.stdout.isatty() else 10_000).print(what)


def show_json(value: Any) -> None:
    """Print plain values as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
