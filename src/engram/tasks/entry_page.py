"""The entrant's page: what an entry scored, beside chance and beside what others got.

This module decides what is told and in which words. It is built of the report's tables and figures; the
page loads nothing, as the report does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engram.ledger import Ledger
from engram.report import figures, tables
from engram.report.figures import Drawing
from engram.report.predictions import FEWEST_SUBJECTS, score_subjects
from engram.report.rendering import write_page
from engram.report.tables import Table
from engram.report.words import number
from engram.tasks.eeg_challenge import CHALLENGES, PUBLISHED, PUBLISHED_ON, VALID_RELEASE
from engram.tasks.entry import ChallengeEntry, EntryScore, Member, ReleaseScore
from engram.units import format_bytes

__all__ = ["write_entry_page"]

_NAMES = {
    "overall": "overall",
    "challenge1": "challenge 1, response time",
    "challenge2": "challenge 2, externalizing",
}
_MOST_SUBJECTS = 500  # listed; --json has all


@dataclass(frozen=True, slots=True)
class _Section:
    """What the page tells of one challenge, or of the trainings."""

    anchor: str
    name: str
    headline: str
    warnings: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[tuple[str, tuple[Drawing, ...]], ...]
    """Under headings; the first has none where the section's says enough."""
    details: tuple[Table, ...]


def write_entry_page(entry: EntryScore, out: Path) -> Path:
    """Write a self-contained HTML page about an entry.

    Parameters
    ----------
    entry
        As ``score_entry`` gives it.
    out
        The page. A file of this name is replaced, once the page is complete.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    MissingExtra
        If Matplotlib or Jinja is not installed.
    """
    content = {
        "title": "EEG Foundation Challenge 2025: an entry",
        "headline": _headline(entry),
        "warnings": list(_warnings(entry)),
        "findings": list(_findings(entry)),
        "tables": [_tabulate_scores(entry), _tabulate_published()],
        "drawings": [_draw_scores(entry)],
        "sections": [*map(_challenge_section, entry.challenges.values()), _trainings_section(entry)],
    }
    return write_page(out, "entry.html.j2", content)


def _headline(entry: EntryScore) -> str:
    scores = (
        f"{_short(name)}: {_figure(each.pooled.score.nrmse)}" for name, each in entry.challenges.items()
    )
    told, where = ", ".join(scores), f"on {', '.join(entry.releases)}; chance 1."
    if entry.overall is None:
        return f"{told.capitalize()} {where}"
    return f"Overall {_figure(entry.overall)} ({told}) {where}"


def _warnings(entry: EntryScore) -> Iterator[str]:
    """Yield what must not be overlooked when the score is read."""
    for name in CHALLENGES:
        if name not in entry.challenges:
            yield f"No training of {_NAMES[name]} was given: there is no overall score."
    if entry.steps:
        yield (
            f"The store was prepared with {', '.join(entry.steps)}, and the organisers' recordings are not: "
            "this is no score of theirs."
        )
    for release, folders in entry.chosen_on().items():
        names = ", ".join(Path(folder).resolve().name for folder in folders)
        yield (
            f"{release} chose the epoch of {names}: the scores on {release} are too good by an unknown "
            "amount."
        )


def _findings(entry: EntryScore) -> Iterator[str]:
    """Yield how sure the scores are, and what they are of."""
    fewest = min(each.pooled.n_subjects for each in entry.challenges.values())
    if fewest < FEWEST_SUBJECTS:
        yield (
            f"With fewer than {FEWEST_SUBJECTS} subjects nothing can be said about how other people "
            "would score."
        )
    else:
        yield "Intervals of 95 % are over subjects: bootstrap, whole subjects drawn 2,000 times, seed 0."
    yield (
        "Scored as the organisers do: in order, one window at a time, crops by Random(42) for each "
        "recording, pooled over windows. Left out are the start kit's nine bad subjects, for which the "
        "scorer's own code has no rule. None of the releases, and none of their subjects, was trained on."
    )
    if entry.n_unprepared:
        yield f"Recordings that could not be prepared, of all releases: {entry.n_unprepared:,}."


def _tabulate_scores(entry: EntryScore) -> Table:
    scored = {name: each.pooled for name, each in entry.challenges.items()}
    rows = [
        (_NAMES[name], _figure(one.score.nrmse), *_trust(one.interval, one.chance, one.chance_beforehand))
        for name, one in scored.items()
    ]
    if entry.overall is not None:
        beforehand = sum(CHALLENGES[name].weight * one.chance_beforehand for name, one in scored.items())
        rows.insert(0, (_NAMES["overall"], _figure(entry.overall), *_trust(entry.interval, 1.0, beforehand)))
    note = (
        "Lower is better. Chance is the constant that is the mean of the scored targets; known beforehand is "
        "the mean of the training targets, and this is what a constant would really have scored."
    )
    return Table("Scores", ("", "score", *_TRUST), tuple(rows), note=note)


_TRUST = ("95 % interval", "chance", "chance known beforehand")


def _trust(bounds: tuple[float, float] | None, chance: float, beforehand: float) -> tuple[str, str, str]:
    interval = f"{number(bounds[0])} to {number(bounds[1])}" if bounds else "not known"
    return interval, number(chance), _figure(beforehand)


def _tabulate_published() -> Table:
    rows = tuple(
        (_NAMES[name], f"{each.best}", f"{each.median}", "" if each.warm_up is None else f"{each.warm_up}")
        for name, each in PUBLISHED.items()
    )
    note = (
        f"Leaderboard of {PUBLISHED_ON} (eeg2025.github.io, 184 entries): on R12, which is withheld, and "
        f"before that, in the warm-up, on {VALID_RELEASE}. Each best figure is of another entry. Scores on "
        "another release, on some subjects of one, or on generated data cannot be compared with these."
    )
    head = ("", "best on R12", "median on R12", f"best on {VALID_RELEASE}")
    return Table("What others scored", head, rows, note=note)


def _short(name: str) -> str:
    return _NAMES[name].partition(",")[0]


def _figure(value: float) -> str:
    """Write a score as the leaderboard does."""
    return "not defined" if math.isnan(value) else f"{value:.5f}"


def _draw_scores(entry: EntryScore) -> Drawing:
    """Draw every challenge on every release, and pooled."""
    labels, values, bounds = [], [], []
    for each in entry.challenges.values():
        many = {"pooled": each.pooled} if len(each.releases) > 1 else {}
        for release, one in {**many, **each.releases}.items():
            labels.append(f"{_short(each.challenge.name)}, {release}")
            values.append(one.score.nrmse)
            bounds.append(one.interval)
    return figures.draw_intervals("scores", labels, values, bounds)


# ---------------------------------------------------------------- one challenge


def _challenge_section(each: ChallengeEntry) -> _Section:
    name, one = each.challenge.name, each.pooled
    n_networks = len(each.members)
    network = "one network" if n_networks == 1 else f"the mean of {n_networks} networks"
    headline = (
        f"nRMSE {_figure(one.score.nrmse)} by {network} on {one.n_windows:,} windows of "
        f"{one.n_subjects:,} unseen subjects."
    )
    return _Section(
        name,
        _NAMES[name].capitalize(),
        headline,
        tuple(_challenge_warnings(one)),
        (_tabulate_releases(each), _tabulate_refused(each)),
        (("", tuple(_challenge_drawings(name, one))),),
        (_tabulate_subjects(one),),
    )


def _challenge_warnings(one: ReleaseScore) -> Iterator[str]:
    if math.isnan(one.score.nrmse):
        yield "The nRMSE is not defined: all targets are the same."
    elif one.score.nrmse >= one.chance:
        yield "Not better than chance: a constant does as well."
    elif one.interval and one.interval[1] >= one.chance:
        yield "Chance lies within the interval: another group of people might show no effect at all."


def _tabulate_releases(each: ChallengeEntry) -> Table:
    many = {"all, pooled": each.pooled} if len(each.releases) > 1 else {}
    rows = tuple(
        (
            release,
            _figure(one.score.nrmse),
            *_trust(one.interval, one.chance, one.chance_beforehand),
            f"{one.n_subjects:,}",
            f"{one.n_windows:,}",
        )
        for release, one in {**each.releases, **many}.items()
    )
    head = ("release", "nRMSE", *_TRUST, "subjects", "windows")
    return Table("By release", head, rows)


def _tabulate_refused(each: ChallengeEntry) -> Table:
    releases = list(each.releases.items())
    (counted,) = tables.tabulate_data({"refused": each.pooled.refused})
    rows = tuple(
        (reason, meaning, *(f"{one.refused.get(reason, 0):,}" for _, one in releases), n)
        for reason, meaning, n in counted.rows
    )
    head = ("reason", "meaning", *(release for release, _ in releases), "all")
    return replace(counted, head=head, rows=rows)


def _challenge_drawings(name: str, one: ReleaseScore) -> Iterator[Drawing]:
    predictions = one.predictions
    yield figures.draw_predictions(f"{name}-predictions", predictions, 0)
    yield figures.draw_distributions(f"{name}-distributions", predictions, 0)
    if one.n_subjects > 1:
        yield figures.draw_subjects(f"{name}-subjects", score_subjects(predictions))


def _tabulate_subjects(one: ReleaseScore) -> Table:
    found = sorted(one.score.by_subject.items(), key=lambda item: item[1].rmse)
    rows = tuple(
        (subject, f"{each.n_windows:,}", number(each.target), number(each.prediction), number(each.rmse))
        for subject, each in found[:_MOST_SUBJECTS]
    )
    note = (
        f"The first {_MOST_SUBJECTS} of {len(found):,}; --json has all."
        if len(found) > _MOST_SUBJECTS
        else ""
    )
    head = ("subject", "windows", "mean target", "mean prediction", "RMSE")
    return Table("Subjects, best first", head, rows, note=note)


# ---------------------------------------------------------------- the trainings


def _trainings_section(entry: EntryScore) -> _Section:
    members = [(each, member) for each in entry.challenges.values() for member in each.members]
    rows = tuple(_training_row(each, member) for each, member in members)
    head = ("folder", "challenge", "model", "trained on", "epoch chosen by", "seed", "parameters", "epochs")
    table = Table("Trainings", (*head, "peak memory", "allowed"), rows, n_words=5)
    n = len(members)
    headline = (
        f"{n} {'training' if n == 1 else 'trainings'}, on neither {VALID_RELEASE} nor what is scored here."
    )
    drawn = tuple(
        (member.folder.resolve().name, tuple(_training_drawings(f"training{i}", member.ledger)))
        for i, (_, member) in enumerate(members)
    )
    return _Section("trainings", "Trainings", headline, (), (table,), drawn, ())


def _training_row(each: ChallengeEntry, member: Member) -> tuple[str, ...]:
    ledger = member.ledger
    return (
        member.folder.resolve().name,
        _short(each.challenge.name).removeprefix("challenge "),
        member.model,
        ", ".join(member.trained_on),
        ", ".join(member.chosen_on) or "no release",
        f"{member.seed}",
        f"{ledger.n_parameters:,}",
        f"{len(ledger.epochs)}",
        format_bytes(ledger.peak_bytes),
        format_bytes(ledger.allowed_bytes),
    )


def _training_drawings(name: str, ledger: Ledger) -> Iterator[Drawing]:
    if ledger.epochs:
        yield figures.draw_losses(f"{name}-losses", ledger)
        if score := figures.draw_score(f"{name}-score", [ledger], [ledger.name]):
            yield score
    if ledger.memory:
        yield figures.draw_memory(f"{name}-memory", ledger)
