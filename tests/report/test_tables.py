from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram.ledger import EpochLine, Ledger, Score, SideLine
from engram.report import tables
from engram.report.predictions import Predictions, score_subjects

SCORES = (
    Score("network", "valid", "nrmse", 0.9, 1.01, False, 30),
    Score("ridge", "test", "nrmse", 0.95, 1.0, False, 20),
    Score("network", "test", "nrmse", 0.84, 1.0, False, 20),
    Score("network", "test", "pearson_r", float("nan"), 0.0, True, 20),
)
LEDGER = Ledger("demo", "regression", "nrmse", scores=SCORES)


def test_scores_stand_beside_chance_and_baselines() -> None:
    """A row per side and metric, test first, a column per model; what was not scored stays empty."""
    table = tables.tabulate_scores(LEDGER)

    assert table.head == ("side", "metric", "network", "ridge", "chance", "better is", "windows")
    assert table.rows == (
        ("test", "nRMSE", "0.840", "0.950", "1.000", "lower", "20"),
        ("test", "Pearson r", "not defined", "", "0.000", "higher", "20"),
        ("validation", "nRMSE", "0.900", "", "1.010", "lower", "30"),
    )


def test_the_main_score_is_the_test_score_if_there_is_one() -> None:
    """Of the test side before the validation side, the network before baselines."""
    assert [s.value for s in tables.main_scores(LEDGER)] == [0.84, 0.95]
    assert [s.value for s in tables.main_scores(dataclasses.replace(LEDGER, scores=SCORES[:1]))] == [0.9]
    assert tables.main_scores(dataclasses.replace(LEDGER, scores=())) == []


def test_sides_say_whether_people_are_on_two() -> None:
    """What a score means depends on it."""
    ledger = dataclasses.replace(LEDGER, sides=(SideLine("test", 2000, 20, 10),))
    assert tables.tabulate_sides(ledger).rows == (("Test", "2,000", "20", "10"),)
    assert tables.tabulate_sides(ledger).note == "No subject is on two sides."
    within = dataclasses.replace(ledger, within_subject=True)
    assert tables.tabulate_sides(within).note == "The same subjects are on two sides."


def test_refusals_are_counted_with_their_meaning() -> None:
    """A mapping of counts is a table; reasons that are not known here stand without a meaning."""
    data = {
        "store_bytes": 3 << 30,
        "n_windows": 12_345,
        "fingerprints": {"train": "00ff"},
        "refused": {"bad": 17, "strange": 2},
        "unused": {"gap": 0},
    }
    facts, refused, unused = tables.tabulate_data(data)

    assert facts.rows == (("store", "3.0 GiB"), ("windows", "12,345"), ("fingerprints.train", "00ff"))
    assert refused.title == "Windows refused"
    assert refused.rows[0] == ("bad", "overlaps an event whose description starts with BAD or EDGE", "17")
    assert refused.rows[1] == ("strange", "", "2")
    assert (unused.rows, unused.note) == ((), "None.")
    assert tables.tabulate_data({}) == ()


def test_a_window_index_s_reasons_are_all_explained() -> None:
    """Every reason to refuse a window has its meaning on the page."""
    from engram.windows.admission import REASONS

    (table,) = tables.tabulate_data({"refused": dict.fromkeys(REASONS, 1)})
    assert [row[0] for row in table.rows if not row[1]] == []


def test_classes_list_recall_precision_and_the_commonest_mistake() -> None:
    """What does not occur has no recall, what was never predicted no precision."""
    true, guess = np.array([0, 0, 0, 1, 1]), np.array([0, 2, 2, 1, 0])
    zeros = np.zeros(5, np.int64)
    predictions = Predictions("test", np.arange(5), zeros, ("s",), true, guess, 4)
    table = tables.tabulate_classes(predictions, ("a", "b", "c", "d"))

    assert table.rows == (
        ("a", "3", "2", "33.3%", "50.0%", "c"),
        ("b", "2", "1", "50.0%", "100.0%", "a"),
        ("c", "0", "2", "not defined", "0.0%", ""),
        ("d", "0", "0", "not defined", "not defined", ""),
    )


def test_more_subjects_than_a_page_can_hold_are_cut_and_told() -> None:
    """The best stand first, and the note says how many there are."""
    n = 600
    target = np.linspace(-1, 1, n)[:, None]
    names = tuple(f"s{i}" for i in range(n))
    scores = score_subjects(Predictions("test", np.arange(n), np.arange(n), names, target, target * 0, 0))
    table = tables.tabulate_subjects(scores)

    assert len(table.rows) == 500
    assert "The first 500 of 600 subjects" in table.note
    values = [float(row[2]) for row in table.rows]
    assert values == sorted(values)


def test_settings_are_listed_as_a_recipe_has_them() -> None:
    """Tables within tables have dotted names; values stand as they were set."""
    settings = {"training": {"epochs": 1000, "by": None, "metrics": ["nrmse", "é"]}, "seed": 0, "empty": {}}
    assert tables.tabulate_settings(settings).rows == (
        ("training.epochs", "1000"),
        ("training.by", "null"),
        ("training.metrics", '["nrmse", "é"]'),
        ("seed", "0"),
        ("empty", "{}"),
    )


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("limit_bytes", 1 << 30, "1.0 GiB"),
        ("limit_bytes", 2**70, str(2**70)),
        ("took_s", 75.0, "1 min 15 s"),
        ("n_cores", 2, "2"),
        ("shared", True, "true"),
        ("limit_bytes", "inf", "inf"),
        ("limit_bytes", None, "null"),
    ],
)
def test_facts_are_written_in_their_unit(name: str, value: object, text: str) -> None:
    """A name's ending says the unit; what is no number stays what it is."""
    assert tables.tabulate_facts("Machine", {name: value}).rows[0][1] == text


# ---------------------------------------------------------------- several trainings


def trained(name: str, seed: int, value: float) -> Ledger:
    """Make a scored ledger."""
    return Ledger(
        name,
        "regression",
        "nrmse",
        recipe={"training": {"seed": seed, "epochs": 2}},
        scores=(Score("network", "test", "nrmse", value, 1.0, False, 20),),
        epochs=(
            EpochLine(0, 1.0, None, None, 1.0, 100.0, 1e-3),
            EpochLine(1, 1.0, None, None, 1.0, 200.0, 1e-3),
        ),
        best_epoch=1,
        peak_bytes=1 << 30,
        duration_s=75.0,
    )


def test_trainings_of_one_name_are_averaged() -> None:
    """Mean, sample standard deviation and range over seeds; a single training has no spread."""
    table = tables.tabulate_groups([trained("a", 0, 0.8), trained("b", 0, 0.9), trained("a", 1, 0.9)])
    assert table.rows == (
        ("a", "network", "test", "nRMSE", "2", "0.850 ± 0.071", "0.800 to 0.900", "1.000"),
        ("b", "network", "test", "nRMSE", "1", "0.900", "", "1.000"),
    )


def test_equal_scores_have_no_spread() -> None:
    """A ridge that scores alike in every training varies by nothing, not by a rounding."""
    assert tables._mean_and_spread([0.879, 0.879, 0.879]) == "0.879 ± 0.000"


def test_an_undefined_score_makes_the_mean_undefined() -> None:
    """Leaving it out would be choosing the seeds that worked."""
    table = tables.tabulate_groups([trained("a", 0, 0.8), trained("a", 1, float("nan"))])
    assert table.rows[0][5] == "not defined"


def test_trainings_stand_beside_each_other() -> None:
    """A row each, with what it scored and what it took; one without a score says so."""
    unscored = dataclasses.replace(trained("b", 0, 0.9), scores=(), epochs=(), best_epoch=None)
    table = tables.tabulate_trainings([trained("a", 0, 0.8), unscored], ["one", "two"])

    assert table.rows[0] == (
        *("a", "one", "test", "nRMSE", "0.800", "1.000", "2", "2", "1 min 15 s", "1.0 GiB", "150.0"),
    )
    assert table.rows[1][2:8] == ("", "nRMSE", "no score", "", "0", "")


def test_only_settings_that_differ_are_compared() -> None:
    """Equal settings say nothing about why scores differ; one that is not set everywhere does."""
    more = dataclasses.replace(
        trained("a", 1, 0.8), recipe={"training": {"seed": 1, "epochs": 2}, "extra": 5}
    )
    table = tables.tabulate_differences([trained("a", 0, 0.8), more], ["one", "two"])

    assert table is not None
    assert table.head == ("setting", "one", "two")
    assert table.rows == (("training.seed", "0", "1"), ("extra", "", "5"))
    assert tables.tabulate_differences([more, more], ["one", "two"]) is None
