"""The commands on recordings and stores: list, prepare, inspect, verify, memory, generate."""

from __future__ import annotations

import sys
from collections import Counter
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
    from engram.preparation.releases import PreparedRelease
    from engram.recordings.recording import Refusal
    from engram.store.reader import Store

__all__ = ["comma_separated"]

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
    root: Annotated[str, typer.Argument(help="BIDS folder, or recordings.")],
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
    from engram.recordings import as_source

    filters = _filters(subjects=subjects, sessions=session, tasks=task, runs=run, releases=release, mini=mini)
    source = as_source(root, **filters)
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
    root: Annotated[str, typer.Argument(help="BIDS folder or its URL, or recordings.")],
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
    fetch_to: Annotated[
        Path | None, typer.Option(help="Folder for files of a URL; without it, STORE.fetched.")
    ] = None,
    delete_raw: Annotated[
        bool, typer.Option("--delete-raw", help="Delete what was fetched of a release when it is prepared.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prepare recordings into a store; again, only what is new or changed."""
    from engram.recordings.remote import is_url

    filters = _filters(subjects=subjects, sessions=session, tasks=task, runs=run, releases=release, mini=mini)
    steps = _steps(
        pick=pick,
        notch=notch,
        high_pass=high_pass,
        low_pass=low_pass,
        reference=reference,
        resample=resample,
        drop_flat=drop_flat,
    )
    options: dict[str, Any] = {"steps": steps, "precision": precision, "memory": memory, "n_jobs": jobs}
    if is_url(root):
        options |= {"fetch_to": fetch_to, "delete_raw": delete_raw}
        _prepare_releases(root, store, as_json=as_json, **filters, **options)
    elif fetch_to or delete_raw:
        raise InputError(
            f"Nothing is fetched from {root}, which is no URL, and nothing deleted. "
            "Leave out --fetch-to and --delete-raw."
        )
    else:
        _prepare(root, store, filters, options, as_json=as_json)


def _prepare(
    root: str, store: Path, filters: dict[str, Any], options: dict[str, Any], *, as_json: bool
) -> None:
    from engram.preparation.ingest import prepare
    from engram.recordings import as_source

    source = as_source(Path(root), **filters)
    with _progress_bar(show=not as_json and sys.stderr.isatty()) as (progress, _):
        prepared = prepare(source, store, progress=progress, **options)
    if as_json:
        show_json(_prepared_json(prepared))
    else:
        _print_prepared(prepared)


def _prepare_releases(url: str, store: Path, *, as_json: bool, **options: Any) -> None:
    """Show each release when it is done, and a total."""
    from engram.preparation.releases import prepare_releases

    done: list[PreparedRelease] = []
    with _progress_bar(show=not as_json and sys.stderr.isatty()) as (progress, fetching):
        for release in prepare_releases(url, store, progress=progress, fetch_progress=fetching, **options):
            done.append(release)
            if not as_json:
                show(_release_line(release))
                _print_refusals(release.refusals)
    refused = Counter(refusal.reason for release in done for refusal in release.refusals)
    n_recordings = sum(release.n_recordings for release in done)
    fetched_bytes = sum(release.fetched_bytes for release in done)
    if as_json:
        figures = {"n_recordings": n_recordings, "fetched_bytes": fetched_bytes, "refused": dict(refused)}
        show_json({"releases": [_release_json(release) for release in done], **figures})
        return
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(refused.items()))
    show(
        f"{count(len(done), 'release')}: {format_bytes(fetched_bytes)} fetched, "
        f"{count(n_recordings, 'recording')} in {store}, {refused.total():,} refused"
        f"{f' ({reasons})' if reasons else ''}"
    )


def _release_line(release: PreparedRelease) -> str:
    fetched = f"{count(release.n_files, 'file')} ({format_bytes(release.fetched_bytes)}) fetched"
    n_prepared = release.prepared.n_prepared if release.prepared else 0
    recordings = f"{count(release.n_recordings, 'recording')} in the store, {n_prepared:,} of them new"
    deleted = f", {format_bytes(release.deleted_bytes)} deleted" if release.deleted_bytes else ""
    return f"{release.name}: {fetched}, {recordings}, {len(release.refusals):,} refused{deleted}"


def _release_json(release: PreparedRelease) -> dict[str, Any]:
    prepared = release.prepared and _prepared_json(release.prepared)
    return {
        "name": release.name,
        "n_files": release.n_files,
        "fetched_bytes": release.fetched_bytes,
        "deleted_bytes": release.deleted_bytes,
        "n_recordings": release.n_recordings,
        "refusals": _refusal_rows(release.refusals),
        "prepared": prepared,
    }


def _filters(
    *,
    subjects: str | None,
    sessions: str | None,
    tasks: str | None,
    runs: str | None,
    releases: str | None,
    mini: bool,
) -> dict[str, Any]:
    """Read the options that choose recordings; those that were not given are left out."""
    filters: dict[str, Any] = {
        "subjects": _subjects(subjects),
        "sessions": comma_separated(sessions),
        "tasks": comma_separated(tasks),
        "runs": comma_separated(runs),
        "releases": comma_separated(releases),
    }
    chosen = {name: value for name, value in filters.items() if value is not None}
    return {**chosen, "mini": True} if mini else chosen


def _subjects(text: str | None) -> int | list[str] | None:
    """Read ``--subjects``: a plain number counts subjects, anything else names them."""
    if text is not None and text.isdigit() and str(int(text)) == text:
        return int(text)
    values = comma_separated(text)
    return values and [value.removeprefix("sub-") for value in values]


def comma_separated(text: str | None) -> list[str] | None:
    """Read the values of an option: A,B; None where it was not given."""
    if text is None:
        return None
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise InputError(f"{text!r} has an empty value. Write values with commas between them: A,B.")
    return values


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in comma_separated(text) or ())
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
        chosen.append(steps.PickChannels(tuple(comma_separated(pick) or ())))
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
        names = comma_separated(reference) or []
        chosen.append(steps.Rereference("average" if names == ["average"] else tuple(names)))
    if resample is not None:
        chosen.append(steps.Resample(resample))
    return chosen


@contextmanager
def _progress_bar(
    *, show: bool
) -> Iterator[tuple[Callable[[Progress], None] | None, Callable[[int, int], None] | None]]:
    """Show recordings, GB, memory and time left, and what is fetched before, on a terminal only."""
    if not show:
        yield None, None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("preparing", total=1, text="")

        def show_progress(progress: Progress) -> None:
            update("preparing", progress.done_bytes, progress.total_bytes, _progress_text(progress))

        def show_fetched(done_bytes: int, all_bytes: int) -> None:
            sizes = f"{done_bytes / 1e9:.2f}/{all_bytes / 1e9:.2f} GB"
            update("fetching", done_bytes, all_bytes, sizes)

        def update(what: str, done_bytes: int, all_bytes: int, text: str) -> None:
            bar.update(line, description=what, completed=done_bytes, total=all_bytes, text=text)

        yield show_progress, show_fetched


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
        releases=tuple(comma_separated(releases) or ()),
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
