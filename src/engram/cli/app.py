"""The program: its options, its log, and its exit codes.

Exit codes: 0 done; 1 a store is damaged; 2 the input has to be changed; 3 something does
not fit, the disk refuses or a worker was killed; 4 the store is being built or is missing;
77 a training stopped itself for want of memory and can be resumed; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from engram import __version__
from engram.errors import (
    DoesNotFit,
    EngramError,
    MemoryExceeded,
    StoreDamaged,
    StoreLocked,
    StoreMissing,
    StoreNotWritable,
    WorkerLost,
)

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train models on brain recordings that do not fit in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # loading rich for --help alone would double its time
)


@app.callback(invoke_without_command=True)
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log every stage with its memory.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"engram {__version__}")
        raise typer.Exit
    handler = logging.StreamHandler()
    handler.addFilter(_once)
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[handler], force=True)


_told: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """Tell a warning once, though its file is opened twice: to plan, and to read."""
    text = record.getMessage()
    is_new = record.levelno < logging.WARNING or text not in _told
    _told.add(text)
    return is_new


_INTERRUPTED = 130
"""What shells give for Ctrl-C, and typer too."""

_EXIT_CODES: tuple[tuple[type[EngramError], int], ...] = (
    (StoreDamaged, 1),
    (DoesNotFit, 3),
    (MemoryExceeded, 3),
    (WorkerLost, 3),
    (StoreNotWritable, 3),
    (StoreLocked, 4),
    (StoreMissing, 4),
    (EngramError, 2),
)


def main() -> None:
    """Run the command line; an error of ours is one line on stderr and an exit code."""
    try:
        app()
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            typer.echo(
                "engram: interrupted. Run the same again: what is finished is not done again.", err=True
            )
        raise
    except EngramError as error:
        typer.echo(f"engram: {error}", err=True)
        code = next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
        raise SystemExit(code) from error
