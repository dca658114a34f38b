"""The report: one HTML page from the folders of one or several trainings.

This module decides what is told in words, first of all the score beside chance, and what a
reader is warned of. Scores per subject are ``predictions``', pictures ``figures``', rows
``tables``'. The page loads nothing: it opens offline, prints, and a policy within it forbids
whatever a stranger's text might ask a browser for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram.errors import InputError
from engram.ledger import Ledger, Score
from engram.report import figures, tables
from engram.report.figures import Drawing
from engram.report.predictions import (
    FEWEST_SUBJECTS,
    Predictions,
    SubjectScores,
    interval,
    pooled_score,
    read_predictions,
    score_subjects,
)
from engram.report.rendering import write_page
from engram.report.tables import Table, main_scores
from engram.report.words import SIDES, metric_name, number
from engram.units import format_bytes, format_duration

__all__ = ["write_report"]

_MOST_OUTPUTS = 4  # drawn; a hundred neurons would make a page that nobody scrolls


@dataclass(frozen=True, slots=True)
class _Training:
    """What lies in one training's folder."""

    folder: str
    ledger: Ledger
    predictions: Predictions | None


@dataclass(frozen=True, slots=True)
class _Section:
    """What the page tells of one training."""

    anchor: str
    name: str
    folder: str
    headline: str
    warnings: tuple[str, ...]
    findings: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    scores: Table
    drawings: tuple[Drawing, ...]
    data: tuple[Table, ...]
    details: tuple[Table, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What the page tells of several trainings together."""

    warnings: tuple[str, ...]
    tables: tuple[Table, ...]
    drawings: tuple[Drawing, ...]


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write a self-contained HTML page about one or several trainings.

    Parameters
    ----------
    folders
        Folders of trainings; each holds a ``ledger.json`` and, unless nothing was predicted, a
        ``predictions.parquet``. Trainings of the same name are taken as repetitions.
    out
        The page. A file of this name is replaced, once the page is complete.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        If no folder is given, one is given twice, or one cannot be understood.
    MissingExtra
        If Matplotlib or Jinja is not installed.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from engram.ledger import EpochLine, Ledger, Score
    >>> with TemporaryDirectory() as name:
    ...     folder = Path(name)
    ...     ledger = Ledger(
    ...         name="demo",
    ...         task="regression",
    ...         main_metric="nrmse",
    ...         epochs=(EpochLine(0, 1.0, None, None, 2.0, 500.0, 1e-3),),
    ...         scores=(Score("network", "test", "nrmse", 0.84, 1.0, False, 480),),
    ...     )
    ...     _ = ledger.write(folder)
    ...     page = write_report([folder], folder / "report.html").read_text(encoding="utf-8")
    >>> "Test nRMSE 0.840 on 480 windows; chance 1.000." in page
    True
    """
    trainings = _read_trainings(folders)
    sections = [_section(f"t{i}", training) for i, training in enumerate(trainings, 1)]
    comparison = _comparison(trainings) if len(trainings) > 1 else None
    return write_page(out, "page.html.j2", {"sections": sections, "comparison": comparison})


def _read_trainings(folders: Sequence[Path]) -> list[_Training]:
    if not folders:
        raise InputError("A report is about one training or several. Name the folder of one.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("A training is named twice and would count as two. Name every folder once.")
    trainings = []
    for folder in folders:
        ledger = Ledger.read(folder)
        trainings.append(_Training(folder.resolve().name, ledger, read_predictions(folder, ledger)))
    return trainings


# ---------------------------------------------------------------- one training


def _section(anchor: str, training: _Training) -> _Section:
    ledger, predictions = training.ledger, training.predictions
    subjects = score_subjects(predictions) if predictions else None
    return _Section(
        anchor=anchor,
        name=ledger.name,
        folder=training.folder,
        headline=_headline(ledger),
        warnings=tuple(_warnings(ledger, predictions)),
        findings=tuple(_findings(ledger, predictions, subjects)),
        facts=tuple(_facts(ledger)),
        scores=tables.tabulate_scores(ledger),
        drawings=tuple(_drawings(anchor, training, subjects)),
        data=(tables.tabulate_sides(ledger), *tables.tabulate_data(ledger.data)),
        details=tuple(_details(training, subjects)),
        notes=(*([f"Ended: {ledger.stopped}."] if ledger.stopped else ()), *ledger.notes),
    )


def _headline(ledger: Ledger) -> str:
    """Say the score in one sentence, beside chance and baselines."""
    if not (scores := main_scores(ledger)):
        return f"Not scored: {ledger.stopped or 'the training has not come to its end'}."
    network, *others = scores
    score = f"{SIDES.get(network.side, network.side)} {metric_name(network.metric)} {number(network.value)}"
    baselines = "".join(f"; {other.model} {number(other.value)}" for other in others)
    return f"{score} on {_whom(ledger, network)}; chance {number(network.chance)}{baselines}."


def _whom(ledger: Ledger, score: Score) -> str:
    n_subjects = next((line.n_subjects for line in ledger.sides if line.side == score.side), None)
    if ledger.within_subject:
        return f"{score.n_windows:,} windows of people who were also trained on"
    if n_subjects is None:
        return f"{score.n_windows:,} windows"
    return f"{n_subjects:,} unseen {'subject' if n_subjects == 1 else 'subjects'}"


def _warnings(ledger: Ledger, predictions: Predictions | None) -> Iterator[str]:
    """Yield what must not be overlooked when the score is read."""
    if ledger.within_subject:
        yield (
            "Within subject: the same people are on two sides of the split. "
            "This score says nothing about unseen people."
        )
    score = next(iter(main_scores(ledger)), None)
    if score is None:
        return
    if math.isnan(score.value):
        yield f"The {metric_name(score.metric)} is not defined on these windows."
        return
    if not math.isnan(score.chance) and not _is_better(score.value, score.chance, score):
        yield "Not better than chance: a predictor that ignores the recordings does as well."
    if score.side == "valid" and ledger.best_epoch is not None:
        yield (
            "There is no test side. The epoch was chosen by the windows that are scored here: "
            "the score is too good by an unknown amount."
        )
    if predictions and predictions.side == score.side:
        again = pooled_score(predictions, score.metric)
        if again is not None and not math.isclose(again, score.value, rel_tol=2e-3, abs_tol=2e-3):
            yield (
                f"The predictions give {number(again)}, the ledger says {number(score.value)}: "
                "the two files do not belong together."
            )


def _is_better(value: float, chance: float, score: Score) -> bool:
    return value > chance if score.higher_is_better else value < chance


def _findings(
    ledger: Ledger, predictions: Predictions | None, subjects: SubjectScores | None
) -> Iterator[str]:
    """Yield what the predictions tell beyond the score."""
    score = next(iter(main_scores(ledger)), None)
    if predictions is None or subjects is None or score is None:
        return
    bounds = interval(predictions, score.metric) if not ledger.within_subject else None
    if bounds and predictions.side == score.side:
        yield (
            f"95 % interval over subjects: {number(bounds[0])} to {number(bounds[1])} "
            "(bootstrap, whole subjects drawn 2,000 times)."
        )
        if bounds[0] <= score.chance <= bounds[1]:
            yield "Chance lies within this interval: another group of people might show no effect at all."
    n = len(subjects.subjects)
    if n < FEWEST_SUBJECTS and not ledger.within_subject:
        yield (
            f"With fewer than {FEWEST_SUBJECTS} subjects nothing can be said about how other people "
            "would score."
        )
    if n > 1:
        metric = metric_name(subjects.metric)
        yield f"Better than chance for {subjects.n_better:,} of {n:,} subjects ({metric})."


def _facts(ledger: Ledger) -> Iterator[tuple[str, str]]:
    """Yield the figures of a training that people ask for first."""
    if ledger.sides:
        yield "windows", f"{sum(line.n_windows for line in ledger.sides):,}"
    best = "" if ledger.best_epoch is None else f", best {ledger.best_epoch + 1}"
    yield "epochs", f"{len(ledger.epochs)}{best}"
    if ledger.n_parameters:
        yield "parameters", f"{ledger.n_parameters:,}"
    if ledger.duration_s:
        yield "took", format_duration(ledger.duration_s)
    if ledger.epochs:
        yield "windows/s", number(ledger.windows_per_s)
    if ledger.peak_bytes:
        allowed = f" of {format_bytes(ledger.allowed_bytes)}" if ledger.allowed_bytes else ""
        yield "peak memory", f"{format_bytes(ledger.peak_bytes)}{allowed}"


def _drawings(anchor: str, training: _Training, subjects: SubjectScores | None) -> Iterator[Drawing]:
    ledger, predictions = training.ledger, training.predictions
    if predictions and predictions.n_classes:
        if predictions.n_classes <= figures.MOST_CLASSES:
            yield figures.draw_confusions(f"{anchor}-confusions", predictions, ledger.classes)
    elif predictions:
        for output in range(min(predictions.target.shape[1], _MOST_OUTPUTS)):
            yield figures.draw_predictions(f"{anchor}-predictions-{output}", predictions, output)
    if subjects and len(subjects.subjects) > 1:
        yield figures.draw_subjects(f"{anchor}-subjects", subjects)
    if ledger.epochs:
        yield figures.draw_losses(f"{anchor}-losses", ledger)
        if score := figures.draw_score(f"{anchor}-score", [ledger], [ledger.name]):
            yield score
    if ledger.memory:
        yield figures.draw_memory(f"{anchor}-memory", ledger)
    if ledger.epochs:
        yield figures.draw_speed(f"{anchor}-speed", ledger)


def _details(training: _Training, subjects: SubjectScores | None) -> Iterator[Table]:
    ledger, predictions = training.ledger, training.predictions
    if predictions and predictions.n_classes:
        yield tables.tabulate_classes(predictions, ledger.classes)
    if subjects:
        yield tables.tabulate_subjects(subjects)
    if ledger.recipe:
        yield tables.tabulate_settings(ledger.recipe)
    for title, facts in (("Machine", ledger.machine), ("Versions", ledger.versions)):
        if facts:
            yield tables.tabulate_facts(title, facts)


# ---------------------------------------------------------------- several trainings


def _comparison(trainings: Sequence[_Training]) -> _Comparison:
    ledgers, folders = [t.ledger for t in trainings], [t.folder for t in trainings]
    labels = [ledger.name for ledger in ledgers]
    shown = [tables.tabulate_trainings(ledgers, folders)]
    if len(set(labels)) < len(labels):
        shown.insert(0, tables.tabulate_groups(ledgers))
    if differences := tables.tabulate_differences(ledgers, folders):
        shown.append(differences)
    drawings = []
    if len({ledger.main_metric for ledger in ledgers}) == 1:
        drawn = figures.draw_score("all-score", ledgers, labels)
        drawings = [drawn] if drawn else []
    return _Comparison(tuple(_unlike(trainings)), tuple(shown), tuple(drawings))


def _unlike(trainings: Sequence[_Training]) -> Iterator[str]:
    """Yield why the scores of trainings may not be compared."""
    if len({t.ledger.main_metric for t in trainings}) > 1:
        yield "The trainings are judged by different metrics: their scores cannot be compared."
    elif len({(t.predictions.side, t.predictions.signature()) for t in trainings if t.predictions}) > 1:
        yield "The trainings were scored on different windows or targets: compare their scores with care."
    if 0 < sum(t.ledger.within_subject for t in trainings) < len(trainings):
        yield "Some of the trainings are within subject, others are not: their scores mean different things."
