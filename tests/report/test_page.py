from __future__ import annotations

import dataclasses
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engram.errors import InputError, MissingExtra
from engram.ledger import PREDICTIONS, EpochLine, Ledger, MemoryLine, Score, SideLine
from engram.report.page import write_report

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"' $\\frac{{{ 7*7 }}"

LEDGER = Ledger(
    name="demo",
    task="regression",
    main_metric="nrmse",
    recipe={"training": {"seed": 0}},
    versions={"engram": "0.1"},
    machine={"n_cores": 2},
    data={"store_bytes": 1 << 30, "refused": {"bad": 17}},
    sides=(SideLine("train", 90, 9, 9), SideLine("test", 120, 12, 12)),
    epochs=tuple(EpochLine(e, 1 / (e + 1), 1.0, 0.9, 1.0, 90.0, 1e-3) for e in range(3)),
    memory=(MemoryLine(0.0, 0, 1 << 28), MemoryLine(9.0, 9, 1 << 29)),
    peak_bytes=1 << 29,
    allowed_bytes=1 << 30,
    best_epoch=2,
    n_parameters=1234,
    duration_s=9.0,
    stopped="all 3 epochs done",
    notes=("The ridge was fitted on 90 windows.",),
)


def regression(folder: Path, *, noise: float = 0.8, side: str = "test", **changes: Any) -> Path:
    """Write a training that predicts 120 windows of 12 subjects."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    target = random.normal(size=120)
    prediction = target * 0.3 + noise * random.normal(size=120) * 0.3
    nrmse = float(np.sqrt(np.mean((target - prediction) ** 2)) / target.std())
    columns = {
        "side": [side] * 120,
        "window": range(120),
        "subject": [f"s{i % 12:02}" for i in range(120)],
        "target": target,
        "prediction": prediction,
    }
    pq.write_table(pa.table(columns), folder / PREDICTIONS)
    scores = (
        Score("network", side, "nrmse", nrmse, 1.003, False, 120),
        Score("ridge", side, "nrmse", 0.9, 1.003, False, 120),
    )
    dataclasses.replace(LEDGER, **{"scores": scores, **changes}).write(folder)
    return folder


def classification(folder: Path, classes: tuple[str, ...], **changes: Any) -> Path:
    """Write a training that mostly recognises its classes."""
    folder.mkdir(parents=True, exist_ok=True)
    n = 20 * len(classes)
    true = [classes[i % len(classes)] for i in range(n)]
    guess = [classes[i % 7 % len(classes)] if i % 3 == 0 else true[i] for i in range(n)]
    columns = {
        "side": ["test"] * n,
        "window": range(n),
        "subject": [f"{EVIL}{i % 4}" for i in range(n)],
        "target": true,
        "prediction": guess,
    }
    pq.write_table(pa.table(columns), folder / PREDICTIONS)
    hits = [
        np.mean([g == t for g, t in zip(guess, true, strict=True) if t == each])
        for each in dict.fromkeys(classes)
    ]
    value = float(np.mean(hits))
    scores = (Score("network", "test", "balanced_accuracy", value, 1 / len(classes), True, n),)
    given = {
        "task": "classification",
        "main_metric": "balanced_accuracy",
        "classes": classes,
        "scores": scores,
    }
    dataclasses.replace(LEDGER, **{**given, **changes}).write(folder)
    return folder


class Audit(HTMLParser):
    """Read a page as a browser does, and note what matters."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "action", "data"}:
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(*folders: Path) -> Audit:
    """Write the page of some trainings and audit it."""
    out = folders[0].parent / "report.html"
    assert write_report(folders, out) == out
    page = Audit(out.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.handlers == []
    return page


def test_the_page_begins_with_the_score_beside_chance_and_ridge(tmp_path: Path) -> None:
    """In one sentence, with whom it was found on; then how far it can be trusted."""
    page = report(regression(tmp_path / "one"))
    assert "Test nRMSE 0.770 on 12 unseen subjects; chance 1.003; ridge 0.900." in page.text
    assert "95 % interval over subjects" in page.text
    assert "Better than chance for 12 of 12 subjects" in page.text
    assert "Not better than chance" not in page.text


def test_the_page_tells_what_was_used_refused_and_set(tmp_path: Path) -> None:
    """Sides, refusals with their meaning, settings, versions, notes and how it ended."""
    page = report(regression(tmp_path / "one"))
    for words in (
        "Sides of the split",
        "Windows refused",
        "overlaps an event whose description starts with BAD or EDGE",
        "training.seed",
        "Versions",
        "Ended: all 3 epochs done.",
        "The ridge was fitted on 90 windows.",
        "512 MiB of 1.0 GiB",
    ):
        assert words in page.text
    assert page.tags.count("svg") == 6


def test_the_page_is_complete(tmp_path: Path) -> None:
    """It names no other file or site, and its policy lets a browser load none."""
    out = write_report([regression(tmp_path / "one")], tmp_path / "report.html")
    text = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert str(tmp_path) not in text


def test_a_stranger_s_text_stays_text(tmp_path: Path) -> None:
    """Markup in names of classes, subjects, trainings, settings, reasons and notes is shown, not obeyed."""
    folder = classification(
        tmp_path / "one",
        (EVIL, "b", "c\x00"),
        name=EVIL,
        recipe={EVIL: EVIL},
        data={EVIL: EVIL, "refused": {EVIL: 1}},
        versions={EVIL: EVIL},
        notes=(EVIL, "undecodable \ud800"),
        stopped=EVIL,
        sides=(SideLine(EVIL, 1, 1, 1),),
    )
    page = report(folder)
    assert page.text.count("<script>alert('x')</script>") > 8
    assert "{{ 7*7 }}" in page.text
    assert "49" not in page.text


def test_within_subject_is_told_before_anything_else(tmp_path: Path) -> None:
    """The score says nothing about unseen people: a banner says so, and no interval pretends otherwise."""
    page = report(regression(tmp_path / "one", within_subject=True))
    assert "120 windows of people who were also trained on" in page.text
    assert "says nothing about unseen people" in page.text
    assert "unseen subjects" not in page.text
    assert "interval over subjects" not in page.text


def test_a_score_that_chance_reaches_is_called_so(tmp_path: Path) -> None:
    """A reader need not compare two numbers to see that nothing was learned."""
    page = report(regression(tmp_path / "one", noise=4.0))
    assert "Not better than chance" in page.text


def test_an_interval_that_holds_chance_is_called_so(tmp_path: Path) -> None:
    """A score may be better than chance by luck of the people."""
    folder = regression(tmp_path / "one", noise=2.33)
    assert "Chance lies within this interval" in report(folder).text


def test_a_validation_score_is_called_too_good(tmp_path: Path) -> None:
    """Without a test side the epoch was chosen by the very windows that are scored."""
    page = report(regression(tmp_path / "one", side="valid", sides=(SideLine("valid", 120, 12, 12),)))
    assert "Validation nRMSE 0.770 on 12 unseen subjects" in page.text
    assert "too good by an unknown amount" in page.text


def test_predictions_of_another_training_are_noticed(tmp_path: Path) -> None:
    """Scores are computed anew from the predictions: a copied or altered file does not pass."""
    score = Score("network", "test", "nrmse", 0.5, 1.0, False, 120)
    page = report(regression(tmp_path / "one", scores=(score,)))
    assert "The predictions give 0.770, the ledger says 0.500" in page.text


def test_a_training_that_left_hardly_anything_has_a_page(tmp_path: Path) -> None:
    """No epoch, score, prediction, side, memory or setting: the page says that it was not scored."""
    Ledger("bare", "regression", "nrmse").write(tmp_path)
    page = report(tmp_path)
    assert "Not scored: the training has not come to its end." in page.text
    assert "svg" not in page.tags


def test_one_epoch_without_validation_or_predictions_has_a_page(tmp_path: Path) -> None:
    """Figures of what there is, none of what is not."""
    folder = regression(tmp_path / "one", epochs=(EpochLine(0, 1.0, None, None, 1.0, 90.0, 1e-3),), scores=())
    (folder / PREDICTIONS).unlink()
    page = report(folder)
    assert page.tags.count("svg") == 3
    assert "no validation side" in page.text


def test_an_undefined_score_is_called_so(tmp_path: Path) -> None:
    """NaN is told in words, and not compared with anything."""
    score = Score("network", "test", "nrmse", float("nan"), float("nan"), False, 120)
    page = report(regression(tmp_path / "one", scores=(score,)))
    assert "Test nRMSE not defined on 12 unseen subjects" in page.text
    assert "The nRMSE is not defined on these windows." in page.text
    assert "do not belong together" not in page.text


def test_classes_have_their_confusions_and_their_table(tmp_path: Path) -> None:
    """Balanced accuracy beside its chance, which class was taken for which, and each class's recall."""
    page = report(classification(tmp_path / "one", ("left", "right", "feet")))
    assert "Test balanced accuracy 0.817 on 12 unseen subjects; chance 0.333." in page.text
    assert "With fewer than 10 subjects nothing can be said" in page.text
    assert "Confusions." in page.text
    assert "most often taken for" in page.text


def test_more_classes_than_can_be_drawn_are_listed(tmp_path: Path) -> None:
    """A matrix with illegible letters helps nobody; the table has every class."""
    page = report(classification(tmp_path / "one", tuple(f"word {i}" for i in range(40))))
    assert "Confusions." not in page.text
    assert "word 39" in page.text


def test_many_outputs_are_drawn_in_part(tmp_path: Path) -> None:
    """The first four of a hundred outputs are drawn, and their titles say of how many."""
    folder = regression(tmp_path / "one", scores=())
    values = np.random.default_rng(0).normal(size=(40, 2, 100))
    columns: dict[str, Any] = {"side": ["test"] * 40, "window": range(40), "subject": ["s"] * 40}
    for number in range(100):
        suffix = f"_{number}" if number else ""
        columns[f"target{suffix}"] = values[:, 0, number]
        columns[f"prediction{suffix}"] = values[:, 1, number]
    pq.write_table(pa.table(columns), folder / PREDICTIONS)
    page = report(folder)
    assert "output 4 of 100" in page.text
    assert "output 5 of 100" not in page.text


def test_several_trainings_are_compared_first(tmp_path: Path) -> None:
    """Mean and spread over seeds of one name, each training, what differs; then a section each."""
    folders = [
        regression(tmp_path / f"seed{seed}", noise=0.8 + 0.1 * seed, recipe={"training": {"seed": seed}})
        for seed in range(3)
    ]
    page = report(*folders)
    assert "3 trainings" in page.text
    assert "mean ± SD" in page.text
    assert "Settings that differ" in page.text
    assert "different windows" not in page.text
    assert page.tags.count("section") == 3
    assert "seed2" in page.text


def test_scores_of_different_windows_are_not_compared_in_silence(tmp_path: Path) -> None:
    """Other test windows, another metric, or people on two sides: the page says so."""
    one, other = regression(tmp_path / "one"), regression(tmp_path / "two", within_subject=True)
    table = pq.read_table(other / PREDICTIONS)
    pq.write_table(table.slice(0, 60), other / PREDICTIONS)
    page = report(one, other)
    assert "scored on different windows or targets" in page.text
    assert "Some of the trainings are within subject" in page.text

    page = report(one, classification(tmp_path / "three", ("a", "b")))
    assert "judged by different metrics" in page.text


def test_a_report_is_about_some_training(tmp_path: Path) -> None:
    """No folder, a folder that is none, or one that is named twice is refused."""
    folder = regression(tmp_path / "one")
    with pytest.raises(InputError, match="Name the folder of one"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"holds no ledger\.json"):
        write_report([folder, tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="named twice"):
        write_report([folder, tmp_path / "two" / ".." / "one"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_same_trainings_give_the_same_page(tmp_path: Path) -> None:
    """Neither clock nor chance nor place enters; a page is replaced, its folder made."""
    folder = regression(tmp_path / "one")
    first = write_report([folder], tmp_path / "new" / "folder" / "report.html").read_bytes()
    assert write_report([folder], tmp_path / "new" / "folder" / "report.html").read_bytes() == first
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["report.html"]


def test_the_template_is_packed_with_the_code() -> None:
    """An installed Engram finds it beside the module."""
    assert files("engram.report").joinpath("page.html.j2").is_file()


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Jinja the error says what to install."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"engram\[report\]"):
        write_report([regression(tmp_path / "one")], tmp_path / "report.html")


def test_a_page_needs_no_torch(tmp_path: Path) -> None:
    """Reports are written where trainings are read, not where they were made."""
    folder = regression(tmp_path / "one")
    code = (
        "import sys; from pathlib import Path; from engram.report.page import write_report;"
        f"write_report([Path({str(folder)!r})], Path({str(tmp_path / 'r.html')!r}));"
        "assert not {'torch', 'lightning', 'sklearn', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
