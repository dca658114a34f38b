"""The page's figures, as SVG that is part of the page.

This module decides how figures look: text stays text (it can be read aloud, selected and found),
colours are custom properties of the page (so that dark mode and print reach them) with hues that
colour-blind people tell apart (Okabe and Ito), and series differ by more than colour. Matplotlib
draws; its global state is left as it was, pyplot is never loaded.

References
----------
Okabe and Ito, Color Universal Design, https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram.errors import MissingExtra
from engram.ledger import EpochLine, Ledger
from engram.report.predictions import Predictions, SubjectScores, count_confusions
from engram.report.words import metric_name, number, shortened
from engram.units import format_bytes, format_duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "MOST_CLASSES",
    "Drawing",
    "draw_confusions",
    "draw_distributions",
    "draw_intervals",
    "draw_losses",
    "draw_memory",
    "draw_predictions",
    "draw_score",
    "draw_speed",
    "draw_subjects",
]

MOST_CLASSES = 30
"""More classes are not drawn as a matrix: its cells would be smaller than letters."""

_MOST_POINTS = 1000  # more hide each other, and make the page large
_MOST_COUNTED = 1_000_000  # more change no hexagon's shade, and counting them takes gigabytes
_N_BINS = 40
_MOST_NAMES = 30  # subjects that fit beside an axis with legible names

# Names of custom properties, and their colours in light mode, by which Matplotlib's output is
# searched. Dark mode's stand in the page's template.
_COLOURS = {
    "ink": "#1b1d21",
    "muted": "#5b6068",
    "grid": "#d5d8dd",
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
    "orange": "#e69f00",
}
_SERIES = ("blue", "vermilion", "green", "purple", "sky", "orange")
_LINES = ("-", "--", "-.", ":")

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9.5,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": _COLOURS["ink"],
    "text.parse_math": False,  # "$" in the name of a class is a dollar sign
    "xtick.color": _COLOURS["muted"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.color": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["ink"],
}
_WIDTH_IN, _HEIGHT_IN = 4.6, 3.1


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure of the page."""

    svg: str
    """An ``svg`` element, safe to stand in HTML."""
    title: str
    """What it shows."""
    caption: str
    """What a reader has to know to read it."""


def draw_losses(name: str, ledger: Ledger) -> Drawing:
    """Draw the loss of every epoch.

    Parameters
    ----------
    name
        Distinguishes this figure from the page's others: letters, digits and hyphens.
    ledger
        What the training left; it has epochs.
    """
    epochs = ledger.epochs
    train, valid = ([getattr(line, f"{side}_loss") for line in epochs] for side in ("train", "valid"))

    def draw(axes: Axes) -> None:
        _plot_epochs(axes, epochs, train, "training", 0)
        if _any(valid):
            _plot_epochs(axes, epochs, valid, "validation", 1)
        _mark_best(axes, ledger)
        axes.set(xlabel="epoch", ylabel="loss")
        axes.legend()

    alt = f"Loss by epoch. {_course('Training', train)} {_course('Validation', valid)}"
    caption = "Mean loss of each epoch, as trained: with dropout, without the penalty on weights."
    if not _any(valid):
        caption += " There was no validation side."
    return _drawing(draw, name=name, title="Loss", alt=alt, caption=caption)


def draw_score(name: str, ledgers: Sequence[Ledger], labels: Sequence[str]) -> Drawing | None:
    """Draw the validation score of every epoch, of one or of several trainings.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    ledgers
        The trainings; all have the same main metric.
    labels
        What to call each; those with the same label share a colour.

    Returns
    -------
    Drawing or None
        None if no training was validated.
    """
    scores = [[line.valid_score for line in ledger.epochs] for ledger in ledgers]
    if not any(map(_any, scores)):
        return None
    metric = metric_name(ledgers[0].main_metric)
    colours = {label: i for i, label in enumerate(dict.fromkeys(labels))}

    def draw(axes: Axes) -> None:
        for ledger, label, values in zip(ledgers, labels, scores, strict=True):
            _plot_epochs(axes, ledger.epochs, values, shortened(label, 28), colours[label])
            _mark_best(axes, ledger, line=len(ledgers) == 1)
        if (chance := _chance(ledgers)) is not None:
            _plot_chance(axes, chance)
        axes.set(xlabel="epoch", ylabel=f"validation {metric}")
        _legend_once(axes)

    courses = (_course(label, values) for label, values in zip(labels, scores, strict=True))
    caption = "On the validation windows, after each epoch."
    if len(ledgers) > 1:
        caption += " A ring marks the epoch whose weights were scored."
    alt = f"Validation {metric} by epoch. {' '.join(courses)}"
    return _drawing(draw, name=name, title=f"Validation {metric}", alt=alt, caption=caption)


def draw_predictions(name: str, predictions: Predictions, output: int) -> Drawing:
    """Draw predicted against true values of one output.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    predictions
        Of a regression.
    output
        Number of the output.
    """
    true, guess = predictions.target[:, output], predictions.prediction[:, output]
    finite = np.isfinite(true) & np.isfinite(guess)
    true, guess = true[finite], guess[finite]
    n_finite, unit = len(true), predictions.unit
    step = -(-n_finite // _MOST_COUNTED) or 1
    true, guess = true[::step], guess[::step]
    n = len(true)

    def draw(axes: Axes) -> None:
        if n:
            low, high = _padded(min(true.min(), guess.min()), max(true.max(), guess.max()))
            if n > _MOST_POINTS:
                _plot_density(axes, true, guess, (low, high))
            else:
                axes.plot(true, guess, "o", ms=4, mew=0, color=_COLOURS["blue"], alpha=0.45)
            axes.plot([low, high], [low, high], "--", lw=1, color=_COLOURS["ink"], label="perfect")
            axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
            axes.legend(loc="upper left")
        axes.set(xlabel="true", ylabel="predicted")

    caption = f"Each point is one of {n:,} {unit}."
    if n > _MOST_POINTS:
        caption = f"{n:,} {unit}, too many for a point each: counted in hexagons. Darker is more."
    if step > 1:
        caption += f" They are one in {step} of {n_finite:,}."
    if n_finite < len(finite):
        caption += f" {len(finite) - n_finite:,} {unit} without a finite value are left out."
    title = "Predicted against true"
    if predictions.target.shape[1] > 1:
        title += f", output {output + 1} of {predictions.target.shape[1]}"
    alt = f"{title}. {caption} {_spread('True', true)} {_spread('Predicted', guess)}"
    return _drawing(draw, name=name, title=title, alt=alt, caption=caption)


def draw_distributions(name: str, predictions: Predictions, output: int) -> Drawing:
    """Draw how often values occur, of what was predicted and of what is true.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    predictions
        Of a regression.
    output
        Number of the output.
    """
    true, guess = predictions.target[:, output], predictions.prediction[:, output]
    edges = np.histogram_bin_edges(np.concatenate([true, guess]), _N_BINS)

    def draw(axes: Axes) -> None:
        shares = [np.histogram(values, edges)[0] / len(values) for values in (true, guess)]
        axes.stairs(shares[0], edges, fill=True, color=_COLOURS["muted"], alpha=0.35, label="true")
        axes.stairs(shares[1], edges, lw=1.6, color=_COLOURS["blue"], label="predicted")
        axes.axvline(true.mean(), ls="--", lw=1, color=_COLOURS["ink"], label="mean of the true")
        axes.set(xlabel="value", ylabel=f"share of {predictions.unit}")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)

    caption = (
        f"{len(true):,} {predictions.unit}. Predictions that differ less than what is true are usual where "
        "much cannot be known; all in one column is a constant."
    )
    alt = f"Distribution. {_spread('True', true)} {_spread('Predicted', guess)}"
    return _drawing(draw, name=name, title="Values, true and predicted", alt=alt, caption=caption)


def draw_intervals(
    name: str, labels: Sequence[str], values: Sequence[float], bounds: Sequence[tuple[float, float] | None]
) -> Drawing:
    """Draw scores below each other with their intervals, beside a chance of one.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    labels
        What was scored.
    values
        nRMSE of each.
    bounds
        95 % interval of each, or None.
    """
    places = np.arange(len(labels))

    def draw(axes: Axes) -> None:
        for place, span in enumerate(bounds):
            if span:
                axes.hlines(place, *span, color=_COLOURS["blue"], lw=1.6, alpha=0.6)
        axes.plot(values, places, "o", ms=6, mew=0, color=_COLOURS["blue"], label="network")
        axes.axvline(1.0, ls=(0, (6, 3)), lw=1.1, color=_COLOURS["muted"], label="chance")
        axes.set_yticks(places, [shortened(label, 28) for label in labels], fontsize=8.5)
        axes.set(xlabel="nRMSE", ylim=(len(labels) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)

    told = (f"{label} {number(value)}" for label, value in zip(labels, values, strict=True))
    alt = f"nRMSE beside chance, which is 1: {', '.join(told)}."
    caption = "Lower is better. A line is the 95 % interval over subjects; there is none below ten of them."
    height_in = max(2.0, 1.0 + 0.24 * len(labels))
    title = "Scores beside chance"
    return _drawing(draw, name=name, title=title, alt=alt, caption=caption, height_in=height_in)


def draw_confusions(name: str, predictions: Predictions, classes: Sequence[str]) -> Drawing:
    """Draw which class was taken for which.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    predictions
        Of a classification with at most ``MOST_CLASSES`` classes.
    classes
        Their names.
    """
    counts = count_confusions(predictions)
    n = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, n, out=np.zeros(counts.shape), where=n > 0)
    names = [shortened(each, 14) for each in classes]

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        for row, column in np.argwhere(counts).tolist():
            _plot_cell(axes, (row, column), shares[row, column], counts[row, column], len(classes))
        size = 9 if len(names) <= 12 else 7
        ticks = range(len(names))
        axes.set_xticks(ticks, names, fontsize=size, rotation=90 if len(names) > 3 else 0)
        axes.set_yticks(ticks, names, fontsize=size)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
        axes.set(xlabel="predicted", ylabel="true")

    diagonal = ", ".join(f"{name} {shares[i, i]:.0%}" for i, name in enumerate(names[:12]) if n[i, 0])
    alt = f"Confusion matrix of {len(names)} classes. Recognised: {diagonal}."
    caption = (
        f"Share of the windows of each true class (row) that were taken for each class, {counts.sum():,} "
        "windows in all. Darker is more."
    )
    height_in = _HEIGHT_IN if len(names) <= 6 else 4.2 if len(names) <= 12 else 5.0
    return _drawing(draw, name=name, title="Confusions", alt=alt, caption=caption, height_in=height_in)


def draw_subjects(name: str, scores: SubjectScores) -> Drawing:
    """Draw the score of every subject beside its chance, best first.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    scores
        Of at least one subject.
    """
    order = scores.best_first()
    value, chance = scores.value[order], scores.chance[order]
    places = np.arange(len(order))
    metric = metric_name(scores.metric)
    upright = len(order) > _MOST_NAMES

    def draw(axes: Axes) -> None:
        if upright:
            axes.vlines(places, value, chance, color=_COLOURS["muted"], lw=0.7, alpha=0.5)
            axes.plot(places, chance, ".", ms=4, color=_COLOURS["muted"], label="chance")
            axes.plot(places, value, "o", ms=3.5, mew=0, color=_COLOURS["blue"], label="network")
            axes.set(xlabel="subjects, best first", ylabel=metric, xticks=[])
        else:
            axes.hlines(places, value, chance, color=_COLOURS["muted"], lw=1, alpha=0.5)
            axes.plot(chance, places, "|", ms=8, mew=1.5, color=_COLOURS["muted"], label="chance")
            axes.plot(value, places, "o", ms=5, mew=0, color=_COLOURS["blue"], label="network")
            axes.set_yticks(places, [shortened(scores.subjects[i], 16) for i in order], fontsize=8)
            axes.set(xlabel=metric, ylim=(len(order) - 0.4, -0.6))
            axes.grid(visible=False, axis="y")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)

    finite = value[np.isfinite(value)]
    best, worst = (finite[0], finite[-1]) if len(finite) else (math.nan, math.nan)
    alt = (
        f"{metric} of {len(order)} subjects, best first, from {number(best)} to {number(worst)}. "
        f"{scores.n_better} are better than chance."
    )
    height_in = _HEIGHT_IN if upright else max(_HEIGHT_IN, 0.9 + 0.17 * len(order))
    title, caption = "Score of each subject", _subject_caption(scores)
    return _drawing(draw, name=name, title=title, alt=alt, caption=caption, height_in=height_in)


def draw_memory(name: str, ledger: Ledger) -> Drawing:
    """Draw memory over time, with the line at which the training would have stopped itself.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    ledger
        What the training left; it has memory lines.
    """
    lines, allowed_bytes = ledger.memory, ledger.allowed_bytes
    most_bytes = max(ledger.peak_bytes, *(max(line.used_bytes, line.device_bytes) for line in lines), 1)
    # A line far above would press the curve flat: it is told in words.
    with_stop = 0 < allowed_bytes <= 4 * most_bytes
    unit, factor = ("GiB", 2**30) if most_bytes >= 2**30 else ("MiB", 2**20)
    clock, second = _clock(max(line.time_s for line in lines))

    def draw(axes: Axes) -> None:
        times = [line.time_s / second for line in lines]
        style: dict[str, Any] = {"marker": "o", "ms": 4} if len(lines) == 1 else {}
        used = [line.used_bytes / factor for line in lines]
        axes.plot(times, used, color=_COLOURS["blue"], label="used", **style)
        if any(line.device_bytes for line in lines):
            device = [line.device_bytes / factor for line in lines]
            axes.plot(times, device, "-.", color=_COLOURS["green"], label="GPU", **style)
        if with_stop:
            axes.axhline(allowed_bytes / factor, ls="--", color=_COLOURS["vermilion"], label="stops here")
        top = max(most_bytes, allowed_bytes if with_stop else 0) / factor
        axes.set(xlabel=f"time ({clock})", ylabel=f"memory ({unit})", ylim=(0, 1.12 * top))
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)

    peak = f"peak {format_bytes(ledger.peak_bytes)}"
    on_device = ", and what is reserved on the GPU" if any(line.device_bytes for line in lines) else ""
    caption = f"What the kernel cannot take back, all processes together{on_device}; {peak}."
    if allowed_bytes:
        caption += f" The training would have stopped itself at {format_bytes(allowed_bytes)}"
        caption += "." if with_stop else ", far above this figure."
    span = format_duration(lines[-1].time_s)
    alt = f"Memory over {span}: from {format_bytes(lines[0].used_bytes)}, {peak}. {caption}"
    return _drawing(draw, name=name, title="Memory", alt=alt, caption=caption)


def draw_speed(name: str, ledger: Ledger) -> Drawing:
    """Draw the windows trained per second, epoch by epoch.

    Parameters
    ----------
    name
        As in ``draw_losses``.
    ledger
        What the training left; it has epochs.
    """
    speeds = [line.windows_per_s for line in ledger.epochs]

    def draw(axes: Axes) -> None:
        _plot_epochs(axes, ledger.epochs, speeds, "", 0)
        top = max((speed for speed in speeds if math.isfinite(speed)), default=0) or 1
        axes.set(xlabel="epoch", ylabel="windows per second", ylim=(0, 1.12 * top))

    caption = f"Training steps only, without validation; {number(ledger.windows_per_s)} windows/s over all."
    alt = f"Windows per second by epoch. {caption}"
    return _drawing(draw, name=name, title="Speed", alt=alt, caption=caption)


# ---------------------------------------------------------------- parts of figures


def _plot_epochs(
    axes: Axes, epochs: Sequence[EpochLine], values: Sequence[float | None], label: str, colour: int
) -> None:
    from matplotlib.ticker import MaxNLocator

    style: dict[str, Any] = {"marker": "o", "ms": 3.5} if len(epochs) <= 30 else {}
    numbers = [line.epoch + 1 for line in epochs]
    axes.plot(
        numbers,
        [math.nan if value is None else value for value in values],
        _LINES[colour % len(_LINES)],
        color=_COLOURS[_SERIES[colour % len(_SERIES)]],
        label=label,
        **style,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(epochs) == 1:
        axes.set_xlim(numbers[0] - 0.9, numbers[0] + 0.9)


def _mark_best(axes: Axes, ledger: Ledger, *, line: bool = True) -> None:
    """Mark the epoch whose weights were scored: with a line, or with a ring on the score."""
    at = next((each for each in ledger.epochs if each.epoch == ledger.best_epoch), None)
    if at is None:
        return
    if line:
        axes.axvline(
            at.epoch + 1, ls=":", lw=1.2, color=_COLOURS["ink"], label=f"best epoch ({at.epoch + 1})"
        )
    elif at.valid_score is not None:
        axes.plot(at.epoch + 1, at.valid_score, "o", ms=9, mew=1.4, mfc="none", color=_COLOURS["ink"])


def _plot_chance(axes: Axes, chance: float) -> None:
    axes.axhline(chance, ls=(0, (6, 3)), lw=1.1, color=_COLOURS["muted"], label="chance")


def _chance(ledgers: Iterable[Ledger]) -> float | None:
    """Give the chance of the validation score, where all trainings agree on it."""
    found = {
        round(score.chance, 3)
        for ledger in ledgers
        for score in ledger.scores
        if score.side == "valid" and score.metric == ledger.main_metric and math.isfinite(score.chance)
    }
    return found.pop() if len(found) == 1 else None


def _plot_density(
    axes: Axes, true: NDArray[np.float64], guess: NDArray[np.float64], span: tuple[float, float]
) -> None:
    """Count windows in hexagons; more windows, less transparent, so that it suits light and dark."""
    from matplotlib.colors import to_rgb

    hexagons = axes.hexbin(true, guess, gridsize=34, extent=(*span, *span), mincnt=1, linewidths=0.1)
    counts = np.asarray(hexagons.get_array(), dtype=np.float64)
    hexagons.set_array(None)
    # Logarithmic, or the crowd at the mean would be all there is to see.
    opacity = 0.15 + 0.85 * np.log1p(counts) / np.log1p(counts.max())
    colours = np.column_stack([np.tile(to_rgb(_COLOURS["blue"]), (len(counts), 1)), opacity])
    hexagons.set(facecolors=colours, edgecolors="none")


def _plot_cell(axes: Axes, cell: tuple[int, int], share: float, count: int, n_classes: int) -> None:
    from matplotlib.patches import Rectangle

    row, column = cell
    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, lw=0, fc=_COLOURS["blue"], alpha=0.04 + 0.56 * share))
    if n_classes <= 12:
        text = f"{share:.0%}\n{count:,}" if n_classes <= 5 else f"{100 * share:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9 if n_classes <= 8 else 7.5)


def _legend_once(axes: Axes) -> None:
    """Show each label once, however many seeds share it."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(list(once.values()), list(once))


def _subject_caption(scores: SubjectScores) -> str:
    if scores.higher_is_better:
        how = "Share of windows recognised, averaged over the classes that a subject has; chance is guessing."
    else:
        how = (
            "RMSE over a subject's windows, divided by the standard deviation of the target over the "
            "windows of all subjects. Chance: the best constant for all of them."
        )
    low, high = int(scores.n_rows.min()), int(scores.n_rows.max())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{how} {each} {scores.unit} per subject."


def _clock(span_s: float) -> tuple[str, float]:
    """Choose the unit of a time axis."""
    if span_s < 180:
        return "s", 1.0
    return ("min", 60.0) if span_s < 3 * 3600 else ("h", 3600.0)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * (high - low) or max(abs(high), 1.0) * 0.04
    return low - margin, high + margin


def _any(values: Iterable[float | None]) -> bool:
    return any(value is not None and math.isfinite(value) for value in values)


def _course(label: str, values: Sequence[float | None]) -> str:
    """Tell a curve in words."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return ""
    return f"{label}: from {number(found[0])} to {number(found[-1])} over {len(values)} epochs."


def _spread(label: str, values: NDArray[np.float64]) -> str:
    if not len(values):
        return ""
    return f"{label}: {number(values.mean())} on average, standard deviation {number(values.std())}."


# ---------------------------------------------------------------- from Matplotlib to the page


def _drawing(
    draw: Callable[[Axes], None],
    *,
    name: str,
    title: str,
    alt: str,
    caption: str,
    height_in: float = _HEIGHT_IN,
) -> Drawing:
    """Draw on fresh axes in the page's style, and make the outcome part of a page."""
    try:
        import matplotlib as mpl
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "report") from error
    # The user's own style file is set aside; hashsalt makes the same figure the same bytes.
    with mpl.style.context(["default", {**_STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        # Matplotlib measures with its own font; the reader's browser has the others.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        draw(figure.subplots())
        svg = _svg_of(figure)
    return Drawing(_part_of_page(svg, name, alt), title, caption)


def _svg_of(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


_PROPERTIES = {colour: f"var(--{name}, {colour})" for name, colour in _COLOURS.items()}
_COLOUR = re.compile("|".join(_COLOURS.values()))
_LINK = "{http://www.w3.org/1999/xlink}href"


def _part_of_page(svg: str, name: str, alt: str) -> str:
    """Turn Matplotlib's document into an element of a page that holds others like it.

    Its style sheet would reach the whole page, its ids would meet those of other figures, and
    its colours and sizes would be fixed.
    """
    root = ET.fromstring(svg)  # noqa: S314 - written by Matplotlib a moment ago, names escaped
    for element in root.iter():
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key: _COLOUR.sub(_property, value) for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if _LINK in attributes:
            attributes["href"] = attributes.pop(_LINK).replace("#", f"#{name}-")
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{name}-")
        element.attrib.clear()
        element.attrib.update(attributes)
    for key in ("width", "height", "version"):
        root.attrib.pop(key)
    root.attrib.update({"role": "img", "aria-label": alt.strip(), "style": "stroke-linejoin: round"})
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _property(colour: re.Match[str]) -> str:
    return _PROPERTIES[colour[0]]
