"""The commands on trainings: train, evaluate, predict, report, demo."""

from __future__ import annotations

import sys
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.atomic import replacing
from engram.cli.app import app
from engram.cli.screen import JsonOption, count, make_table, show, show_json
from engram.cli.stores import comma_separated
from engram.errors import DoesNotFit, InputError, MemoryExceeded
from engram.units import format_bytes, format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engram.ledger import Ledger, Score
    from engram.tasks.entry import EntryScore
    from engram.training.fit import Progress

__all__: list[str] = []

_OUT_OF_MEMORY = 77
"""Exit code of a training that has too little memory: with more, the same command goes on."""

_Folder = Annotated[Path, typer.Argument(help="Folder of a training.")]
_Memory = Annotated[str | None, typer.Option(help="Memory to keep within: '2 GB'.")]


class _Recipes(StrEnum):
    """Recipes to begin with."""

    DEMO = "demo"
    CHALLENGE_1 = "challenge1"
    CHALLENGE_2 = "challenge2"


@app.command("recipe", short_help="Write a recipe to begin with.")
def recipe_command(
    name: Annotated[_Recipes, typer.Argument(help="Which.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; without, it is shown.")
    ] = None,
) -> None:
    """Write a recipe to begin with: of the demo, or of a challenge of the EEG Foundation Challenge 2025."""
    from importlib.resources import files

    room = "engram.training" if name is _Recipes.DEMO else "engram.tasks"
    text = files(room).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    if out is None:
        show(text.rstrip())
        return
    if out.exists():
        raise InputError(
            f"{out} is there already, and you may have changed it. Remove it, or name another file."
        )
    if not out.parent.is_dir():
        raise InputError(f"There is no folder {out.parent}. Make it, or name another file.")
    from engram.store.writer import disk_errors

    with disk_errors(out.parent), replacing(out) as file:
        file.write(text.encode())
    show(f"Wrote {out}. Change its store, or anything else, and run engram train {out} FOLDER")


@app.command("train", short_help="Train what a recipe says, or go on with it.")
def train_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file that says what is trained.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the training: made, or gone on with.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Set a field of the recipe: training.seed=1.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Train what a recipe says, score it, and leave a ledger; again, go on where it stopped."""
    from engram.training.recipe import read_recipe

    ledger = _trained(read_recipe(recipe, _changes(changes or [])), folder, show_lines=not as_json)
    if as_json:
        show_json(ledger.to_dict())
    else:
        _show_ledger(ledger, folder)


def _changes(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``--set``: a dotted name, and a value as in TOML; one word needs no quotes."""
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"--set {text!r} is no change of a field. Write --set training.seed=1.")
        try:
            changes[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[name] = value
    return changes


def _trained(recipe: Any, folder: Path, *, show_lines: bool) -> Ledger:
    from engram.training.train import train

    try:
        return train(recipe, folder, progress=_epoch_lines() if show_lines else None).ledger
    except (MemoryExceeded, DoesNotFit) as error:
        if isinstance(error, DoesNotFit) and error.resource != "memory":
            raise
        typer.echo(f"engram: {error}", err=True)
        raise typer.Exit(_OUT_OF_MEMORY) from error


def _epoch_lines() -> Callable[[Progress], None]:
    """Show one line per epoch, and on a terminal how far the epoch is."""
    is_terminal = sys.stdout.isatty()

    def show_progress(progress: Progress) -> None:
        if is_terminal:
            typer.echo("\r\033[K", nl=False)
        if progress.message:
            show(progress.message)
        if progress.line is not None:
            line = progress.line
            score = line.valid_score
            valid = "" if score is None else f", validation {progress.metric} {score:.3f}"
            loss = f"loss {line.train_loss:.4f}"
            show(
                f"epoch {line.epoch + 1}/{progress.n_epochs}: {loss}{valid}, "
                f"{line.windows_per_s:,.0f} windows/s, memory {format_bytes(progress.used_bytes)}"
            )
        elif is_terminal and not progress.message:
            place = f"epoch {progress.epoch + 1}/{progress.n_epochs}"
            typer.echo(f"{place}: batch {progress.batch}/{progress.n_batches}", nl=False)

    return show_progress


def _show_ledger(ledger: Ledger, folder: Path) -> None:
    from engram.ledger import LEDGER, PREDICTIONS

    table = make_table("what", ">value")
    for row in (
        *_windows_rows(ledger),
        ("memory at its peak", format_bytes(ledger.peak_bytes)),
        ("memory allowed", format_bytes(ledger.allowed_bytes)),
        ("trained", f"{ledger.windows_per_s:,.0f} windows/s"),
        ("time", format_duration(ledger.duration_s)),
    ):
        table.add_row(*row)
    show(table)
    _show_scores(ledger.scores, within_subject=ledger.within_subject)
    for note in ledger.notes:
        show(note)
    show(f"Ended: {ledger.stopped}. In {folder}: {LEDGER}, {PREDICTIONS}. Page: engram report {folder}")


def _windows_rows(ledger: Ledger) -> list[tuple[str, str]]:
    from engram.windows.admission import OF_RECORDINGS

    refused = {**ledger.data.get("refused", {}), **ledger.data.get("unused", {})}
    whole = ", ".join(f"{n:,} {reason}" for reason, n in refused.items() if n and reason in OF_RECORDINGS)
    named = ", ".join(f"{n:,} {reason}" for reason, n in refused.items() if n and reason not in OF_RECORDINGS)
    rows = [("store", format_bytes(int(ledger.data.get("store_bytes", 0))))]
    for side in ledger.sides:
        people = count(side.n_subjects, "subject")
        rows.append((f"{side.side} windows", f"{side.n_windows:,} of {people}"))
    return [
        *rows,
        ("recordings left out", whole or "none"),
        ("windows left out", named or "none"),
    ]


def _show_scores(scores: Sequence[Score], *, within_subject: bool) -> None:
    table = make_table("side", "metric", "model", ">score", ">chance", "better is", ">windows")
    for score in sorted(scores, key=lambda each: each.side != "test"):
        direction = "higher" if score.higher_is_better else "lower"
        figures = (f"{score.value:.3f}", f"{score.chance:.3f}", direction, f"{score.n_windows:,}")
        table.add_row(score.side, score.metric, score.model, *figures)
    show(table)
    if within_subject:
        show("Subjects are on two sides of the split: these scores say nothing about unseen people.")


@app.command("evaluate", short_help="Score a trained network again, or an entry to a challenge.")
def evaluate_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folder of a training; with --challenge, of several.")
    ],
    side: Annotated[str, typer.Option(help="Side of its split: train, valid or test.")] = "test",
    store: Annotated[
        Path | None, typer.Option(help="Another store, all of whose windows are scored.")
    ] = None,
    memory: _Memory = None,
    challenge: Annotated[
        str | None, typer.Option(help="Score as a challenge does, on --store: eeg2025.")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(help="With --challenge: releases, R5,R6; all that were not trained on if left out."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="With --challenge: HTML page to write.")] = None,
    device: Annotated[
        str, typer.Option(help="With --challenge: where networks predict: cpu or cuda.")
    ] = "cpu",
    *,
    as_json: JsonOption = False,
) -> None:
    """Score a trained network again: on a side of its split, on another store, or as a challenge does."""
    if challenge is not None:
        if side != "test" or memory is not None:
            raise InputError("--side and --memory do not go with --challenge. Leave them out.")
        _evaluate_entry(folders, store, challenge, release, page, device, as_json=as_json)
        return
    from engram.training.train import evaluate

    if len(folders) > 1 or release is not None or page is not None or device != "cpu":
        raise InputError(
            "Several trainings, --release, --page and --device are for an entry to a challenge. Add "
            "--challenge eeg2025."
        )
    found = evaluate(folders[0], side=side, store=store, memory=memory)
    if as_json:
        from dataclasses import asdict

        show_json({"scores": [asdict(score) for score in found.scores], "refused": dict(found.refused)})
        return
    _show_scores(found.scores, within_subject=found.within_subject)
    _show_refused(found.refused)


def _evaluate_entry(
    folders: Sequence[Path],
    store: Path | None,
    challenge: str,
    release: str | None,
    page: Path | None,
    device: str,
    *,
    as_json: bool,
) -> None:
    if challenge != "eeg2025":
        raise InputError(f"There is no challenge {challenge!r}. Use eeg2025.")
    if device != "cpu" and not (device.startswith("cuda") and _has_cuda()):
        raise InputError(f"There is no device {device!r} here. Use cpu.")
    if store is None:
        raise InputError("An entry is scored on a store. Give --store.")
    if page is not None and page.is_dir():
        raise InputError(f"{page} is a folder. Name a file in it: {page / 'challenge.html'}.")
    from engram.store.writer import disk_errors
    from engram.tasks.entry import score_entry
    from engram.tasks.entry_page import write_entry_page

    shown = _show_scored if sys.stderr.isatty() else None
    entry = score_entry(folders, store, comma_separated(release) or (), device=device, progress=shown)
    if page is not None:
        with disk_errors(page.parent):
            write_entry_page(entry, page)
    if as_json:
        show_json(entry.to_dict())
        return
    _show_entry(entry)
    if page is not None:
        show(f"Open {page}")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _show_scored(what: str, n_scored: int, n_windows: int) -> None:
    typer.echo(f"\r\033[K{what}: {n_scored:,}/{n_windows:,} windows", err=True, nl=n_scored == n_windows)


def _show_entry(entry: EntryScore) -> None:
    table = make_table(
        "challenge",
        "release",
        ">nRMSE",
        ">95 % interval",
        ">chance",
        ">known beforehand",
        ">subjects",
        ">windows",
    )
    for name, each in entry.challenges.items():
        pooled = {"all": each.pooled} if len(each.releases) > 1 else {}
        for release, one in {**each.releases, **pooled}.items():
            bounds = "" if one.interval is None else f"{one.interval[0]:.3f} to {one.interval[1]:.3f}"
            figures = (f"{one.score.nrmse:.5f}", bounds, f"{one.chance:.3f}", f"{one.chance_beforehand:.5f}")
            table.add_row(name, release, *figures, f"{one.n_subjects:,}", f"{one.n_windows:,}")
    show(table)
    for name, each in entry.challenges.items():
        named = ", ".join(f"{n:,} {reason}" for reason, n in each.pooled.refused.items())
        show(f"{name}, left out: {named or 'nothing'}")
    if entry.overall is not None:
        bounds = (
            "" if entry.interval is None else f", 95 % {entry.interval[0]:.3f} to {entry.interval[1]:.3f}"
        )
        show(f"overall {entry.overall:.5f}{bounds}; chance 1")
    if entry.steps:
        show(f"The store was prepared with {', '.join(entry.steps)}, the scorer's recordings are not.")
    for release, folders in entry.chosen_on().items():
        show(f"{release} chose the epoch of {', '.join(folders)}: the scores on it are too good.")


@app.command("predict", short_help="Predict the windows of a store.")
def predict_command(
    folder: _Folder,
    store: Annotated[Path, typer.Argument(help="Store whose windows are predicted.")],
    out: Annotated[Path, typer.Argument(help="Parquet file to write, one row per window.")],
    memory: _Memory = None,
) -> None:
    """Predict every window of a store with a trained network, whether its target is known or not."""
    from engram.store.writer import disk_errors
    from engram.training.predict import write_table
    from engram.training.train import predict_windows

    if out.is_dir():
        raise InputError(f"{out} is a folder. Name a file in it: {out / 'predictions.parquet'}.")
    found = predict_windows(folder, store, memory=memory)
    with disk_errors(out.parent):
        write_table(out, found.predictions)
    show(f"{count(found.predictions.num_rows, 'window')} predicted, in {out}")
    _show_refused(found.refused)


def _show_refused(refused: Mapping[str, int]) -> None:
    for reason, n in refused.items():
        show(f"left out, {reason}: {n:,}")


@app.command("submit", short_help="Pack trainings for the EEG Foundation Challenge, and try them.")
def submit_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of trainings: at least one for each challenge.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The zip.")] = Path("submission.zip"),
    *,
    as_json: JsonOption = False,
) -> None:
    """Pack trained networks for the EEG Foundation Challenge, after running them as its scorer would."""
    from dataclasses import asdict

    from engram.tasks.submission import write_submission

    checked = write_submission(folders, out)
    if as_json:
        show_json({**asdict(checked), "path": str(checked.path)})
        return
    table = make_table(
        "challenge", ">networks", ">weights", ">per window", ">windows tried", ">largest difference"
    )
    for trial in checked.trials:
        table.add_row(
            trial.challenge,
            f"{trial.n_networks:,}",
            format_bytes(trial.weights_bytes),
            f"{trial.window_s * 1000:.1f} ms",
            f"{trial.n_windows:,}",
            f"{trial.largest_difference:.1g}",
        )
    show(table)
    gpu = "tried on the CPU" if checked.gpu_bytes is None else f"{format_bytes(checked.gpu_bytes)} of the GPU"
    show(
        f"Wrote {checked.path} ({format_bytes(checked.n_bytes)}). It imports "
        f"{' and '.join(checked.libraries)}; memory {format_bytes(checked.peak_bytes)}, {gpu}."
    )


@app.command("report", short_help="Write a page about trainings.")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders of trainings.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page about one or several trainings: scores, curves, memory, what was used."""
    from engram.report.page import write_report
    from engram.store.writer import disk_errors

    if out.is_dir():
        raise InputError(f"{out} is a folder. Name a file in it: {out / 'report.html'}.")
    with disk_errors(out.parent):
        show(f"Open {write_report(folders, out)}")


@app.command("demo", short_help="Do the whole job on a generated corpus.")
def demo_command(
    folder: Annotated[Path, typer.Argument(help="Folder to work in; made if it is not there.")],
    subjects: Annotated[int, typer.Option(help="Subjects in each of two releases.")] = 20,
    effect: Annotated[float, typer.Option(help="Size of the planted effect; 0 plants none.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Trainings, from different first weights.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory to prepare in and to train in.")] = "1 GB",
) -> None:
    """Do the whole job on a generated corpus: generate, prepare, train, score, report."""
    from importlib.resources import files

    from engram.preparation.ingest import prepare
    from engram.preparation.steps import HighPass
    from engram.recordings import as_source
    from engram.report.page import write_report
    from engram.testing.hbn import HbnCorpus, write_hbn
    from engram.training.recipe import read_recipe

    corpus, store, recipe = folder / "corpus", folder / "store", folder / "recipe.toml"
    if seeds < 1:
        raise InputError(f"--seeds {seeds} trains nothing. Use 1 or more.")
    show(f"$ engram generate {corpus} --subjects {subjects} --effect {effect:g}")
    summary = write_hbn(corpus, HbnCorpus(n_subjects=subjects, effect_size=effect), n_jobs=2)
    show(f"{summary.n_recordings} recordings, {format_bytes(summary.n_bytes)}")

    show(f"\n$ engram prepare {corpus} {store} --high-pass 0.5 --memory '{memory}'")
    prepared = prepare(as_source(corpus), store, steps=[HighPass(0.5)], memory=memory)
    refused = f"{len(prepared.refusals)} refused"
    show(f"{prepared.n_prepared} prepared, {prepared.n_unchanged} unchanged, {refused}, "
         f"memory {format_bytes(prepared.peak.unreclaimable_bytes)} at its peak")  # fmt: skip

    recipe.write_bytes(files("engram.training").joinpath("demo.toml").read_bytes())
    ledgers = []
    trainings = [folder / f"training-{seed}" for seed in range(seeds)]
    for seed, training in enumerate(trainings):
        show(
            f"\n$ engram train {recipe} {training} --set training.seed={seed} "
            f"--set 'training.memory={memory}'"
        )
        told = read_recipe(recipe, {"training.seed": seed, "training.memory": memory})
        ledgers.append(_trained(told, training, show_lines=True))

    page = folder / "report.html"
    show(f"\n$ engram report {' '.join(map(str, trainings))} --out {page}")
    write_report(trainings, page)
    _show_demo(ledgers, summary.best_nrmse)
    show(f"Open {page}. To train something else on the same store, change {recipe}.")


def _show_demo(ledgers: Sequence[Ledger], best: float) -> None:
    """Show what the whole job came to: one row per figure, the mean over trainings."""
    first = ledgers[0]
    network = [_test_score(ledger, "network") for ledger in ledgers]
    ridge, mean = _test_score(first, "ridge"), sum(score.value for score in network) / len(network)
    spread = f" (of {', '.join(f'{score.value:.3f}' for score in network)})" if len(network) > 1 else ""
    unseen = next(side.n_subjects for side in first.sides if side.side == "test")
    rows = [
        *_windows_rows(first),
        ("memory at its peak", format_bytes(max(ledger.peak_bytes for ledger in ledgers))),
        ("memory allowed", format_bytes(first.allowed_bytes)),
        ("trained", f"{sum(ledger.windows_per_s for ledger in ledgers) / len(ledgers):,.0f} windows/s"),
        (f"test nRMSE on {count(unseen, 'unseen subject')}", f"{mean:.3f}{spread}"),
        ("chance (the mean of the training targets)", f"{network[0].chance:.3f}"),
        ("ridge", f"{ridge.value:.3f}"),
        ("best possible here", f"{best:.3f}"),
    ]
    table = make_table("what", ">value")
    for row in rows:
        table.add_row(*row)
    show("")
    show(table)


def _test_score(ledger: Ledger, model: str) -> Score:
    found = (ledger.main_metric, "test", model)
    return next(score for score in ledger.scores if (score.metric, score.side, score.model) == found)
