"""The commands on recordings and stores: list, prepare, inspect, verify, memory, generate."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.cli.app import app
from engram.cli.screen import JsonOption, count, make_table, show, show_json
from engram.errors import InputError
from engram.units import format_bytes, format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from engram.memory.limits import Limit
    from engram.preparation.ingest import Prepared, Progress
    from engram.recordings.recording import Refusal, Source
    from engram.store.reader import Store

__all__: list[str] = []

_Subjects = Annotated[
    str | None, typer.Option("--subjects", help="A number of subjects, or their ids: A,B,C.")
]
_Sessions = Annotated[str | None, typer.Option("--session", help="Sessions, without 'ses-': 1,2.")]
_Tasks = Annotated[str | None, typer.Option("--task", help="Tasks, without 'task-': a,b.")]
_Runs = Annotated[str | None, typer.Option("--run", help="Runs, without 'run-': 1,2.")]
_Releases = Annotated[str | None, typer.Option("--release", help="Releases: R1,R2.")]
_Mini = Annotated[bool, typer.Option("--mini", help="Only the first 20 subjects of every release.")]


@app.command("list", short_help="List the recordings of a folder.")
def list_command(
    root: Annotated[Path, typer.Argument(help="BIDS folder, or recordings.")],
    subjects: _Subjects = None,
    session: _Sessions = None,
    task: _Tasks = None,
    run: _Runs = None,
    release: _Releases = None,
    *,
    mini: _Mini = False,
    as_json: JsonOption = False,
) -> None:
    """List the recordings of a folder without opening one."""
    source = _source(
        root, subjects=subjects, sessions=session, tasks=task, runs=run, releases=release, mini=mini
    )
    entries, refusals = source.entries(), source.refusals()
    if as_json:
        rows = [{"id": e.id, "size_bytes": e.size_bytes, **e.fields} for e in entries]
        show_json({"recordings": rows, "refusals": _refusal_rows(refusals)})
        return
    table = make_table("recording", "subject", "release", ">size")
    for entry in entries:
        fields = (str(entry.fields.get(name, "")) for name in ("subject", "release"))
        table.add_row(entry.id, *fields, format_bytes(entry.size_bytes))
    show(table)
    size = sum(entry.size_bytes for entry in entries)
    subjects_found = {entry.fields["subject"] for entry in entries if "subject" in entry.fields}
    of_subjects = f" of {count(len(subjects_found), 'subject')}" if subjects_found else ""
    show(f"{count(len(entries), 'recording')}{of_subjects}, {format_bytes(size)}")
    _print_refusals(refusals)


@app.command("prepare", short_help="Prepare recordings into a store.")
def prepare_command(
    root: Annotated[Path, typer.Argument(help="BIDS folder, or recordings.")],
    store: Annotated[Path, typer.Argument(help="Folder of the store: made, or added to.")],
    subjects: _Subjects = None,
    session: _Sessions = None,
    task: _Tasks = None,
    run: _Runs = None,
    release: _Releases = None,
    *,
    mini: _Mini = False,
    pick: Annotated[str | None, typer.Option(help="Keep these channels: Fz,Cz.")] = None,
    drop_flat: Annotated[
        bool, typer.Option("--drop-flat", help="Leave out channels that never change.")
    ] = False,
    notch: Annotated[str | None, typer.Option(help="Take out these frequencies in Hz: 50,100.")] = None,
    high_pass: Annotated[float | None, typer.Option(help="High-pass at this frequency in Hz.")] = None,
    low_pass: Annotated[float | None, typer.Option(help="Low-pass at this frequency in Hz.")] = None,
    reference: Annotated[str | None, typer.Option(help="'average', or channels: M1,M2.")] = None,
    resample: Annotated[float | None, typer.Option(help="Resample to this rate in Hz.")] = None,
    precision: Annotated[
        str, typer.Option(help="default, float32, float16, bfloat16, int16 or exact.")
    ] = "default",
    memory: Annotated[str | None, typer.Option(help="Memory budget, such as '700 MB'.")] = None,
    jobs: Annotated[int, typer.Option(help="Jobs at once.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Prepare recordings into a store; again, only what is new or changed."""
    from engram.preparation.ingest import prepare

    source = _source(
        root, subjects=subjects, sessions=session, tasks=task, runs=run, releases=release, mini=mini
    )
    steps = _steps(
        pick=pick,
        notch=notch,
        high_pass=high_pass,
        low_pass=low_pass,
        reference=reference,
        resample=resample,
        drop_flat=drop_flat,
    )
    with _progress_bar(show=not as_json and sys.stderr.isatty()) as progress:
        prepared = prepare(
            source, store, steps=steps, precision=precision, memory=memory, n_jobs=jobs, progress=progress
        )
    if as_json:
        show_json(_prepared_json(prepared))
    else:
        _print_prepared(prepared)


def _source(
    root: Path,
    *,
    subjects: str | None,
    sessions: str | None,
    tasks: str | None,
    runs: str | None,
    releases: str | None,
    mini: bool,
) -> Source:
    from engram.recordings import as_source

    filters: dict[str, Any] = {
        "subjects": _subjects(subjects),
        "sessions": _values(sessions),
        "tasks": _values(tasks),
        "runs": _values(runs),
        "releases": _values(releases),
    }
    chosen = {name: value for name, value in filters.items() if value is not None}
    return as_source(root, **chosen, **({"mini": True} if mini else {}))


def _subjects(text: str | None) -> int | list[str] | None:
    """Read ``--subjects``: a plain number counts subjects, anything else names them."""
    if text is not None and text.isdigit() and str(int(text)) == text:
        return int(text)
    values = _values(text)
    return values and [value.removeprefix("sub-") for value in values]


def _values(text: str | None) -> list[str] | None:
    if text is None:
        return None
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise InputError(f"{text!r} has an empty value. Write values with commas between them: A,B.")
    return values


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in _values(text) or ())
    except ValueError as error:
        raise InputError(
            f"{text!r} are not all numbers. Write them with commas between them: 50,100."
        ) from error


def _steps(
    *,
    pick: str | None,
    notch: str | None,
    high_pass: float | None,
    low_pass: float | None,
    reference: str | None,
    resample: float | None,
    drop_flat: bool,
) -> list[Any]:
    """Put the steps in the order in which they are usually run."""
    from engram.preparation import steps

    chosen: list[Any] = []
    if pick is not None:
        chosen.append(steps.PickChannels(tuple(_values(pick) or ())))
    if drop_flat:
        chosen.append(steps.DropFlat())
    if notch is not None:
        chosen.append(steps.Notch(_numbers(notch)))
    if high_pass is not None and low_pass is not None:
        chosen.append(steps.BandPass(high_pass, low_pass))
    elif high_pass is not None:
        chosen.append(steps.HighPass(high_pass))
    elif low_pass is not None:
        chosen.append(steps.LowPass(low_pass))
    if reference is not None:
        names = _values(reference) or []
        chosen.append(steps.Rereference("average" if names == ["average"] else tuple(names)))
    if resample is not None:
        chosen.append(steps.Resample(resample))
    return chosen


@contextmanager
def _progress_bar(*, show: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show recordings, GB, memory and time left, on a terminal only."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("preparing", total=1, text="")

        def show_progress(progress: Progress) -> None:
            bar.update(
                line, completed=progress.done_bytes, total=progress.total_bytes, text=_progress_text(progress)
            )

        yield show_progress


def _progress_text(progress: Progress) -> str:
    left = ""
    if 0 < progress.done_bytes < progress.total_bytes:
        seconds = progress.elapsed_s * (progress.total_bytes / progress.done_bytes - 1)
        left = f", {format_duration(seconds)} left"
    used = format_bytes(progress.usage.unreclaimable_bytes)
    sizes = f"{progress.done_bytes / 1e9:.2f}/{progress.total_bytes / 1e9:.2f} GB"
    return f"{progress.n_done}/{progress.n_total} recordings, {sizes}, memory {used}{left}"


def _print_prepared(prepared: Prepared) -> None:
    store = prepared.store
    table = make_table("what", ">value")
    size = sum(stamp.size_bytes for stamp in store.manifest.files.values())
    rows = [
        ("recordings prepared", f"{prepared.n_prepared:,}"),
        ("unchanged, not done again", f"{prepared.n_unchanged:,}"),
        ("refused", f"{len(prepared.refusals):,}"),
        ("store", f"{count(store.recordings.num_rows, 'recording')}, {format_bytes(size)}"),
        ("memory at its peak", format_bytes(prepared.peak.unreclaimable_bytes)),
        ("memory allowed", format_bytes(prepared.budget.allowed_bytes)),
        ("time", format_duration(prepared.duration_s)),
    ]
    for row in rows:
        table.add_row(*row)
    show(table)
    for recording, reason in sorted(prepared.changed.items())[:10]:
        show(f"prepared again: {recording}: {reason}")
    if len(prepared.changed) > 10:
        show(f"... and {len(prepared.changed) - 10} more")
    _print_refusals(prepared.refusals)


def _prepared_json(prepared: Prepared) -> dict[str, Any]:
    stages = [
        {"name": s.name, "duration_s": round(s.duration_s, 3), "used_bytes": s.usage.unreclaimable_bytes}
        for s in prepared.stages
    ]
    return {
        "n_prepared": prepared.n_prepared,
        "n_unchanged": prepared.n_unchanged,
        "changed": dict(prepared.changed),
        "refusals": _refusal_rows(prepared.refusals),
        "peak_bytes": prepared.peak.unreclaimable_bytes,
        "allowed_bytes": prepared.budget.allowed_bytes,
        "stages": stages,
    }


@app.command("inspect", short_help="Show what a store holds.")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="Folder of the store.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Show what a store holds, how it was made, and what storing cost."""
    from engram.store.reader import Store

    store = Store(path)
    signals = _signal_rows(store)
    if as_json:
        calls = [asdict(call) for call in store.manifest.calls]
        names = {"events": _event_counts(store), "fields": _field_counts(store)}
        show_json({"recordings": store.recordings.num_rows, "signals": signals, **names, "calls": calls})
        return
    table = make_table("signal", ">recordings", ">rate", "sample", "stored as", ">duration", ">size")
    for row in signals:
        rate = f"{row['rate_hz']:g} Hz"
        duration, size = format_duration(row["duration_s"]), format_bytes(row["n_bytes"])
        table.add_row(
            row["signal"],
            str(row["n_recordings"]),
            rate,
            row["sample_shape"],
            row["precision"],
            duration,
            size,
        )
    show(table)
    n_all = store.recordings.num_rows
    show(_names_line("events", [f"{name} ({n:,})" for name, n in _event_counts(store).items()]))
    fields = _field_counts(store).items()
    show(
        _names_line("fields", [name if n == n_all else f"{name} ({n:,} of {n_all:,})" for name, n in fields])
    )
    _print_calls(store)


def _names_line(what: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - _MOST_NAMES:,} more: --json" if len(names) > _MOST_NAMES else ""
    return f"{what}: {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"


_MOST_NAMES = 40
"""Names of events, or of fields, that ``inspect`` shows; a corpus may have thousands."""


def _event_counts(store: Store) -> dict[str, int]:
    """Count events by their description, the commonest first: what an anchor may name."""
    column = store.table("events", ["recording", "description"])["description"]
    counted = {row["values"]: row["counts"] for row in column.value_counts().to_pylist()}
    return dict(sorted(counted.items(), key=lambda each: (-each[1], each[0])))


def _field_counts(store: Store) -> dict[str, int]:
    """Count the recordings that have each descriptive field: what may be split by, or predicted."""
    from engram.store.tables import SCHEMAS

    recordings = store.recordings
    names = sorted(set(recordings.column_names) - set(SCHEMAS["recordings"].names))
    return {name: len(recordings) - recordings[name].null_count for name in names}


def _signal_rows(store: Store) -> list[dict[str, Any]]:
    """Sum up the extents of equal signal, rate, sample shape and precision."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in sorted(set(store.signals["signal"].to_pylist())):
        for extent in store.extents(name):
            grid = extent.part.grid
            shape = " x ".join(map(str, grid.sample_shape)) or "scalar"
            key = {
                "signal": name,
                "rate_hz": extent.rate_hz,
                "sample_shape": shape,
                "precision": extent.precision,
            }
            row = rows.setdefault(
                tuple(key.values()), {**key, "n_recordings": 0, "duration_s": 0.0, "n_bytes": 0}
            )
            row["n_recordings"] += 1
            row["duration_s"] += extent.n_samples / extent.rate_hz
            row["n_bytes"] += extent.n_samples * grid.sample_bytes
    return list(rows.values())


def _print_calls(store: Store) -> None:
    for call in store.manifest.calls:
        show(f"\ncall {call.number}: {count(call.n_recordings, 'recording')}, {call.n_refused} refused")
        for signal, steps in call.steps.items():
            show(f"  {signal}: {' > '.join(_step_text(step) for step in steps) or 'as it is'}")
        for signal, worst in call.errors.items():
            figures = f"{worst['min_snr_db']:.1f} dB, off by {worst['max_error']:.3g} {worst['unit']} at most"
            show(f"  {signal}, worst channel: {figures} ({worst['recording']}, {worst['channel']})")
    refusals = store.table("refusals").to_pylist()
    counts: dict[str, int] = {}
    for row in refusals:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    for reason, n in sorted(counts.items()):
        show(f"refused for {reason}: {n}")


def _step_text(step: dict[str, Any]) -> str:
    settings = ", ".join(
        f"{key}={value}" for key, value in step.items() if key != "step" and value not in ([], None)
    )
    return f"{step['step']}({settings})"


@app.command("verify", short_help="Compare a store with its checksums.")
def verify_command(
    path: Annotated[Path, typer.Argument(help="Folder of the store.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Compare every file of a store with its checksum; locate what is damaged."""
    from engram.store.verify import verify

    found = verify(path)
    if as_json:
        damages = [
            {"path": d.path, "kind": d.kind, "where": d.where, "recordings": d.recordings}
            for d in found.damages
        ]
        show_json({"is_sound": found.is_sound, "n_files": found.n_files, "n_bytes": found.n_bytes,
                     "damages": damages, "unlisted": found.unlisted})  # fmt: skip
    else:
        for damage in found.damages:
            show(f"damaged: {damage.path} ({damage.kind}): {damage.where}")
        for name in found.unlisted:
            show(f"not part of the store: {name}")
        verdict = "sound" if found.is_sound else f"{count(len(found.damages), 'file')} damaged"
        show(f"{count(found.n_files, 'file')}, {format_bytes(found.n_bytes)}: {verdict}")
    if not found.is_sound:
        raise typer.Exit(1)


@app.command("memory", short_help="Show the limits of memory and disk.")
def memory_command(*, as_json: JsonOption = False) -> None:
    """Show the limits of memory and disk here, and which of memory binds."""
    from engram.memory.limits import binding_limit, disk_limit, memory_limits, shm_limit

    binding = binding_limit()
    limits = [*memory_limits(), *filter(None, [shm_limit()]), disk_limit(Path.cwd())]
    if as_json:
        rows = [
            {"kind": each.kind, "where": str(each.where), "allowed_bytes": each.allowed_bytes,
             "used_bytes": each.used_bytes, "binds": _is_same(each, binding)}
            for each in limits
        ]  # fmt: skip
        show_json({"limits": rows})
        return
    table = make_table("limit", ">allowed", ">used", ">free", "", "where")
    for each in limits:
        sizes = (format_bytes(n) for n in (each.allowed_bytes, each.used_bytes, each.free_bytes))
        table.add_row(each.kind, *sizes, "binds" if _is_same(each, binding) else "", str(each.where))
    show(table)


def _is_same(limit: Limit, other: Limit) -> bool:
    """Tell limits apart by what they are; what is used of them was read at two moments."""
    return (limit.kind, limit.where) == (other.kind, other.where)


@app.command("generate", short_help="Write an EEG corpus to try Engram on.")
def generate_command(
    folder: Annotated[Path, typer.Argument(help="Folder to write the corpus into.")],
    subjects: Annotated[int, typer.Option(help="Subjects per release.")] = 4,
    releases: Annotated[str, typer.Option(help="Releases: R1,R2.")] = "R1,R2",
    effect: Annotated[float, typer.Option(help="Size of the planted effects; 0 plants none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same bytes.")] = 0,
    faults: Annotated[bool, typer.Option(help="Plant the faults that real recordings have.")] = True,
    jobs: Annotated[int, typer.Option(help="Jobs at once.")] = 1,
) -> None:
    """Write an EEG corpus in the layout of HBN-EEG, to try Engram on."""
    from engram.testing.hbn import QUIRKS, HbnCorpus, write_hbn

    corpus = HbnCorpus(
        n_subjects=subjects,
        releases=tuple(_values(releases) or ()),
        effect_size=effect,
        seed=seed,
        quirks=QUIRKS if faults else frozenset(),
    )
    summary = write_hbn(folder, corpus, n_jobs=jobs)
    show(f"{summary.n_recordings} recordings, {format_bytes(summary.n_bytes)}, in {folder}")
    for name in sorted({quirk.name for quirk in summary.quirks}):
        paths = [quirk.path for quirk in summary.quirks if quirk.name == name]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        show(f"planted fault {name}: {paths[0]}{more}")


def _refusal_rows(refusals: Sequence[Refusal]) -> list[dict[str, str]]:
    return [{"id": r.id, "reason": r.reason, "detail": r.detail} for r in refusals]


def _print_refusals(refusals: Sequence[Refusal]) -> None:
    for refusal in refusals:
        show(f"refused: {refusal.id} ({refusal.reason}): {refusal.detail}")
