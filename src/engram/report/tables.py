"""The page's tables, as rows of text.

This module decides what stands beside what: scores beside chance and baselines, windows used
beside windows refused and why, one training beside another. How rows look is the template's.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram.ledger import Ledger, Score
from engram.report.predictions import Predictions, SubjectScores, count_confusions
from engram.report.words import SIDES, metric_name, number
from engram.units import format_bytes, format_duration

__all__ = [
    "Table",
    "main_scores",
    "tabulate_classes",
    "tabulate_data",
    "tabulate_differences",
    "tabulate_facts",
    "tabulate_groups",
    "tabulate_scores",
    "tabulate_settings",
    "tabulate_sides",
    "tabulate_subjects",
    "tabulate_trainings",
]

_MOST_ROWS = 500  # subjects or classes; the rest is in the training's folder

# What the reasons of `engram.windows` mean.
_REASONS = {
    "refused": {
        "bad": "overlaps an event whose description starts with BAD or EDGE",
        "excluded": "recordings that were to be left out",
        "gap": "overlaps samples that were not measured",
        "no events": "recordings without an event to anchor a window at",
        "no signal": "recordings without a signal that is asked for",
        "no trial": "events that are not the first of their trial",
        "no target": "the target is missing, unreadable or out of its range",
        "other channels": "recordings whose channels differ from those of most",
        "other rate": "recordings whose sampling rate differs from that of most",
        "outside": "does not lie wholly within its recording",
        "too short": "recordings or trials without room for a window",
    },
    "unused": {
        "gap": "too near to a window of a side that goes first",
        "not named": "of a group that no side names",
    },
}
_TITLES = {"refused": "Windows refused", "unused": "Windows on no side"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under their head."""

    title: str
    """What it lists."""
    head: tuple[str, ...]
    """Names of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """A text for each column."""
    n_words: int = 1
    """So many columns, from the left, hold words; the others hold numbers."""
    note: str = ""
    """What a reader has to know beside it."""


def tabulate_scores(ledger: Ledger) -> Table:
    """Put the scores of the network and of the baselines beside chance, a row per side and metric.

    Parameters
    ----------
    ledger
        What the training left.
    """
    models = list(dict.fromkeys(score.model for score in ledger.scores))
    rows: dict[tuple[str, str], dict[str, Score]] = {}
    for score in sorted(ledger.scores, key=lambda score: score.side != "test"):
        rows.setdefault((score.side, score.metric), {})[score.model] = score
    return Table(
        "Scores",
        ("side", "metric", *models, "chance", "better is", "windows"),
        tuple(_score_row(key, row, models) for key, row in rows.items()),
        n_words=2,
    )


def _score_row(key: tuple[str, str], row: Mapping[str, Score], models: Sequence[str]) -> tuple[str, ...]:
    one = next(iter(row.values()))
    values = (number(row[model].value) if model in row else "" for model in models)
    better = "higher" if one.higher_is_better else "lower"
    side = SIDES.get(key[0], key[0]).lower()
    return side, metric_name(key[1]), *values, number(one.chance), better, f"{one.n_windows:,}"


def tabulate_sides(ledger: Ledger) -> Table:
    """List what each side of the split consists of.

    Parameters
    ----------
    ledger
        What the training left.
    """
    rows = (
        (
            SIDES.get(line.side, line.side),
            f"{line.n_windows:,}",
            f"{line.n_recordings:,}",
            f"{line.n_subjects:,}",
        )
        for line in ledger.sides
    )
    note = "The same subjects are on two sides." if ledger.within_subject else "No subject is on two sides."
    return Table("Sides of the split", ("side", "windows", "recordings", "subjects"), tuple(rows), note=note)


def tabulate_data(data: Mapping[str, Any]) -> tuple[Table, ...]:
    """List what was used, and count what was not, with the reasons.

    A mapping from text to whole numbers is a table of its own, from reason to count.

    Parameters
    ----------
    data
        The ledger's.
    """
    counts = {name: each for name, each in data.items() if _are_counts(each)}
    facts = {name: each for name, each in data.items() if name not in counts}
    tables = [tabulate_facts("Data", facts)] if facts else []
    return (*tables, *(_count_table(name, each) for name, each in counts.items()))


def _are_counts(each: Any) -> bool:
    return isinstance(each, Mapping) and all(type(n) is int for n in each.values())


def _count_table(name: str, counts: Mapping[str, int]) -> Table:
    meanings = _REASONS.get(name, {})
    rows = tuple((reason, meanings.get(reason, ""), f"{n:,}") for reason, n in counts.items() if n)
    note = "" if rows else "None."
    return Table(_TITLES.get(name, _label(name)), ("reason", "meaning", "count"), rows, 2, note)


def tabulate_classes(predictions: Predictions, classes: Sequence[str]) -> Table:
    """List how well each class was recognised.

    Parameters
    ----------
    predictions
        Of a classification.
    classes
        Their names.
    """
    counts = count_confusions(predictions)
    true, guessed, hits = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    others = counts - np.diag(hits)
    rows = tuple(
        (
            name,
            f"{true[i]:,}",
            f"{guessed[i]:,}",
            _share(hits[i], true[i]),
            _share(hits[i], guessed[i]),
            classes[int(others[i].argmax())] if others[i].any() else "",
        )
        for i, name in enumerate(classes)
    )
    head = ("class", "windows", "predicted", "recall", "precision", "most often taken for")
    return Table("Classes", head, rows[:_MOST_ROWS], note=_cut(len(rows), "classes"))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "not defined"


def tabulate_subjects(scores: SubjectScores) -> Table:
    """List the score of each subject, best first.

    Parameters
    ----------
    scores
        Of at least one subject.
    """
    rows = tuple(
        (scores.subjects[i], f"{scores.n_rows[i]:,}", number(scores.value[i]), number(scores.chance[i]))
        for i in scores.best_first()[:_MOST_ROWS]
    )
    head = ("subject", scores.unit, metric_name(scores.metric), "chance")
    return Table("Subjects, best first", head, rows, note=_cut(len(scores.subjects), "subjects"))


def _cut(n: int, what: str) -> str:
    if n <= _MOST_ROWS:
        return ""
    return f"The first {_MOST_ROWS} of {n:,} {what}; all are in the predictions beside the ledger."


def tabulate_settings(settings: Mapping[str, Any]) -> Table:
    """List settings as a recipe has them, those of a table within a table with a dotted name.

    Parameters
    ----------
    settings
        The ledger's recipe.
    """
    return Table("Settings", ("", ""), tuple((n, _as_set(each)) for n, each in _flat(settings)), n_words=2)


def tabulate_facts(title: str, facts: Mapping[str, Any]) -> Table:
    """List facts in words, with the units that their names end in.

    Parameters
    ----------
    title
        What they are about.
    facts
        By name.
    """
    return Table(title, ("", ""), tuple((_label(n), _text(n, each)) for n, each in _flat(facts)), n_words=2)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _as_set(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- several trainings


def main_scores(ledger: Ledger) -> list[Score]:
    """Give the scores by the main metric on the test side, or else on the validation side.

    The network's comes first.

    Parameters
    ----------
    ledger
        What the training left.
    """
    scores = [score for score in ledger.scores if score.metric == ledger.main_metric]
    side = "test" if any(score.side == "test" for score in scores) else "valid"
    return sorted((s for s in scores if s.side == side), key=lambda score: score.model != "network")


def tabulate_trainings(ledgers: Sequence[Ledger], folders: Sequence[str]) -> Table:
    """Put trainings beside each other, a row each.

    Parameters
    ----------
    ledgers
        What they left.
    folders
        Names of their folders.
    """
    rows = tuple(_training_row(ledger, folder) for ledger, folder in zip(ledgers, folders, strict=True))
    head = (
        "training",
        "folder",
        "side",
        "metric",
        "score",
        "chance",
        "epochs",
        "best",
        "took",
        "peak memory",
    )
    return Table("Trainings", (*head, "windows/s"), rows, n_words=4)


def _training_row(ledger: Ledger, folder: str) -> tuple[str, ...]:
    score = next(iter(main_scores(ledger)), None)
    return (
        ledger.name,
        folder,
        SIDES.get(score.side, score.side).lower() if score else "",
        metric_name(ledger.main_metric),
        number(score.value) if score else "no score",
        number(score.chance) if score else "",
        f"{len(ledger.epochs)}",
        "" if ledger.best_epoch is None else f"{ledger.best_epoch + 1}",
        format_duration(ledger.duration_s),
        format_bytes(ledger.peak_bytes),
        number(ledger.windows_per_s) if ledger.epochs else "",
    )


def tabulate_groups(ledgers: Sequence[Ledger]) -> Table:
    """Average the trainings of the same name: mean and standard deviation of their scores.

    Parameters
    ----------
    ledgers
        What the trainings left.
    """
    groups: dict[tuple[str, str, str, str], list[Score]] = {}
    for ledger in ledgers:
        for score in main_scores(ledger):
            groups.setdefault((ledger.name, score.model, score.side, score.metric), []).append(score)
    rows = tuple(
        (
            name,
            model,
            SIDES.get(side, side).lower(),
            metric_name(metric),
            f"{len(scores)}",
            _mean_and_spread([score.value for score in scores]),
            _range([score.value for score in scores]),
            number(float(np.mean([score.chance for score in scores]))),
        )
        for (name, model, side, metric), scores in groups.items()
    )
    head = ("training", "model", "side", "metric", "trainings", "mean ± SD", "range", "chance")
    return Table("By name", head, rows, n_words=4)


def _range(values: Sequence[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else ""


def _mean_and_spread(values: Sequence[float]) -> str:
    """Write a mean and, of two values or more, the sample standard deviation."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return number(mean)
    # Exact, where NumPy's deviation of equal scores is 1e-16.
    return f"{number(mean)} ± {number(statistics.stdev(values))}"


def tabulate_differences(ledgers: Sequence[Ledger], folders: Sequence[str]) -> Table | None:
    """List the settings that are not the same in all trainings; None if all are.

    Parameters
    ----------
    ledgers
        What the trainings left.
    folders
        Names of their folders.
    """
    flats = [{name: _as_set(value) for name, value in _flat(ledger.recipe)} for ledger in ledgers]
    names = [
        name
        for name in dict.fromkeys(name for flat in flats for name in flat)
        if len({flat.get(name) for flat in flats}) > 1
    ]
    if not names:
        return None
    rows = tuple((name, *(flat.get(name, "") for flat in flats)) for name in names)
    return Table("Settings that differ", ("setting", *folders), rows, n_words=1 + len(ledgers))


# ---------------------------------------------------------------- words for keys and values


def _label(name: str) -> str:
    for unit in ("_bytes", "_s"):
        name = name.removesuffix(unit)
    return name.removeprefix("n_").replace("_", " ")


def _text(name: str, value: Any) -> str:
    """Write one value of a ledger's free fields, by the unit in its name."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**63:
        return _as_set(value)
    if name.endswith("_bytes"):
        return format_bytes(int(value))
    return format_duration(value) if name.endswith("_s") else f"{value:,}"
