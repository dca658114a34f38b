"""The command that measures how fast windows come: bench."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.app import app
from engram.cli.screen import JsonOption, count, make_table, show, show_json
from engram.errors import MissingExtra
from engram.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engram.batches.speed import Speed, SpeedReport
    from engram.batches.windows import Windows

__all__: list[str] = []


@app.command("bench", short_help="Measure how fast windows come, and what limits them.")
def bench_command(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store; nothing is written.")],
    signal: Annotated[str | None, typer.Option(help="Signal to read; else the one of most bytes.")] = None,
    window_s: Annotated[float, typer.Option(help="Length of the windows in seconds.")] = 2.0,
    batch_size: Annotated[int, typer.Option(help="Windows in a batch.")] = 64,
    seconds: Annotated[float, typer.Option(help="How long to measure each of three things.")] = 5.0,
    memory: Annotated[str | None, typer.Option(help="What the loader may hold, such as '500 MB'.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast windows come from memory and from the disk, and what limits them here."""
    try:
        from engram.batches.speed import choose_windows, measure_speed
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtra("torch", "torch") from error
    from engram.store.reader import Store

    with Store(path) as store:
        windows = choose_windows(store, signal, window_s)
        progress = _show_round if sys.stderr.isatty() else None
        report = measure_speed(
            windows, batch_size=batch_size, seconds=seconds, memory=memory, progress=progress
        )
    notes = list(_notes(windows, report, window_s, batch_size))
    if as_json:
        show_json(_to_json(windows, report, notes))
    else:
        _show_report(windows, report, notes)


def _show_round(n_done: int, n_rounds: int) -> None:
    text = f"\r{n_done} of {n_rounds} rounds" if n_done < n_rounds else "\r\033[K"
    typer.echo(text, nl=False, err=True)


def _show_report(windows: Windows, report: SpeedReport, notes: Sequence[str]) -> None:
    spec, window_bytes = windows.index.spec, round(report.stored_bytes_per_window)
    show(
        f"{spec.signal}: {count(len(windows), 'window')} of {_length(windows)}, "
        f"{format_bytes(window_bytes)} each in the store; shuffled, batches of {report.batch_size}"
    )
    table = make_table("windows", ">windows/s", ">GB/s", ">GB/s from disk", "of what is possible", ">cores")
    share = f"{report.fraction_of_memcpy:.0%} of copying in memory, {report.memcpy_gb_per_s:.1f} GB/s"
    table.add_row("from memory", *_row(report.warm, share, report.n_cores))
    if report.capped is not None:
        name, share = "files forgotten", "not known"
        if report.fraction_of_medium is not None:
            share = f"{report.fraction_of_medium:.0%} of random reads, {report.medium_gb_per_s:.2f} GB/s"
            name = "from the disk"
        table.add_row(name, *_row(report.capped, share, report.n_cores))
    show(table)
    data, room = format_bytes(report.data_bytes), format_bytes(report.cache_bytes)
    show(f"limit: {report.limit} (the windows are {data}, memory has room for {room})")
    show(report.advice)
    show(_read_ahead_line(report.read_ahead_kb))
    for note in notes:
        show(note)


def _length(windows: Windows) -> str:
    spec = windows.index.spec
    return "1 sample" if spec.window_size_s is None else f"{spec.window_size_s:g} s"


def _row(speed: Speed, share: str, n_cores: int) -> tuple[str, ...]:
    from_disk = "not known" if speed.disk_gb_per_s is None else f"{speed.disk_gb_per_s:.2f}"
    cores = f"{speed.n_cores:.1f} of {n_cores}"
    return f"{speed.windows_per_s:,.0f}", f"{speed.gb_per_s:.2f}", from_disk, share, cores


def _read_ahead_line(read_ahead_kb: int | None) -> str:
    if read_ahead_kb is None:
        return "read-ahead of the disk: not known here"
    return (
        f"read-ahead of the disk: {read_ahead_kb:,} KiB. Engram turns it off for its own reads; "
        "loaders that map files may read so much for every window."
    )


def _notes(windows: Windows, report: SpeedReport, window_s: float, batch_size: int) -> Iterator[str]:
    """Say what is not as it was asked for, or makes a figure rough."""
    size_s = windows.index.spec.window_size_s
    if size_s is None:
        yield f"Windows are of one sample: samples are more than {window_s:g} s apart."
    elif size_s < window_s:
        yield f"Windows are of {size_s:g} s, not {window_s:g} s: half of the recordings are shorter."
    left_out = {reason: n for reason, n in windows.counts().items() if reason != "no signal"}
    if left_out:
        yield f"Left out: {', '.join(f'{n:,} {reason}' for reason, n in left_out.items())}."
    if report.batch_size < batch_size:
        yield f"Batches are of {report.batch_size}, not {batch_size}: more do not fit into memory."
    if report.memcpy_bytes < 256 << 20:
        yield f"Copying was measured with arrays of {format_bytes(report.memcpy_bytes)}: memory is short."
    if (report.warm.disk_bytes_per_window or 0) > 0.05 * report.stored_bytes_per_window:
        yield "Memory did not hold its windows: some came from the disk, and its figure is too low."
    yield from _notes_on_disk(report)


def _notes_on_disk(report: SpeedReport) -> Iterator[str]:
    if report.capped is None:
        yield "This system cannot be asked to forget files: the disk was not measured."
    elif not report.is_from_medium:
        yield (
            "The disk was not measured: when the kernel was asked to forget the files, windows still came "
            "from memory, or from a file system whose bytes it does not count."
        )
    elif report.is_direct:
        yield "Windows from the disk came past the page cache, which has room for less than a quarter of all."
    if report.is_medium_direct is False:
        yield "This file system has no direct reads: random reads are plain ones, of forgotten files."


def _to_json(windows: Windows, report: SpeedReport, notes: Sequence[str]) -> dict[str, Any]:
    from engram.batches.speed import Speed

    capped = dict.fromkeys(field.name for field in fields(Speed))
    how = "not measured"
    if report.capped is not None:
        capped, how = asdict(report.capped), "evicted"
    return {
        "signal": windows.index.spec.signal,
        "window_s": windows.index.spec.window_size_s,
        "left_out": windows.counts(),
        **asdict(report),
        "warm": {**asdict(report.warm), "fraction_of_memcpy": report.fraction_of_memcpy},
        "capped": {**capped, "fraction_of_medium": report.fraction_of_medium, "how": how},
        "limit": report.limit,
        "advice": report.advice,
        "notes": notes,
    }
