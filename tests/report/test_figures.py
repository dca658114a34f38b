from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from engram.errors import MissingExtra
from engram.ledger import EpochLine, Ledger, MemoryLine
from engram.report import figures
from engram.report.predictions import Predictions, score_subjects

EPOCHS = tuple(EpochLine(e, 1 / (e + 1), 1.1 / (e + 1), 0.9 - 0.1 * e, 1.0, 50.0, 1e-3) for e in range(5))
LEDGER = Ledger(
    "demo",
    "regression",
    "nrmse",
    epochs=EPOCHS,
    memory=tuple(MemoryLine(60.0 * i, i, (300 + i) << 20) for i in range(10)),
    peak_bytes=400 << 20,
    allowed_bytes=800 << 20,
    best_epoch=4,
)


def predicted(n: int, n_subjects: int = 5, n_classes: int = 0) -> Predictions:
    """Make predictions of windows of some subjects."""
    random = np.random.default_rng(0)
    subject = np.arange(n) % n_subjects
    names = tuple(f"s{i}" for i in range(n_subjects))
    if n_classes:
        target, guess = random.integers(0, n_classes, (2, n))
    else:
        target, guess = random.normal(size=(2, n, 1))
    return Predictions("test", np.arange(n), subject, names, target, guess, n_classes)


def texts(drawing: figures.Drawing) -> list[str]:
    """Give every text that a figure shows."""
    return ["".join(element.itertext()).strip() for element in ET.fromstring(drawing.svg).iter("text")]


def every_figure(name: str) -> list[figures.Drawing]:
    """Draw one of each kind."""
    drawn = [
        figures.draw_losses(f"{name}-losses", LEDGER),
        figures.draw_score(f"{name}-score", [LEDGER], ["demo"]),
        figures.draw_predictions(f"{name}-few", predicted(50), 0),
        figures.draw_predictions(f"{name}-many", predicted(5000), 0),
        figures.draw_confusions(f"{name}-confusions", predicted(90, n_classes=3), ["a", "b", "c"]),
        figures.draw_subjects(f"{name}-subjects", score_subjects(predicted(50))),
        figures.draw_subjects(f"{name}-people", score_subjects(predicted(500, 100))),
        figures.draw_memory(f"{name}-memory", LEDGER),
        figures.draw_speed(f"{name}-speed", LEDGER),
    ]
    return [drawing for drawing in drawn if drawing is not None]


def test_figures_share_a_page() -> None:
    """No two figures have an id in common, and every reference is to an id of the same figure."""
    seen: set[str] = set()
    for drawing in every_figure("t1") + every_figure("t2"):
        ids = re.findall(r' id="([^"]+)"', drawing.svg)
        references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', drawing.svg)
        assert not seen & set(ids)
        assert {one or other for one, other in references} <= set(ids)
        seen |= set(ids)


def test_figures_bring_nothing_that_reaches_the_page() -> None:
    """No style sheet, script or reference to elsewhere; size and colours are the page's."""
    for drawing in every_figure("t1"):
        root = ET.fromstring(drawing.svg)
        kinds = {element.tag for element in root.iter()}
        assert kinds <= {"svg", "g", "defs", "path", "use", "text", "clipPath", "rect", "tspan"}
        assert "http" not in drawing.svg
        assert not {"width", "height"} & set(root.attrib)
        assert not re.search(r"[: ]#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", drawing.svg))


def test_figures_can_be_read_aloud() -> None:
    """Each is an image with a description that holds figures; its texts are text."""
    for drawing in every_figure("t1"):
        root = ET.fromstring(drawing.svg)
        assert root.get("role") == "img"
        assert re.search(r"\d", root.get("aria-label", ""))
        assert texts(drawing)
        assert drawing.title
        assert drawing.caption


def test_the_same_figure_is_the_same_bytes() -> None:
    """Neither date nor chance enters: a page can be compared with the one before."""
    assert every_figure("t1") == every_figure("t1")


def test_the_user_keeps_his_own_style() -> None:
    """Settings of Matplotlib are as before, and those of the user do not reach the page."""
    plain = figures.draw_losses("a", LEDGER)
    with mpl.rc_context({"axes.facecolor": "red", "text.usetex": True, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert figures.draw_losses("a", LEDGER) == plain
        assert dict(mpl.rcParams) == before


def test_drawing_leaves_pyplot_alone() -> None:
    """No backend is chosen and no window can open: pyplot is never loaded."""
    code = (
        "import sys; from engram.ledger import EpochLine, Ledger; from engram.report import figures;"
        "epoch = EpochLine(0, 1.0, None, None, 1.0, 1.0, 1e-3);"
        "figures.draw_losses('a', Ledger('a', 'regression', 'nrmse', epochs=(epoch,)));"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Matplotlib the error says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"engram\[report\]"):
        figures.draw_losses("a", LEDGER)


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "$\\frac", "#0072b2", 'a" id="b', "日本", "a\x1b\x00\ud800", ""]
)
def test_names_are_shown_as_they_are(name: str) -> None:
    """A stranger's name is text: no markup, no formula, no colour; what cannot be shown is a mark."""
    drawing = figures.draw_confusions("a", predicted(40, n_classes=2), [name, "other"])
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)

    assert "<script" not in drawing.svg
    assert shown[-9:] in "".join(texts(drawing))


def test_thousands_of_windows_are_counted_not_drawn() -> None:
    """The figure stays small, and the caption tells what was done and how many there are."""
    drawing = figures.draw_predictions("a", predicted(10_000), 0)
    assert len(drawing.svg) < 300_000
    assert "10,000 windows, too many for a point each: counted in hexagons" in drawing.caption


def test_millions_of_windows_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are counted, evenly, and the caption says so."""
    monkeypatch.setattr(figures, "_MOST_COUNTED", 4000)
    drawing = figures.draw_predictions("a", predicted(10_000), 0)
    assert "3,334 windows" in drawing.caption
    assert "one in 3 of 10,000" in drawing.caption


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_are_counted_out(value: float) -> None:
    """What cannot be drawn is left out and told, all of it if need be."""
    some, none = predicted(10), predicted(10)
    some.prediction[:3] = value
    none.prediction[:] = value
    assert "3 windows without a finite value are left out" in figures.draw_predictions("a", some, 0).caption
    assert "10 windows without a finite value are left out" in figures.draw_predictions("a", none, 0).caption


def test_equal_values_can_be_drawn() -> None:
    """A constant target, predicted perfectly, is one point and no error."""
    same = predicted(10)
    same.target[:] = same.prediction[:] = 3.0
    assert "10 windows" in figures.draw_predictions("a", same, 0).caption


def test_a_single_epoch_can_be_drawn() -> None:
    """A curve of one point has a mark, and the axis names the one epoch."""
    one = Ledger("demo", "regression", "nrmse", epochs=EPOCHS[:1], best_epoch=0)
    drawing = figures.draw_losses("a", one)
    assert "1" in texts(drawing)
    assert not [text for text in texts(drawing) if text.startswith("\N{MINUS SIGN}")]


def test_epochs_without_validation_have_no_curve_of_it() -> None:
    """The loss says that there was none; the score has no figure."""
    line = EpochLine(0, 1.0, None, None, 1.0, 1.0, 1e-3)
    ledger = Ledger("demo", "regression", "nrmse", epochs=(line,))
    assert "no validation side" in figures.draw_losses("a", ledger).caption
    assert figures.draw_score("a", [ledger], ["demo"]) is None


def test_losses_that_are_no_numbers_can_be_drawn() -> None:
    """A training that diverged has a page, too."""
    lines = (*EPOCHS, EpochLine(5, float("nan"), float("inf"), float("nan"), 1.0, float("nan"), 1e-3))
    ledger = Ledger("demo", "regression", "nrmse", epochs=lines)
    assert figures.draw_losses("a", ledger).svg
    assert figures.draw_speed("a", ledger).svg


def test_a_far_limit_does_not_flatten_the_memory() -> None:
    """A stop line within reach is drawn; one far above is told in words."""
    far = Ledger("demo", "regression", "nrmse", memory=LEDGER.memory, peak_bytes=1, allowed_bytes=100 << 30)
    assert "stops here" in texts(figures.draw_memory("a", LEDGER))
    drawing = figures.draw_memory("a", far)
    assert "stops here" not in texts(drawing)
    assert "stopped itself at 100 GiB, far above" in drawing.caption


def test_trainings_of_one_name_share_a_colour() -> None:
    """Seeds of one model are one entry of the legend; another name is another."""
    drawing = figures.draw_score("a", [LEDGER, LEDGER, LEDGER], ["net", "net", "other"])
    assert drawing is not None
    assert texts(drawing).count("net") == 1
    assert texts(drawing).count("other") == 1


def test_few_subjects_are_named_many_are_ranked() -> None:
    """Names stand beside the axis as long as they can be read."""
    assert "s4" in texts(figures.draw_subjects("a", score_subjects(predicted(50))))
    ranked = texts(figures.draw_subjects("a", score_subjects(predicted(500, 200))))
    assert "subjects, best first" in ranked
    assert "s4" not in ranked


def test_names_that_begin_alike_are_told_apart() -> None:
    """Long names of classes lose their middle, not the end by which they differ."""
    names = ["instructed_toCloseEyes", "instructed_toOpenEyes"]
    shown = "".join(texts(figures.draw_confusions("a", predicted(40, n_classes=2), names)))
    assert "…CloseEyes" in shown
    assert "…oOpenEyes" in shown
